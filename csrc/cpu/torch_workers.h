// Torch's thread pool as the workers of a kernel.
#pragma once

#include <ATen/Parallel.h>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

// As many workers as torch has threads; one where we already are on one of them, or where `operations` are too few to
// be worth waking others.
inline Workers torch_workers(double operations) {
  constexpr double kWorthWaking = 1e6;
  const int count = at::in_parallel_region() || operations < kWorthWaking ? 1 : at::get_num_threads();
  const auto run = [](int count, void (*body)(void*, int), void* context) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(context, static_cast<int>(worker));
    });
  };
  return {count, run, tile_unit()};
}

}  // namespace mmk
