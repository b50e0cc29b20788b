# Builds this transport into Mooncake, in place of its C++ EfaTransport and without an edit of its tree:
#
#   cmake .. -DUSE_EFA=ON -DCMAKE_PROJECT_mooncake_INCLUDE=<here>/cmake/MooncakeEfaDropIn.cmake
#
# Cargo builds the library, unless MooncakeEfa_DIR or CMAKE_PREFIX_PATH leads to an installed one.
# docs/mooncake.md says more. What is not as it should be ends the configuration with one sentence.

option(MOONCAKE_EFA_ALLOW_UNKNOWN "Try a Mooncake whose transport headers are not known" OFF)

# Fingerprints of Mooncake's headers that the adapter was built and tested with.
set(mooncake_efa_known
  23be59e4f3fffb28 # main at 3b5a594 (2026-08-22)
  95b469b53a128b89 # v0.3.12, v0.3.12.post1
)

set(mooncake_efa_root "${CMAKE_CURRENT_LIST_DIR}/..")
get_filename_component(mooncake_efa_root "${mooncake_efa_root}" ABSOLUTE)

function(mooncake_efa_stop why)
  message(FATAL_ERROR "mooncake-efa: ${why}")
endfunction()

# One fingerprint of the three headers, without comments and blanks; and what of the transport came later
# than the oldest known one.
function(mooncake_efa_fingerprint out)
  set(dir "${CMAKE_SOURCE_DIR}/mooncake-transfer-engine/include")
  set(text "")
  foreach(header transport/efa_transport/efa_transport.h transport/transport.h transfer_metadata.h)
    if(NOT EXISTS "${dir}/${header}")
      mooncake_efa_stop("this Mooncake has no mooncake-transfer-engine/include/${header}, so there is no EFA transport that could be replaced.")
    endif()
    file(READ "${dir}/${header}" one)
    string(REGEX REPLACE "//[^\n]*" "" one "${one}")
    string(REGEX REPLACE "/\\*([^*]|\\*+[^*/])*\\*+/" "" one "${one}")
    string(REGEX REPLACE "[ \t\r\n]+" "" one "${one}")
    string(APPEND text "${one}")
  endforeach()
  if(text MATCHES "buildLocalNicMap")
    set(mooncake_efa_definitions MOONCAKE_EFA_LOCAL_NIC_MAP PARENT_SCOPE)
  endif()
  string(SHA256 text "${text}")
  string(SUBSTRING "${text}" 0 16 text)
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

# ---- before anything is built

if(CMAKE_VERSION VERSION_LESS 3.19)
  mooncake_efa_stop("CMake ${CMAKE_VERSION} is too old, 3.19 is needed.")
endif()
# Mooncake's own option comes later, and is off unless it is set here.
if(NOT USE_EFA)
  mooncake_efa_stop("USE_EFA is off, so Mooncake would have no EFA transport; add -DUSE_EFA=ON.")
endif()
mooncake_efa_fingerprint(mooncake_efa_found)
if(NOT mooncake_efa_found IN_LIST mooncake_efa_known)
  if(NOT MOONCAKE_EFA_ALLOW_UNKNOWN)
    mooncake_efa_stop("the transport headers of this Mooncake (${mooncake_efa_found}) are not among those it was tested with; take a version that docs/mooncake.md names, or try with -DMOONCAKE_EFA_ALLOW_UNKNOWN=ON.")
  endif()
  message(WARNING "mooncake-efa: transport headers ${mooncake_efa_found} are unknown, and are used as you asked")
endif()

# ---- the library

# An installed one only if somebody leads there: this file's own sources are what it goes with.
if(NOT MooncakeEfa_DIR)
  find_package(MooncakeEfa CONFIG QUIET NO_CMAKE_SYSTEM_PATH NO_SYSTEM_ENVIRONMENT_PATH NO_CMAKE_PACKAGE_REGISTRY
    NO_CMAKE_SYSTEM_PACKAGE_REGISTRY)
else()
  find_package(MooncakeEfa CONFIG REQUIRED)
endif()
if(MooncakeEfa_FOUND)
  message(STATUS "mooncake-efa: installed library ${MooncakeEfa_VERSION} (${MooncakeEfa_DIR})")
else()
  unset(MooncakeEfa_DIR CACHE)
  foreach(part TESTS CLI SWAP)
    set(MOONCAKE_EFA_BUILD_${part} OFF CACHE BOOL "")
  endforeach()
  set(MOONCAKE_EFA_INSTALL OFF CACHE BOOL "")
  add_subdirectory("${mooncake_efa_root}" "${CMAKE_BINARY_DIR}/mooncake-efa")
  message(STATUS "mooncake-efa: library built by Cargo from ${mooncake_efa_root}")
endif()

# ---- when all of Mooncake's lists have been read

# All programs and libraries below a directory.
function(mooncake_efa_binaries dir out)
  get_property(targets DIRECTORY "${dir}" PROPERTY BUILDSYSTEM_TARGETS)
  set(all "")
  foreach(target IN LISTS targets)
    get_target_property(type ${target} TYPE)
    if(type MATCHES "^(EXECUTABLE|SHARED_LIBRARY|MODULE_LIBRARY)$")
      list(APPEND all ${target})
    endif()
  endforeach()
  get_property(below DIRECTORY "${dir}" PROPERTY SUBDIRECTORIES)
  foreach(one IN LISTS below)
    mooncake_efa_binaries("${one}" more)
    list(APPEND all ${more})
  endforeach()
  set(${out} "${all}" PARENT_SCOPE)
endfunction()

# With the flags that the transport will be compiled with, as far as they matter.
function(mooncake_efa_check_compiler)
  get_target_property(standard efa_transport CXX_STANDARD)
  if(standard MATCHES "^(98|11|14)$")
    mooncake_efa_stop("Mooncake is to be compiled as C++${standard}, and C++17 is needed.")
  endif()
  get_target_property(dir efa_transport SOURCE_DIR)
  get_property(values DIRECTORY "${dir}" PROPERTY COMPILE_DEFINITIONS)
  foreach(property COMPILE_DEFINITIONS COMPILE_OPTIONS)
    get_target_property(more efa_transport ${property})
    list(APPEND values ${more})
  endforeach()
  list(FILTER values INCLUDE REGEX "^(-D)?_GLIBCXX_USE_CXX11_ABI=")
  list(TRANSFORM values REPLACE "^-D" "")
  list(TRANSFORM values PREPEND "-D")
  set(source "${CMAKE_BINARY_DIR}/CMakeFiles/mooncake_efa_abi.cpp")
  file(WRITE "${source}" "#include <string>\n#if defined(__GLIBCXX__) && !_GLIBCXX_USE_CXX11_ABI\n#error old\n#endif\n")
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  try_compile(MOONCAKE_EFA_ABI_OK "${CMAKE_BINARY_DIR}/CMakeFiles" "${source}"
    COMPILE_DEFINITIONS ${values})
  set(ok "${MOONCAKE_EFA_ABI_OK}")
  unset(MOONCAKE_EFA_ABI_OK CACHE)
  if(NOT ok)
    mooncake_efa_stop("Mooncake is to be compiled with the old strings of libstdc++ (_GLIBCXX_USE_CXX11_ABI=0), with which it was never tested; compile it with the new ones.")
  endif()
endfunction()

# So that what Mooncake installs finds the library.
function(mooncake_efa_install)
  get_target_property(library MooncakeEfa::mooncake_efa IMPORTED_LOCATION)
  get_target_property(soname MooncakeEfa::mooncake_efa IMPORTED_SONAME)
  get_filename_component(lib_dir "${library}" DIRECTORY)
  mooncake_efa_binaries("${CMAKE_SOURCE_DIR}" binaries)
  if(MooncakeEfa_FOUND)
    # Where it is already.
    foreach(target IN LISTS binaries)
      set_property(TARGET ${target} APPEND PROPERTY INSTALL_RPATH "${lib_dir}")
    endforeach()
    return()
  endif()
  foreach(target IN LISTS binaries)
    get_target_property(type ${target} TYPE)
    set_property(TARGET ${target} APPEND PROPERTY INSTALL_RPATH "$ORIGIN")
    if(type STREQUAL "EXECUTABLE")
      set_property(TARGET ${target} APPEND PROPERTY INSTALL_RPATH "$ORIGIN/../lib")
    endif()
  endforeach()
  install(PROGRAMS "${library}" DESTINATION lib)
  install(FILES "${lib_dir}/${soname}" DESTINATION lib)
  # Mooncake's Python module looks beside itself.
  if(TARGET engine)
    get_target_property(dir engine SOURCE_DIR)
    get_directory_property(python DIRECTORY "${dir}" DEFINITION MOONCAKE_PYTHON_INSTALL_DIR)
  endif()
  if(python)
    install(PROGRAMS "${library}" DESTINATION "${python}" COMPONENT python RENAME "${soname}")
  endif()
endfunction()

function(mooncake_efa_drop_in)
  foreach(target efa_transport transfer_engine)
    if(NOT TARGET ${target})
      mooncake_efa_stop("this Mooncake has no target ${target} (WITH_TE off, or a Mooncake built otherwise than the known ones).")
    endif()
  endforeach()
  get_target_property(type efa_transport TYPE)
  if(NOT type STREQUAL "OBJECT_LIBRARY")
    mooncake_efa_stop("target efa_transport is a ${type} and not the OBJECT_LIBRARY of the known Mooncakes.")
  endif()
  mooncake_efa_check_compiler()

  set_property(TARGET efa_transport PROPERTY SOURCES
    "${mooncake_efa_root}/adapter/dropin.cpp" "${mooncake_efa_root}/adapter/adapter.cpp")
  target_include_directories(efa_transport PRIVATE "${mooncake_efa_root}/adapter")
  target_compile_definitions(efa_transport PRIVATE ${mooncake_efa_definitions})
  target_link_libraries(efa_transport PRIVATE MooncakeEfa::mooncake_efa)
  # The objects end up in transfer_engine, and with it in all that link it.
  target_link_libraries(transfer_engine PUBLIC MooncakeEfa::mooncake_efa)
  mooncake_efa_install()
  message(STATUS "mooncake-efa: in place of Mooncake's EfaTransport")
endfunction()

cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL mooncake_efa_drop_in)
