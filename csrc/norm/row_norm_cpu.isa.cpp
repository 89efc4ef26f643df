//
//   z = x + add,   x̂ = (z − mean) · rstd,   y = x̂ · gain + offset
//   e = grad_out · gain,   grad_z = rstd · (e − mean(e) − x̂ · mean(e ∘ x̂)),   means over the row; rms has no mean(e)
//
// Tiling     R rows at once, so that gain and offset are loaded once for R rows and the sums of R rows hide each
//            other's latency. Forward: x is read once into float rows in the first-level cache and summed; a second
//            pass takes the squares, of float32 alone; the last writes. The pass with the squares fetches the rows of
//            the next call. Float rows with nothing to add are not copied. Backward: two more passes, of grad_out and
//            of grad_z; what is summed over rows is added R rows at a time.
// Precision  float32; the mean from distances to the row's first feature, the variance from the centred row, or
//            of half precision from those distances, which is as exact as its elements (load_rows). The sums
//            of a row do not depend on R.
// Limits     any C, any alignment: tails are masked, never padded in memory of others.
#include "csrc/cpu/element.h"
#include "csrc/cpu/tile.h"
#include "csrc/norm/row_norm.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kStep = 2;                                          // vectors of a turn, each with sums of its own
constexpr int64_t kForwardFloats = 4096, kBackwardFloats = 2048;  // R · C: float rows in half of a 32 KB cache
#define MMK_LAMBDA __attribute__((always_inline))

// step(k, u, n) for every vector k of C features: u numbers the vectors of a turn, n counts the vector's elements.
template <class Step>
MMK_INLINE void for_vectors(int64_t features, Step step) {
  int64_t k = 0;
  for (; k + kStep * VW <= features; k += kStep * VW) {
    MMK_UNROLL for (int u = 0; u < kStep; ++u) step(k + u * VW, u, Constant<VW>{});
  }
  for (; k + VW <= features; k += VW) step(k, 0, Constant<VW>{});
  if (k < features) step(k, 0, features - k);
}

// x with zeros from lane n on.
MMK_INLINE vf keep_first(vf x, Constant<VW>) { return x; }
MMK_INLINE vf keep_first(vf x, int64_t n) {
  alignas(64) float lanes[VW] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = 1.f;
  return select(load(lanes) > zero(), x, zero());
}

template <int R>
struct RowSet {
  const float* z[R];
  float mean[R], rstd[R];
};

// The same in registers. A pass takes its own copy: what it writes might be anyone's memory to the compiler.
template <int R>
struct RowVectors {
  const float* z[R];
  vf mean[R], rstd[R];
  MMK_INLINE explicit RowVectors(const RowSet<R>& set) {
    MMK_UNROLL for (int j = 0; j < R; ++j) {
      z[j] = set.z[j];
      mean[j] = set1(set.mean[j]);
      rstd[j] = set1(set.rstd[j]);
    }
  }
  template <class Count>
  MMK_INLINE vf centered(int j, int64_t k, Count n) const {
    return load_as_float(z[j] + k, n) - mean[j];
  }
};

// Whether the pass that loads a row of T sums its squares too.
template <class T>
constexpr bool kSumsSquares = !std::is_same_v<T, float>;

MMK_INLINE int64_t row_stride(int64_t features) { return padded_features(features) + 16; }  // off the multiples of 1 KB

// The lines of the next rows that belong to a turn at feature k.
template <int R, int kElement>
MMK_INLINE void prefetch_turn(const void* const* rows, int64_t k) {
  constexpr int kBytes = kStep * VW * kElement;
  MMK_UNROLL for (int j = 0; j < R; ++j) {
    MMK_UNROLL for (int byte = 0; byte < kBytes; byte += 64)
        __builtin_prefetch(static_cast<const char*>(rows[j]) + k * kElement + byte, 0, 2);
  }
}

// What the next call reads, or null: rows of x, and in the backward of grad_out.
struct Ahead {
  const void *const *x, *const *grad;

  template <int R, int kElement>
  MMK_INLINE void fetch_turn(int64_t k) const {
    if (x != nullptr) prefetch_turn<R, kElement>(x, k);
    if (grad != nullptr) prefetch_turn<R, kElement>(grad, k);
  }
};

// z[j] = x[j] + add[j] as floats, and its mean; floats with nothing to add stay where they are. What is summed is the
// distance from the first feature, so that the mean of a row far from zero is not rounded like the sum of large terms.
//
// Of bfloat16 and float16 rows the squares of these distances are summed as well, which spares a pass: Σ (z − mean)² is
// that less n (mean − first)². A row's first feature is at most √C standard deviations from its mean, so the difference
// is off by C float32 roundings at most, however the row is made, and by few in all but made-up ones.
template <class T, int R, bool kAdd>
MMK_NOINLINE void load_rows(const NormRows& rows, int64_t features, bool centers, float* copy, const float* (&z)[R],
                            float (&means)[R], float (&squares)[R], const Ahead& ahead) {
  constexpr bool kSquares = kSumsSquares<T>, kCopies = kAdd || !std::is_same_v<T, float>;
  const int64_t stride = row_stride(features);
  const T* x[R];
  const float* added[R];
  float first[R];
  vf acc[R][kStep], square[R][kSquares ? kStep : 1], origin[R];
  clear(acc);
  clear(square);
  MMK_UNROLL for (int j = 0; j < R; ++j) {
    x[j] = static_cast<const T*>(rows.x[j]);
    added[j] = rows.add[j];
    first[j] = centers ? sum(load_as_float(x[j], int64_t{1})) + (kAdd ? added[j][0] : 0.f) : 0.f;
    origin[j] = set1(first[j]);
  }
  for_vectors(features, [&](int64_t k, int u, auto n) MMK_LAMBDA {
    if constexpr (kSquares) {
      if (u == 0) ahead.fetch_turn<R, sizeof(T)>(k);
    }
    MMK_UNROLL for (int j = 0; j < R; ++j) {
      vf v = load_as_float(x[j] + k, n);
      if constexpr (kAdd) v = v + load(added[j] + k);
      if constexpr (kCopies) store(copy + j * stride + k, v);
      const vf distance = keep_first(v - origin[j], n);
      acc[j][u] = acc[j][u] + distance;
      if constexpr (kSquares) square[j][u] = fma(distance, distance, square[j][u]);
    }
  });
  const auto count = static_cast<float>(features);
  MMK_UNROLL for (int j = 0; j < R; ++j) {
    const float total = sum(acc[j][0] + acc[j][1]);
    means[j] = centers ? first[j] + total / count : 0.f;
    if constexpr (kSquares) {
      const float around_first = sum(square[j][0] + square[j][1]);
      const float around_mean = centers ? around_first - total * (total / count) : around_first;
      squares[j] = around_mean < 0.f ? 0.f : around_mean;  // a NaN stays
    }
    if constexpr (kCopies) {
      z[j] = copy + j * stride;
    } else {
      z[j] = x[j];
    }
  }
}

// Whole rows, where no pass has arithmetic to hide them behind.
void prefetch_rows(const void* const* rows, int count, int64_t bytes) {
  for (int j = 0; j < count; ++j) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(rows[j]) + byte);
  }
}

// Σ (z − mean)²
template <int R>
MMK_NOINLINE void centered_squares(const RowSet<R>& set, int64_t features, const Ahead& ahead, float (&squares)[R]) {
  const RowVectors<R> row(set);
  vf acc[R][kStep];
  clear(acc);
  for_vectors(features, [&](int64_t k, int u, auto n) MMK_LAMBDA {
    if (u == 0) ahead.fetch_turn<R, sizeof(float)>(k);
    MMK_UNROLL for (int j = 0; j < R; ++j) {
      const vf d = keep_first(row.centered(j, k, n), n);
      acc[j][u] = fma(d, d, acc[j][u]);
    }
  });
  MMK_UNROLL for (int j = 0; j < R; ++j) squares[j] = sum(acc[j][0] + acc[j][1]);
}

// value(j, k, n) to y[j][k …] for every vector of every row, two at a time.
template <int R, bool kStream, class T, class Value>
MMK_INLINE void write_vectors(T* const (&y)[R], int64_t features, Value value) {
  static_assert(kStep == 2);
  int64_t k = 0;
  for (; k + kStep * VW <= features; k += kStep * VW) {
    vf first[R], second[R];
    value(k, Constant<VW>{}, first);
    value(k + VW, Constant<VW>{}, second);
    MMK_UNROLL for (int j = 0; j < R; ++j) write_pair<kStream>(y[j] + k, first[j], second[j]);
  }
  for (; k < features; k += VW) {
    const int64_t n = min(VW, features - k);
    vf last[R];
    value(k, n, last);
    for (int j = 0; j < R; ++j) store_from_float(y[j] + k, last[j], n);
  }
}

template <class T, int R, bool kAffine, bool kStream>
MMK_NOINLINE void write_rows(const RowSet<R>& set, int64_t features, const float* gain, const float* offset,
                             void* const* out) {
  const RowVectors<R> row(set);
  T* y[R];
  MMK_UNROLL for (int j = 0; j < R; ++j) y[j] = static_cast<T*>(out[j]);
  write_vectors<R, kStream>(y, features, [&](int64_t k, auto n, vf(&result)[R]) MMK_LAMBDA {
    const vf g = kAffine ? load(gain + k) : zero(), h = kAffine ? load(offset + k) : zero();
    MMK_UNROLL for (int j = 0; j < R; ++j) {
      const vf xhat = row.centered(j, k, n) * row.rstd[j];
      result[j] = kAffine ? fma(xhat, g, h) : xhat;
    }
  });
}

// e = grad_out · gain with Σ e and Σ e · x̂ of every row (kInput); sums over the rows for gain and offset (kParameters).
template <class T, int R, bool kInput, bool kParameters>
MMK_NOINLINE void weigh_gradient(const RowSet<R>& set, int64_t features, const void* const* grad_out, const float* gain,
                                 float* e, const NormSums& into, float (&e_sums)[R], float (&ex_sums)[R]) {
  const int64_t stride = row_stride(features);
  const RowVectors<R> row(set);
  float *const gain_sum = into.gain, *const offset_sum = into.offset;
  const T* grad[R];
  MMK_UNROLL for (int j = 0; j < R; ++j) grad[j] = static_cast<const T*>(grad_out[j]);
  vf e_acc[R][1], ex_acc[R][1];
  clear(e_acc);
  clear(ex_acc);
  for_vectors(features, [&](int64_t k, int, auto n) MMK_LAMBDA {
    const vf weight = gain != nullptr ? load(gain + k) : set1(1.f);
    vf dgain = zero(), doffset = zero();
    MMK_UNROLL for (int j = 0; j < R; ++j) {
      const vf g = load_as_float(grad[j] + k, n);
      const vf xhat = keep_first(row.centered(j, k, n) * row.rstd[j], n);
      if constexpr (kInput) {
        const vf weighed = g * weight;
        store(e + j * stride + k, weighed);
        e_acc[j][0] = e_acc[j][0] + weighed;
        ex_acc[j][0] = fma(weighed, xhat, ex_acc[j][0]);
      }
      if constexpr (kParameters) {
        dgain = fma(g, xhat, dgain);
        doffset = doffset + g;
      }
    }
    if constexpr (kParameters) {
      store(gain_sum + k, load(gain_sum + k) + dgain);
      store(offset_sum + k, load(offset_sum + k) + doffset);
    }
  });
  MMK_UNROLL for (int j = 0; j < R; ++j) {
    e_sums[j] = sum(e_acc[j][0]);
    ex_sums[j] = sum(ex_acc[j][0]);
  }
}

// grad_z = e · rstd − (constant + (z − mean) · slope), written (kStore) and summed over the rows (kSum).
template <class T, int R, bool kStore, bool kSum, bool kStream>
MMK_NOINLINE void write_gradient(const RowSet<R>& set, int64_t features, const float* e, const float (&constant)[R],
                                 const float (&slope)[R], void* const* grad_x, float* z_sum) {
  const int64_t stride = row_stride(features);
  const RowVectors<R> row(set);
  vf constants[R], slopes[R];
  MMK_UNROLL for (int j = 0; j < R; ++j) {
    constants[j] = set1(constant[j]);
    slopes[j] = set1(slope[j]);
  }
  T* dx[R];
  if constexpr (kStore) {
    MMK_UNROLL for (int j = 0; j < R; ++j) dx[j] = static_cast<T*>(grad_x[j]);
  }
  const auto gradients = [&](int64_t k, auto n, vf(&dz)[R]) MMK_LAMBDA {
    vf total = zero();
    MMK_UNROLL for (int j = 0; j < R; ++j) {
      const vf taken = fma(row.centered(j, k, n), slopes[j], constants[j]);
      dz[j] = load(e + j * stride + k) * row.rstd[j] - taken;
      if constexpr (kSum) total = total + dz[j];
    }
    if constexpr (kSum) store(z_sum + k, load(z_sum + k) + keep_first(total, n));
  };
  if constexpr (kStore) {
    write_vectors<R, kStream>(dx, features, gradients);
  } else {
    for_vectors(features, [&](int64_t k, int, auto n) MMK_LAMBDA {
      vf dz[R];
      gradients(k, n, dz);
    });
  }
}

// f(T{}) with the element type.
template <class Function>
MMK_INLINE void with_element(Dtype dtype, Function f) {
  with_element_type(dtype, static_cast<const void*>(nullptr),
                    [&](auto* p) { f(std::remove_const_t<std::remove_pointer_t<decltype(p)>>{}); });
}

// Pointers of the next call's rows, the last one repeated; null where there are none.
template <int R>
const void* const* repeat_last(const void* const* rows, int count, const void* (&full)[R]) {
  if (count == 0) return nullptr;
  for (int j = 0; j < R; ++j) full[j] = rows[j < count ? j : count - 1];
  return full;
}

template <int R>
void take_statistics(const RowNorm& norm, const NormRows& rows, const NormRows& next, bool backward, float* scratch,
                     RowSet<R>& set) {
  const bool normalizes = norm.norm != Norm::none;
  const void *next_x[R], *next_grad[R];
  Ahead ahead{nullptr, nullptr};
  if (normalizes) {
    ahead.x = repeat_last(next.x, next.count, next_x);
    if (backward) ahead.grad = repeat_last(next.grad_out, next.count, next_grad);
  } else {
    prefetch_rows(next.x, next.count, norm.features * element_size(norm.dtype));
    if (backward) prefetch_rows(next.grad_out, next.count, norm.features * element_size(norm.out_dtype));
  }
  float squares[R];
  with_element(norm.dtype, [&](auto t) {
    using T = decltype(t);
    with_bool(rows.add[0] != nullptr, [&](auto add) {
      load_rows<T, R, decltype(add)::value>(rows, norm.features, norm.norm == Norm::layer, scratch, set.z, set.mean,
                                            squares, ahead);
    });
    if (normalizes && !kSumsSquares<T>) centered_squares(set, norm.features, ahead, squares);
  });
  const auto count = static_cast<float>(norm.features);
  for (int j = 0; j < R; ++j) set.rstd[j] = normalizes ? 1.f / std::sqrt(squares[j] / count + norm.eps) : 1.f;
}

// Whether every row can be streamed: its address is a multiple of a vector.
bool can_stream(const RowNorm& norm, void* const* rows, int count) {
  if (!kStreams || !norm.stream) return false;
  for (int j = 0; j < count; ++j) {
    if (reinterpret_cast<uintptr_t>(rows[j]) % (VW * sizeof(float)) != 0) return false;
  }
  return true;
}

template <int R>
void forward(const RowNorm& norm, const NormRows& rows, const NormRows& next, const float* gain, const float* offset,
             float* scratch) {
  RowSet<R> set;
  take_statistics(norm, rows, next, false, scratch, set);
  with_element(norm.out_dtype, [&](auto t) {
    with_bool(gain != nullptr, [&](auto affine) {
      with_bool(can_stream(norm, rows.out, R), [&](auto streamed) {
        write_rows<decltype(t), R, decltype(affine)::value, decltype(streamed)::value>(set, norm.features, gain, offset,
                                                                                       rows.out);
      });
    });
  });
}

template <int R>
void backward(const RowNorm& norm, const NormRows& rows, const NormRows& next, const float* gain, const NormSums& into,
              float* scratch) {
  RowSet<R> set;
  float* e = scratch + R * row_stride(norm.features);
  take_statistics(norm, rows, next, true, scratch, set);
  float constant[R] = {}, slope[R] = {};
  const bool stores = rows.grad_x[0] != nullptr, input = stores || into.z != nullptr;
  with_element(norm.out_dtype, [&](auto t) {
    const auto weigh = [&](auto with_input, auto with_parameters) {
      weigh_gradient<decltype(t), R, decltype(with_input)::value, decltype(with_parameters)::value>(
          set, norm.features, rows.grad_out, gain, e, into, constant, slope);
    };
    if (!input) return weigh(std::false_type{}, std::true_type{});
    with_bool(into.gain != nullptr, [&](auto with_parameters) { weigh(std::true_type{}, with_parameters); });
  });
  if (!input) return;
  const float count = static_cast<float>(norm.features);
  for (int j = 0; j < R; ++j) {
    const float rstd = set.rstd[j];
    constant[j] = norm.norm == Norm::layer ? rstd * constant[j] / count : 0.f;
    slope[j] = norm.norm == Norm::none ? 0.f : rstd * rstd * slope[j] / count;
  }
  if (norm.norm == Norm::none) {  // grad_z = e whatever z is, infinite or NaN: a row of zeros stands for it
    std::memset(scratch, 0, static_cast<size_t>(padded_features(norm.features)) * sizeof(float));
    for (int j = 0; j < R; ++j) set.z[j] = scratch;
  }
  with_element(norm.dtype, [&](auto t) {
    const auto write = [&](auto with_store, auto with_sum, auto streamed) {
      write_gradient<decltype(t), R, decltype(with_store)::value, decltype(with_sum)::value, decltype(streamed)::value>(
          set, norm.features, e, constant, slope, rows.grad_x, into.z);
    };
    if (!stores) return write(std::false_type{}, std::true_type{}, std::false_type{});
    with_bool(into.z != nullptr, [&](auto with_sum) {
      with_bool(can_stream(norm, rows.grad_x, R), [&](auto streamed) { write(std::true_type{}, with_sum, streamed); });
    });
  });
}

}  // namespace

int norm_rows(int64_t features, bool backward) {
  const int64_t floats = backward ? kBackwardFloats : kForwardFloats;
  return features * 4 <= floats ? 4 : features * 2 <= floats ? 2 : 1;
}

int64_t norm_scratch(int64_t features) { return 2 * kMaxNormRows * row_stride(features); }

void normalize_rows(const RowNorm& norm, const NormRows& rows, const NormRows& next, const float* gain,
                    const float* offset, float* scratch) {
  with_constant<kMaxNormRows>(rows.count, [&](auto r) {
    forward<static_cast<int>(decltype(r)::value)>(norm, rows, next, gain, offset, scratch);
  });
}

void normalize_rows_backward(const RowNorm& norm, const NormRows& rows, const NormRows& next, const float* gain,
                             const NormSums& sums, float* scratch) {
  with_constant<kMaxNormRows>(rows.count, [&](auto r) {
    backward<static_cast<int>(decltype(r)::value)>(norm, rows, next, gain, sums, scratch);
  });
}

void finish_streaming() { stream_fence(); }

}  // namespace MMK_ISA
}  // namespace mmk
