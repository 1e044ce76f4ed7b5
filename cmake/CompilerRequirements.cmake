# Stops with a plain message where the compiler cannot build this project.

set(compiler_needed "x_rope_cls needs GCC 12 or newer or Clang 15 or newer, with C++20")
set(compiler_found "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} (${CMAKE_CXX_COMPILER})")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(compiler_oldest 12)
elseif(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  set(compiler_oldest 15)
else()
  set(compiler_oldest 0)
endif()
if(compiler_oldest EQUAL 0 OR CMAKE_CXX_COMPILER_VERSION VERSION_LESS compiler_oldest
   OR NOT "cxx_std_20" IN_LIST CMAKE_CXX_COMPILE_FEATURES)
  message(FATAL_ERROR "${compiler_needed}, got ${compiler_found}. Set CXX to another compiler.")
endif()
