// Passes over rows that leave sums over them: a block owns 64 features of a run of rows, a thread eight of them in
// every 32nd row. The sums of a run are added up here, those of all runs by the caller, both in their order.
#pragma once

#include "csrc/cuda/rows.cuh"

namespace mmk::cuda {

constexpr int kSumVectors = 8;  // of a row, in a block
constexpr int kSumRows = 32;    // at a time
constexpr int kSumThreads = kSumVectors * kSumRows;
constexpr int kSumFeatures = kSumVectors * kVector;
constexpr int kSumShared = 2 * kSumRows * kSumFeatures * int(sizeof(float));

/// The first feature and row of this thread, less those of its block.
__device__ __forceinline__ int sum_feature() { return int(threadIdx.x) % kSumVectors * kVector; }
__device__ __forceinline__ int sum_row() { return int(threadIdx.x) / kSumVectors; }

/// Adds up two sums of all threads of a block, and stores those that are wanted from the block's first feature on, of
/// which there are `features`, at most kSumFeatures.
__device__ __forceinline__ void store_sums(unsigned char* shared, const float (&x)[kVector], const float (&y)[kVector],
                                           float* of_x, float* of_y, int features) {
  if (!of_x && !of_y) return;
  float* const sums = reinterpret_cast<float*>(shared);  // [x, y][kSumRows][kSumFeatures]
  float* const mine = sums + sum_row() * kSumFeatures + sum_feature();
  store_vector(mine, x);
  store_vector(mine + kSumRows * kSumFeatures, y);
  __syncthreads();
  const int which = int(threadIdx.x) / kSumFeatures, feature = int(threadIdx.x) % kSumFeatures;
  float* const into = which == 0 ? of_x : of_y;
  if (which > 1 || !into || feature >= features) return;
  float sum = 0.0f;
  for (int r = 0; r < kSumRows; ++r) sum += sums[(which * kSumRows + r) * kSumFeatures + feature];
  into[feature] = sum;
}

}  // namespace mmk::cuda
