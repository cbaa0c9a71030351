// The directory protocol of checkpoints, ignorant of what is in them.
//   OUT/step_00000500.tmp/   being written; never loaded
//   OUT/step_00000500/       complete: a directory gets this name by one rename, after everything in it is on the disk
//   OUT/latest               a text file with the name of the newest complete one
// So a run killed at any moment, or a full disk, leaves the previous checkpoint as it was and `latest` naming it.
// One process at a time writes to an OUT. Errors throw Error.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

class CheckpointWriter {
 public:
  // Creates out_dir (if need be) and an empty out_dir/step_NNNNNNNN.tmp, after removing every step_*.tmp that a killed
  // run left behind.
  CheckpointWriter(const std::string& out_dir, int64_t step);
  ~CheckpointWriter();  // without commit(): removes the temporary directory
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  std::string path(const std::string& name) const;                  // where to write the file `name`
  void write_text(const std::string& name, std::string_view text);  // writes it

  // fsync of all files and of the directory; rename (a complete checkpoint of the same step is exchanged in one rename
  // where the file system can, and removed after); fsync of out_dir; `latest`; then of the complete checkpoints up to
  // this step all but the newest `keep` are removed (keep <= 0: none is). Those of later steps, which an abandoned run
  // may have left, are not touched. Returns the checkpoint's directory.
  std::string commit(int64_t keep);

 private:
  void remove_stale();

  std::string out_dir_, name_, temporary_;
  int64_t step_;
  bool committed_ = false;
};

// "step_00000500".
std::string checkpoint_name(int64_t step);

// The directory of the checkpoint to resume from: the one that out_dir/latest names, or, if that file is absent or names
// something incomplete, the complete one of the highest step. Error if there is none.
std::string find_latest(const std::string& out_dir);

// Is there a checkpoint that find_latest would return?
bool exists_any(const std::string& out_dir);

// Error unless `dir` is a complete checkpoint: not a *.tmp, and with trainer.json, config.json and a model*.safetensors.
// The line says what is missing and which checkpoint beside it to use instead.
void require_complete(const std::string& dir);
