#include "llmc/console.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>

namespace {

constexpr int kPatience = 1000;  // milliseconds that one line may wait for its reader

bool writable(int fd, int milliseconds) {
  pollfd p{fd, POLLOUT, 0};
  int found;
  while ((found = poll(&p, 1, milliseconds)) < 0 && errno == EINTR) {}
  return found > 0;
}

}  // namespace

Console::Console(int fd, bool terminal) : fd_(fd), terminal_(terminal) { std::fflush(stdout); }

void Console::put(std::string text) {
  if (!writable(fd_, lost_ ? 0 : kPatience)) {
    ++lost_;
    return;
  }
  if (lost_) text = (terminal_ ? "\r\033[K" : "") + ("[" + std::to_string(lost_) + " lines that nobody read]\n") + text;
  lost_ = 0;
  // A pipe that is writable takes PIPE_BUF bytes at once, and never fewer.
  for (size_t at = 0; at < text.size();) {
    if (at > 0 && !writable(fd_, kPatience)) {
      ++lost_;
      return;
    }
    const ssize_t n = write(fd_, text.data() + at, std::min(text.size() - at, size_t(PIPE_BUF)));
    if (n < 0 && errno != EINTR) return;  // closed, or a full disk: the logs tell
    at += size_t(std::max<ssize_t>(n, 0));
  }
}

void Console::line(const char* format, ...) {
  va_list list, again;
  va_start(list, format);
  va_copy(again, list);
  std::string text(size_t(std::vsnprintf(nullptr, 0, format, list)), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(list), va_end(again);
  put((terminal_ ? "\r\033[K" : "") + text + "\n");
}

void Console::progress(std::string_view text) {
  put(terminal_ ? "\r\033[K" + std::string(text) : std::string(text) + "\n");
}
