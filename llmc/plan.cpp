#include "llmc/plan.h"

#include <algorithm>

const char* category_name(Category c) {
  static const char* names[n_category] = {"weights", "gradients",        "optimizer",
                                          "saved",   "routing metadata", "transient workspace"};
  return names[int(c)];
}

// Ends are checked as they grow, so that no sum of sizes wraps around.
static size_t checked_end(size_t end) {
  if (end > size_t(1) << 62) fail("the plan needs more than 2^62 bytes");
  return end;
}
static size_t aligned(size_t bytes) { return (bytes + Plan::alignment - 1) / Plan::alignment * Plan::alignment; }

TensorInfo* Plan::add(std::string name, std::vector<int64_t> shape, DType dtype, Category category, bool persistent) {
  unsigned __int128 bytes = dtype_size(dtype);
  for (int64_t n : shape) {
    if (n < 0) fail("tensor ", name, ": negative extent ", n);
    bytes *= uint64_t(n);
    if (bytes > (uint64_t(1) << 62)) fail("tensor ", name, " is larger than 2^62 bytes");
  }
  TensorInfo t;
  t.name = std::move(name);
  t.shape = std::move(shape);
  t.dtype = dtype;
  t.category = category;
  t.layer = layer_;
  t.part = part_;
  t.persistent = persistent;
  t.bytes = size_t(bytes);
  tensors_.push_back(std::move(t));
  return &tensors_.back();
}

void Plan::place() {
  size_t end = 0;
  for (TensorInfo& t : tensors_) {
    if (!t.persistent) continue;
    t.offset = end;
    end = checked_end(end + aligned(t.bytes));
  }
  persistent_bytes_ = end;

  std::vector<TensorInfo*> order;
  for (TensorInfo& t : tensors_)
    if (!t.persistent && t.first >= 0) order.push_back(&t);
  std::stable_sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->bytes > b->bytes; });

  std::vector<TensorInfo*> placed;  // ascending offset
  arena_bytes_ = persistent_bytes_;
  for (TensorInfo* t : order) {
    size_t offset = persistent_bytes_, need = aligned(t->bytes);
    for (TensorInfo* other : placed) {
      if (other->last < t->first || t->last < other->first) continue;  // never alive together
      if (other->offset >= offset + need) break;                       // the gap before it is large enough
      offset = std::max(offset, other->offset + aligned(other->bytes));
    }
    t->offset = offset;
    arena_bytes_ = std::max(arena_bytes_, checked_end(offset + need));
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), t, [](auto* a, auto* b) { return a->offset < b->offset; }), t);
  }
}

size_t Plan::separate_bytes() const {
  size_t sum = 0;
  for (const TensorInfo& t : tensors_) sum = checked_end(sum + t.bytes);
  return sum;
}

size_t Plan::category_bytes(Category c) const {
  size_t sum = 0;
  for (const TensorInfo& t : tensors_)
    if (t.category != Category::workspace && (c == Category::workspace || t.category == c)) sum += t.bytes;
  return c == Category::workspace ? arena_bytes_ - sum : sum;
}

size_t Plan::layer_bytes(int layer, const std::string& part, Category c) const {
  size_t sum = 0;
  for (const TensorInfo& t : tensors_)
    if (t.layer == layer && t.category == c && (part.empty() || t.part == part)) sum += t.bytes;
  return sum;
}
