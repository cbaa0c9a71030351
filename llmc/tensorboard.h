// Event files of TensorBoard, written without its libraries: scalars and histograms by step. A file is a sequence of
// records (TFRecord: length, its checksum, data, its checksum), each a protocol-buffer message Event; the messages are
// those of tensorboard/compat/proto/{event,summary,histogram}.proto.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

// CRC-32C (Castagnoli, RFC 3720 appendix B.4): crc32c("123456789") = 0xE3069283.
uint32_t crc32c(std::string_view data);

// data as one TFRecord: uint64 length, masked CRC of these 8 bytes, data, masked CRC of it; little-endian. The mask of c
// is (c rotated right by 15) + 0xa282ead8, so that a checksum of data that holds checksums stays a good one.
std::string tfrecord(std::string_view data);

// What is known at one step: the message Summary.
class EventSummary {
 public:
  EventSummary& scalar(std::string_view tag, double value);  // stored as fp32
  // How often each of 0, 1, 2... was chosen: value i fills the bucket [i, i+1). Nothing if nothing was chosen.
  EventSummary& counts(std::string_view tag, std::span<const int32_t> counts);
  const std::string& bytes() const { return bytes_; }

 private:
  void value(std::string_view tag, std::string_view content);
  std::string bytes_;
};

// The message Event. seconds: since 1970.
std::string event(double seconds, int64_t step, const EventSummary& summary);

class EventWriter {
 public:
  EventWriter() = default;  // writes nothing (ranks other than 0, runs without --tensorboard)
  // A new file in dir (created if need be), named so that TensorBoard reads it after those that are there. It begins
  // with the record by which TensorBoard forgets steps from first_step on in earlier files: those that a killed run
  // wrote after its last checkpoint, or those of another run. Errors: a path that cannot be created or written.
  EventWriter(const std::string& dir, int64_t first_step);
  ~EventWriter();
  EventWriter(EventWriter&& other) noexcept;
  EventWriter& operator=(EventWriter&& other) noexcept;

  bool active() const { return fd_ >= 0; }
  // One write: a killed run loses none but perhaps the last half of one, which TensorBoard passes over.
  void write(int64_t step, const EventSummary& summary);

 private:
  void record(std::string_view event);
  std::string path_;
  int fd_ = -1;
};
