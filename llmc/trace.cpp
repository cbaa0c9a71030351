#include "llmc/trace.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "llmc/error.h"
#include "llmc/files.h"

namespace {
const std::string beginning = "{\"displayTimeUnit\":\"ms\",\"otherData\":";
// To eighths of a microsecond: what readers multiply and truncate to nanoseconds comes out whole, and what lies within
// something else stays there.
double rounded(double us) { return std::round(us * 8) / 8; }
}  // namespace

Trace::Json& Trace::add(const char* phase, int group, const std::string& name, double time) {
  events_.push_back({{"name", name}, {"ph", phase}, {"pid", group}, {"tid", 1}, {"ts", rounded(time)}});
  return events_.back();
}

void Trace::group(int group, const std::string& name) {
  add("M", group, "process_name", 0)["args"] = {{"name", name}};
  add("M", group, "process_sort_index", 0)["args"] = {{"sort_index", group}};
}
void Trace::track(int group, int track, const std::string& name) {
  Json& e = add("M", group, "thread_name", 0);
  e["tid"] = track, e["args"] = {{"name", name}};
}
void Trace::slice(int group, int track, const std::string& name, const std::string& category, double begin,
                  double duration, Json args) {
  Json& e = add("X", group, name, begin);
  e["tid"] = track, e["dur"] = rounded(begin + duration) - rounded(begin), e["cat"] = category,
  e["args"] = std::move(args);
}
void Trace::ops(int group, int track, const std::vector<Op>& ops) {
  for (size_t first = 0, end = 0; first < ops.size(); first = end) {
    for (end = first + 1; end < ops.size() && ops[end].layer == ops[first].layer;) ++end;
    const Op &a = ops[first], &z = ops[end - 1];
    if (a.layer >= 0)
      slice(group, track, "layer " + std::to_string(a.layer), "layer", a.begin, z.begin + z.duration - a.begin);
    for (size_t i = first; i < end; ++i)
      slice(group, track, ops[i].name, ops[i].category, ops[i].begin, ops[i].duration, ops[i].args);
  }
}
void Trace::life(int group, const std::string& name, const std::string& category, double begin, double end, Json args) {
  ++lives_;
  for (bool first : {true, false}) {
    Json& e = add(first ? "b" : "e", group, name, first ? begin : end);
    e["cat"] = category, e["id2"] = {{"local", std::to_string(lives_)}};
    if (first) e["args"] = args;
  }
}
void Trace::counter(int group, const std::string& name, double time, Json values) {
  add("C", group, name, time)["args"] = std::move(values);
}
void Trace::mark(int group, const std::string& name, double time, Json args) {
  Json& e = add("i", group, name, time);
  e["s"] = "p", e["tid"] = 1, e["args"] = std::move(args);
}

void Trace::check(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code none;
  const fs::path parent = fs::absolute(path, none).parent_path();
  if (fs::is_directory(path, none)) fail(path, ": is a directory; a file is to be written there");
  if (access(parent.c_str(), W_OK | X_OK) != 0) fail(path, ": cannot be written: ", errno_text());
  if (!fs::exists(path, none)) return;
  std::string there(beginning.size(), ' ');
  if (!std::ifstream(path).read(there.data(), std::streamsize(there.size())) || there != beginning)
    fail(path, ": holds something else than an earlier profile, and stays; choose another name");
}

void Trace::write(const std::string& path, Json about) const {
  check(path);
  std::string text = beginning + about.dump() + ",\"traceEvents\":[\n";
  for (size_t i = 0; i < events_.size(); ++i) text += events_[i].dump() + (i + 1 < events_.size() ? ",\n" : "\n");
  write_file_atomic(path, text + "]}\n");
}
