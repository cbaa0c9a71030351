// Errors: one clear line that says what is wrong, where, and what to do about it.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

// Everything that a user can cause (a bad file, an impossible option, too little memory) throws Error; main() prints
// its one line and exits with 1. Nothing is written before the checks that can throw.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// fail("shard ", path, ": truncated at byte ", n): joins its arguments as a stream would and throws Error.
template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream line;
  (line << ... << args);
  throw Error(line.str());
}
