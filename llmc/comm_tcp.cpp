// Bytes between processes by TCP, for where no MPI is or starts the job: rank 0 listens at MASTER_PORT, learns where the
// others listen and tells all; then every two ranks have a connection. A thread for each takes in whatever comes, so that
// whoever sends need not wait for the receiver to want it.
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <map>

#include "llmc/comm_link.h"
#include "llmc/files.h"

namespace {

struct Hello {  // the first bytes of a connection: strangers knock at open ports
  uint32_t magic;
  int32_t rank, size, port;
};
constexpr uint32_t magic = 0x6D6F6531;

class TcpLink : public Link {
 public:
  TcpLink(int my_rank, int ranks, const std::string& host, int port, double timeout)
      : timeout_(timeout), fd_(ranks, -1), closed_(ranks) {
    name = "tcp", rank = my_rank, size = ranks;
    const int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    sockaddr_in own = {};
    socklen_t length = sizeof own;
    own.sin_family = AF_INET, own.sin_port = htons(uint16_t(rank ? 0 : port));
    if (bind(listening, reinterpret_cast<sockaddr*>(&own), length) || listen(listening, size))
      fail("MASTER_PORT=", port, ": rank 0 cannot listen there: ", errno_text());
    getsockname(listening, reinterpret_cast<sockaddr*>(&own), &length);

    std::vector<sockaddr_in> where(size);  // every rank listens, as rank 0 sees it
    if (rank == 0) {
      for (int n = 1; n < size; ++n) accept_one(listening, where);
      for (int r = 1; r < size; ++r) all_of(r, where.data(), where.size() * sizeof own, true);
    } else {
      addrinfo hints = {}, *found = nullptr;
      hints.ai_family = AF_INET, hints.ai_socktype = SOCK_STREAM;
      if (getaddrinfo(host.c_str(), nullptr, &hints, &found)) fail("MASTER_ADDR=", host, ": no such host (IPv4)");
      sockaddr_in master = *reinterpret_cast<sockaddr_in*>(found->ai_addr);
      freeaddrinfo(found);
      master.sin_port = htons(uint16_t(port));
      connect_to(0, master, ntohs(own.sin_port));
      all_of(0, where.data(), where.size() * sizeof own, false);
      for (int r = 1; r < rank; ++r) {
        if (ntohl(where[r].sin_addr.s_addr) >> 24 == 127) where[r].sin_addr = master.sin_addr;  // on the host of rank 0
        connect_to(r, where[r], 0);
      }
      for (int r = rank + 1; r < size; ++r) accept_one(listening, where);
    }
    close(listening);
    for (int r = 0; r < size; ++r)
      if (r != rank) readers_.emplace_back([this, r] { read(r); });
  }
  ~TcpLink() override {
    for (int fd : fd_) shutdown(fd, SHUT_RDWR);
    for (auto& reader : readers_) reader.join();
    for (int fd : fd_) close(fd);
  }

  std::shared_ptr<Batch> post(int tag, const std::vector<Piece>& sends, const std::vector<Piece>& receives) override {
    auto batch = std::make_shared<Awaited>();
    batch->with.resize(size);
    for (const Piece& piece : receives) {
      batch->pieces.push_back({{piece.rank, tag, received_[{piece.rank, tag}]++}, piece});
      ++batch->left, ++batch->with[piece.rank];
    }
    for (const Piece& piece : sends) {
      int64_t header[] = {tag, sent_[{piece.rank, tag}]++, piece.bytes};
      if (!all(piece.rank, header, sizeof header, true) || !all(piece.rank, piece.data, size_t(piece.bytes), true))
        closed_[piece.rank] = true, ++batch->left, ++batch->with[piece.rank];  // wait() will say so
    }
    return batch;
  }
  void progress(Batch& any) override {
    auto& batch = static_cast<Awaited&>(any);
    std::lock_guard lock(mutex_);
    std::erase_if(batch.pieces, [&](const auto& awaited) {
      const auto& [key, piece] = awaited;
      auto message = mail_.find(key);
      if (message == mail_.end()) return false;
      if (int64_t(message->second.size()) != piece.bytes)
        fail("a message of rank ", piece.rank, " has ", message->second.size(), " bytes where ", piece.bytes,
             " were expected");
      if (piece.bytes) std::memcpy(piece.data, message->second.data(), size_t(piece.bytes));
      mail_.erase(message);
      --batch.left, --batch.with[piece.rank];
      return true;
    });
  }
  bool gone(int r) override { return closed_[r]; }
  bool farewell() override { return farewell_; }
  void abort() override {
    const int64_t header[] = {0, 0, 0};
    for (int r = 0; r < size; ++r)
      if (r != rank) ::send(fd_[r], header, sizeof header, MSG_NOSIGNAL | MSG_DONTWAIT);
    usleep(50000);  // an end that closes with unread bytes may take back what it sent
    _exit(1);
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Key = std::array<int64_t, 3>;  // rank, tag, how many before it
  struct Awaited : Batch {
    std::vector<std::pair<Key, Piece>> pieces;
  };

  // All bytes of a message; false: the connection is closed.
  bool all(int r, void* data, size_t bytes, bool sending) {
    for (char* p = static_cast<char*>(data); bytes;) {
      const ssize_t n = sending ? ::send(fd_[r], p, bytes, MSG_NOSIGNAL) : recv(fd_[r], p, bytes, 0);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      p += n, bytes -= size_t(n);
    }
    return true;
  }
  void read(int r) {
    for (int64_t header[3]; all(r, header, sizeof header, false);) {
      std::vector<char> message(header[2]);
      if (!all(r, message.data(), message.size(), false)) break;
      std::lock_guard lock(mutex_);
      if (header[0] == 0) farewell_ = true;
      mail_[{r, header[0], header[1]}] = std::move(message);
    }
    closed_[r] = true;
  }

  // ---- the start ----

  void open(int r, int fd) {
    const int yes = 1;
    timeval patience = {time_t(std::min(timeout_ + 1, 1e9)), 0};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    fd_[r] = fd;
  }
  void await(int fd) {
    pollfd one = {fd, POLLIN, 0};
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
    if (poll(&one, 1, int(std::clamp<int64_t>(left, 0, 1 << 30))) <= 0)
      fail("rank ", rank, " waited ", timeout_, " s for the other ranks: are all ", size,
           " there? (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, --comm-timeout)");
  }
  void all_of(int r, void* data, size_t bytes, bool sending) {
    if (!sending) await(fd_[r]);
    if (!all(r, data, bytes, sending)) fail("rank ", rank, ": rank ", r, " left before the job began");
  }
  void connect_to(int r, const sockaddr_in& address, int own_port) {
    for (;; usleep(50000)) {  // it may not have started yet
      open(r, socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
      if (connect(fd_[r], reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) break;
      close(fd_[r]);
      if (Clock::now() > end_)
        fail("rank ", rank, " waited ", timeout_, " s for rank ", r, " to answer at its port ", ntohs(address.sin_port),
             " (MASTER_ADDR, MASTER_PORT, --comm-timeout)");
    }
    Hello hello = {magic, rank, size, own_port};
    all_of(r, &hello, sizeof hello, true);
  }
  void accept_one(int listening, std::vector<sockaddr_in>& where) {
    for (;;) {
      await(listening);
      sockaddr_in address = {};
      socklen_t length = sizeof address;
      const int fd = accept4(listening, reinterpret_cast<sockaddr*>(&address), &length, SOCK_CLOEXEC);
      timeval patience = {5, 0}, for_ever = {0, 0};
      Hello hello = {};
      setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
      if (recv(fd, &hello, sizeof hello, MSG_WAITALL) != sizeof hello || hello.magic != magic) {
        close(fd);
        continue;
      }
      setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &for_ever, sizeof for_ever);
      if (hello.size != size)
        fail("WORLD_SIZE is ", size, " for rank ", rank, " and ", hello.size, " for rank ", hello.rank);
      if (hello.rank < 0 || hello.rank >= size || hello.rank == rank || fd_[hello.rank] >= 0)
        fail("two processes have RANK=", hello.rank);
      open(hello.rank, fd);
      if (rank == 0) where[hello.rank] = address, where[hello.rank].sin_port = htons(uint16_t(hello.port));
      return;
    }
  }

  const double timeout_;
  const Clock::time_point end_ =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_));
  std::vector<int> fd_;  // of each rank
  std::vector<std::thread> readers_;
  std::mutex mutex_;                                           // of mail_
  std::map<Key, std::vector<char>> mail_;                      // what came and is not fetched yet
  std::map<std::array<int64_t, 2>, int64_t> sent_, received_;  // messages for, of a rank by tag
  std::vector<std::atomic<bool>> closed_;
  std::atomic<bool> farewell_ = false;
};

}  // namespace

std::unique_ptr<Link> open_tcp_link(int rank, int size, const std::string& host, int port, double timeout) {
  return std::make_unique<TcpLink>(rank, size, host, port, timeout);
}
