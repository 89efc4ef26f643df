// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter per lane.
#pragma once

#include "csrc/cpu/simd.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// words[w][lane] for the counters (c0, first_c1 + lane, c2, c3).
MMK_NOINLINE inline void philox(uint64_t seed, uint32_t c0, uint32_t first_c1, uint32_t c2, uint32_t c3,
                                uint32_t (&words)[4][VW]) {
  for (int i = 0; i < VW; ++i) {
    words[0][i] = c0;
    words[1][i] = first_c1 + static_cast<uint32_t>(i);
    words[2][i] = c2;
    words[3][i] = c3;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < VW; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * words[0][i], p1 = uint64_t{0xCD9E8D57} * words[2][i];
      words[0][i] = static_cast<uint32_t>(p1 >> 32) ^ words[1][i] ^ k0;
      words[2][i] = static_cast<uint32_t>(p0 >> 32) ^ words[3][i] ^ k1;
      words[1][i] = static_cast<uint32_t>(p1);
      words[3][i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
