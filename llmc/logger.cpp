#include "llmc/logger.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <utility>

#include <nlohmann/json.hpp>

#include "llmc/error.h"
#include "llmc/files.h"

namespace {

using nlohmann::ordered_json;

constexpr size_t kMaxLog = size_t(16) << 30;

// printf's %.*f, for main.log.
std::string fixed(double value, int digits) {
  if (std::isnan(value)) return "nan";  // glibc may print -nan
  char text[400];
  auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed, digits).ptr;
  return std::string(text, end);
}

// Step of a line of main.log ("s:12 ..."), or nothing.
std::optional<int64_t> main_step(std::string_view line) {
  int64_t step = 0;
  if (!line.starts_with("s:")) return std::nullopt;
  auto [end, error] = std::from_chars(line.data() + 2, line.data() + line.size(), step);
  if (error != std::errc() || end == line.data() + line.size() || *end != ' ') return std::nullopt;
  return step;
}

void append_json(const ordered_json& value, std::string& out) {
  if (value.is_number_float()) {
    out += format_number(value.get<double>());
  } else if (value.is_object()) {
    char separator = '{';
    for (const auto& [key, member] : value.items()) {
      out += separator;
      out += ordered_json(key).dump(-1, ' ', false, ordered_json::error_handler_t::replace) + ":";
      append_json(member, out);
      separator = ',';
    }
    out += value.empty() ? "{}" : "}";
  } else if (value.is_array()) {
    char separator = '[';
    for (const auto& member : value) {
      out += separator;
      append_json(member, out);
      separator = ',';
    }
    out += value.empty() ? "[]" : "]";
  } else {
    out += value.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
  }
}

}  // namespace

std::string format_number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[40];
  auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::general, 9).ptr;
  return std::string(text, end);
}

std::string format_json(const ordered_json& value) {
  std::string out;
  append_json(value, out);
  return out;
}

void Logger::Stream::open(bool append) {
  fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (append ? 0 : O_TRUNC), 0666);
  if (fd < 0) fail(path, ": cannot open: ", errno_text());
}

void Logger::Stream::close() {
  if (fd >= 0) ::close(fd);
  fd = -1;
}

void Logger::Stream::line(std::string text) {
  if (fd < 0) return;
  text += '\n';
  for (size_t done = 0; done < text.size();) {
    ssize_t n = ::write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path, ": cannot write: ", errno_text());
    done += size_t(n);
  }
}

template <class Keep>
void Logger::Stream::filter(Keep keep) {
  if (fd < 0) return;
  std::string text = read_file(path, kMaxLog), kept;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1)
    if (keep(std::string_view(text).substr(begin, end - begin))) kept.append(text, begin, end + 1 - begin);
  if (kept == text) return;
  close();
  write_file_atomic(path, kept);
  open(true);
}

Logger::Logger(const std::string& out_dir, bool append) {
  std::error_code error;
  std::filesystem::create_directories(out_dir, error);
  if (error) fail(out_dir, ": cannot create: ", error.message());
  main_.path = (std::filesystem::path(out_dir) / "main.log").string();
  json_.path = (std::filesystem::path(out_dir) / "log.jsonl").string();
  for (Stream* stream : {&main_, &json_}) {
    stream->open(append);
    if (append) stream->filter([](std::string_view) { return true; });  // all but a last line without its end
  }
}

Logger::~Logger() {
  main_.close();
  json_.close();
}

Logger::Logger(Logger&& other) noexcept { *this = std::move(other); }

Logger& Logger::operator=(Logger&& other) noexcept {
  std::swap(main_, other.main_);
  std::swap(json_, other.json_);
  return *this;
}

void Logger::truncate_after(int64_t step) {
  main_.filter([&](std::string_view line) {
    std::optional<int64_t> s = main_step(line);
    return s && *s <= step;
  });
  json_.filter([&](std::string_view line) {
    ordered_json value = ordered_json::parse(line, nullptr, false);
    if (!value.is_object()) return false;
    auto s = value.find("step");
    return s == value.end() || !s->is_number() || s->get<double>() <= double(step);
  });
}

void Logger::train(int64_t step, double loss, double learning_rate, double grad_norm) {
  main_.line("s:" + std::to_string(step) + " trl:" + fixed(loss, 4) + " lr:" + fixed(learning_rate, 6) +
             " norm:" + fixed(grad_norm, 2));
}

void Logger::validation(int64_t step, double loss) {
  main_.line("s:" + std::to_string(step) + " tel:" + fixed(loss, 4));
}

void Logger::eval(int64_t step, double accuracy) {
  main_.line("s:" + std::to_string(step) + " eval:" + fixed(accuracy, 4));
}

void Logger::record(const ordered_json& record) { json_.line(format_json(record)); }
