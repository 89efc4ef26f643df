// The core of every op that normalises rows of features: a few rows at a time, forward and backward.
//
//   z = x + add                                      a row of C features
//   y = (z − mean) · rstd · gain + offset            layer: of z; rms: mean 0, rstd of mean z²; none: mean 0, rstd 1
//
// A caller says which rows there are and what is added, and sums over rows what backward hands it.
#pragma once

#include "csrc/cpu/dtype.h"
#include "csrc/cpu/simd.h"
#include "csrc/norm/norm.h"

namespace mmk {
namespace MMK_ISA {

constexpr int kMaxNormRows = 4;

struct RowNorm {
  Norm norm = Norm::layer;
  float eps = 0.f;
  int64_t features = 0;
  Dtype dtype = Dtype::f32, out_dtype = Dtype::f32;  // of x and its gradient, of y and its gradient
  bool stream = false;                               // results bypass the caches
};

// Rows that are normalised together: they share gain and offset.
struct NormRows {
  int count = 0;
  const void* x[kMaxNormRows];
  const float* add[kMaxNormRows];      // null for all or for none
  void* out[kMaxNormRows];             // forward
  const void* grad_out[kMaxNormRows];  // backward
  void* grad_x[kMaxNormRows];          // backward; null for all or for none
};

// Where the backward of some rows adds to; every vector is padded to whole SIMD vectors, null if not wanted.
struct NormSums {
  float* gain = nullptr;    // += Σ_rows grad_out · (z − mean) · rstd
  float* offset = nullptr;  // += Σ_rows grad_out; given with gain
  float* z = nullptr;       // += Σ_rows grad_z
};

// Float vectors of C features, padded: what gain, offset, add and the sums need.
inline int64_t padded_features(int64_t features) { return (features + VW - 1) / VW * VW; }

// How many rows of C features to hand over at a time: as many as fit the first-level cache with what goes with them.
int norm_rows(int64_t features, bool backward);
int64_t norm_scratch(int64_t features);  // floats

// `next` are the rows of the following call, fetched ahead; count 0 where there are none. gain and offset may both be
// null: 1 and 0.
void normalize_rows(const RowNorm& norm, const NormRows& rows, const NormRows& next, const float* gain,
                    const float* offset, float* scratch);
void normalize_rows_backward(const RowNorm& norm, const NormRows& rows, const NormRows& next, const float* gain,
                             const NormSums& sums, float* scratch);
// Before other threads may read streamed results.
void finish_streaming();

}  // namespace MMK_ISA
}  // namespace mmk
