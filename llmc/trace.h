// A file in Chrome's trace event format (JSON), which Perfetto (ui.perfetto.dev) and chrome://tracing open: slices on
// tracks, lives that overlap, counters, marks. Times are in microseconds.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

class Trace {
 public:
  using Json = nlohmann::ordered_json;

  // A group of tracks, and a track in it, by number; both from 1, in the order in which viewers show them.
  void group(int group, const std::string& name);
  void track(int group, int track, const std::string& name);

  // On a track. Slices that lie within another are shown below it; no two may overlap otherwise.
  void slice(int group, int track, const std::string& name, const std::string& category, double begin, double duration,
             Json args = Json::object());
  // Ops one after another on a track, those of one layer within a slice of the layer.
  struct Op {
    std::string name, category;
    int layer;  // -1: none
    double begin, duration;
    Json args;
  };
  void ops(int group, int track, const std::vector<Op>& ops);
  // Something that lives for a while; lives of one name share a track, whatever overlaps.
  void life(int group, const std::string& name, const std::string& category, double begin, double end,
            Json args = Json::object());
  // The values of a counter from this moment on, by name: drawn stacked.
  void counter(int group, const std::string& name, double time, Json values);
  // A line through all tracks of a group.
  void mark(int group, const std::string& name, double time, Json args = Json::object());

  // Writes the file whole or not at all; an earlier trace of that name is replaced. about: what it is of, under
  // "otherData". Errors: the path cannot be written, or holds something else; check() says so beforehand.
  static void check(const std::string& path);
  void write(const std::string& path, Json about) const;

 private:
  Json& add(const char* phase, int group, const std::string& name, double time);

  Json events_ = Json::array();
  int64_t lives_ = 0;
};
