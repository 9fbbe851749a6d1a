// Errors of emulated kernels: exceptions that say which kernel, block, thread and source line did
// what.
#pragma once

#include <stdexcept>
#include <string>

namespace emulator {

// A place in a kernel's source. As a default argument, Site::here() is the place of the call.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  friend bool operator==(const Site& a, const Site& b) {
    return a.line == b.line && a.file == b.file;
  }
};

std::string to_text(Site site);  // "rms_norm.cu:57"

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws an Error that starts with the CUDA thread that is running and ends with `problem`.
[[noreturn]] void fail(Site site, const std::string& problem);

}  // namespace emulator
