#include "llmc/tensorboard.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "llmc/error.h"
#include "llmc/files.h"

namespace {

// ---- protocol buffers: a field is its number and kind, then its value ----

enum Kind { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

template <class T>
void put_little_endian(std::string& out, T value) {
  for (size_t i = 0; i < sizeof value; ++i) out += char(value >> 8 * i & 0xff);
}

void put_varint(std::string& out, uint64_t value) {
  for (; value >= 128; value >>= 7) out += char((value & 127) | 128);
  out += char(value);
}

void put_key(std::string& out, int field, Kind kind) { put_varint(out, uint64_t(field) << 3 | kind); }

// As the format has it, a number that is zero is left out.
void put_number(std::string& out, int field, double value) {
  if (std::bit_cast<uint64_t>(value) == 0) return;
  put_key(out, field, fixed64);
  put_little_endian(out, std::bit_cast<uint64_t>(value));
}

void put_integer(std::string& out, int field, int64_t value) {
  if (value == 0) return;
  put_key(out, field, varint);
  put_varint(out, uint64_t(value));
}

void put_bytes(std::string& out, int field, std::string_view value) {
  put_key(out, field, bytes);
  put_varint(out, value.size());
  out += value;
}

template <class F>
void put_numbers(std::string& out, int field, size_t n, F value) {
  std::string packed;
  for (size_t i = 0; i < n; ++i) put_little_endian(packed, std::bit_cast<uint64_t>(double(value(i))));
  put_bytes(out, field, packed);
}

// An Event that holds `content` in the field of that number.
std::string event_of(double seconds, int64_t step, int field, std::string_view content) {
  std::string out;
  put_number(out, 1, seconds);
  put_integer(out, 2, step);
  put_bytes(out, field, content);
  return out;
}

double seconds_since_1970() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// ---- names ----

constexpr std::string_view kPrefix = "events.out.tfevents.";

// TensorBoard reads the files of a directory in the order of their names, which begin with seconds: this one's are later
// than those of any that is there.
std::string new_name(const std::string& dir) {
  auto seconds = int64_t(seconds_since_1970());
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(dir, error)) {
    const std::string name = entry.path().filename().string();
    int64_t theirs = 0;
    if (name.starts_with(kPrefix) &&
        std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), theirs).ec == std::errc())
      seconds = std::max(seconds, theirs + 1);
  }
  if (error) fail("--tensorboard ", dir, ": cannot read: ", error.message());
  char host[256] = "", text[400];
  gethostname(host, sizeof host - 1);
  std::snprintf(text, sizeof text, "%.*s%010lld.%s.%d", int(kPrefix.size()), kPrefix.data(), (long long)seconds, host,
                int(getpid()));
  return text;
}

}  // namespace

uint32_t crc32c(std::string_view data) {
  static constexpr auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      t[i] = i;
      for (int bit = 0; bit < 8; ++bit) t[i] = t[i] >> 1 ^ (t[i] & 1 ? 0x82f63b78u : 0);
    }
    return t;
  }();
  uint32_t crc = ~0u;
  for (char c : data) crc = crc >> 8 ^ table[(crc ^ uint8_t(c)) & 255];
  return ~crc;
}

std::string tfrecord(std::string_view data) {
  auto masked = [](std::string_view text) { return std::rotr(crc32c(text), 15) + 0xa282ead8u; };
  std::string out;
  put_little_endian(out, uint64_t(data.size()));
  put_little_endian(out, masked(out));
  out += data;
  put_little_endian(out, masked(data));
  return out;
}

void EventSummary::value(std::string_view tag, std::string_view content) {
  std::string value;
  put_bytes(value, 1, tag);
  value += content;
  put_bytes(bytes_, 1, value);
}

EventSummary& EventSummary::scalar(std::string_view tag, double number) {
  std::string content;
  put_key(content, 2, fixed32);
  put_little_endian(content, std::bit_cast<uint32_t>(float(number)));
  value(tag, content);
  return *this;
}

EventSummary& EventSummary::counts(std::string_view tag, std::span<const int32_t> counts) {
  size_t first = 0, end = counts.size();  // of the buckets in use: what lies outside would have no width
  while (first < end && counts[first] == 0) ++first;
  while (first < end && counts[end - 1] == 0) --end;
  if (first == end) return *this;
  double number = 0, sum = 0, squares = 0;
  for (size_t i = first; i < end; ++i) {
    const double n = counts[i], x = double(i);
    number += n, sum += n * x, squares += n * x * x;
  }
  std::string histogram, content;
  put_number(histogram, 1, double(first));  // TensorBoard takes min and max for the outer edges
  put_number(histogram, 2, double(end));
  put_number(histogram, 3, number);
  put_number(histogram, 4, sum);
  put_number(histogram, 5, squares);
  put_numbers(histogram, 6, end - first, [&](size_t i) { return first + i + 1; });  // upper edges
  put_numbers(histogram, 7, end - first, [&](size_t i) { return counts[first + i]; });
  put_bytes(content, 5, histogram);
  value(tag, content);
  return *this;
}

std::string event(double seconds, int64_t step, const EventSummary& summary) {
  return event_of(seconds, step, 5, summary.bytes());
}

EventWriter::EventWriter(const std::string& dir, int64_t first_step) {
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) fail("--tensorboard ", dir, ": cannot create: ", error.message());
  path_ = (std::filesystem::path(dir) / new_name(dir)).string();
  fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
  if (fd_ < 0) fail("--tensorboard ", path_, ": cannot create: ", errno_text());
  record(event_of(seconds_since_1970(), 0, 3, "brain.Event:2"));  // the version of the format
  std::string start;
  put_integer(start, 1, 1);  // SessionLog: status START
  record(event_of(seconds_since_1970(), first_step, 7, start));
}

EventWriter::~EventWriter() {
  if (fd_ >= 0) ::close(fd_);
}

EventWriter::EventWriter(EventWriter&& other) noexcept { *this = std::move(other); }

EventWriter& EventWriter::operator=(EventWriter&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  return *this;
}

void EventWriter::write(int64_t step, const EventSummary& summary) {
  if (active()) record(event(seconds_since_1970(), step, summary));
}

void EventWriter::record(std::string_view event) {
  const std::string text = tfrecord(event);
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(fd_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path_, ": cannot write: ", errno_text());
    done += size_t(n);
  }
}
