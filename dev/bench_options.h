// The command line of the workshop's programs: what to run, how, and where results go. Host code alone.
//
//   NAME [variant] [shape] [options]
//
// A variant is given by its name, by the beginning of its name, or by the number of its rung (3: the one that begins with
// "03_"; 0: production); several with commas; "all" or "-" for all. A shape by its name or the beginning of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "llmc/error.h"

namespace bench {

struct Options {
  std::string out;                            // results; empty: dev/results/<gpu>.jsonl
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

inline std::string utc(const char* format) {
  char text[32];
  std::time_t now = std::time(nullptr);
  std::strftime(text, sizeof text, format, std::gmtime(&now));
  return text;
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
inline std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
  return text.empty() ? "none" : text;
}

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
          "         --out FILE                     append the rows there; default: dev/results/<gpu>.jsonl for a run\n"
          "                                        of everything, nowhere for a part or with --quick\n"
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
    if (i + 1 == argc) fail(option, " needs a value");
    std::string value = argv[++i], name = option.substr(2);
    if (name == "out")
      o.out = value;
    else if (name == "run-id")
      o.run_id = value;
    else if (name == "shapes" || name == "variants")
      (name == "shapes" ? o.shapes : o.variants) = split_names(value);
    else if (o.own.count(name))
      o.own[name] = value;
    else
      fail("no option is called '", option, "' (see --help)");
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
    beginning = (rung < 10 ? "0" : "") + std::to_string(rung) + "_";
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

}  // namespace bench
