#include "llmc/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "llmc/error.h"

namespace {

// A descriptor that is closed on every way out.
struct Descriptor {
  int fd;
  explicit Descriptor(int value) : fd(value) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
};

int open_read(const std::string& path) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path, ": cannot open: ", errno_text());
  return fd;
}

// Size of an open regular file; anything else (a directory, a device) is refused.
size_t regular_size(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) fail(path, ": cannot stat: ", errno_text());
  if (!S_ISREG(info.st_mode)) fail(path, ": not a regular file");
  return size_t(info.st_size);
}

}  // namespace

std::string errno_text() { return std::generic_category().message(errno); }

std::string read_file(const std::string& path, size_t limit) {
  Descriptor file(open_read(path));
  size_t size = regular_size(file.fd, path);
  if (size > limit) fail(path, ": ", size, " bytes, more than the ", limit, " that such a file may have");
  std::string text(size, '\0');
  size_t done = 0;
  while (done < size) {
    ssize_t n = ::read(file.fd, text.data() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path, ": cannot read: ", errno_text());
    if (n == 0) fail(path, ": ended at byte ", done, " of ", size, " while it was read");
    done += size_t(n);
  }
  return text;
}

void sync_path(const std::string& path) {
  Descriptor file(open_read(path));
  if (::fsync(file.fd) != 0) fail(path, ": cannot sync to disk: ", errno_text());
}

void write_file_atomic(const std::string& path, std::string_view text) {
  std::string temporary = path + ".tmp";
  OutputFile file(temporary);
  file.write(text.data(), text.size());
  file.finish();
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    int reason = errno;
    ::unlink(temporary.c_str());
    errno = reason;
    fail(path, ": cannot replace: ", errno_text());
  }
  std::string parent = std::filesystem::path(path).parent_path().string();
  sync_path(parent.empty() ? "." : parent);
}

OutputFile::OutputFile(const std::string& path, size_t buffer_bytes) : path_(path) {
  buffer_.reserve(buffer_bytes);
  fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(path, ": cannot create: ", errno_text());
}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  struct stat info;
  bool regular = ::fstat(fd_, &info) == 0 && S_ISREG(info.st_mode);
  ::close(fd_);
  if (regular) ::unlink(path_.c_str());  // never a device such as /dev/null
}

void OutputFile::write(const void* data, size_t bytes) {
  const std::byte* from = static_cast<const std::byte*>(data);
  if (buffer_.size() + bytes > buffer_.capacity()) flush();
  if (bytes >= buffer_.capacity()) return write_through(from, bytes);
  buffer_.insert(buffer_.end(), from, from + bytes);
}

void OutputFile::flush() {
  write_through(buffer_.data(), buffer_.size());
  buffer_.clear();
}

void OutputFile::write_through(const std::byte* data, size_t bytes) {
  if (fd_ < 0) fail(path_, ": written to after finish()");
  while (bytes > 0) {
    ssize_t n = ::write(fd_, data, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path_, ": cannot write: ", errno_text());
    data += n;
    bytes -= size_t(n);
  }
}

void OutputFile::finish() {
  flush();
  if (::fsync(fd_) != 0) fail(path_, ": cannot sync to disk: ", errno_text());
  int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0) {  // some network file systems report a full disk only here
    int reason = errno;
    ::unlink(path_.c_str());
    errno = reason;
    fail(path_, ": cannot write: ", errno_text());
  }
}

MappedFile::MappedFile(const std::string& path) {
  Descriptor file(open_read(path));
  size_ = regular_size(file.fd, path);
  if (size_ == 0) return;  // mmap refuses a length of zero
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (address == MAP_FAILED) fail(path, ": cannot map: ", errno_text());
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}
