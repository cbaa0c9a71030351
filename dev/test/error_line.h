// What a test asks of an error: that it is an Error with one line, so that it can be compared.
#pragma once
#include <gtest/gtest.h>

#include <string>

#include "llmc/error.h"

// The line of the Error that `call` throws, or "" where it throws none (which no expectation on its text survives).
template <class Call>
std::string error_line(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    std::string line = error.what();
    EXPECT_FALSE(line.empty());
    EXPECT_EQ(line.find('\n'), std::string::npos) << line;
    EXPECT_LT(line.size(), 1000u) << line;
    return line;
  }
  return "";
}

// EXPECT that the call is refused with a line that holds every one of the given texts.
template <class Call, class... Texts>
void expect_refused(const Call& call, const Texts&... texts) {
  const std::string line = error_line(call);
  EXPECT_FALSE(line.empty()) << "not refused";
  for (const std::string& text : {std::string(texts)...}) {
    EXPECT_NE(line.find(text), std::string::npos) << "'" << text << "' is not in: " << line;
  }
}
