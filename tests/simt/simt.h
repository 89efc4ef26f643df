// CUDA kernels on the CPU: one fiber per CUDA thread, blocks one after another, warps and lanes in an order that a seed
// chooses. csrc/cuda/device.h includes this in place of CUDA's headers where MMK_SIMT is defined.
//
// Caught: threads that never reach a barrier, lanes that meet at different collectives, misaligned 16-byte accesses,
// reads of shared memory before it is written (it starts as NaN), of copies before they were waited for; with
// AddressSanitizer what is out of bounds, with ThreadSanitizer missing barriers.
// Not emulated: wgmma, tensor memory, mbarriers, clusters, atomics. Sums of an mma are in another order than a GPU's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace simt {

inline constexpr unsigned kLanes = 32;

enum class State : uint8_t { kRuns, kWaitsForWarp, kWaitsForBlock, kDone };

struct Copy {
  void* to;
  const void* from;  // null fills with zeros
};

struct Thread {
  Context context;
  dim3 index;
  unsigned warp = 0;
  State state = State::kRuns;
  const void* collective = nullptr;  // where this lane waits for the others of its warp,
  void* argument = nullptr;          // and with what
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

struct Statistics {
  uint64_t blocks, barriers, collectives, mma, matrix_loads, bank_conflicts, copies;
};

struct World {
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<Stack>> stacks;
  dim3 grid, block, at;
  Thread* current = nullptr;
  Context main;
  std::function<void()> body;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Statistics statistics{};
  uint64_t seed = 0;  // 0: in order
  std::string error;
  char barrier = 0;  // an address for ThreadSanitizer
};

inline World& world() {
  static World w;
  return w;
}

SIMT_UNCHECKED inline void stop(bool last = false) {
  World& w = world();
  switch_fibers(w.current->context, w.main, last);
}

/// End the launch with an error; the threads of the block stay where they are.
[[noreturn]] inline void fail(const std::string& what) {
  World& w = world();
  const dim3 &b = w.at, &t = w.current->index;
  const auto name = [](const dim3& d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  w.error = what + ", block " + name(b) + " thread " + name(t);
  for (;;) stop(true);
}

SIMT_UNCHECKED inline void resume(Thread& thread) {
  World& w = world();
  w.current = &thread;
  switch_fibers(w.main, thread.context);
  w.current = nullptr;
}

SIMT_UNCHECKED inline void run_thread() {
  World& w = world();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &w.main.bottom, &w.main.size);
#endif
  w.body();
  release(&w.barrier);
  w.current->state = State::kDone;
  stop(true);
  std::abort();
}

SIMT_UNCHECKED inline void wait_for_block() {
  world().current->state = State::kWaitsForBlock;
  stop();
}

/// The last lane of a warp to come here runs `operation` on the arguments of all.
using Operation = void (*)(void** arguments);

SIMT_UNCHECKED inline void meet(Operation operation, void* argument) {
  World& w = world();
  Thread* self = w.current;
  self->collective = reinterpret_cast<const void*>(operation);
  self->argument = argument;
  Thread* lanes = &w.threads[self->warp * kLanes];
  unsigned here = 0;
  const char* wrong = nullptr;
  {
    Unobserved unobserved;
    for (unsigned i = 0; i < kLanes; ++i) {
      if (&lanes[i] == self || lanes[i].state == State::kWaitsForWarp) {
        if (lanes[i].collective != self->collective) wrong = "lanes of a warp meet at different collectives";
        ++here;
      } else if (lanes[i].state == State::kDone) {
        wrong = "a collective with a lane that has returned";
      }
    }
  }
  if (wrong) fail(wrong);
  if (here < kLanes) {
    self->state = State::kWaitsForWarp;
    stop();
    return;
  }
  Unobserved unobserved;
  void* arguments[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) arguments[i] = lanes[i].argument;
  operation(arguments);
  ++w.statistics.collectives;
  for (unsigned i = 0; i < kLanes; ++i) lanes[i].state = State::kRuns;
}

/// One block, from its first thread's first step to its last thread's return, or to an error.
SIMT_UNCHECKED inline void run_block(std::mt19937_64& random) {
  World& w = world();
  const unsigned count = unsigned(w.threads.size());
  std::vector<unsigned> warps(count / kLanes), lanes(kLanes);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  for (unsigned i = 0; i < kLanes; ++i) lanes[i] = i;
  while (true) {
    bool ran = false;
    if (w.seed) std::shuffle(warps.begin(), warps.end(), random);
    for (unsigned warp : warps) {
      if (w.seed) std::shuffle(lanes.begin(), lanes.end(), random);
      uint64_t turns = w.seed ? 1 + random() % 64 : ~uint64_t(0);  // before another warp's
      for (bool any = true; any && turns > 0; --turns) {
        any = false;
        for (unsigned lane : lanes) {
          Thread& thread = w.threads[warp * kLanes + lane];
          if (thread.state != State::kRuns) continue;
          resume(thread);
          if (!w.error.empty()) return;
          ran = any = true;
        }
      }
    }
    unsigned done = 0, waiting = 0;
    for (const Thread& t : w.threads) {
      done += t.state == State::kDone;
      waiting += t.state == State::kWaitsForBlock;
    }
    if (done == count) return;
    if (waiting > 0 && waiting + done == count) {
      if (done > 0) {
        w.error = "__syncthreads with threads that have returned";
        return;
      }
      ++w.statistics.barriers;
      for (Thread& t : w.threads) t.state = State::kRuns;
    } else if (!ran) {
      w.error = "deadlock: threads wait for others that never come";
      return;
    }
  }
}

/// Dynamic shared memory: NaN in every 16-bit format and in float32 at first, and not one byte longer under ASan.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : memory_(nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    if (posix_memalign(&memory_, 128, bytes ? bytes : 1)) std::abort();
#else
    if (posix_memalign(&memory_, 1024, bytes + 1024)) std::abort();
#endif
  }
  ~SharedMemory() { std::free(memory_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  unsigned char* get() const { return static_cast<unsigned char*>(memory_); }

 private:
  void* memory_;
};

SIMT_UNCHECKED inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  Unobserved unobserved;
  World& w = world();
  const unsigned count = block.x * block.y * block.z;
  if (count == 0 || count % kLanes || count > 1024) throw std::runtime_error("simt: a block of no whole warps");
  std::mt19937_64 random(w.seed);
  SharedMemory shared(shared_bytes);
  w.grid = grid;
  w.block = block;
  w.body = body;
  w.shared = shared.get();
  w.shared_bytes = shared_bytes;
  w.error.clear();
  w.threads = std::vector<Thread>(count);
  while (w.stacks.size() < count) w.stacks.push_back(std::make_unique<Stack>());
#if defined(__SANITIZE_THREAD__)
  w.main.thread = __tsan_get_current_fiber();
#endif
  const auto run_at = [&](unsigned x, unsigned y, unsigned z) {
    w.at = dim3(x, y, z);
    ++w.statistics.blocks;
    for (size_t i = 0; i + 1 < shared_bytes; i += 2) w.shared[i] = 0xc1, w.shared[i + 1] = 0x7f;
    for (unsigned i = 0; i < count; ++i) {
      Thread& t = w.threads[i];
      t.index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
      t.warp = i / kLanes;
      t.state = State::kRuns;
      t.committed.clear();
      t.open.clear();
      t.context.start_at(&run_thread, *w.stacks[i]);
    }
    run_block(random);
    acquire(&w.barrier);  // a kernel's end comes before what its caller does next
    for (Thread& t : w.threads) t.context.destroy();
  };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        run_at(x, y, z);
        if (!w.error.empty()) throw std::runtime_error("simt: " + w.error);
      }
}

}  // namespace simt

#define threadIdx (simt::world().current->index)
#define blockIdx (simt::world().at)
#define blockDim (simt::world().block)
#define gridDim (simt::world().grid)

inline void __syncthreads() {
  simt::release(&simt::world().barrier);
  simt::wait_for_block();
  simt::acquire(&simt::world().barrier);
}
