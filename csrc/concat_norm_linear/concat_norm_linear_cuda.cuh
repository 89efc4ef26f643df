// concat_norm_linear for CUDA.
//
//     n = x̂ ∘ g + h,   x̂ = (c − mean) · rstd,   c = [x₁; …; x_M]   (rms: mean = 0),   y = act(n Wᵀ + b)
//     a = dz W,   dc = rstd · (a ∘ g − mean(a ∘ g) − x̂ · mean(a ∘ g ∘ x̂))   (rms: without mean(a ∘ g))
//
// Tiling     Forward: a pass over the rows takes their statistics, a team of one to eight warps to a row, which it
// reads
//            twice, the second time from cache. The product is that of csrc/concat/product_cuda.cuh; each thread
//            normalises the chunks that it copied to a stage before the others read them. Backward: a pass over the
//            rows takes the two means; one over 64 features of a source and a run of rows then writes dx, n and the
//            sums over the run for dg and dh (csrc/cuda/column_sums.cuh). a and dW = dzᵀ n are plain products, which
//            torch's library is best at.
// Precision  statistics and sums in float32, the variance from differences to the mean; n, z, dz and a rounded to the
//            inputs' dtype.
// Limits     16-bit dtypes; up to 16 sources; every K_i and N a multiple of 8; everything begins at a multiple of 16
//            bytes.
#pragma once

#include "csrc/concat/preactivation_cuda.cuh"
#include "csrc/concat/product_cuda.cuh"

namespace mmk::cuda {

/// Mean (rms: 0) and rstd of a row; or of its gradient, the two means.
struct Pair {
  float first, second;
};

struct RowStatistics {
  Sources sources;
  Pair* statistics;  // [rows]
  int width;         // K
  float eps;
  bool centred;  // layer norm
};

/// For every vector of a row's sources that is this thread's share: visit(source's vector, feature of all K).
template <typename T, typename Visit>
__device__ __forceinline__ void visit_row(const Sources& sources, int row, Visit visit) {
  int column = 0;
  for (int i = 0; i < sources.count; ++i) {
    const T* const x = static_cast<const T*>(sources.x[i]) + row * sources.stride[i];
    for (int k = int(threadIdx.x) * kVector; k < sources.width[i]; k += int(blockDim.x) * kVector)
      visit(x + k, column + k);
    column += sources.width[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(256) concat_norm_linear_statistics(RowStatistics p) {
  MMK_SHARED_MEMORY(shared);
  Team team(shared);
  const int row = int(blockIdx.x * blockDim.y + threadIdx.y);
  if (row >= p.sources.rows) return;  // a team by itself: others of its block have no barrier
  const float width = float(p.width);
  float mean = 0.0f;
  if (p.centred) {
    visit_row<T>(p.sources, row, [&](const T* at, int) {
      float x[kVector];
      load_vector(at, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) mean += x[i];
    });
    mean = team.sum(mean) / width;
  }
  float drift = 0.0f, squares = 0.0f;
  visit_row<T>(p.sources, row, [&](const T* at, int) {
    float x[kVector];
    load_vector(at, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float d = x[i] - mean;
      drift += d;
      squares += d * d;
    }
  });
  float variance = team.sum(squares) / width;
  if (p.centred) {  // the mean was off by its rounding
    const float off = team.sum(drift) / width;
    mean += off;
    variance -= off * off;
  }
  if (threadIdx.x == 0) p.statistics[row] = {mean, 1.0f / sqrtf(variance + p.eps)};
}

struct ConcatNormLinear {
  Sources sources;
  const void *norm_weight, *norm_bias;  // g, [K]; h, [K] or null
  const Pair* statistics;               // [rows]
  const void* weight;                   // [N, K]
  int64_t weight_stride;
  LinearEpilogue epilogue;
};

/// Eight features of x to those of n.
__device__ __forceinline__ void scale_and_shift(float (&x)[kVector], const Pair& statistics, const float (&g)[kVector],
                                                const float (&h)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = (x[i] - statistics.first) * statistics.second * g[i] + h[i];
}

template <typename T, int kTile>
__global__ void MMK_TILE_BOUNDS concat_norm_linear_forward(ConcatNormLinear p) {
  using Tile = OperandTile<kTile, false>;
  MMK_SHARED_MEMORY(shared);
  const int rows = p.sources.rows;
  const TilePlace<kTile> place(rows, p.epilogue.features);
  unsigned present[2];
  Pair statistics[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = place.row + Tile::row(half);
    present[half] = row < rows ? ~0u : 0u;
    statistics[half] = row < rows ? p.statistics[row] : Pair{0.0f, 0.0f};
  }
  const T* const norm_weight = static_cast<const T*>(p.norm_weight);
  const T* const norm_bias = static_cast<const T*>(p.norm_bias);
  SourceCopies<T, kTile> copies(p.sources, ~0u, place, present, p.weight, p.weight_stride, p.epilogue.features);
  SourceWalk normalised(p.sources, ~0u);
  const auto load = [&](T* a, T* b) { copies.load(a, b); };
  const auto normalise = [&](T* a, T*) {
    const int k = normalised.k + Tile::chunk() * kVector, feature = normalised.column + k;
    if (k < normalised.width) {  // zeros stay beyond, as W's do
      float g[kVector], h[kVector] = {};
      load_vector(norm_weight + feature, g);
      if (norm_bias) load_vector(norm_bias + feature, h);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* const chunk = a + copies.to + half * Tile::kHalf;
        float x[kVector];
        load_vector(chunk, x);
        scale_and_shift(x, statistics[half], g, h);
        store_vector(chunk, x);
      }
    }
    normalised.advance();
  };
  Product<T, kTile, false, false> product;
  product.add(reinterpret_cast<T*>(shared), normalised.steps(), load, normalise);
  const LinearFinish<T> finish(p.epilogue, place.column + product.column_in_tile());
  product.finish(shared, [&](int row, float (&x)[kVector]) { finish(place.row + row, x); });
}

struct GradientMeans {
  Sources sources;
  const void *a, *norm_weight;  // [rows, K] contiguous, [K]
  const Pair* statistics;       // [rows]
  Pair* means;                  // of a ∘ g (rms: 0) and of a ∘ g ∘ x̂, [rows]
  int width;                    // K
  bool centred;
};

template <typename T>
__global__ void __launch_bounds__(256) concat_norm_linear_means(GradientMeans p) {
  MMK_SHARED_MEMORY(shared);
  Team team(shared);
  const int row = int(blockIdx.x * blockDim.y + threadIdx.y);
  if (row >= p.sources.rows) return;  // as above
  const Pair statistics = p.statistics[row];
  const T* const a = static_cast<const T*>(p.a) + int64_t(row) * p.width;
  float plain = 0.0f, along = 0.0f;
  visit_row<T>(p.sources, row, [&](const T* at, int feature) {
    float x[kVector], d[kVector], g[kVector];
    load_vector(at, x);
    load_vector(a + feature, d);
    load_vector(static_cast<const T*>(p.norm_weight) + feature, g);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      d[i] *= g[i];
      plain += d[i];
      along += d[i] * ((x[i] - statistics.first) * statistics.second);
    }
  });
  along = team.sum(along) / float(p.width);
  plain = p.centred ? team.sum(plain) / float(p.width) : 0.0f;
  if (threadIdx.x == 0) p.means[row] = {plain, along};
}

struct SourceGradients {
  Sources sources;
  const void *a, *norm_weight, *norm_bias;  // [rows, K] contiguous or null, [K], [K] or null
  const Pair *statistics, *means;           // [rows], [rows] or null
  void* dx[kMostSources];                   // [rows, K_i] contiguous, or null
  void* n;                                  // [rows, K] contiguous, or null
  float *dnorm_weight, *dnorm_bias;         // [runs, K] or null
  int width, run;                           // K; rows of a block
};

template <typename T>
__global__ void __launch_bounds__(kSumThreads) concat_norm_linear_gradients(SourceGradients p) {
  MMK_SHARED_MEMORY(shared);
  int source = 0, column = 0, block = int(blockIdx.y);  // of the source's blocks of features
  for (;; ++source) {
    const int blocks = (p.sources.width[source] + kSumFeatures - 1) / kSumFeatures;
    if (block < blocks) break;
    block -= blocks;
    column += p.sources.width[source];
  }
  const int width = p.sources.width[source], first = block * kSumFeatures, k = first + sum_feature();
  const int begin = int(blockIdx.x) * p.run, end = min(begin + p.run, p.sources.rows);
  float of_weight[kVector] = {}, of_bias[kVector] = {};
  if (k < width) {
    const T* const x_column = static_cast<const T*>(p.sources.x[source]) + k;
    T* const dx = static_cast<T*>(p.dx[source]);
    float g[kVector], h[kVector] = {};
    load_vector(static_cast<const T*>(p.norm_weight) + column + k, g);
    if (p.norm_bias) load_vector(static_cast<const T*>(p.norm_bias) + column + k, h);
    for (int row = begin + sum_row(); row < end; row += kSumRows) {
      const int64_t at = int64_t(row) * p.width + column + k;
      const Pair statistics = p.statistics[row];
      float x[kVector];
      load_vector(x_column + row * p.sources.stride[source], x);
      if (p.n) {
        float n[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) n[i] = x[i];
        scale_and_shift(n, statistics, g, h);
        store_vector(static_cast<T*>(p.n) + at, n);
      }
      if (!p.a) continue;
      float d[kVector];
      load_vector(static_cast<const T*>(p.a) + at, d);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[i] = (x[i] - statistics.first) * statistics.second;
        of_weight[i] += d[i] * x[i];
        of_bias[i] += d[i];
      }
      if (dx) {
        const Pair means = p.means[row];
#pragma unroll
        for (int i = 0; i < kVector; ++i) d[i] = (d[i] * g[i] - means.first - x[i] * means.second) * statistics.second;
        store_vector(dx + int64_t(row) * width + k, d);
      }
    }
  }
  const int64_t sums = int64_t(blockIdx.x) * p.width + column + first;
  store_sums(shared, of_weight, of_bias, p.dnorm_weight ? p.dnorm_weight + sums : nullptr,
             p.dnorm_bias ? p.dnorm_bias + sums : nullptr, width - first);
}

/// A warp to a row where there are many of them, else up to eight.
inline Launch rows_launch(const char* name, int rows, int width, Stream stream) {
  constexpr int kMany = 4096, kWarps = 8, kVectorsOfThread = 4;
  const int most = rows >= kMany ? kWarp : kWarp * kWarps;
  const int threads = min(team_size(width, kVectorsOfThread), most), teams = threads == kWarp ? kWarps : 1;
  return {name, dim3(unsigned((rows + teams - 1) / teams)), dim3(threads, teams), kTeamShared, stream};
}

template <typename T>
void launch_concat_norm_linear_statistics(const RowStatistics& p, Stream stream) {
  launch(rows_launch("concat_norm_linear statistics", p.sources.rows, p.width, stream),
         concat_norm_linear_statistics<T>, p);
}

template <typename T, int kTile>
void launch_concat_norm_linear_forward(const ConcatNormLinear& p, Stream stream) {
  constexpr int kShared = Product<T, kTile, false, false>::kShared;
  launch(tiles_launch<kTile>("concat_norm_linear forward", p.sources.rows, p.epilogue.features, 1, kShared, stream),
         concat_norm_linear_forward<T, kTile>, p);
}

template <typename T>
void launch_concat_norm_linear_means(const GradientMeans& p, Stream stream) {
  launch(rows_launch("concat_norm_linear means", p.sources.rows, p.width, stream), concat_norm_linear_means<T>, p);
}

template <typename T>
void launch_concat_norm_linear_gradients(const SourceGradients& p, Stream stream) {
  unsigned blocks = 0;  // of features
  for (int i = 0; i < p.sources.count; ++i) blocks += unsigned((p.sources.width[i] + kSumFeatures - 1) / kSumFeatures);
  const dim3 grid(unsigned((p.sources.rows + p.run - 1) / p.run), blocks);
  launch({"concat_norm_linear gradients", grid, dim3(kSumThreads), kSumShared, stream}, concat_norm_linear_gradients<T>,
         p);
}

}  // namespace mmk::cuda
