// What a run says on standard output, to people. A reader that stops reading (a stopped terminal, a paused pager, mpirun
// once it was told to end) must not hold up a run that others wait for, so lines that nobody takes within a second are
// dropped, and counted; the logs of llmc/logger.h have everything.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

class Console {
 public:
  // Writes to file descriptor fd, after what stdio holds for standard output. terminal: progress() rewrites one line
  // instead of adding lines.
  Console(int fd, bool terminal);
  bool terminal() const { return terminal_; }

  // A line, without its end, as of std::printf; on a terminal it takes the place of the progress shown.
  [[gnu::format(printf, 2, 3)]] void line(const char* format, ...);
  // The newest progress: on a terminal the last line, written over; elsewhere a line like any other.
  void progress(std::string_view text);
  int64_t lost() const { return lost_; }  // lines dropped since one was last taken

 private:
  void put(std::string text);
  int fd_;
  bool terminal_;
  int64_t lost_ = 0;
};
