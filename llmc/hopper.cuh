// The vocabulary of Hopper kernels (sm_90a): what lets one group of warps load tiles while another multiplies them.
//
//   mbarrier   a counter in shared memory on which both threads and TMA arrive, and which threads wait for
//   TMA        the tensor memory accelerator: one thread asks for a box of a tensor, the box arrives in shared memory by itself
//   wgmma      a product of a warpgroup (four warps): operands in shared memory, accumulators in registers, asynchronous
//   setmaxnreg registers go from the warpgroup that copies to those that multiply
//
// Each function is one PTX instruction, named beside it, with what the instruction demands of its caller. Everything
// here needs the target sm_90a; compiled for another GPU a kernel must not reach it (HOPPER_CODE).
#pragma once
#include <cuda.h>

#include "llmc/cuda_mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE 1
#else
#define HOPPER_CODE 0
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !HOPPER_CODE
#error "for Hopper compile for sm_90a (-gencode=arch=compute_90a,code=sm_90a), not sm_90"
#endif

namespace hopper {

// Whether this GPU runs what is written here: it is a Hopper, and the program has code for sm_90a and not only PTX of an
// older architecture that the driver translates.
bool usable(const GpuBase& dev);
bool is_compiled();

constexpr int warpgroup = 128;            // threads; a warpgroup starts at a multiple of four warps
constexpr int shared_bytes = 227 * 1024;  // that a block may use

// ---- mbarrier ----
// A barrier is 8 bytes of shared memory, given by its address. It counts arrivals, and bytes still to come, and when
// both are done enters the next phase. wait(barrier, parity) returns once the phase of that parity is over: waiting for
// a phase is right only while the barrier is in that phase or the one after, so nobody may run two phases ahead.

// mbarrier.init: before anyone uses it; then fence_barriers() and a barrier of the block (or cluster).
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// fence.mbarrier_init: makes initialised barriers visible to TMA and to the cluster.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// mbarrier.arrive: releases what this thread wrote and read before.
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// mbarrier.arrive.expect_tx: one arrival, and the phase also waits for `bytes` from TMA.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// cp.async.mbarrier.arrive.noinc: one arrival once all copy_async() of this thread so far have landed. It counts among
// the arrivals of init_barrier().
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// mapa + mbarrier.arrive.shared::cluster: arrives at the same barrier of block `block` of the cluster. For saying "I have
// read it": what was written is released to this block alone. (.release.cluster would wait for all stores on their way,
// those to global memory too: a grouped product took one and a half times as long.)
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
// mbarrier.try_wait.parity: acquires what those who arrived had released.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// bar.sync / bar.arrive: barrier `id` (1-15; 0 is __syncthreads) of `threads` threads, some of which only arrive.
__device__ __forceinline__ void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_threads(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters ----

// %cluster_ctarank: this block's number within its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
// barrier.cluster: all threads of all blocks of the cluster, not necessarily warp by warp. A block must not end before
// the others are done with its shared memory and barriers.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// launch() of cuda_common.cuh for a grid whose blocks form clusters of `cluster` neighbours; grid.x is a multiple of it.
// (__cluster_dims__ on the kernel would do the same, but does not compile for GPUs without clusters.)
template <class... Params, class... Args>
void launch_clusters(GpuBase& dev, void (*kernel)(Params...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                     const Args&... args) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = dev.stream;
  config.attrs = &size, config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// ---- TMA ----

// What TMA knows of a tensor: three dimensions, the innermost contiguous, and the box that is copied at a
// time. Boxes may reach beyond the tensor: that part is loaded as zeros and not stored.
using TensorMap = CUtensorMap;

// A tensor (batches, rows, width) of bf16, rows of different batches `batch_stride` elements apart, in boxes of
// box_rows x box_columns. Columns are 64: 128 bytes a row, whose 16-byte chunk c is placed at c ^ (row % 8) (the 128-byte
// swizzle); or 32: 64 bytes a row, chunk c at c ^ (row / 2 % 4).
// width % 8 == 0, box_rows <= 256, data aligned to 16 bytes; Error where the driver refuses.
TensorMap tensor_map(const bf16* data, int64_t batches, int64_t rows, int64_t width, int64_t batch_stride, int box_rows,
                     int box_columns = 64);

// prefetch.tensormap
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// cp.async.bulk.tensor: the box at (batch, row, column) to `to`; its bytes arrive at `barrier`. One thread. `to` is a
// multiple of 1024, so that the swizzle starts at row 0; the map lies in constant, parameter or global memory.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap* map, int column, int row, int batch,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(batch), "r"(barrier)
      : "memory");
}
// The same, to the same place in every block of the cluster whose bit is set in `blocks`; each block's own barrier (at
// the same address) receives the bytes.
__device__ __forceinline__ void load_box_multicast(uint32_t to, const TensorMap* map, int column, int row, int batch,
                                                   uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(batch), "r"(barrier), "h"(blocks)
      : "memory");
}
// cp.async.bulk.tensor (store): the box from shared memory at `from`. What threads wrote there needs
// fence_async_proxy() in each of them and a barrier first. Belongs to this thread's current bulk group; a block waits
// for its last group (wait_stores_read) before it ends.
__device__ __forceinline__ void store_box(const TensorMap* map, uint32_t from, int column, int row, int batch) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(from), "r"(column), "r"(row), "r"(batch)
               : "memory");
}
// cp.async.bulk.commit_group, cp.async.bulk.wait_group.read: until all but the newest `pending` groups of this thread's
// stores have read shared memory, which may then be written again.
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// cp.async.bulk.wait_group: until they are done, not only read: what they wrote may be released to others.
template <int pending>
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// Plain bytes without a map: a multiple of 16, both ends aligned to 16. One thread.
// cp.async.bulk to shared memory; they arrive at `barrier`.
__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// cp.async.bulk to global memory, in this thread's current bulk group.
__device__ __forceinline__ void store_bytes(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
// cp.reduce.async.bulk: likewise, added as fp32 to what is there, each element once and in no given order.
__device__ __forceinline__ void add_floats(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// fence.proxy.async.shared::cta: ordinary accesses to shared memory before it (copy_async() too) are ordered before
// those of TMA and of wgmma after it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- stmatrix ----

// stmatrix.x4: four 8x8 matrices from the registers in which products leave them; lane l gives the address (a multiple
// of 16) of row l%8 of matrix l/8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- registers ----

// setmaxnreg: all warps of a warpgroup together; a multiple of 8 from 24 to 256. The kernel needs a bound on its
// registers (__launch_bounds__), and each role its own branch.
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// ---- wgmma ----
// Operands lie in shared memory in panels of 128 bytes a row, swizzled as tensor_map() says, each panel a multiple of
// 1024 bytes. There are two ways for an operand with `extent` rows (of A) or columns (of B) and 64 of the reduction:
//   K-major  one panel: `extent` rows, each holding the 64 elements of the reduction
//   M-major  extent / 64 panels, one after the other: 64 rows, row k holding 64 neighbouring elements for step k
// The name says what is contiguous; for B "M" is its column. A descriptor names an operand's first byte and two
// distances. K-major: from one group of eight rows to the next; the other is unused. M-major: from one group of eight
// rows to the next within a panel, and from panel to panel.

// Descriptor of an operand at `address`; with panel_bytes = 64 * 128 for M-major. To move on by 16 of the reduction,
// add step_k(); by bytes, bytes / 16.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t swizzle_128 = uint64_t(1) << 62, eight_rows = uint64_t(1024 / 16) << 32,
                     panel = uint64_t(64 * 128 / 16) << 16;
  return swizzle_128 | eight_rows | panel | uint64_t((address & 0x3FFFF) >> 4);
}
template <bool m_major>
constexpr uint64_t step_k() {
  return m_major ? 16 * 128 / 16 : 32 / 16;
}

// wgmma.fence: before the first product, and where registers of accumulators were touched since the last.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// wgmma.commit_group, wgmma.wait_group: accumulators may be read, and operands overwritten, once the group is done.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// No instruction: after wait_products() and before d is read, so that the compiler does not move what reads d ahead of
// the wait, about whose meaning it knows nothing.
template <int blocks>
__device__ __forceinline__ void hold(float (&d)[blocks][4]) {
#pragma unroll
  for (int j = 0; j < blocks; ++j)
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

// The same for operands in registers, before fence_products(): they are written by then.
template <int n>
__device__ __forceinline__ void hold(uint32_t (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])::"memory");
}

// wgmma.mma_async m64nNk16, bf16 with fp32 accumulators: d (64 x N) = a (64 x 16) b (16 x N), plus d if `accumulate`.
// Lane 4g + t of warp w holds rows 16w + g and 16w + g + 8, columns 8j + 2t and 8j + 2t + 1, as d[j][0..3]: what mma
// leaves. The whole warpgroup; d is not to be touched before wait_products().
#define HOPPER_32(i)                                                                                                   \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), \
      "+f"(d[i + 1][3]), "+f"(d[i + 2][0]), "+f"(d[i + 2][1]), "+f"(d[i + 2][2]), "+f"(d[i + 2][3]),                   \
      "+f"(d[i + 3][0]), "+f"(d[i + 3][1]), "+f"(d[i + 3][2]), "+f"(d[i + 3][3]), "+f"(d[i + 4][0]),                   \
      "+f"(d[i + 4][1]), "+f"(d[i + 4][2]), "+f"(d[i + 4][3]), "+f"(d[i + 5][0]), "+f"(d[i + 5][1]),                   \
      "+f"(d[i + 5][2]), "+f"(d[i + 5][3]), "+f"(d[i + 6][0]), "+f"(d[i + 6][1]), "+f"(d[i + 6][2]),                   \
      "+f"(d[i + 6][3]), "+f"(d[i + 7][0]), "+f"(d[i + 7][1]), "+f"(d[i + 7][2]), "+f"(d[i + 7][3])
#define HOPPER_D0                                                                                                      \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define HOPPER_D1                                                                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59" \
  ",%60,%61,%62,%63"
#define HOPPER_D2                                                                                                    \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91" \
  ",%92,%93,%94,%95"
#define HOPPER_D3                                                                                                   \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118" \
  ",%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define HOPPER_PRODUCT(n, registers, a_at, b_at, sum_at, a_way, b_way, ...)                               \
  asm volatile("{\n\t.reg .pred sum;\n\tsetp.ne.b32 sum, " sum_at                                         \
               ", 0;\n\t"                                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" registers "}, " a_at ", " b_at \
               ", sum, 1, 1, " a_way ", " b_way ";\n\t}"                                                  \
               : __VA_ARGS__                                                                              \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int(a_m_major)), "n"(int(b_m_major)))

template <bool a_m_major, bool b_m_major, int blocks>
__device__ __forceinline__ void multiply(float (&d)[blocks][4], uint64_t a, uint64_t b, int accumulate) {
  static_assert(blocks == 8 || blocks == 16 || blocks == 24 || blocks == 32);
  if constexpr (blocks == 8)
    HOPPER_PRODUCT("64", HOPPER_D0, "%32", "%33", "%34", "%35", "%36", HOPPER_32(0));
  else if constexpr (blocks == 16)
    HOPPER_PRODUCT("128", HOPPER_D0 HOPPER_D1, "%64", "%65", "%66", "%67", "%68", HOPPER_32(0), HOPPER_32(8));
  else if constexpr (blocks == 24)
    HOPPER_PRODUCT("192", HOPPER_D0 HOPPER_D1 HOPPER_D2, "%96", "%97", "%98", "%99", "%100", HOPPER_32(0), HOPPER_32(8),
                   HOPPER_32(16));
  else
    HOPPER_PRODUCT("256", HOPPER_D0 HOPPER_D1 HOPPER_D2 HOPPER_D3, "%128", "%129", "%130", "%131", "%132", HOPPER_32(0),
                   HOPPER_32(8), HOPPER_32(16), HOPPER_32(24));
}

// The same with A in registers: a holds what two neighbouring blocks of an accumulator hold, rounded to bf16 (lanes as
// in mma). The registers of a are not to be written before wait_products() either.
#define HOPPER_REGISTER_PRODUCT(n, registers, a_at, b_at, sum_at, b_way, ...)                               \
  asm volatile("{\n\t.reg .pred sum;\n\tsetp.ne.b32 sum, " sum_at                                           \
               ", 0;\n\t"                                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" registers "}, {" a_at "}, " b_at \
               ", sum, 1, 1, " b_way ";\n\t}"                                                               \
               : __VA_ARGS__                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(b_m_major)))

template <bool b_m_major, int blocks>
__device__ __forceinline__ void multiply(float (&d)[blocks][4], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(blocks == 8 || blocks == 16);
  if constexpr (blocks == 8)
    HOPPER_REGISTER_PRODUCT("64", HOPPER_D0, "%32,%33,%34,%35", "%36", "%37", "%38", HOPPER_32(0));
  else
    HOPPER_REGISTER_PRODUCT("128", HOPPER_D0 HOPPER_D1, "%64,%65,%66,%67", "%68", "%69", "%70", HOPPER_32(0),
                            HOPPER_32(8));
}
#undef HOPPER_REGISTER_PRODUCT
#undef HOPPER_PRODUCT
#undef HOPPER_32
#undef HOPPER_D0
#undef HOPPER_D1
#undef HOPPER_D2
#undef HOPPER_D3

}  // namespace hopper
