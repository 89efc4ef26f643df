// What Python asks of the emulator that the kernels of libmmkernels_simt.so run in.
#include "csrc/cuda/device.h"

extern "C" {

/// The seed of the order that warps and lanes run in from now on; 0 for the natural one.
__attribute__((visibility("default"))) void mmk_simt_set_seed(uint64_t seed) { simt::world().seed = seed; }

/// Blocks, barriers, collectives, products, matrix loads, their bank conflicts and copies, since the last call.
__attribute__((visibility("default"))) void mmk_simt_take_statistics(uint64_t* out) {
  std::memcpy(out, &simt::world().statistics, sizeof(simt::Statistics));
  simt::world().statistics = simt::Statistics{};
}
}
