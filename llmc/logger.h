// The two logs of a run, in its output directory: main.log, in the line format of llm.c, which its plotting tools read,
// and log.jsonl, one JSON object a line, with everything. A line is one write: a killed run loses none but perhaps the
// last half of one. The bytes of a line depend on its values alone, so logs can be compared with cmp.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

// A number as JSON with 9 significant digits, which tell any two floats apart: 0.1f -> "0.100000001", 1e20 -> "1e+20",
// 2.0 -> "2"; NaN and infinity, which JSON lacks, -> "null". Independent of the locale.
std::string format_number(double value);

// One line (without its end), keys in the order given, doubles as by format_number.
std::string format_json(const nlohmann::ordered_json& value);

class Logger {
 public:
  Logger() = default;  // writes nothing (ranks other than 0)
  // Creates out_dir if need be. append = false: both logs start empty. append = true: they go on, after a torn last
  // line, if any, has been dropped. Errors: a path that cannot be created or written.
  Logger(const std::string& out_dir, bool append);
  ~Logger();
  Logger(Logger&& other) noexcept;
  Logger& operator=(Logger&& other) noexcept;

  // On resume at step s: drops every line of both files whose step is greater than `step` (a crashed run may have logged
  // steps after its last checkpoint), and lines that are not whole. Lines of log.jsonl without "step" stay.
  void truncate_after(int64_t step);

  // main.log
  void train(int64_t step, double loss, double learning_rate,
             double grad_norm);                // s:1 trl:5.5452 lr:0.000300 norm:1.25
  void validation(int64_t step, double loss);  // s:1 tel:5.5452
  void eval(int64_t step, double accuracy);    // s:1 eval:0.2500

  // log.jsonl. `record` is an object; give it an integer "step" unless it belongs to none.
  void record(const nlohmann::ordered_json& record);

 private:
  struct Stream {
    std::string path;
    int fd = -1;
    void open(bool append);
    void close();
    void line(std::string text);
    template <class Keep>
    void filter(Keep keep);  // rewrites the file with the whole lines that keep(line) accepts
  };
  Stream main_, json_;
};
