# Configures stand-ins for Mooncake, in the empty directory WORK, that cmake/MooncakeEfaDropIn.cmake must
# refuse, each with the sentence that belongs to it; and one that it must take. Nothing is built.
cmake_minimum_required(VERSION 3.19)
file(REMOVE_RECURSE "${WORK}")
set(drop_in "${CMAKE_CURRENT_LIST_DIR}/../../cmake/MooncakeEfaDropIn.cmake")
set(include mooncake-transfer-engine/include)

# What Mooncake's own lists do, as far as the drop-in sees it.
set(whole [[
option(USE_EFA "" OFF)
if(USE_EFA)
  add_library(efa_transport OBJECT cxx.cpp)
endif()
add_library(transfer_engine cxx.cpp)
add_executable(program cxx.cpp)
target_link_libraries(program transfer_engine)
]])

# NAME, what CMakeLists.txt says after project(), then arguments of cmake.
function(configure name lists)
  set(source "${WORK}/${name}")
  file(WRITE "${source}/CMakeLists.txt" "cmake_minimum_required(VERSION 3.16)\nproject(mooncake C CXX)\n${lists}")
  file(WRITE "${source}/cxx.cpp" "int main() {}\n")
  if(NOT name STREQUAL "no_header")
    file(WRITE "${source}/${include}/transport/efa_transport/efa_transport.h" "class EfaTransport; // one\n")
  endif()
  file(WRITE "${source}/${include}/transport/transport.h" "")
  file(WRITE "${source}/${include}/transfer_metadata.h" "")
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -S "${source}" -B "${source}/build" -G "${GENERATOR}"
      -D "CMAKE_C_COMPILER=${CC}" -D "CMAKE_CXX_COMPILER=${CXX}" -D CMAKE_EXPORT_COMPILE_COMMANDS=ON
      -D "CMAKE_PROJECT_mooncake_INCLUDE=${drop_in}" -D "MOONCAKE_EFA_TARGET_DIR=${TARGET_DIR}" ${ARGN}
    OUTPUT_VARIABLE out ERROR_VARIABLE out RESULT_VARIABLE result)
  # CMake breaks lines where it likes.
  string(REGEX REPLACE "[ \n]+" " " out "${out}")
  set(out "${out}" PARENT_SCOPE)
  set(result "${result}" PARENT_SCOPE)
endfunction()

function(refuses name sentence lists)
  configure(${name} "${lists}" ${ARGN})
  if(result EQUAL 0)
    message(SEND_ERROR "${name}: was not refused\n${out}")
  elseif(NOT out MATCHES "mooncake-efa: ${sentence}")
    message(SEND_ERROR "${name}: was refused without '${sentence}'\n${out}")
  else()
    message(STATUS "${name}: ${CMAKE_MATCH_0}")
  endif()
endfunction()

set(try -D USE_EFA=ON -D MOONCAKE_EFA_ALLOW_UNKNOWN=ON)
set(efa_transport "add_library(efa_transport OBJECT cxx.cpp)\n")

refuses(efa_off "USE_EFA is off" "${whole}")
refuses(no_header "this Mooncake has no [^ ]*/efa_transport.h" "${whole}" -D USE_EFA=ON)
refuses(unknown_header "the transport headers of this Mooncake .[0-9a-f]+. are not among those" "${whole}" -D USE_EFA=ON)
refuses(no_engine "this Mooncake has no target transfer_engine" "${efa_transport}" ${try})
refuses(no_transport "this Mooncake has no target efa_transport" "add_library(transfer_engine cxx.cpp)" ${try})
refuses(other_kind "target efa_transport is a STATIC_LIBRARY"
  "add_library(efa_transport STATIC cxx.cpp)\nadd_library(transfer_engine cxx.cpp)\n" ${try})
refuses(old_standard "Mooncake is to be compiled as C[+][+]14" "${whole}" ${try} -D CMAKE_CXX_STANDARD=14)
set(abi "Mooncake is to be compiled with the old strings of libstdc")
refuses(old_strings_flag "${abi}" "${whole}" ${try} -D CMAKE_CXX_FLAGS=-D_GLIBCXX_USE_CXX11_ABI=0)
refuses(old_strings_definition "${abi}" "add_compile_definitions(_GLIBCXX_USE_CXX11_ABI=0)\n${whole}" ${try})

# Taken: the transport's sources are ours, nothing of the stand-in's is.
configure(taken "${whole}" ${try})
file(READ "${WORK}/taken/build/compile_commands.json" commands)
if(NOT result EQUAL 0 OR NOT out MATCHES "in place of Mooncake's EfaTransport")
  message(SEND_ERROR "taken: was refused\n${out}")
elseif(NOT commands MATCHES "efa_transport.dir[^\n]*adapter/dropin.cpp" OR commands MATCHES "efa_transport.dir/cxx")
  message(SEND_ERROR "taken: the sources of efa_transport are not ours\n${commands}")
endif()

# A changed comment is not another header, a changed declaration is.
set(first "${out}")
set(header "${WORK}/taken/${include}/transport/efa_transport/efa_transport.h")
foreach(change "class EfaTransport; /* two\n **/" "class EfaTransport2;")
  file(WRITE "${header}" "${change}\n")
  execute_process(COMMAND "${CMAKE_COMMAND}" "${WORK}/taken/build" OUTPUT_VARIABLE again ERROR_VARIABLE again)
  string(REGEX MATCH "transport headers ([0-9a-f]+)" _ "${again}")
  list(APPEND prints "${CMAKE_MATCH_1}")
endforeach()
string(REGEX MATCH "transport headers ([0-9a-f]+)" _ "${first}")
list(GET prints 0 comment)
list(GET prints 1 declaration)
if(NOT comment STREQUAL CMAKE_MATCH_1 OR declaration STREQUAL CMAKE_MATCH_1 OR comment STREQUAL "")
  message(SEND_ERROR "fingerprints: ${CMAKE_MATCH_1}, with another comment ${comment}, another class ${declaration}")
endif()
