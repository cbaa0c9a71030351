// The directory protocol of checkpoints: whatever happens during a save, what loads afterwards is whole, and what is
// half-written is refused.
#include "llmc/checkpoint.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include <nlohmann/json.hpp>

#include "dev/test/error_line.h"
#include "dev/test/temp_dir.h"
#include "llmc/random.h"
#include "llmc/safetensors.h"

namespace {

namespace fs = std::filesystem;

// A checkpoint whose every part says `tag`, so that a mixture of two is seen.
void save(const std::string& out, int64_t step, int tag, int64_t keep = 0, int64_t elements = 4096) {
  CheckpointWriter checkpoint(out, step);
  checkpoint.write_text("config.json", "{\"tag\":" + std::to_string(tag) + "}");
  SafetensorsShardedWriter model(checkpoint.path(""), "model",
                                 {{"a", DType::i32, {elements}}, {"b", DType::i32, {elements}}}, {}, 1 << 16);
  std::vector<int32_t> values(size_t(elements), tag);
  for (const char* name : {"a", "b"}) model.append(name, values.data(), values.size() * 4);
  model.finish();
  checkpoint.write_text("trainer.json", "{\"tag\":" + std::to_string(tag) + "}");
  EXPECT_EQ(checkpoint.commit(keep), out + "/" + checkpoint_name(step));
}

// Loads it as a trainer would and returns its tag; throws if it is refused or not of one piece.
int load(const std::string& dir) {
  require_complete(dir);
  int tag = nlohmann::json::parse(get_file(dir + "/trainer.json"))["tag"];
  if (nlohmann::json::parse(get_file(dir + "/config.json"))["tag"] != tag) fail(dir, ": config.json of another save");
  SafetensorsDir model(dir, "model");
  for (const char* name : {"a", "b"}) {
    std::vector<int32_t> values(size_t(model.get(name).elements));
    read_elements(name, model.get(name), 0, int64_t(values.size()), values.data());
    for (int32_t v : values)
      if (v != tag) fail(dir, ": tensor of another save");
  }
  return tag;
}

std::vector<std::string> entries(const std::string& dir) {
  std::vector<std::string> names;
  for (auto& entry : fs::directory_iterator(dir)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

using Names = std::vector<std::string>;

TEST(CheckpointDir, CommitNamesAndLatest) {
  TempDir dir;
  std::string out = dir / "runs/x";  // created
  EXPECT_FALSE(exists_any(out));
  expect_refused([&] { find_latest(out); }, out, "no complete checkpoint");
  save(out, 500, 1);
  EXPECT_EQ(entries(out), (Names{"latest", "step_00000500"}));
  EXPECT_EQ(get_file(out + "/latest"), "step_00000500\n");
  EXPECT_TRUE(exists_any(out));
  EXPECT_EQ(find_latest(out), out + "/step_00000500");
  EXPECT_EQ(load(out + "/step_00000500"), 1);
  EXPECT_EQ(load(out + "/step_00000500/"), 1);
  EXPECT_EQ(checkpoint_name(0), "step_00000000");
  EXPECT_EQ(checkpoint_name(1234567890123), "step_1234567890123");
}

TEST(CheckpointDir, WithoutCommitNothingIsLeft) {
  TempDir dir;
  save(dir.path(), 1, 1);
  {
    CheckpointWriter checkpoint(dir.path(), 2);
    checkpoint.write_text("trainer.json", "{}");
    EXPECT_EQ(entries(dir.path()), (Names{"latest", "step_00000001", "step_00000002.tmp"}));
  }
  EXPECT_EQ(entries(dir.path()), (Names{"latest", "step_00000001"}));
  {
    CheckpointWriter checkpoint(dir.path(), 2);
    expect_refused([&] { checkpoint.commit(1); }, "step_00000002.tmp", "no trainer.json");
  }
  EXPECT_EQ(find_latest(dir.path()), dir / "step_00000001");
  expect_refused([&] { CheckpointWriter(dir.path(), -1); }, "step -1");
}

TEST(CheckpointDir, KeepsTheNewest) {
  TempDir dir;
  for (int64_t step : {1, 2, 3}) save(dir.path(), step, int(step), 0);
  EXPECT_EQ(entries(dir.path()).size(), 4u);  // keep 0: all
  save(dir.path(), 4, 4, 2);
  EXPECT_EQ(entries(dir.path()), (Names{"latest", "step_00000003", "step_00000004"}));
  save(dir.path(), 123456789, 5, 2);
  EXPECT_EQ(entries(dir.path()), (Names{"latest", "step_00000004", "step_123456789"}));
  // Going back: the newest is what was saved last, later steps of the abandoned run are not touched.
  save(dir.path(), 3, 6, 1);
  EXPECT_EQ(entries(dir.path()), (Names{"latest", "step_00000003", "step_00000004", "step_123456789"}));
  EXPECT_EQ(load(find_latest(dir.path())), 6);
  save(dir.path(), 4, 7, 1);
  EXPECT_EQ(entries(dir.path()), (Names{"latest", "step_00000004", "step_123456789"}));
  EXPECT_EQ(load(find_latest(dir.path())), 7);
}

TEST(CheckpointDir, SavingAStepAgainReplacesIt) {
  TempDir dir;
  save(dir.path(), 7, 1, 0, 40000);  // shards
  save(dir.path(), 7, 2, 0, 16);     // a single file: nothing of the old one may stay
  EXPECT_EQ(entries(dir.path()), (Names{"latest", "step_00000007"}));
  EXPECT_EQ(entries(dir / "step_00000007"), (Names{"config.json", "model.safetensors", "trainer.json"}));
  EXPECT_EQ(load(find_latest(dir.path())), 2);
}

TEST(CheckpointDir, StaleLeftoversAreRemovedAndOtherFilesAreNot) {
  TempDir dir;
  fs::create_directories(dir / "step_00000005.tmp/deep");
  fs::create_directories(dir / "step_00000006.old.tmp");
  fs::create_directories(dir / "step_notes.tmp");
  put_file(dir / "main.log", "x");
  save(dir.path(), 9, 1);
  EXPECT_EQ(entries(dir.path()), (Names{"latest", "main.log", "step_00000009", "step_notes.tmp"}));
}

TEST(CheckpointDir, FindLatestFallsBack) {
  TempDir dir;
  for (int64_t step : {1, 2, 10}) save(dir.path(), step, int(step));
  put_file(dir / "latest", "step_00000002\n");  // as long as it is whole, what it names counts
  EXPECT_EQ(find_latest(dir.path()), dir / "step_00000002");
  for (std::string text :
       {"", "step_00000003\n", "step_00000010.tmp", "../x", "\n\n", "step_99999999999999999999999999"}) {
    put_file(dir / "latest", text);
    EXPECT_EQ(find_latest(dir.path()), dir / "step_00000010") << text;
  }
  put_file(dir / "latest", std::string(1000, 'x'));
  EXPECT_EQ(find_latest(dir.path()), dir / "step_00000010");
  fs::remove(dir / "latest");
  EXPECT_EQ(find_latest(dir.path()), dir / "step_00000010");
  fs::create_directory(dir / "latest");
  EXPECT_EQ(find_latest(dir.path()), dir / "step_00000010");
  fs::remove(dir / "step_00000010/trainer.json");
  EXPECT_EQ(find_latest(dir.path()), dir / "step_00000002");
  fs::create_directory(dir / "step_00000020");
  fs::create_directory(dir / "step_000000x1");
  EXPECT_EQ(find_latest(dir.path()), dir / "step_00000002");
}

TEST(CheckpointDir, HalfWrittenIsRefusedWithAdvice) {
  TempDir dir;
  save(dir.path(), 1, 1);
  fs::copy(dir / "step_00000001", dir / "step_00000002.tmp");  // all there, but never committed
  expect_refused([&] { require_complete(dir / "step_00000002.tmp"); }, dir / "step_00000002.tmp", "half-written",
                 "use " + (dir / "step_00000001"));
  expect_refused([&] { require_complete(dir / "step_00000002.tmp/"); }, "half-written");
  for (const char* name : {"trainer.json", "config.json", "model.safetensors"}) {
    fs::remove_all(dir / "step_00000003");
    fs::copy(dir / "step_00000001", dir / "step_00000003");
    require_complete(dir / "step_00000003");
    fs::remove(dir / "step_00000003" + std::string("/") + name);
    expect_refused([&] { require_complete(dir / "step_00000003"); }, "half-written",
                   name[0] == 'm' ? "no model*.safetensors" : name, "use " + (dir / "step_00000001"));
  }
  expect_refused([&] { require_complete(dir / "step_00000009"); }, "no such checkpoint", "use ");
  TempDir none;
  fs::create_directory(none / "step_00000001");
  expect_refused([&] { require_complete(none / "step_00000001"); }, "there is no complete checkpoint beside it");
}

// Everything that must hold after a save was cut short. Returns the newest tag, or -1.
int check_after_crash(const std::string& out, int& half_written) {
  for (const std::string& name : entries(out)) {
    std::string dir = out + "/" + name;
    if (name.ends_with(".tmp") && fs::is_directory(dir)) {
      half_written++;
      expect_refused([&] { load(dir); }, "half-written");
    } else if (name.starts_with("step_")) {
      EXPECT_NO_THROW(load(dir)) << dir;
    }
  }
  if (!exists_any(out)) return -1;
  return load(find_latest(out));
}

TEST(CheckpointDir, KilledAtAnyMoment) {
  TempDir dir;
  constexpr int kKills = 200;
  int newest = -1, half_written = 0, saved = 0;
  int64_t step = 1;
  for (int kill_number = 0; kill_number < kKills; kill_number++) {
    // The child saves without pause; every third one begins with the step that is already there.
    int64_t first = step + (kill_number % 3 ? 1 : 0);
    int ready[2];
    ASSERT_EQ(pipe(ready), 0);
    pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      (void)!write(ready[1], "x", 1);
      try {
        for (int64_t s = first;; s++) save(dir.path(), s, kill_number * 1000 + int(s - first), 2);
      } catch (...) {}
      _exit(1);
    }
    char byte;
    ASSERT_EQ(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(ready[1]);
    usleep(useconds_t(20000 * random_uniform(3, 4, uint64_t(kill_number))));
    kill(child, SIGKILL);
    int status;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "a save failed by itself";

    int tag = check_after_crash(dir.path(), half_written);
    ASSERT_FALSE(HasFailure()) << "after kill " << kill_number;
    ASSERT_GE(tag, newest) << "a checkpoint was lost";
    saved += tag > newest;
    newest = tag;
    if (newest >= 0) step = std::stoll(fs::path(find_latest(dir.path())).filename().string().substr(5));
  }
  EXPECT_GT(half_written, 0);
  EXPECT_GT(saved, 0);
  save(dir.path(), step + 1, newest + 1, 1);  // and the next run clears up what all of them left
  EXPECT_EQ(entries(dir.path()).size(), 2u);
}

// While it lives no file can grow beyond `bytes`.
struct FileSizeLimit {
  explicit FileSizeLimit(rlim_t bytes) {
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before);
    rlimit limit = {bytes, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { setrlimit(RLIMIT_FSIZE, &before); }
  rlimit before;
};

TEST(CheckpointDir, FailedWritesLeaveThePreviousOne) {
  TempDir dir;
  save(dir.path(), 1, 1);
  const Names before = entries(dir.path());
  for (rlim_t limit : {0, 5, 8, 100, 1000, 16384, 32768}) {
    std::string line = error_line([&] {
      FileSizeLimit guard(limit);
      save(dir.path(), 2, 2, 1, 4096 + 37);
    });
    EXPECT_NE(line.find("File too large"), std::string::npos) << limit << ": " << line;
    EXPECT_EQ(entries(dir.path()), before);
    EXPECT_EQ(load(find_latest(dir.path())), 1);
  }
  // The last write of all is that of `latest`: the checkpoint is in place then, and the old name still loads.
  CheckpointWriter checkpoint(dir.path(), 2);
  for (const std::string& name : entries(dir / "step_00000001"))
    fs::copy_file(dir / "step_00000001/" + name, checkpoint.path(name));
  expect_refused(
      [&] {
        FileSizeLimit guard(3);
        checkpoint.commit(1);
      },
      "latest.tmp: cannot write: File too large");
  EXPECT_EQ(get_file(dir / "latest"), "step_00000001\n");
  EXPECT_EQ(load(dir / "step_00000001"), 1);
  EXPECT_EQ(load(dir / "step_00000002"), 1);
}

constexpr int kNotPermitted = 77;

// In a child, with a file system of 1 MiB of its own: a disk that is really full, at every page of a save. Returns 0,
// or a number that says what went wrong.
int fill_the_disk(const std::string& mount_point) {
  uid_t uid = getuid();
  gid_t gid = getgid();
  if (unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return kNotPermitted;
  put_file("/proc/self/setgroups", "deny");
  put_file("/proc/self/uid_map", "0 " + std::to_string(uid) + " 1");
  put_file("/proc/self/gid_map", "0 " + std::to_string(gid) + " 1");
  if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return kNotPermitted;
  if (mount("none", mount_point.c_str(), "tmpfs", 0, "size=1m") != 0) return kNotPermitted;
  int refused = 0;
  for (int free_pages = 0; free_pages < 24; free_pages++) {
    std::string out = mount_point + "/" + std::to_string(free_pages);
    save(out, 1, 1, 1);
    int filler = open((mount_point + "/filler").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    std::vector<char> page(4096);
    off_t size = 0;
    for (ssize_t n; (n = write(filler, page.data(), page.size())) > 0;) size += n;
    if (ftruncate(filler, std::max<off_t>(0, size - off_t(free_pages) * 4096)) != 0) return 2;
    close(filler);
    std::string line = error_line([&] { save(out, 2, 2, 1); });
    if (!line.empty() && line.find("No space left on device") == std::string::npos) return 3;
    refused += !line.empty();
    int half_written = 0;
    int tag = check_after_crash(out, half_written);
    if (tag != (line.empty() ? 2 : 1) || half_written != 0) return 4;
    fs::remove(mount_point + "/filler");
    save(out, 3, 3, 1);  // with room again the run goes on
    if (load(find_latest(out)) != 3) return 5;
    fs::remove_all(out);
  }
  return refused > 8 && refused < 24 && !testing::Test::HasFailure() ? 0 : 6;
}

TEST(CheckpointDir, FullDiskAtEveryPage) {
  TempDir dir;
  pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    int result = 1;
    try {
      result = fill_the_disk(dir.path());
    } catch (const std::exception& error) { fprintf(stderr, "%s\n", error.what()); }
    _exit(result);
  }
  int status;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == kNotPermitted) GTEST_SKIP() << "this machine lets nobody mount a small file system";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
