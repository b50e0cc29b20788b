# Builds this transport into Mooncake, in place of its C++ EfaTransport and without an edit of its tree:
#
#   cmake .. -DUSE_EFA=ON -DCMAKE_PROJECT_mooncake_INCLUDE=<here>/cmake/MooncakeEfaDropIn.cmake
#
# An installed library is taken where MooncakeEfa_DIR or CMAKE_PREFIX_PATH leads to one; otherwise Cargo
# builds it. MOONCAKE_EFA_ALLOW_UNKNOWN=ON tries a Mooncake whose headers are not the ones known here.

# Of Mooncake's headers that the adapter is written against, without comments and blanks: transport.h,
# transfer_metadata.h and efa_transport.h of main at 3b5a594 (2026-08-22).
set(MOONCAKE_EFA_KNOWN_HEADERS 4b2c11d8e3964b26e74a1b2584f63d8ac063402f812c349d53a3c949e27e11fe)

option(MOONCAKE_EFA_ALLOW_UNKNOWN "Build against a Mooncake whose headers are not known" OFF)
get_filename_component(MOONCAKE_EFA_ROOT "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)

function(mooncake_efa_stop why)
  message(FATAL_ERROR "mooncake-efa: ${why}")
endfunction()

# One hash for the declarations in the headers, so that a changed comment does not matter.
function(mooncake_efa_hash_headers dir out)
  set(text "")
  foreach(header transport/transport.h transfer_metadata.h transport/efa_transport/efa_transport.h)
    if(NOT EXISTS "${dir}/${header}")
      mooncake_efa_stop("this Mooncake has no ${dir}/${header}; its EFA transport is not one that can be replaced.")
    endif()
    file(READ "${dir}/${header}" one)
    string(REGEX REPLACE "//[^\n]*" "" one "${one}")
    string(REGEX REPLACE "[ \t\r\n]+" "" one "${one}")
    string(APPEND text "${one}")
  endforeach()
  string(SHA256 hash "${text}")
  set(${out} "${hash}" PARENT_SCOPE)
endfunction()

if(NOT USE_EFA)
  mooncake_efa_stop("USE_EFA is off, so there is no EFA transport to replace; add -DUSE_EFA=ON.")
endif()
mooncake_efa_hash_headers("${CMAKE_SOURCE_DIR}/mooncake-transfer-engine/include" mooncake_efa_hash)
if(NOT mooncake_efa_hash IN_LIST MOONCAKE_EFA_KNOWN_HEADERS)
  if(NOT MOONCAKE_EFA_ALLOW_UNKNOWN)
    mooncake_efa_stop("the transport headers of this Mooncake are not known here (${mooncake_efa_hash}); take a version that docs/mooncake.md lists, or try it with -DMOONCAKE_EFA_ALLOW_UNKNOWN=ON.")
  endif()
  message(WARNING "mooncake-efa: unknown transport headers (${mooncake_efa_hash}), used as asked")
endif()
# The adapter hands std::string to Mooncake: both sides must mean the same by it.
if("${CMAKE_CXX_FLAGS}" MATCHES "_GLIBCXX_USE_CXX11_ABI=0")
  mooncake_efa_stop("Mooncake is built with _GLIBCXX_USE_CXX11_ABI=0, whose strings are not those of mooncake-efa; leave it out.")
endif()

find_package(MooncakeEfa CONFIG QUIET)
if(MooncakeEfa_FOUND)
  message(STATUS "mooncake-efa: installed library ${MooncakeEfa_VERSION}")
else()
  foreach(part TESTS CLI SWAP)
    set(MOONCAKE_EFA_BUILD_${part} OFF CACHE BOOL "" FORCE)
  endforeach()
  set(MOONCAKE_EFA_INSTALL ON CACHE BOOL "" FORCE)
  add_subdirectory("${MOONCAKE_EFA_ROOT}" "${CMAKE_BINARY_DIR}/mooncake-efa")
  message(STATUS "mooncake-efa: library built from ${MOONCAKE_EFA_ROOT}")
endif()

# Runs when Mooncake's own lists have been read, so that its targets are there.
function(mooncake_efa_drop_in)
  foreach(target efa_transport transfer_engine)
    if(NOT TARGET ${target})
      mooncake_efa_stop("this Mooncake has no target ${target}; it is not one that is known here.")
    endif()
  endforeach()
  get_target_property(kind efa_transport TYPE)
  if(NOT kind STREQUAL "OBJECT_LIBRARY")
    mooncake_efa_stop("target efa_transport is a ${kind}, not the OBJECT_LIBRARY that is known here.")
  endif()
  set_property(TARGET efa_transport PROPERTY SOURCES
    "${MOONCAKE_EFA_ROOT}/adapter/dropin.cpp" "${MOONCAKE_EFA_ROOT}/adapter/adapter.cpp")
  target_include_directories(efa_transport PRIVATE "${MOONCAKE_EFA_ROOT}/adapter")
  target_link_libraries(efa_transport PRIVATE MooncakeEfa::mooncake_efa)
  # An object library hands its libraries to nobody: whoever has its objects links ours.
  target_link_libraries(transfer_engine PUBLIC MooncakeEfa::mooncake_efa)
  message(STATUS "mooncake-efa: takes the place of Mooncake's EfaTransport")
endfunction()

cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL mooncake_efa_drop_in)
