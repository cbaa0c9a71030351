// Collectives on host memory against plain loops, on every rank of a job: run by itself it is one process, and
// test_comm.py starts it in several. With `--fail HOW RANK` that rank breaks off in the middle of a collective instead.
#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>
#include <numeric>

#include <unistd.h>

#include "dev/test/error_line.h"
#include "llmc/comm.h"
#include "llmc/random.h"

namespace {

World* world = nullptr;
Comm everyone;
// Made at the start, all of them: every second rank, the ranks backwards, this rank and its neighbour in a ring of pairs.
Comm even, backwards, pair;
uint64_t digest = 0;  // of all sums of this rank: equal bits in equal runs

template <class T>
T value(int rank, int64_t i) {
  const double x = random_normal(7, rank, i) * std::exp2(double(random_bits(8, rank, i) % 21) - 10);
  if constexpr (std::is_same_v<T, int32_t>) return int32_t(random_bits(9, rank, i));
  if constexpr (std::is_same_v<T, bf16>) return bf16(float(x));
  return T(x);
}
template <>
bf16 value<bf16>(int rank, int64_t i) {
  return bf16(value<float>(rank, i));
}
template <class T>
std::vector<T> values(int rank, int64_t n) {
  std::vector<T> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = value<T>(rank, i);
  return v;
}
// One rank after another.
template <class T>
T sum_of(const std::vector<int>& ranks, int64_t i) {
  if constexpr (std::is_same_v<T, int32_t>) {
    uint32_t sum = 0;
    for (int r : ranks) sum += uint32_t(value<T>(r, i));
    return T(sum);
  } else {
    using Acc = typename Cpu<T>::Acc;
    Acc sum = Acc(value<T>(ranks[0], i));
    for (size_t r = 1; r < ranks.size(); ++r) sum += Acc(value<T>(ranks[r], i));
    return T(sum);
  }
}
template <class T>
bool same_bits(const T* a, const T* b, int64_t n) {
  return n == 0 || std::memcmp(a, b, size_t(n) * sizeof(T)) == 0;
}
template <class T>
void remember(const std::vector<T>& v) {
  const char* p = reinterpret_cast<const char*>(v.data());
  for (size_t i = 0; i < v.size() * sizeof(T); ++i) digest = mix64(digest ^ uint8_t(p[i]));
}

std::vector<Comm> groups() {
  std::vector<Comm> mine;
  for (const Comm& comm : {everyone, even, backwards, pair})
    if (comm) mine.push_back(comm);
  return mine;
}
const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 17, 1000, 70001};

template <class T>
class Sums : public testing::Test {};
using Types = testing::Types<float, double, bf16, int32_t>;
TYPED_TEST_SUITE(Sums, Types);

TYPED_TEST(Sums, AllReduceIsTheSumInOrderOfRanks) {
  using T = TypeParam;
  for (const Comm& comm : groups())
    for (int64_t n : sizes) {
      auto data = values<T>(world->rank(), n);
      std::vector<T> expected(n);
      for (int64_t i = 0; i < n; ++i) expected[i] = sum_of<T>(comm.ranks(), i);
      comm.all_reduce(data.data(), n, "gradients");
      EXPECT_TRUE(same_bits(data.data(), expected.data(), n)) << n << " elements on " << comm.size() << " ranks";
      remember(data);
    }
}

TYPED_TEST(Sums, ReduceScatterIsTheSumInOrderOfRanks) {
  using T = TypeParam;
  for (const Comm& comm : groups())
    for (int64_t n : sizes) {
      const int64_t begin = comm.rank() * n;
      auto in = values<T>(world->rank(), n * comm.size());
      std::vector<T> out(n), expected(n);
      for (int64_t i = 0; i < n; ++i) expected[i] = sum_of<T>(comm.ranks(), begin + i);
      comm.reduce_scatter(out.data(), in.data(), n, "gradients");
      EXPECT_TRUE(same_bits(out.data(), expected.data(), n));
      comm.reduce_scatter(in.data() + begin, in.data(), n, "gradients in place");
      EXPECT_TRUE(same_bits(in.data() + begin, expected.data(), n));
      remember(out);
    }
}

TYPED_TEST(Sums, ManyBegunAtOnce) {
  using T = TypeParam;
  for (const Comm& comm : groups()) {
    const int64_t n = 5003;
    auto a = values<T>(world->rank(), n), b = a, c = a;
    std::vector<T> gathered(n * comm.size()), scattered(n / comm.size());
    Begun first = comm.begin_all_reduce(a.data(), n, "first");
    Begun second = comm.begin_reduce_scatter(scattered.data(), c.data(), n / comm.size(), "second");
    Begun third = comm.begin_all_gather(gathered.data(), c.data(), n, "third");
    comm.all_reduce(b.data(), n, "between");
    first.wait(), second.wait(), third.wait();
    EXPECT_TRUE(same_bits(a.data(), b.data(), n));
    EXPECT_TRUE(same_bits(scattered.data(), a.data() + comm.rank() * (n / comm.size()), n / comm.size()));
    for (int r = 0; r < comm.size(); ++r)
      EXPECT_TRUE(same_bits(gathered.data() + r * n, values<T>(comm.ranks()[r], n).data(), n));
  }
}

TEST(Moves, AllGather) {
  for (const Comm& comm : groups())
    for (int64_t n : sizes) {
      const auto mine = values<float>(world->rank(), n);
      std::vector<float> out(n * comm.size()), expected;
      for (int r : comm.ranks()) {
        auto of_rank = values<float>(r, n);
        expected.insert(expected.end(), of_rank.begin(), of_rank.end());
      }
      comm.all_gather(out.data(), mine.data(), n, "weights");
      EXPECT_EQ(out, expected);
      std::vector<float> whole(n * comm.size());
      std::copy(mine.begin(), mine.end(), whole.begin() + comm.rank() * n);
      comm.all_gather(whole.data(), whole.data() + comm.rank() * n, n, "weights in place");
      EXPECT_EQ(whole, expected);
    }
}

// Rank s sends rank r count(s, r) elements; some send nothing, some all.
TEST(Moves, AllToAllWithUnevenCounts) {
  for (const Comm& comm : groups())
    for (int round = 0; round < 4; ++round) {
      auto count = [&](int s, int r) {
        return round == 0 ? 0 : round == 1 ? (r == 0) * 33 : (s * 7 + r * 3 + round) % 5 * 100;
      };
      const int p = comm.size(), me = comm.rank();
      std::vector<int64_t> to(p), from(p);
      for (int r = 0; r < p; ++r) to[r] = count(me, r), from[r] = count(r, me);
      std::vector<int32_t> in, out(std::accumulate(from.begin(), from.end(), int64_t(0))), expected;
      for (int r = 0; r < p; ++r)
        for (int i = 0; i < count(me, r); ++i) in.push_back(me * 1000000 + r * 1000 + i);
      for (int s = 0; s < p; ++s)
        for (int i = 0; i < count(s, me); ++i) expected.push_back(s * 1000000 + me * 1000 + i);
      comm.all_to_all(out.data(), from, in.data(), to, "rows");
      EXPECT_EQ(out, expected);
    }
}

TEST(Moves, BroadcastFromEveryRank) {
  for (const Comm& comm : groups())
    for (int root = 0; root < comm.size(); ++root)
      for (int64_t n : sizes) {
        auto data = values<double>(world->rank(), n);
        comm.broadcast(data.data(), n, root, "weights");
        EXPECT_EQ(data, values<double>(comm.ranks()[root], n));
      }
}

TEST(Moves, SendAndReceiveAlongALine) {
  for (const Comm& comm : groups()) {
    const int me = comm.rank(), last = comm.size() - 1;
    char letter = 'a';
    if (me > 0) comm.receive(&letter, 1, me - 1, "activations");
    EXPECT_EQ(letter, 'a' + me);
    ++letter;
    if (me < last) comm.send(&letter, 1, me + 1, "activations");
  }
}

// Large pieces around a ring in both directions at once, two to the same rank, and one to itself.
TEST(Moves, ExchangeInARing) {
  for (const Comm& comm : groups()) {
    const int64_t n = 300001;
    const int p = comm.size(), me = comm.rank(), next = (me + 1) % p, before = (me + p - 1) % p;
    auto a = values<float>(me, n), b = values<float>(me + 100, n);
    std::vector<float> from_before(n), second(n), from_next(n), own(5);
    Begun begun = comm.begin_exchange(
        {{next, a.data(), n}, {next, b.data(), n}, {before, a.data(), n}, {me, b.data(), 5}},
        {{before, from_before.data(), n}, {before, second.data(), n}, {next, from_next.data(), n}, {me, own.data(), 5}},
        "ring");
    begun.wait();
    EXPECT_EQ(from_before, values<float>(before, n));
    EXPECT_EQ(second, values<float>(before + 100, n));
    EXPECT_EQ(from_next, values<float>(next, n));
    EXPECT_TRUE(same_bits(own.data(), b.data(), 5));
  }
}

TEST(Values, OfTheHost) {
  for (const Comm& comm : groups()) {
    int lowest = world->size(), highest = 0;
    for (int r : comm.ranks()) lowest = std::min(lowest, r), highest = std::max(highest, r);
    EXPECT_EQ(comm.max(world->rank(), "highest"), highest);
    EXPECT_EQ(comm.min(double(world->rank()), "lowest"), lowest);
    EXPECT_EQ(comm.sum(int64_t(1) << 40, "sum"), int64_t(comm.size()) << 40);
    EXPECT_TRUE(std::isnan(comm.max(comm.rank() == comm.size() - 1 ? NAN : 1.0, "a NaN is seen by all")));
    EXPECT_TRUE(std::isnan(comm.min(comm.rank() == 0 ? NAN : 1.0, "a NaN is seen by all")));
    comm.barrier("end");
  }
  EXPECT_EQ(world->local_rank(), world->rank());  // all on one host
}

TEST(Misuse, IsOneLine) {
  float data[4] = {};
  const int64_t n = everyone.size();
  const std::vector<int64_t> few(n - 1), negative(n, -1);
  EXPECT_EQ(error_line([&] { everyone.all_to_all(data, few, data, few, "rows"); }),
            "all_to_all \"rows\": " + std::to_string(n - 1) + " counts for a group of " + std::to_string(n) + " ranks");
  EXPECT_EQ(error_line([&] { everyone.all_to_all(data, negative, data, negative, "rows"); }),
            "all_to_all \"rows\": -1 elements");
  EXPECT_EQ(error_line([&] { everyone.broadcast(data, 4, int(n), "weights"); }),
            "broadcast \"weights\": rank " + std::to_string(n) + " is not in the group: it has " + std::to_string(n));
  EXPECT_EQ(error_line([&] { everyone.send(data, 4, -1, "rows"); }),
            "send \"rows\": rank -1 is not in the group: it has " + std::to_string(n));
  EXPECT_EQ(error_line([&] {
              everyone.exchange({{everyone.rank(), data, 4}}, {}, "rows");
            }),
            "exchange \"rows\": what rank " + std::to_string(everyone.rank()) +
                " sends itself is not what it expects from itself");
  EXPECT_EQ(error_line([&] { everyone.all_reduce(data, -1, "gradients"); }), "all_reduce \"gradients\": -1 elements");
  const std::string ranks = " ranks";
  EXPECT_EQ(error_line([&] { world->host_comm({int(n)}, "far"); }),
            "group \"far\" of ranks " + std::to_string(n) + ": there are " + std::to_string(n) + ranks);
  EXPECT_EQ(error_line([&] {
              world->host_comm({0, 0}, "twice");
            }),
            "group \"twice\" of ranks 0 0: rank 0 is in it twice");
  EXPECT_EQ(error_line([&] { world->host_comm({}, "none"); }), "group \"none\" of ranks: it is empty");
  EXPECT_EQ(error_line([&] { World second; }),
            world->launcher() == std::string("single") ? "" : "a process has one World");
}

// This rank ends in the middle of a job, as a fault would end it.
void fail_as(const std::string& how, int rank) {
  std::vector<float> data(100000, 1.0f);
  everyone.all_reduce(data.data(), 1000, "before");
  if (world->rank() == rank) {
    if (how == "exit") std::exit(1);
    if (how == "exit0") std::exit(0);
    if (how == "kill") raise(SIGKILL);
    if (how == "sleep") sleep(10);
    if (how == "error") fail("shard x: truncated");
    if (how == "throw") throw 1;
    if (how == "size") everyone.all_reduce(data.data(), 500, "gradients");
    if (how == "finish") return;
    if (how == "begun") {  // its memory goes away while it is being written
      std::vector<float> gone(100000);
      Begun begun = everyone.begin_all_reduce(gone.data(), 100000, "gradients");
      fail("shard x: truncated");
    }
  }
  if (how == "everyone") fail("all ranks see this");
  everyone.all_reduce(data.data(), 100000, "gradients");
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (testing::GTEST_FLAG(list_tests)) return RUN_ALL_TESTS();
  std::unique_ptr<World> opened;
  try {
    const char* timeout = std::getenv("COMM_TIMEOUT");
    opened = std::make_unique<World>(timeout ? std::atof(timeout) : 60);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  world = opened.get();
  try {
    Cpu<float> dev;
    std::vector<int> all(world->size()), evens, back;
    std::iota(all.begin(), all.end(), 0);
    for (int r : all)
      if (r % 2 == 0) evens.push_back(r);
    back.assign(all.rbegin(), all.rend());
    everyone = world->comm(dev, all, "everyone");
    even = world->comm(dev, evens, "even");
    backwards = world->comm(dev, back, "backwards");
    for (int r = 0; r + 1 < world->size(); r += 2)
      if (Comm made = world->comm(dev, {r, r + 1}, "pair")) pair = made;
    EXPECT_EQ(bool(even), world->rank() % 2 == 0);
    if (argc == 4) {
      fail_as(argv[2], std::atoi(argv[3]));
      return 0;
    }
    if (world->rank() > 0) testing::GTEST_FLAG(brief) = true;  // failures alone
    const int failed = everyone.max(RUN_ALL_TESTS(), "status");
    digest = everyone.sum(digest, "digest");
    if (world->rank() == 0)
      std::printf("%d ranks by %s, digest %016llx, status %d\n", world->size(), world->launcher(),
                  static_cast<unsigned long long>(digest), failed);
    return failed;  // the World is closed by its destructor
  } catch (const std::exception& error) { world->abort(error.what()); }
}
