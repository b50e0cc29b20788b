# Builds and runs the consumer in one WAY, in the empty directory WORK:
#   build_tree         find_package in the library's build tree
#   install_prefix     find_package in an install prefix that was moved since
#   add_subdirectory   the library's source inside the consumer's build
#   pkg_config         no CMake: the compiler and pkg-config, in a moved prefix too
cmake_minimum_required(VERSION 3.18)

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}: ${result}")
  endif()
endfunction()

file(REMOVE_RECURSE "${WORK}")
file(MAKE_DIRECTORY "${WORK}")
set(source "${CMAKE_CURRENT_LIST_DIR}")

if(WAY STREQUAL "install_prefix" OR WAY STREQUAL "pkg_config")
  run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/first")
  file(RENAME "${WORK}/first" "${WORK}/prefix")
endif()

if(WAY STREQUAL "pkg_config")
  find_program(pkg_config pkg-config REQUIRED)
  file(GLOB_RECURSE pc "${WORK}/prefix/*/mooncake_efa.pc")
  get_filename_component(pc_dir "${pc}" DIRECTORY)
  set(ENV{PKG_CONFIG_PATH} "${pc_dir}")
  execute_process(COMMAND "${pkg_config}" --cflags --libs mooncake_efa
    OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "pkg-config: ${result}")
  endif()
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run("${CC}" "${source}/consumer.c" -o "${WORK}/consumer_c" ${flags})
  run("${CXX}" "${source}/consumer.cpp" -o "${WORK}/consumer_cxx" ${flags})
  get_filename_component(lib_dir "${pc_dir}" DIRECTORY)
  set(ENV{LD_LIBRARY_PATH} "${lib_dir}")
  set(programs "${WORK}")
else()
  set(options
    -G "${GENERATOR}"
    -D "CMAKE_C_COMPILER=${CC}"
    -D "CMAKE_CXX_COMPILER=${CXX}"
    # Only what this way offers: not a copy that the machine happens to have.
    -D CMAKE_FIND_USE_PACKAGE_REGISTRY=OFF
    -D CMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF)
  if(WAY STREQUAL "build_tree")
    list(APPEND options -D "CMAKE_PREFIX_PATH=${BUILD}")
  elseif(WAY STREQUAL "install_prefix")
    list(APPEND options -D "CMAKE_PREFIX_PATH=${WORK}/prefix")
  elseif(WAY STREQUAL "add_subdirectory")
    list(APPEND options -D "MOONCAKE_EFA_SOURCE=${ROOT}"
      # The same packages and directory as outside, so that Cargo finds everything built.
      -D "MOONCAKE_EFA_TARGET_DIR=${TARGET_DIR}" -D "MOONCAKE_EFA_BUILD_CLI=${CLI}")
  else()
    message(FATAL_ERROR "no way '${WAY}'")
  endif()
  run("${CMAKE_COMMAND}" -S "${source}" -B "${WORK}/build" ${options})
  run("${CMAKE_COMMAND}" --build "${WORK}/build")
  set(programs "${WORK}/build")
endif()

run("${programs}/consumer_c")
run("${programs}/consumer_cxx")
