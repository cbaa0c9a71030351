// The library: NCCL, all ranks in one process, so that every call is a group of one call a rank.
#pragma once
#include <nccl.h>

#include "dev/collectives/exchange.cuh"

namespace collectives {

inline void nccl_check(ncclResult_t result, const char* call) {
  if (result != ncclSuccess) fail("NCCL: ", call, ": ", ncclGetErrorString(result));
}
#define NCCL_CHECK(call) nccl_check(call, #call)

class Nccl {
 public:
  explicit Nccl(const Ranks& ranks) : ranks_(ranks) {
    int devices[max_ranks];
    for (int r = 0; r < ranks.n; ++r) devices[r] = r;
    NCCL_CHECK(ncclCommInitAll(comm_.data(), ranks.n, devices));
  }
  ~Nccl() {
    for (int r = 0; r < ranks_.n; ++r) ncclCommDestroy(comm_[r]);
  }
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  static std::string version() {
    int code = 0;
    NCCL_CHECK(ncclGetVersion(&code));
    return std::to_string(code / 10000) + "." + std::to_string(code / 100 % 100) + "." + std::to_string(code % 100);
  }

  template <class T>
  void all_reduce(const Peers<T>& out, const ConstPeers<T>& in, int64_t n) const {
    group([&](int r) { NCCL_CHECK(ncclAllReduce(in[r], out[r], size_t(n), type<T>(), ncclSum, comm_[r], on(r))); });
  }
  template <class T>
  void all_gather(const Peers<T>& out, const ConstPeers<T>& in, int64_t n) const {
    group([&](int r) { NCCL_CHECK(ncclAllGather(in[r], out[r], size_t(n), type<T>(), comm_[r], on(r))); });
  }
  // Of rows that lie side by side for each receiver (pack_for_sending). The host has to know how many.
  template <class T>
  void all_to_all(const Peers<T>& out, const ConstPeers<T>& packed, const Exchange& x) const {
    group([&](int r) {
      for (int s = 0; s < ranks_.n; ++s) {
        const size_t to = size_t(x.rows(s, r) * x.width), from = size_t(x.rows(r, s) * x.width);
        if (to > 0) NCCL_CHECK(ncclSend(packed[r] + x.packed[r][s] * x.width, to, type<T>(), s, comm_[r], on(r)));
        if (from > 0) NCCL_CHECK(ncclRecv(out[r] + x.begin[r][s] * x.width, from, type<T>(), s, comm_[r], on(r)));
      }
    });
  }

 private:
  template <class T>
  static constexpr ncclDataType_t type() {
    return std::is_same_v<T, bf16> ? ncclBfloat16 : ncclFloat32;
  }
  cudaStream_t on(int rank) const { return ranks_.stream[rank]; }
  template <class Call>
  void group(Call call) const {
    NCCL_CHECK(ncclGroupStart());
    for (int r = 0; r < ranks_.n; ++r) call(r);
    NCCL_CHECK(ncclGroupEnd());
  }

  const Ranks& ranks_;
  std::array<ncclComm_t, max_ranks> comm_{};
};

}  // namespace collectives
