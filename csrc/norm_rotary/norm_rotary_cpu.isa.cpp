//
//   n = x · r ∘ weight,  r = 1 / √(mean x² + eps);  without a weight n = x
//   y_a = n_a cos − n_b sin,  y_b = n_b cos + n_a sin   for each pair (a, b) of the first R features
//
//   With dn the gradient of y rotated back:
//   grad_weight = Σ dn ∘ x · r,   grad_x = r · (dn ∘ weight − x · r² · mean(dn ∘ weight ∘ x))
//   grad_cos = Σ_heads g_a n_a + g_b n_b,   grad_sin = Σ_heads g_b n_a − g_a n_b
//
// Tiling     a task owns a run of tokens of one batch element, all heads of queries and keys; where the gradient of one
//            table for all elements is wanted, the run of every element. Heads and tokens are walked in their order in
//            memory. A row is read once; what is read of it again comes from the first-level cache.
// Tables     read as they lie where they are float32 and halves are rotated, else made into floats once for the run:
//            interleaved, cos twice and sin as −sin, sin, so that y = n ∘ cos + swapped n ∘ sin.
// Precision  float32. Sums over rows: those of a run, then the runs' in their order, whatever the number of threads.
// Limits     any D, R and strides.
#include <cmath>

#include "csrc/cpu/schedule.h"
#include "csrc/cpu/tile.h"
#include "csrc/norm/row_norm.h"
#include "csrc/norm/vectors.h"
#include "csrc/norm_rotary/norm_rotary.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kRun = 32;      // tokens of a task
constexpr int64_t kPad = 2 * VW;  // floats behind a vector that a load may reach
#define MMK_LAMBDA __attribute__((always_inline))

// Lanes 2i and 2i + 1 exchanged.
MMK_INLINE vf swap_neighbours(vf x) {
  typedef uint64_t pairs __attribute__((vector_size(4 * VW)));
  const pairs lanes = (pairs)x;
  return (vf)(lanes << 32 | lanes >> 32);
}

// What holds for every row of a call.
struct Shape {
  int64_t features, half;
  bool whole;  // every part of a row is a multiple of two vectors

  explicit Shape(const NormRotaryParams& p)
      : features(p.features),
        half(p.half),
        whole(half % (p.interleaved ? VW : 2 * VW) == 0 && (features - 2 * half) % (2 * VW) == 0) {}
  int64_t table_floats(bool interleaved) const { return padded_features(interleaved ? 2 * half : half); }
};

// The table of a token, as floats.
struct Angle {
  const float *cos, *sin;
};

// f(k, n) for the vectors of features k0 … end.
template <class Function>
MMK_INLINE void for_vectors_of(int64_t k0, int64_t end, Function f) {
  int64_t k = k0;
  for (; k + VW <= end; k += VW) f(k, Constant<VW>{});
  if (k < end) f(k, end - k);
}

// y = rotated x · r ∘ weight (kNorm), or rotated x; kInverse: by the opposite angles.
template <class In, class Out, bool kNorm, bool kInverse, bool kInterleaved, bool kStream>
MMK_INLINE void rotate_row(const Shape& shape, const In* x, Out* y, const Angle& angle, const float* weight, float r) {
  const vf scale = set1(r);
  const auto value = [&](int64_t k, auto n) MMK_LAMBDA {
    vf v = load_as_float(x + k, n);
    if constexpr (kNorm) v = v * scale * load(weight + k);
    return v;
  };
  const auto sine = [&](int64_t k, auto n) MMK_LAMBDA {
    const vf s = load_as_float(angle.sin + k, n);
    return kInverse ? -s : s;
  };
  const auto neighbours = [&](int64_t k, auto n) MMK_LAMBDA {
    const vf v = value(k, n);
    return fma(v, load_as_float(angle.cos + k, n), swap_neighbours(v) * sine(k, n));
  };
  const auto halves = [&](int64_t k, auto n, vf& first, vf& second) MMK_LAMBDA {
    const vf a = value(k, n), b = value(shape.half + k, n), c = load_as_float(angle.cos + k, n), s = sine(k, n);
    first = a * c - b * s;
    second = fma(b, c, a * s);
  };
  const Constant<VW> all;
  const int64_t turned = 2 * shape.half;
  if (kStream || shape.whole) {
    if constexpr (kInterleaved) {
      for (int64_t k = 0; k < turned; k += 2 * VW) {
        write_pair<kStream>(y + k, neighbours(k, all), neighbours(k + VW, all));
      }
    } else {
      for (int64_t k = 0; k < shape.half; k += 2 * VW) {
        vf a, b, c, d;
        halves(k, all, a, b);
        halves(k + VW, all, c, d);
        write_pair<kStream>(y + k, a, c);
        write_pair<kStream>(y + shape.half + k, b, d);
      }
    }
    for (int64_t k = turned; k < shape.features; k += 2 * VW) {
      write_pair<kStream>(y + k, value(k, all), value(k + VW, all));
    }
    return;
  }
  if constexpr (kInterleaved) {
    for_vectors_of(0, turned, [&](int64_t k, auto n) MMK_LAMBDA { store_from_float(y + k, neighbours(k, n), n); });
  } else {
    for_vectors_of(0, shape.half, [&](int64_t k, auto n) MMK_LAMBDA {
      vf a, b;
      halves(k, n, a, b);
      store_from_float(y + k, a, n);
      store_from_float(y + shape.half + k, b, n);
    });
  }
  for_vectors_of(turned, shape.features,
                 [&](int64_t k, auto n) MMK_LAMBDA { store_from_float(y + k, value(k, n), n); });
}

float rstd_of(float squares, int64_t features, float eps) {
  return 1.f / std::sqrt(squares / static_cast<float>(features) + eps);
}

template <class T>
MMK_INLINE float rstd_of_row(const T* x, int64_t features, float eps) {
  vf even = zero(), odd = zero();
  int64_t k = 0;
  for (; k + 2 * VW <= features; k += 2 * VW) {
    const vf a = load_as_float(x + k), b = load_as_float(x + k + VW);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for_vectors_of(k, features, [&](int64_t i, auto n) MMK_LAMBDA {
    const vf a = load_as_float(x + i, n);
    even = fma(a, a, even);
  });
  return rstd_of(sum(even + odd), features, eps);
}

template <class T>
MMK_INLINE T* row_of(const Rows& rows, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(rows.data) + b * rows.batch + h * rows.head + l * rows.row;
}

// f(h, l) for all rows of a run, in the order in which they lie.
template <class Function>
MMK_INLINE void for_each_row(const Rows& rows, int64_t heads, int64_t begin, int64_t end, Function f) {
  const bool heads_outside = rows.head > rows.row;
  const int64_t tokens = end - begin, outer = heads_outside ? heads : tokens, inner = heads_outside ? tokens : heads;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) f(heads_outside ? i : j, begin + (heads_outside ? j : i));
  }
}

// The tables of a run of tokens.
class Angles {
 public:
  Angles(const NormRotaryParams& p, float* memory)
      : p_(p),
        memory_(memory),
        floats_(Shape(p).table_floats(p.interleaved)),
        as_they_lie_(p.table_dtype == Dtype::f32 && !p.interleaved) {}
  static int64_t floats(const NormRotaryParams& p) { return kRun * 2 * Shape(p).table_floats(p.interleaved) + kPad; }

  void take(int64_t b, int64_t begin, int64_t end) {
    b_ = b;
    begin_ = begin;
    if (as_they_lie_) return;
    for (int64_t l = begin; l < end; ++l) {
      float *cos = memory_ + (l - begin) * 2 * floats_, *sin = cos + floats_;
      load_vector(p_.table_dtype, row_address(p_.cos, b, l, p_.table_dtype), p_.half, cos);
      load_vector(p_.table_dtype, row_address(p_.sin, b, l, p_.table_dtype), p_.half, sin);
      if (p_.interleaved) {
        for (int64_t i = p_.half - 1; i >= 0; --i) {
          const float c = cos[i], s = sin[i];
          cos[2 * i] = cos[2 * i + 1] = c;
          sin[2 * i] = -s;
          sin[2 * i + 1] = s;
        }
      }
    }
  }
  Angle of(int64_t l) const {
    if (as_they_lie_) {
      return {reinterpret_cast<const float*>(row_address(p_.cos, b_, l, Dtype::f32)),
              reinterpret_cast<const float*>(row_address(p_.sin, b_, l, Dtype::f32))};
    }
    const float* cos = memory_ + (l - begin_) * 2 * floats_;
    return {cos, cos + floats_};
  }

 private:
  const NormRotaryParams& p_;
  float* memory_;
  int64_t floats_, b_ = 0, begin_ = 0;
  bool as_they_lie_;
};

// Whether all rows can be streamed: their parts are whole vectors at multiples of a vector.
bool can_stream(const Shape& shape, const Rows& rows, bool wanted, Dtype dtype) {
  const int64_t bytes = VW * static_cast<int64_t>(sizeof(float)), element = element_size(dtype);
  const int64_t start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data));
  return kStreams && wanted && shape.whole && start % bytes == 0 && rows.batch * element % bytes == 0 &&
         rows.head * element % bytes == 0 && rows.row * element % bytes == 0;
}

template <class T, bool kNorm, bool kInterleaved, bool kStream>
MMK_NOINLINE void rotate_run(const NormRotaryParams& p, const RotatedHeads& side, const float* weight,
                             const Angles& angles, int64_t b, int64_t begin, int64_t end) {
  const Shape shape(p);
  for_each_row(side.out, side.heads, begin, end, [&](int64_t h, int64_t l) MMK_LAMBDA {
    const T* x = row_of<const T>(side.x, b, h, l);
    const float r = kNorm ? rstd_of_row(x, shape.features, p.eps) : 1.f;
    rotate_row<T, T, kNorm, false, kInterleaved, kStream>(shape, x, row_of<T>(side.out, b, h, l), angles.of(l), weight,
                                                          r);
  });
}

// Where the backward of a run adds to; null where not wanted.
struct Sums {
  float* weight;     // [D]
  float *cos, *sin;  // [tokens of the run][half]
  float* gradient;   // a row's dn, scratch
  float* value;      // a row's n, scratch
};

// += g_a n_a + g_b n_b and g_b n_a − g_a n_b
template <class T>
void pull_table(const NormRotaryParams& p, const T* grad, const float* n, float* cos, float* sin) {
  const int64_t step = p.interleaved ? 2 : 1, other = p.interleaved ? 1 : p.half;
  alignas(64) float ga[VW], gb[VW], na[VW], nb[VW];
  for_each_vector(p.half, [&](int64_t i, int64_t count) {
    for (int64_t j = 0; j < VW; ++j) {
      const int64_t at = (i + (j < count ? j : 0)) * step;
      ga[j] = sum(load_as_float(grad + at, 1));
      gb[j] = sum(load_as_float(grad + at + other, 1));
      na[j] = n[at];
      nb[j] = n[at + other];
    }
    const vf g = load(ga), h = load(gb), a = load(na), b = load(nb);
    store(cos + i, load(cos + i) + fma(g, a, h * b));
    store(sin + i, load(sin + i) + (h * a - g * b));
  });
}

template <class T, bool kInterleaved, bool kStream>
MMK_NOINLINE void pull_run(const NormRotaryParams& p, const RotatedHeads& side, const float* weight,
                           const Angles& angles, int64_t b, int64_t begin, int64_t end, const Sums& sums) {
  const Shape shape(p);
  const bool normed = side.weight != nullptr, stores = side.grad_x.data != nullptr;
  const bool tables = sums.cos != nullptr;
  if (!stores && !tables && sums.weight == nullptr) return;
  const int64_t features = shape.features, table = padded_features(p.half);
  for_each_row(side.x, side.heads, begin, end, [&](int64_t h, int64_t l) MMK_LAMBDA {
    const T* grad = row_of<const T>(side.grad_out, b, h, l);
    T* dx = stores ? row_of<T>(side.grad_x, b, h, l) : nullptr;
    if (!normed && stores) {
      rotate_row<T, T, false, true, kInterleaved, kStream>(shape, grad, dx, angles.of(l), nullptr, 1.f);
    }
    if (!normed && !tables) return;
    const T* x = row_of<const T>(side.x, b, h, l);
    float r = 1.f;
    if (normed) {
      float* dn = sums.gradient;
      rotate_row<T, float, false, true, kInterleaved, false>(shape, grad, dn, angles.of(l), nullptr, 1.f);
      vf squares = zero(), dot = zero();
      for_vectors_of(0, features, [&](int64_t k, auto n) MMK_LAMBDA {
        const vf v = load_as_float(x + k, n);
        squares = fma(v, v, squares);
        dot = fma(load_as_float(dn + k, n) * load(weight + k), v, dot);
      });
      r = rstd_of(sum(squares), features, p.eps);
      const vf scale = set1(r), slope = set1(r * r * r * sum(dot) / static_cast<float>(features));
      const auto gradient = [&](int64_t k, auto n) MMK_LAMBDA {
        const vf v = load_as_float(x + k, n), d = load_as_float(dn + k, n) * scale;
        if (sums.weight != nullptr) store(sums.weight + k, fma(d, v, load(sums.weight + k)));
        return d * load(weight + k) - v * slope;
      };
      if (!stores) {
        for_vectors_of(0, features, [&](int64_t k, auto n) MMK_LAMBDA { gradient(k, n); });
      } else if (kStream) {
        const Constant<VW> all;
        for (int64_t k = 0; k < features; k += 2 * VW) {
          const vf first = gradient(k, all);
          write_pair<kStream>(dx + k, first, gradient(k + VW, all));
        }
      } else {
        for_vectors_of(0, features, [&](int64_t k, auto n) MMK_LAMBDA { store_from_float(dx + k, gradient(k, n), n); });
      }
    }
    if (!tables) return;
    for_vectors_of(0, 2 * p.half, [&](int64_t k, auto n) MMK_LAMBDA {
      const vf v = load_as_float(x + k, n);
      store(sums.value + k, normed ? v * set1(r) * load(weight + k) : v);
    });
    pull_table(p, grad, sums.value, sums.cos + (l - begin) * table, sums.sin + (l - begin) * table);
  });
}

// The weights of both sides as floats, [2][stride]; what lies behind their features is zero.
void load_weights(const NormRotaryParams& p, float* to, int64_t stride) {
  for (int side = 0; side < 2; ++side) {
    clear_vector(to + side * stride, stride);
    if (p.sides[side].weight == nullptr) continue;
    load_vector(p.weight_dtype, p.sides[side].weight, p.features, to + side * stride);
  }
}

}  // namespace

void norm_rotary_forward(const NormRotaryParams& p) {
  const Shape shape(p);
  const int64_t runs = ceil_div(p.length, kRun), stride = padded_features(p.features) + kPad;
  const int64_t per_worker = round_up(Angles::floats(p), 16);
  const Scratch memory(2 * stride + p.workers.count * per_worker);
  load_weights(p, memory.data(), stride);
  for_each_claim(p.workers, p.batch * runs, 1, [&](int worker, int64_t first, int64_t last) {
    Angles angles(p, memory.data() + 2 * stride + worker * per_worker);
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / runs, begin = task % runs * kRun, end = min(begin + kRun, p.length);
      angles.take(b, begin, end);
      for (int i = 0; i < 2; ++i) {
        const RotatedHeads& side = p.sides[i];
        const float* weight = memory.data() + i * stride;
        with_element_type(p.dtype, side.x.data, [&](const auto* element) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
          with_bool(side.weight != nullptr, [&](auto norm) {
            with_bool(p.interleaved, [&](auto interleaved) {
              with_bool(can_stream(shape, side.out, side.stream, p.dtype), [&](auto streamed) {
                rotate_run<T, decltype(norm)::value, decltype(interleaved)::value, decltype(streamed)::value>(
                    p, side, weight, angles, b, begin, end);
              });
            });
          });
        });
      }
    }
    stream_fence();
  });
}

void norm_rotary_backward(const NormRotaryParams& p) {
  const Shape shape(p);
  const bool tables = p.grad_cos.data != nullptr || p.grad_sin.data != nullptr;
  const bool together = tables && p.one_table;  // a task has the run of every element
  const int64_t runs = ceil_div(p.length, kRun), tasks = together ? runs : runs * p.batch;
  const int64_t stride = padded_features(p.features) + kPad, table = padded_features(p.half);
  bool sums_weight[2];
  for (int i = 0; i < 2; ++i) sums_weight[i] = p.sides[i].grad_weight != nullptr;
  const bool keeps_sums = sums_weight[0] || sums_weight[1];
  const int64_t partial_floats = keeps_sums ? runs * p.batch * 2 * stride : 0;  // of each run of each element
  const int64_t per_worker = round_up(Angles::floats(p), 16) + 2 * stride + (tables ? 2 * kRun * table : 0);
  const Scratch memory(2 * stride + partial_floats + p.workers.count * per_worker);
  load_weights(p, memory.data(), stride);
  float *partials = memory.data() + 2 * stride, *workspace = partials + partial_floats;

  for_each_claim(p.workers, tasks, 1, [&](int worker, int64_t first, int64_t last) {
    float* gradient = workspace + worker * per_worker;
    float *value = gradient + stride, *cos = value + stride;
    float *sin = cos + (tables ? kRun * table : 0), *own = sin + (tables ? kRun * table : 0);
    Angles angles(p, own);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % runs * kRun, end = min(begin + kRun, p.length);
      const int64_t b0 = together ? 0 : task / runs, b1 = together ? p.batch : b0 + 1;
      if (tables) clear_vector(cos, 2 * kRun * table);
      for (int64_t b = b0; b < b1; ++b) {
        float* partial = partials + (b * runs + task % runs) * 2 * stride;
        if (keeps_sums) clear_vector(partial, 2 * stride);
        angles.take(b, begin, end);
        for (int i = 0; i < 2; ++i) {
          const RotatedHeads& side = p.sides[i];
          const Sums sums{sums_weight[i] ? partial + i * stride : nullptr, tables ? cos : nullptr, sin, gradient,
                          value};
          with_element_type(p.dtype, side.x.data, [&](const auto* element) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
            with_bool(p.interleaved, [&](auto interleaved) {
              with_bool(can_stream(shape, side.grad_x, side.stream, p.dtype), [&](auto streamed) {
                pull_run<T, decltype(interleaved)::value, decltype(streamed)::value>(
                    p, side, memory.data() + i * stride, angles, b, begin, end, sums);
              });
            });
          });
        }
      }
      for (int64_t l = begin; tables && l < end; ++l) {
        const int64_t at = (l - begin) * table;
        if (p.grad_cos.data != nullptr) {
          store_vector(p.table_dtype, row_address(p.grad_cos, b0, l, p.table_dtype), p.half, cos + at);
        }
        if (p.grad_sin.data != nullptr) {
          store_vector(p.table_dtype, row_address(p.grad_sin, b0, l, p.table_dtype), p.half, sin + at);
        }
      }
    }
    stream_fence();
  });

  for (int i = 0; i < 2; ++i) {
    if (!sums_weight[i]) continue;
    float* total = memory.data() + i * stride;  // in place of the weight
    clear_vector(total, stride);
    for (int64_t part = 0; part < runs * p.batch; ++part) {
      add_vector(total, partials + (part * 2 + i) * stride, p.features);
    }
    store_vector(p.weight_dtype, p.sides[i].grad_weight, p.features, total);
  }
}

}  // namespace MMK_ISA
}  // namespace mmk
