// A product of matrices with all that the emulator is to watch, and ways to break it: `mutants <mutant> <seed>` prints
// what caught it, or "nothing".
//
// One block of four warps computes C[64, 64] = A[64, K] Bᵀ[64, K] in tiles of 32 columns that arrive in the background,
// double buffered.
#include <cstdio>
#include <string>
#include <vector>

#include "csrc/cuda/launch.h"

using namespace mmk::cuda;

namespace {

enum Mutant {
  kNone,
  kNoBarrier,       // before a buffer is filled again
  kLateWait,        // for all copies but the last two groups instead of the last
  kShortShared,     // 16 bytes less than the kernel uses
  kNoSwizzle,       // rows one below the other
  kDivergentLanes,  // a shuffle that half a warp does not come to
  kEarlyReturn,     // a thread that leaves before the last barrier
  kMisaligned,      // a copy of 16 bytes to an address that 16 does not divide
};
constexpr const char* kNames[] = {"none",       "no barrier",      "late wait",    "short shared memory",
                                  "no swizzle", "divergent lanes", "early return", "misaligned copy"};

constexpr int kRows = 64, kColumns = 32;

__device__ int place(int row, int chunk, Mutant mutant) {
  return row * kColumns + (mutant == kNoSwizzle ? chunk : chunk ^ ((row >> 1) & 3)) * 8;
}

__global__ void product(const Bf16* a, const Bf16* b, float* c, int k, Mutant mutant) {
  MMK_SHARED_MEMORY(shared);
  Bf16* const tiles = reinterpret_cast<Bf16*>(shared);  // [2][A, B][64, 32]
  const int tile = kRows * kColumns, thread = int(threadIdx.x), steps = k / kColumns;
  const auto fetch = [&](int step) {
    Bf16* const into = tiles + step % 2 * 2 * tile;
    for (int i = thread; i < 2 * kRows * 4; i += 128) {
      const int row = i / 4 % kRows, chunk = i % 4;
      const Bf16* const from = (i < kRows * 4 ? a : b) + row * k + step * kColumns + chunk * 8;
      const int off = mutant == kMisaligned && i == 5 ? 4 : 0;
      copy_async(into + i / (kRows * 4) * tile + place(row, chunk, mutant) + off, from, true);
    }
    commit_copies();
  };
  float acc[8][4] = {};
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps)
      fetch(step + 1);
    else
      commit_copies();
    if (mutant == kLateWait)
      wait_for_copies<2>();
    else
      wait_for_copies<1>();
    __syncthreads();
    const Bf16* const from = tiles + step % 2 * 2 * tile;
    for (int kk = 0; kk < 2; ++kk) {
      uint32_t x[4], y[4];
      load_matrices(x, from + place(warp() * 16 + (lane() & 15), 2 * kk + (lane() >> 4), mutant));
      for (int n = 0; n < 4; ++n) {
        const int row = n * 16 + (lane() & 7) + ((lane() >> 4) << 3);
        load_matrices(y, from + tile + place(row, 2 * kk + ((lane() >> 3) & 1), mutant));
        multiply<Bf16>(acc[2 * n], x, y[0], y[1]);
        multiply<Bf16>(acc[2 * n + 1], x, y[2], y[3]);
      }
    }
    if (mutant != kNoBarrier) __syncthreads();
  }
  if (mutant == kDivergentLanes && lane() < 16) acc[0][0] += 0.0f * shuffle_xor(acc[0][0], 1);
  if (mutant == kDivergentLanes) __syncwarp();
  if (mutant == kEarlyReturn && thread == 3) return;
  __syncthreads();
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) {
      const int row = warp() * 16 + lane() / 4 + (i >> 1) * 8, column = n * 8 + lane() % 4 * 2 + (i & 1);
      c[row * kRows + column] = acc[n][i];
    }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  int mutant = 0;
  while (mutant < 8 && std::string(arguments[1]) != kNames[mutant]) ++mutant;
  if (mutant == 8) return 2;
  simt::world().seed = std::stoull(arguments[2]);
  const int k = 5 * kColumns;
  std::vector<Bf16> a(kRows * k), b(kRows * k);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = from_float<Bf16>(float(i * 7 % 13) - 6);
    b[i] = from_float<Bf16>(float(i * 5 % 11) - 5);
  }
  std::vector<float> c(kRows * kRows, NAN);
  const int shared = 4 * kRows * kColumns * 2 - (mutant == kShortShared ? 16 : 0);
  try {
    const Launch at{"product", 1, 128, shared, nullptr};
    launch(at, product, static_cast<const Bf16*>(a.data()), static_cast<const Bf16*>(b.data()), c.data(), k,
           Mutant(mutant));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  int wrong = 0;
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kRows; ++column) {
      float exact = 0;
      for (int i = 0; i < k; ++i) exact += to_float(a[row * k + i]) * to_float(b[column * k + i]);
      wrong += !(c[row * kRows + column] == exact);
    }
  const unsigned long long conflicts = simt::world().statistics.bank_conflicts;
  if (wrong)
    std::printf("%d wrong results\n", wrong);
  else if (conflicts)
    std::printf("%llu bank conflicts\n", conflicts);
  else
    std::printf("nothing\n");
}
