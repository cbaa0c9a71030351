// Small functions that all programs of the workshop share, with a GPU or without. Host code alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <exception>
#include <functional>
#include <string>
#include <vector>

namespace bench {

// ---- names ----

inline bool contains(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}
inline void add_once(std::vector<std::string>& names, const std::string& name) {
  if (!contains(names, name)) names.push_back(name);
}
inline std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
  return text.empty() ? "none" : text;
}
// "a,b" -> a, b. "all" and "-" -> none, which stands for all.
inline std::vector<std::string> split_names(const std::string& list) {
  if (list == "all" || list == "-") return {};
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= list.size();) {
    size_t end = std::min(list.find(',', begin), list.size());
    if (end > begin) parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

// ---- times ----

inline std::string utc(const char* format) {
  char text[32];
  std::time_t now = std::time(nullptr);
  std::strftime(text, sizeof text, format, std::gmtime(&now));
  return text;
}

struct Timing {
  double median = 0, p10 = 0, p90 = 0;  // in the unit of the samples; 0: not measured
  explicit operator bool() const { return median > 0; }
};
inline Timing percentiles(std::vector<double> samples) {
  if (samples.empty()) return {};
  std::sort(samples.begin(), samples.end());
  auto at = [&](double share) { return samples[size_t(std::lround(share * double(samples.size() - 1)))]; };
  return {at(0.5), at(0.1), at(0.9)};
}

// ---- main() ----

// Runs body and turns an Error into one line on stderr and status 1.
inline int guarded(const char* program, const std::function<int()>& body) {
  try {
    return body();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", program, e.what());
    return 1;
  }
}

}  // namespace bench
