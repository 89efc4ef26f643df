// Tasks on workers: claimed one by one in order, so that a task may wait for an earlier one without deadlock, and
// ordered sums, whose terms are added in the order of their rank whichever worker has them.
#pragma once

#include <sched.h>

#include "csrc/cpu/scratch.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/tiles.h"
#include "csrc/cpu/workers.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// Calls f(worker, first, last) on claimed ranges of `grain` tasks, in increasing order, until `count` are done.
template <class Function>
inline void for_each_claim(const Workers& workers, int64_t count, int64_t grain, Function f) {
  if (count <= 0) return;
  struct Context {
    Function* f;
    int64_t next, count, grain;
    TileUnit tiles;
  } context{&f, 0, count, grain, workers.tiles};
  const auto claim = [](void* opaque, int worker) {
    auto& c = *static_cast<Context*>(opaque);
    const TileScope tiles(c.tiles);
    for (;;) {
      const int64_t first = __atomic_fetch_add(&c.next, c.grain, __ATOMIC_RELAXED);
      if (first >= c.count) return;
      (*c.f)(worker, first, min(first + c.grain, c.count));
    }
  };
  if (workers.count == 1 || count <= grain) {  // claimed at once; f is compiled at one place, once
    context.grain = count;
    return claim(&context, 0);
  }
  workers.run(static_cast<int>(min(workers.count, ceil_div(count, grain))), claim, &context);
}

// A sum whose terms come in the order of their rank: wait_turn, add, end_turn. The counter starts at 0.
inline void wait_turn(const int32_t* turn, int32_t rank) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != rank; ++spins) {
    if (spins >= 1024) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}
inline void end_turn(int32_t* turn, int32_t rank) { __atomic_store_n(turn, rank + 1, __ATOMIC_RELEASE); }

// Memory for one call, never initialised.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t floats) {
    if (floats > 0) block_ = take_scratch(static_cast<size_t>(floats) * sizeof(float));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_.data != nullptr) give_back_scratch(block_);
  }
  float* data() const { return block_.data; }

 private:
  ScratchBlock block_;
};

// Hands out aligned pieces of one allocation; with no memory behind it, it only counts.
class Carver {
 public:
  explicit Carver(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(floats, 16);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
