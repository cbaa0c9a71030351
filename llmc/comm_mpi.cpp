// Bytes between processes by MPI: nonblocking messages in MPI_COMM_WORLD alone, polled by Job::wait().
#ifdef GPT_MOE_MPI
#include <mpi.h>
#include <unistd.h>

#include <cstdlib>

#include "llmc/comm_link.h"

namespace {

constexpr int farewell_tag = 0;
constexpr int64_t most_bytes = int64_t(1) << 30;  // of a message: MPI counts in int

void check(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(result, text, &length);
  fail("MPI: ", call, ": ", text);
}
#define MPI_CHECK(call) check(call, #call)

class MpiLink : public Link {
 public:
  MpiLink() {
    // Where Open MPI reads a longer message than was expected straight out of the sender's memory, it writes past the end of
    // the receiver's. Through shared memory it reports it.
    setenv("OMPI_MCA_btl_vader_single_copy_mechanism", "none", 0);
    int level = 0;
    MPI_CHECK(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level));
    MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
    MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &size));
    name = "mpi";
  }
  ~MpiLink() override { MPI_Finalize(); }

  std::shared_ptr<Batch> post(int tag, const std::vector<Piece>& sends, const std::vector<Piece>& receives) override {
    auto batch = std::make_shared<Messages>();
    batch->with.resize(size);
    for (const Piece& piece : receives)
      batch->each_part(piece, true, [&](char* data, int bytes, MPI_Request* request) {
        MPI_CHECK(MPI_Irecv(data, bytes, MPI_BYTE, piece.rank, tag, MPI_COMM_WORLD, request));
      });
    for (const Piece& piece : sends)
      batch->each_part(piece, false, [&](char* data, int bytes, MPI_Request* request) {
        MPI_CHECK(MPI_Isend(data, bytes, MPI_BYTE, piece.rank, tag, MPI_COMM_WORLD, request));
      });
    return batch;
  }

  void progress(Batch& any) override {
    auto& batch = static_cast<Messages&>(any);
    const int n = int(batch.requests.size());
    std::vector<int> which(n);
    std::vector<MPI_Status> statuses(n);
    int done = 0;
    if (batch.left == 0) return;
    const int result = MPI_Testsome(n, batch.requests.data(), &done, which.data(), statuses.data());
    if (result != MPI_SUCCESS && result != MPI_ERR_IN_STATUS) check(result, "MPI_Testsome");
    for (int i = 0; i < done; ++i) {
      const Messages::Part& part = batch.parts[which[i]];
      int bytes = part.bytes;
      if (result == MPI_ERR_IN_STATUS && statuses[i].MPI_ERROR != MPI_SUCCESS) {
        int kind = 0;
        MPI_Error_class(statuses[i].MPI_ERROR, &kind);
        if (kind != MPI_ERR_TRUNCATE) check(statuses[i].MPI_ERROR, "a message");
        fail("a message of rank ", part.rank, " is larger than the ", part.bytes, " bytes that were expected");
      }
      if (part.receive) MPI_Get_count(&statuses[i], MPI_BYTE, &bytes);
      if (bytes != part.bytes)
        fail("a message of rank ", part.rank, " has ", bytes, " bytes where ", part.bytes, " were expected");
      --batch.left, --batch.with[part.rank];
    }
  }

  bool farewell() override {
    int heard = 0;
    MPI_Iprobe(MPI_ANY_SOURCE, farewell_tag, MPI_COMM_WORLD, &heard, MPI_STATUS_IGNORE);
    return heard;
  }
  void abort() override {
    if (!farewell()) {
      MPI_Request request;
      for (int r = 0; r < size; ++r)
        if (r != rank) MPI_Isend(nullptr, 0, MPI_BYTE, r, farewell_tag, MPI_COMM_WORLD, &request);
      for (int i = 0; i < 20; ++i) farewell(), usleep(1000);  // moves the messages along
    }
    MPI_Abort(MPI_COMM_WORLD, 1);
    _exit(1);
  }

 private:
  struct Messages : Batch {
    struct Part {
      int rank, bytes;
      bool receive;
    };
    std::vector<MPI_Request> requests;
    std::vector<Part> parts;

    template <class Post>
    void each_part(const Piece& piece, bool receive, Post post) {
      int64_t begin = 0;
      do {  // an empty piece is a message too: both sides agree on it
        const int bytes = int(std::min(piece.bytes - begin, most_bytes));
        parts.push_back({piece.rank, bytes, receive});
        post(static_cast<char*>(piece.data) + begin, bytes, &requests.emplace_back());
        ++left, ++with[piece.rank], begin += bytes;
      } while (begin < piece.bytes);
    }
  };
};

}  // namespace

std::unique_ptr<Link> open_mpi_link() { return std::make_unique<MpiLink>(); }
#endif
