#include "llmc/console.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <string>

namespace {

struct Pipe {
  int ends[2];
  Pipe() { EXPECT_EQ(pipe(ends), 0); }
  ~Pipe() { close(ends[0]), close(ends[1]); }
  // What is in it; nothing may be.
  std::string taken() {
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    std::string all, part(1 << 16, '\0');
    for (ssize_t n; (n = read(ends[0], part.data(), part.size())) > 0;) all.append(part, 0, size_t(n));
    return all;
  }
};

TEST(Console, Lines) {
  Pipe pipe;
  Console console(pipe.ends[1], false);
  console.line("step %d of %s", 3, "ten");
  console.progress("100 % done");
  EXPECT_EQ(pipe.taken(), "step 3 of ten\n100 % done\n");
}

TEST(Console, ATerminalHasOneLineOfProgress) {
  Pipe pipe;
  Console console(pipe.ends[1], true);
  console.progress("1");
  console.progress("2");
  console.line("saved");
  EXPECT_EQ(pipe.taken(), "\r\033[K1\r\033[K2\r\033[Ksaved\n");
}

TEST(Console, ATextLongerThanAPipeTakesAtOnce) {
  Pipe pipe;
  Console console(pipe.ends[1], false);
  const std::string text(40000, 'x');
  console.line("%s", text.c_str());
  EXPECT_EQ(pipe.taken(), text + "\n");
}

// A write that waited for its reader would never return here.
TEST(Console, NobodyReads) {
  Pipe pipe;
  Console console(pipe.ends[1], false);
  const std::string text(999, 'x');
  auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 500; ++i) console.line("%s", text.c_str());
  EXPECT_GT(console.lost(), 400);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20)) << "every line waited";
  const int64_t lost = console.lost();
  std::string expected;
  for (int64_t i = 0; i < 500 - lost; ++i) expected += text + "\n";
  EXPECT_EQ(pipe.taken(), expected);
  console.line("read again");
  EXPECT_EQ(console.lost(), 0);
  EXPECT_EQ(pipe.taken(), "[" + std::to_string(lost) + " lines that nobody read]\nread again\n");
}

TEST(Console, TheReaderIsGone) {
  Pipe pipe;
  signal(SIGPIPE, SIG_IGN);
  close(pipe.ends[0]);
  Console console(pipe.ends[1], false);
  console.line("to nobody");
  EXPECT_EQ(console.lost(), 0);
}

}  // namespace
