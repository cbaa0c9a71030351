// The memory plan: every tensor has a name, shape, dtype, lifetime and category before a byte is allocated.
//
// The model's code is run twice over the same lines. First "planning": ops are not executed, but each one advances a
// clock and stamps the tensors it was given, so that first and last use are known. Then place() packs the tensors whose
// lifetimes overlap side by side, and the rest on top of each other, into one arena. Afterwards the very same code runs
// for real. There is no second description of the model that could drift from the first.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "llmc/device.h"
#include "llmc/types.h"

enum class Category { weights, gradients, optimizer, saved, metadata, workspace };
inline constexpr int n_category = 6;
const char* category_name(Category c);

// One tensor of the plan. `first` and `last` are ticks of the planning clock, both inclusive; a persistent tensor lives
// from start to end. `data` is null until the arena is allocated.
struct TensorInfo {
  std::string name;
  std::vector<int64_t> shape;
  DType dtype = DType::f32;
  Category category = Category::workspace;
  int layer = -1;    // -1: belongs to no layer
  std::string part;  // "attention", "moe", "mlp" or ""
  bool persistent = false;
  int64_t first = -1, last = -1;
  size_t bytes = 0;   // exact size of the elements
  size_t offset = 0;  // in the arena
  void* data = nullptr;
};

// One op of the plan: what executor.op() was given at a tick of the planning clock.
struct PlannedOp {
  const char* name;
  int layer;
  bool recomputing;  // it makes again what the forward pass did not keep
  bool extra;        // only some steps need it (a further pass of rows)
  size_t bytes;      // of the tensors it was given, once for each time it was given them; scratch not counted
};
// The ticks of a program begin at `first` and end where those of the next begin.
struct PlannedProgram {
  std::string name;
  int64_t first;
};

// A typed handle. Converts to the T* that ops take; a default-constructed handle is the null tensor.
template <class T>
struct Tensor {
  TensorInfo* info = nullptr;
  operator T*() const { return info ? static_cast<T*>(info->data) : nullptr; }
  explicit operator bool() const { return info != nullptr; }
  T* data() const { return *this; }
  int64_t size() const { return info ? int64_t(info->bytes / sizeof(T)) : 0; }
};

class Plan {
 public:
  static constexpr size_t alignment = 256;

  // Declares a tensor. Sizes are computed in 64 bits; a product past 2^62 bytes is an Error.
  TensorInfo* add(std::string name, std::vector<int64_t> shape, DType dtype, Category category, bool persistent);
  template <class T>
  Tensor<T> persistent(std::string name, std::vector<int64_t> shape, Category category) {
    return {add(std::move(name), std::move(shape), dtype_of<T>(), category, true)};
  }

  // The layer and part that the tensors declared next belong to.
  void set_place(int layer, std::string part) { layer_ = layer, part_ = std::move(part); }
  int layer() const { return layer_; }

  // Declares the next op; returns its tick.
  int64_t add_op(PlannedOp op) { return ops_.push_back(op), ticks() - 1; }
  void begin_program(std::string name) { programs_.push_back({std::move(name), ticks()}); }
  void touch(TensorInfo* t, int64_t tick) {
    if (t->first < 0) t->first = tick;
    t->last = tick;
  }

  // Chooses offsets: persistent tensors one after another, then the others, largest first, each at the lowest offset
  // that is free during its whole life.
  void place();

  size_t arena_bytes() const { return arena_bytes_; }
  // What --arena separate allocates: every tensor by itself.
  size_t separate_bytes() const;
  size_t persistent_bytes() const { return persistent_bytes_; }
  // Bytes by category. For workspace it is what the arena needs beyond the other categories, so that the sum over the
  // categories is arena_bytes(), to the byte.
  size_t category_bytes(Category c) const;
  // Bytes of one category that belong to one layer and part ("" = every part).
  size_t layer_bytes(int layer, const std::string& part, Category c) const;
  const std::deque<TensorInfo>& tensors() const { return tensors_; }
  std::deque<TensorInfo>& tensors() { return tensors_; }
  const std::vector<PlannedOp>& ops() const { return ops_; }  // by tick
  const std::vector<PlannedProgram>& programs() const { return programs_; }
  int64_t ticks() const { return int64_t(ops_.size()); }

 private:
  std::deque<TensorInfo> tensors_;  // a deque: handles point into it
  int layer_ = -1;
  std::string part_;
  std::vector<PlannedOp> ops_;
  std::vector<PlannedProgram> programs_;
  size_t arena_bytes_ = 0, persistent_bytes_ = 0;
};

// The memory that a plan describes: one arena, or (separate) an allocation of its own for every tensor, poisoned with
// NaN bytes at the end of its lifetime, so that memory checkers see real edges and stale reads show.
template <class Device>
class Arena {
 public:
  Arena(Device& device, Plan& plan, bool separate) : device_(device), plan_(plan), separate_(separate) {
    if (separate_) {
      for (TensorInfo& t : plan_.tensors()) {
        allocated_ += t.bytes;
        t.data = device_.allocate(t.bytes);
        device_.fill_byte(t.data, t.persistent ? 0 : 0xFF, t.bytes);
      }
    } else {
      allocated_ = plan_.arena_bytes();
      base_ = static_cast<char*>(device_.allocate(allocated_));
      device_.zero(base_, plan_.persistent_bytes());
      for (TensorInfo& t : plan_.tensors()) t.data = base_ + t.offset;
    }
  }
  // Memory that somebody else has, who says where each tensor is.
  Arena(Device& device, Plan& plan) : device_(device), plan_(plan), separate_(false) {}
  ~Arena() {
    if (separate_)
      for (TensorInfo& t : plan_.tensors()) device_.release(t.data);
    else
      device_.release(base_);
    for (TensorInfo& t : plan_.tensors()) t.data = nullptr;
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  bool separate() const { return separate_; }
  char* base() const { return base_; }  // of the one allocation; separate: null
  size_t allocated_bytes() const { return allocated_; }
  void end_of_life(TensorInfo* t) { device_.fill_byte(t->data, 0xFF, t->bytes); }

 private:
  Device& device_;
  Plan& plan_;
  bool separate_;
  char* base_ = nullptr;
  size_t allocated_ = 0;
};

// Called for every op that runs with its name; empty by default. Profilers and tests hang themselves here.
using OpObserver = std::function<void(const char* op, int layer)>;

// Marks the ops of its scope as recomputation.
template <class Device>
class Executor;
template <class Device>
struct Recomputing {
  Executor<Device>& x;
  bool outer;
  explicit Recomputing(Executor<Device>& x, bool on = true) : x(x), outer(x.recomputing) { x.recomputing |= on; }
  ~Recomputing() { x.recomputing = outer; }
};

// Runs ops, or plans them. op("name", function, arguments...) reads like a call of function(device, arguments...);
// arguments that are tensors are stamped with the clock while planning and passed as pointers while running.
template <class Device>
class Executor {
 public:
  Executor(Device& device, Plan& plan) : device(device), plan(plan) {}

  Device& device;
  Plan& plan;
  OpObserver before, observer;  // `observer` after the op
  bool recomputing = false;     // the ops of the moment make again what the forward pass did not keep
  bool extra = false;           // only some steps need them
  bool skipping = false;        // they would have nothing to do, and are not called

  bool planning() const { return arena_ == nullptr; }
  void run_with(Arena<Device>* arena) { arena_ = arena; }

  // Starts program `id` (training step, evaluation, decoding): its temporaries are its own. The name is the plan's.
  void begin(int id, const char* name = "") {
    if (int(programs_.size()) <= id) programs_.resize(id + 1);
    program_ = &programs_[id];
    if (planning()) {
      if (!program_->temporaries.empty()) fail("program ", id, " is planned twice");
      program_->first_tick = plan.ticks();
      plan.begin_program(name);
    }
    cursor_ = 0;
    tick_ = program_->first_tick;
  }

  // While planning: programs `first` to `last`, the newest, run in any order and many times. What one of them leaves
  // for another lives as long as any of them.
  void interleave(int first, int last) {
    const int64_t begin = programs_[first].first_tick, end = plan.ticks() - 1;
    for (int id = first; id <= last; ++id) {
      const int64_t next = id < last ? programs_[id + 1].first_tick : end + 1;
      for (TensorInfo* t : programs_[id].temporaries)
        if (t->last >= next) t->first = begin, t->last = end;
    }
  }

  // A tensor of the running program, alive from the first op that is given it to the last.
  template <class T>
  Tensor<T> tensor(const char* name, std::vector<int64_t> shape, Category category = Category::workspace) {
    if (planning()) program_->temporaries.push_back(plan.add(name, std::move(shape), dtype_of<T>(), category, false));
    if (cursor_ >= program_->temporaries.size() || program_->temporaries[cursor_]->name != name)
      fail("the program asks for tensor '", name, "', which was not planned at this place");
    return {program_->temporaries[cursor_++]};
  }

  template <class... Params, class... Args>
  void op(const char* name, void (*function)(Device&, Params...), const Args&... args) {
    static_assert(sizeof...(Params) == sizeof...(Args),
                  "an op takes exactly its declared arguments: there are no defaults");
    if (planning()) {
      int64_t tick = plan.add_op({name, plan.layer(), recomputing, extra, (bytes_of(args) + ... + 0)});
      (stamp(args, tick), ...);
      return;
    }
    if (!skipping) {
      device.layer = plan.layer();
      if (before) before(name, plan.layer());
      function(device, static_cast<Params>(args)...);
      if (observer) observer(name, plan.layer());
    }
    if (arena_->separate()) (poison(args), ...);
    ++tick_;
  }

  // Of the op that runs: its place in plan.ops().
  int64_t tick() const { return tick_; }

 private:
  struct Program {
    std::vector<TensorInfo*> temporaries;
    int64_t first_tick = 0;
  };

  template <class A>
  void each_tensor(const A& arg, auto&& visit) {
    if constexpr (requires { arg.info; }) {
      if (arg.info) visit(arg.info);
    } else if constexpr (requires { arg.for_each_tensor(visit); }) {
      arg.for_each_tensor([&](auto t) { each_tensor(t, visit); });
    }
  }
  template <class A>
  void stamp(const A& arg, int64_t tick) {
    each_tensor(arg, [&](TensorInfo* t) {
      if (!t->persistent) plan.touch(t, tick);
    });
    if constexpr (requires { arg.tensor(); }) {  // a gradient: what is written twice has lost the first
      TensorInfo* t = arg.tensor();
      if (!t || arg.add) return;
      if (t->first >= 0) fail("gradient ", t->name, " is written twice");
      plan.touch(t, tick);
    }
  }
  template <class A>
  size_t bytes_of(const A& arg) {
    size_t bytes = 0;
    if constexpr (requires { arg.tensor(); }) {  // a gradient: written, or read and written
      if (TensorInfo* t = arg.tensor()) bytes = t->bytes * (arg.add ? 2 : 1);
    } else {
      each_tensor(arg, [&](TensorInfo* t) { bytes += t->dtype == DType::u8 ? 0 : t->bytes; });
    }
    return bytes;
  }
  template <class A>
  void poison(const A& arg) {
    each_tensor(arg, [&](TensorInfo* t) {
      if (!t->persistent && t->last == tick_) arena_->end_of_life(t);
    });
  }

  Arena<Device>* arena_ = nullptr;
  std::deque<Program> programs_;
  Program* program_ = nullptr;
  size_t cursor_ = 0;
  int64_t tick_ = 0;
};
