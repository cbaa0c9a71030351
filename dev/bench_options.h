// The command line of the workshop's programs: what to run, how, and where results go. Host code alone.
//
//   NAME [variant] [shape] [options]
//
// A variant is given by its name, by the beginning of its name, or by the number of its rung (3: the one that begins with
// "03_"; 0: production); several with commas; "all" or "-" for all. A shape by its name or the beginning of it.
//
// Rows are appended to dev/results/<device>.jsonl by a run of everything, else only to the file that --out names.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dev/bench_common.h"
#include "llmc/error.h"

namespace bench {

struct Options {
  std::string out;                            // results; empty: dev/results/<device>.jsonl
  std::string run_id;                         // marks the lines of one run; default: $RUN_ID, else the time
  std::vector<std::string> shapes, variants;  // those to run, as they were asked for; empty: all
  bool quick = false;                         // few timed runs
  bool check_only = false;                    // only the check at a reduced size, as memory and race checkers want it
  bool json = false;                          // rows of results on stdout, all other text on stderr
  bool list = false;                          // only name variants and shapes
  bool positional = false;                    // a person asked for something in particular
  std::map<std::string, std::string> own;     // options of this program alone, by name without the dashes

  int64_t number(const std::string& name) const {
    const std::string& text = own.at(name);
    char* end = nullptr;
    long long value = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || value <= 0) fail("--", name, " must be a positive whole number, not '", text, "'");
    return value;
  }
  // Whether rows are appended to a file. Tables are made from whole runs: a part of one, or a quick one, is recorded only
  // where a file is named for it.
  bool records() const {
    const bool whole = !positional && !quick && shapes.empty() && variants.empty();
    return !check_only && !list && (whole || !out.empty());
  }
};

// own: the program's own options and their defaults. --help prints and exits. Throws naming the option.
inline Options parse_options(int argc, char** argv, std::map<std::string, std::string> own = {}) {
  Options o;
  o.own = std::move(own);
  const char* from_environment = std::getenv("RUN_ID");
  o.run_id = from_environment && *from_environment ? from_environment : utc("%Y%m%dT%H%M%SZ");
  int positions = 0;
  for (int i = 1; i < argc; ++i) {
    std::string option = argv[i];
    if (option == "--help" || option == "-h") {
      std::printf(
          "usage: %s [variant] [shape] [options]\n"
          "  variant  a name, the beginning of one, or a rung's number (0: production); A,B for several; - for all\n"
          "  shape    a name or the beginning of one\n"
          "options: --variants A,B  --shapes A,B   the same\n"
          "         --list                         name variants and shapes, run nothing\n"
          "         --check-only                   only the check against the CPU, at a reduced size\n"
          "         --quick                        few timed runs\n"
          "         --json                         rows of results on stdout, all other text on stderr\n"
          "         --out FILE                     append the rows there; default: dev/results/<device>.jsonl for\n"
          "                                        a run of everything, nowhere for a part or with --quick\n"
          "         --run-id ID                    marks these rows; default: $RUN_ID, else the time\n",
          std::filesystem::path(argv[0]).filename().c_str());
      for (auto& [name, value] : o.own)
        std::printf("         --%s VALUE (default: %s)\n", name.c_str(), value.empty() ? "none" : value.c_str());
      std::exit(0);
    }
    const std::map<std::string, bool*> flags = {
        {"--quick", &o.quick}, {"--check-only", &o.check_only}, {"--json", &o.json}, {"--list", &o.list}};
    if (auto flag = flags.find(option); flag != flags.end()) {
      *flag->second = true;
      continue;
    }
    if (option == "-" || !option.starts_with("-")) {
      std::vector<std::string>& wanted = positions == 0 ? o.variants : o.shapes;
      if (++positions > 2) fail("'", option, "' is one argument too many: [variant] [shape] (see --help)");
      if (!wanted.empty()) fail("'", option, "': ", positions == 1 ? "--variants" : "--shapes", " is given too");
      wanted = split_names(option);
      o.positional = true;
      continue;
    }
    if (!option.starts_with("--")) fail("'", option, "' is not an option (see --help)");
    const std::string name = option.substr(2);
    const bool is_shapes = name == "shapes", is_variants = name == "variants";
    std::string list;
    std::string* value = is_shapes || is_variants ? &list
                         : name == "out"          ? &o.out
                         : name == "run-id"       ? &o.run_id
                                                  : nullptr;
    if (auto known = o.own.find(name); known != o.own.end()) value = &known->second;
    if (!value) fail("no option is called '", option, "' (see --help)");
    if (i + 1 == argc) fail(option, " needs a value");
    *value = argv[++i];
    if (is_shapes || is_variants) (is_shapes ? o.shapes : o.variants) = split_names(list);
  }
  return o;
}

// The variant among these (production first) that is meant; empty: none. Throws where it could be several.
inline std::string match_variant(const std::string& asked, const std::vector<std::string>& names) {
  for (const std::string& name : names)
    if (name == asked) return name;
  std::string beginning = asked;
  if (!asked.empty() && asked.size() <= 3 && asked.find_first_not_of("0123456789") == std::string::npos) {
    const int rung = std::atoi(asked.c_str());
    if (rung == 0) return names.empty() ? "" : names[0];
    beginning = std::string(rung < 10 ? 1 : 0, '0') + std::to_string(rung) + "_";
  }
  std::vector<std::string> found;
  for (const std::string& name : names)
    if (name.starts_with(beginning)) found.push_back(name);
  if (found.size() > 1) fail("variant '", asked, "' could be any of: ", joined(found));
  return found.empty() ? "" : found[0];
}

// The shapes among these that are meant: the one of that name and those of a group ("a" means "a.x" and "a.y" too), else
// the only one that begins so. Throws where there is none, or one could not tell.
inline std::vector<std::string> match_shape(const std::string& asked, const std::vector<std::string>& names) {
  std::vector<std::string> found;
  for (const std::string& name : names)
    if (name == asked || name.starts_with(asked + ".")) found.push_back(name);
  if (!found.empty()) return found;
  for (const std::string& name : names)
    if (name.starts_with(asked)) found.push_back(name);
  if (found.empty()) fail("no shape is called '", asked, "'; there are: ", joined(names));
  if (found.size() > 1) fail("shape '", asked, "' could be any of: ", joined(found));
  return found;
}

// The whole names of all that is asked for; none asked: none. Throws naming what is unknown and what exists.
inline std::vector<std::string> match_variants(const std::vector<std::string>& asked,
                                               const std::vector<std::string>& names) {
  std::vector<std::string> found;
  for (const std::string& variant : asked) {
    const std::string match = match_variant(variant, names);
    if (match.empty()) fail("no variant is called '", variant, "'; there are: ", joined(names));
    add_once(found, match);
  }
  return found;
}
inline std::vector<std::string> match_shapes(const std::vector<std::string>& asked,
                                             const std::vector<std::string>& names) {
  std::vector<std::string> found;
  for (const std::string& shape : asked)
    for (const std::string& match : match_shape(shape, names)) add_once(found, match);
  return found;
}

// Puts whole names in place of what is asked for. With --list it prints all names; true: there is nothing to run.
inline bool settle_names(Options& o, const std::vector<std::string>& variants, const std::vector<std::string>& shapes) {
  o.shapes = match_shapes(o.shapes, shapes), o.variants = match_variants(o.variants, variants);
  if (o.list) std::printf("shapes: %s\nvariants: %s\n", joined(shapes).c_str(), joined(variants).c_str());
  return o.list;
}

// dev/results of the repository that one of these folders lies in, whichever is found first.
inline std::filesystem::path find_results(const std::vector<std::filesystem::path>& from) {
  for (std::filesystem::path folder : from)
    for (; !folder.empty(); folder = folder.parent_path()) {
      std::error_code ignored;
      if (std::filesystem::is_directory(folder / "dev" / "results", ignored)) return folder / "dev" / "results";
      if (folder == folder.parent_path()) break;
    }
  fail("no folder dev/results above this one or above the program; --out FILE says where results go");
}
inline std::filesystem::path find_results() {
  std::error_code ignored;
  return find_results(
      {std::filesystem::current_path(ignored), std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path()});
}

// Where rows go, one a line: to the file that the options say, if any, and with --json to stdout, where nothing else is
// printed from then on: all other text goes to stderr.
class Results {
 public:
  // device: names the file in dev/results
  Results(const Options& options, const std::string& device) {
    if (options.records()) {
      path_ = options.out.empty() ? (find_results() / (device + ".jsonl")).string() : options.out;
      file_.open(path_, std::ios::app);
      if (!file_) fail(path_, ": cannot be written");
    }
    if (options.json && !options.list) {
      std::fflush(stdout);
      json_ = fdopen(dup(STDOUT_FILENO), "w");
      if (!json_ || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) fail("--json: stdout cannot be used");
    }
  }
  ~Results() {
    if (json_) std::fclose(json_);
  }
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  void write(const std::string& row) {
    if (json_) std::fprintf(json_, "%s\n", row.c_str()), std::fflush(json_);
    if (!path_.empty() && !(file_ << row << std::endl)) fail(path_, ": cannot be written");
  }

 private:
  std::string path_;  // empty: no file
  std::ofstream file_;
  std::FILE* json_ = nullptr;  // with --json: what stdout was
};

// The last lines of a run; returns the status of the program.
inline int finish(const std::string& bench, int checks, int failures, const Options& options) {
  std::printf("%s: %d checks, %d failed\n", bench.c_str(), checks, failures);
  if (!options.records() && !options.check_only)
    std::printf("%s: not recorded, since it is not a whole run (--out FILE records it)\n", bench.c_str());
  return failures > 0 ? 1 : 0;
}

}  // namespace bench
