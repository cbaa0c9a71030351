// Files: whole reads, buffered writes that notice a full disk, durable replacement, read-only mappings.
// Every failure throws Error naming the path and the system's reason.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

// "No space left on device": the text of errno as it is now.
std::string errno_text();

// The whole file. Refuses one larger than `limit` bytes (a mistaken path should not fill the memory).
std::string read_file(const std::string& path, size_t limit = size_t(1) << 30);

// fsync of a file or a directory (a directory's fsync makes the names in it durable).
void sync_path(const std::string& path);

// Replaces `path` so that at every moment, also after a crash, it holds the old text or the new one, never a mixture:
// writes path + ".tmp", fsync, rename, fsync of the directory. On an error `path` is untouched.
void write_file_atomic(const std::string& path, std::string_view text);

// A file being written, through a buffer. Unless finish() succeeds the destructor removes the file (if it is a regular
// one), so that an interrupted write leaves nothing that could be taken for a whole file.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path, size_t buffer_bytes = size_t(1) << 20);  // created or truncated
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(const void* data, size_t bytes);
  void finish();  // flush, fsync, close; nothing may be written afterwards

 private:
  void flush();
  void write_through(const std::byte* data, size_t bytes);

  std::string path_;
  int fd_ = -1;
  std::vector<std::byte> buffer_;  // capacity is the buffer's size
};

// A file mapped read-only. An empty file has an empty span. The file must not shrink while it is mapped.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};
