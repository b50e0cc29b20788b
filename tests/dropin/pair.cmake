# Adds the program `mooncake_efa_pair` to Mooncake's build: -DCMAKE_PROJECT_INCLUDE=<here>/pair.cmake, with
# the drop-in beside it or without.
if(PROJECT_NAME STREQUAL "mooncake")
  set(mooncake_efa_pair "${CMAKE_CURRENT_LIST_DIR}/pair.cpp")
  function(mooncake_efa_add_pair)
    add_executable(mooncake_efa_pair "${mooncake_efa_pair}")
    target_link_libraries(mooncake_efa_pair PRIVATE transfer_engine)
  endfunction()
  cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL mooncake_efa_add_pair)
endif()
