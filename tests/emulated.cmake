# What the modules of tests/emulator and tests/amx are built with.
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
include(${CMAKE_CURRENT_LIST_DIR}/../csrc/sources.cmake)

option(EMULATOR_SANITIZE "With AddressSanitizer, which then has to be preloaded into Python" OFF)
set(sanitize "")  # for the sources that it is to watch
if(EMULATOR_SANITIZE)
  set(sanitize -fsanitize=address -fno-omit-frame-pointer -g1 -O1)
  add_link_options(-fsanitize=address)
endif()

find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
find_package(pybind11 CONFIG REQUIRED)
find_package(Threads REQUIRED)
