#include "llmc/checkpoint.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <vector>

#include "llmc/error.h"
#include "llmc/files.h"

namespace fs = std::filesystem;

namespace {

constexpr const char* kTemporary = ".tmp";

// Step of a complete checkpoint's name ("step_00000500"), or nothing.
std::optional<int64_t> step_of(const std::string& name) {
  if (!name.starts_with("step_") || name.size() < 13 || name.size() > 23) return std::nullopt;
  int64_t step = 0;
  for (char c : name.substr(5)) {
    if (c < '0' || c > '9') return std::nullopt;
    step = step * 10 + (c - '0');
  }
  if (checkpoint_name(step) != name) return std::nullopt;
  return step;
}

std::vector<std::string> list(const std::string& dir) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(dir, error), end; !error && it != end; it.increment(error))
    names.push_back(it->path().filename().string());
  if (error) fail(dir, ": cannot list: ", error.message());
  return names;
}

// What a directory lacks to be a checkpoint, or "".
std::string missing(const std::string& dir) {
  std::error_code error;
  if (!fs::is_directory(dir, error)) return "it is not a directory";
  for (const char* name : {"trainer.json", "config.json"})
    if (!fs::is_regular_file(fs::path(dir) / name, error)) return std::string("it has no ") + name;
  for (const std::string& name : list(dir))
    if (name.starts_with("model") && name.ends_with(".safetensors")) return "";
  return "it has no model*.safetensors";
}

// The complete checkpoints of out_dir, by ascending step.
std::vector<int64_t> complete_steps(const std::string& out_dir) {
  std::vector<int64_t> steps;
  std::error_code error;
  if (!fs::is_directory(out_dir, error)) return steps;
  for (const std::string& name : list(out_dir))
    if (std::optional<int64_t> step = step_of(name); step && missing((fs::path(out_dir) / name).string()).empty())
      steps.push_back(*step);
  std::sort(steps.begin(), steps.end());
  return steps;
}

// find_latest without the complaint: "" if there is none.
std::string latest_or_empty(const std::string& out_dir) {
  fs::path latest = fs::path(out_dir) / "latest";
  std::error_code error;
  if (fs::is_regular_file(latest, error) && fs::file_size(latest, error) < 100) {
    std::string name = read_file(latest.string());
    while (!name.empty() && (name.back() == '\n' || name.back() == '\r')) name.pop_back();
    std::string dir = (fs::path(out_dir) / name).string();
    if (step_of(name) && missing(dir).empty()) return dir;
  }
  std::vector<int64_t> steps = complete_steps(out_dir);
  return steps.empty() ? "" : (fs::path(out_dir) / checkpoint_name(steps.back())).string();
}

void remove_tree(const std::string& dir) {
  std::error_code error;
  fs::remove_all(dir, error);
  if (error) fail(dir, ": cannot remove: ", error.message());
}

void rename_path(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail(from, ": cannot rename to ", to, ": ", errno_text());
}

// A directory that will vanish loses its complete name first: a removal cut short must not leave half a checkpoint
// under a name that promises a whole one.
void remove_checkpoint(const std::string& dir) {
  rename_path(dir, dir + kTemporary);
  remove_tree(dir + kTemporary);
}

// Gives `temporary` the name `final`. If `final` exists the two change names, so that a complete checkpoint has it at
// every moment; a file system that cannot do so moves the old one to a name of its own first.
void put_in_place(const std::string& temporary, const std::string& final) {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(final, error))) return rename_path(temporary, final);
#ifdef RENAME_EXCHANGE
  if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, final.c_str(), RENAME_EXCHANGE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS) fail(temporary, ": cannot exchange with ", final, ": ", errno_text());
#endif
  std::string old = final + ".old" + kTemporary;
  remove_tree(old);
  rename_path(final, old);
  rename_path(temporary, final);
}

}  // namespace

std::string checkpoint_name(int64_t step) {
  std::string digits = std::to_string(step);
  return "step_" + std::string(digits.size() < 8 ? 8 - digits.size() : 0, '0') + digits;
}

CheckpointWriter::CheckpointWriter(const std::string& out_dir, int64_t step)
    : out_dir_(out_dir.empty() ? "." : out_dir), name_(checkpoint_name(step)), step_(step) {
  if (step < 0) fail("checkpoint of step ", step, ": must be >= 0");
  temporary_ = (fs::path(out_dir_) / (name_ + kTemporary)).string();
  std::error_code error;
  fs::create_directories(out_dir_, error);
  if (error) fail(out_dir_, ": cannot create: ", error.message());
  remove_stale();
  fs::create_directory(temporary_, error);
  if (error) fail(temporary_, ": cannot create: ", error.message());
}

CheckpointWriter::~CheckpointWriter() {
  std::error_code ignored;
  if (!committed_) fs::remove_all(temporary_, ignored);
}

void CheckpointWriter::remove_stale() {
  for (const std::string& name : list(out_dir_))
    if (name.ends_with(kTemporary) && step_of(name.substr(0, name.find('.'))))
      remove_tree((fs::path(out_dir_) / name).string());
}

std::string CheckpointWriter::path(const std::string& name) const { return (fs::path(temporary_) / name).string(); }

void CheckpointWriter::write_text(const std::string& name, std::string_view text) {
  OutputFile file(path(name));
  file.write(text.data(), text.size());
  file.finish();
}

std::string CheckpointWriter::commit(int64_t keep) {
  if (std::string lack = missing(temporary_); !lack.empty()) fail(temporary_, ": not a checkpoint to commit: ", lack);
  for (const std::string& name : list(temporary_)) sync_path(path(name));
  sync_path(temporary_);
  std::string final = (fs::path(out_dir_) / name_).string();
  put_in_place(temporary_, final);
  committed_ = true;
  sync_path(out_dir_);  // the rename is on the disk before `latest` can name its result
  write_file_atomic((fs::path(out_dir_) / "latest").string(), name_ + "\n");

  remove_stale();  // what an exchange left
  std::vector<int64_t> steps = complete_steps(out_dir_);
  std::erase_if(steps, [&](int64_t s) { return s > step_; });
  if (keep > 0)
    for (size_t i = 0; i + size_t(keep) < steps.size(); i++)
      remove_checkpoint((fs::path(out_dir_) / checkpoint_name(steps[i])).string());
  return final;
}

std::string find_latest(const std::string& out_dir) {
  std::string dir = latest_or_empty(out_dir);
  if (dir.empty()) fail(out_dir, ": no complete checkpoint (step_NNNNNNNN) to load");
  return dir;
}

bool exists_any(const std::string& out_dir) { return !latest_or_empty(out_dir).empty(); }

void require_complete(const std::string& dir) {
  std::string name = dir;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  std::string lack = name.ends_with(kTemporary) ? "it was being written when its run ended" : missing(name);
  if (lack.empty()) return;
  std::error_code error;
  fs::path parent = fs::path(name).parent_path();
  std::string other = latest_or_empty(parent.empty() ? "." : parent.string());
  std::string advice = other.empty() ? "there is no complete checkpoint beside it" : "use " + other + " instead";
  if (!fs::exists(name, error)) fail(dir, ": no such checkpoint; ", advice);
  fail(dir, ": half-written checkpoint, not loaded: ", lack, "; ", advice);
}
