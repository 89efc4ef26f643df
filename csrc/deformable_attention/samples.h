// The samples of one query and head: which rows of the maps they read, and with which shares.
#pragma once

#include "csrc/cpu/element.h"
#include "csrc/cpu/schedule.h"
#include "csrc/deformable_attention/deformable_attention.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// n elements as floats.
inline void read_floats(Dtype dtype, const void* data, int64_t offset, int64_t n, float* to) {
  with_element_type(dtype, data, [&](const auto* from) {
    for (int64_t i = 0; i < n; i += VW) store(to + i, load_as_float(from + offset + i, n - i));
  });
}
// Streamed past the caches where that is asked for and these are whole aligned vectors of float32.
template <class T>
MMK_INLINE void write_row(T* to, int64_t n, const float* from, bool streamed) {
  if constexpr (kStreams && std::is_same_v<T, float>) {
    if (streamed && n % VW == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(vf) == 0) {
      for (int64_t i = 0; i < n; i += VW) stream(to + i, load(from + i));
      return;
    }
  }
  for (int64_t i = 0; i < n; i += VW) store_from_float(to + i, load(from + i), n - i);
}
inline void write_floats(Dtype dtype, void* data, int64_t offset, int64_t n, const float* from, bool streamed) {
  with_element_type(dtype, data, [&](auto* to) { write_row(to + offset, n, from, streamed); });
}

// Asks for the lines of n elements, to be written or to be read.
template <bool kWritten, class T>
MMK_INLINE void ask_for_lines(const T* p, int64_t n) {
  const char *line = reinterpret_cast<const char*>(p), *end = reinterpret_cast<const char*>(p + n);
  for (; line < end; line += 64) __builtin_prefetch(line, kWritten ? 1 : 0);
}
template <bool kWritten>
inline void ask_for_floats(Dtype dtype, const void* data, int64_t offset, int64_t n) {
  if (data == nullptr) return;
  ask_for_lines<kWritten>(static_cast<const char*>(data) + offset * element_size(dtype), n * element_size(dtype));
}

// Four corners of a bilinear sample, upper left, upper right, lower left, lower right; one pixel of a discrete one.
//
// A corner beyond the map gives its place to the other one in its row or column, which is read twice with half its
// share, so that every sample reads as many rows, and none that it must not.
class Samples {
 public:
  explicit Samples(const DeformableParams& p)
      : p_(p), corners(p.discrete ? 1 : 4), padded(round_up(p.points, VW)), memory_(floats(p)) {
    std::memset(memory_.data(), 0, sizeof(float) * static_cast<size_t>(floats(p)));
    Carver carve(memory_.data());
    place_ = carve.take(2 * padded + VW);
    weight_ = carve.take(padded);
    height_ = carve.take(padded);
    width_ = carve.take(padded);
    across_ = carve.take(padded);
    down_ = carve.take(padded);
    first_row_ = ints(carve);
    reaches_ = ints(carve);
    indices = ints(carve);
    for (int k = 0; k < 4; ++k) {
      rows[k] = ints(carve);
      shares[k] = carve.take(padded);
      valid_[k] = ints(carve);
    }
    dots = carve.take(padded * 4 * VW);
  }

  // The sizes of the maps that each point samples. NaN, which nothing is less than, keeps points from sampling: those
  // of absent sources and of empty maps, and the padding.
  void set_batch(int64_t b) {
    int64_t i = 0;
    for (int64_t l = 0; l < p_.level_count; ++l) {
      const DeformableLevel& level = p_.levels[l];
      const bool present = p_.presence == nullptr || p_.presence[b * p_.presence_stride + level.source] != 0;
      const bool sampled = present && level.height > 0 && level.width > 0;
      for (int64_t end = i + level.points; i < end; ++i) {
        height_[i] = sampled ? static_cast<float>(level.height) : std::numeric_limits<float>::quiet_NaN();
        width_[i] = sampled ? static_cast<float>(level.width) : std::numeric_limits<float>::quiet_NaN();
        first_row_[i] = static_cast<int32_t>(level.first_row);
      }
    }
    for (; i < padded; ++i) height_[i] = width_[i] = std::numeric_limits<float>::quiet_NaN();
  }

  // Fills rows and shares of the points that reach a map, and the indices of these; returns how many they are.
  int64_t place(int64_t b, int64_t q, int64_t h) {
    const auto read = [&](const DeformableSamples& s, int64_t n, float* to) {
      read_floats(s.dtype, s.data, b * s.batch_stride + q * s.query_stride + h * s.head_stride, n, to);
    };
    read(p_.locations, 2 * p_.points, place_);
    read(p_.weights, p_.points, weight_);
    for (int64_t i = 0; i < padded; ++i) {  // as two planes
      across_[i] = place_[2 * i];
      down_[i] = place_[2 * i + 1];
    }
    for (int64_t i = 0; i < padded; i += VW) p_.discrete ? place_nearest(i) : place_bilinear(i);
    int64_t count = 0;
    for (int64_t i = 0; i < p_.points; ++i) {
      indices[count] = static_cast<int32_t>(i);
      count -= reaches_[i];
    }
    return count;
  }

  // Asks for what a query reads and writes.
  void ask_for(int64_t b, int64_t q, int64_t h) const {
    const DeformableSamples &l = p_.locations, &w = p_.weights;
    const int64_t at = (b * p_.queries + q) * p_.heads + h;
    const int64_t grad = b * p_.grad_batch_stride + q * p_.grad_query_stride + h * p_.width;
    const auto place_of = [&](const DeformableSamples& s) {
      return b * s.batch_stride + q * s.query_stride + h * s.head_stride;
    };
    ask_for_floats<false>(l.dtype, l.data, place_of(l), 2 * p_.points);
    ask_for_floats<false>(w.dtype, w.data, place_of(w), p_.points);
    ask_for_floats<true>(p_.dtype, p_.out, at * p_.width, p_.width);
    ask_for_floats<false>(p_.dtype, p_.grad_out, grad, p_.width);
    ask_for_floats<true>(l.dtype, p_.grad_locations, 2 * at * p_.points, 2 * p_.points);
    ask_for_floats<true>(w.dtype, p_.grad_weights, at * p_.points, p_.points);
  }

  // From `dots`, [point][corner] vectors whose sums are those of the gradient with each row.
  void write_gradients(int64_t b, int64_t q, int64_t h) {
    for (int64_t i = 0; i < padded; i += VW) {
      const vi reaches = load_ints(reaches_ + i);
      vf dot[4];
      for (int k = 0; k < corners; ++k) {
        vf rows_of[VW];
        MMK_UNROLL for (int j = 0; j < VW; ++j) rows_of[j] = load(dots + ((i + j) * corners + k) * VW);
        dot[k] = select(load_ints(valid_[k] + i), sum_rows(rows_of), zero());
      }
      vf of_weight = dot[0], of_x = zero(), of_y = zero();
      if (!p_.discrete) {
        const vf x = load(across_ + i), y = load(down_ + i), left = set1(1.f) - x, up = set1(1.f) - y;
        const vf weight = load(weight_ + i);
        of_weight = up * (left * dot[0] + x * dot[1]) + y * (left * dot[2] + x * dot[3]);
        of_x = weight * load(width_ + i) * (up * (dot[1] - dot[0]) + y * (dot[3] - dot[2]));
        of_y = weight * load(height_ + i) * (left * (dot[2] - dot[0]) + x * (dot[3] - dot[1]));
        of_x = select(reaches, of_x, zero());
        of_y = select(reaches, of_y, zero());
      }
      store(weight_ + i, select(reaches, of_weight, zero()));
      store(across_ + i, of_x);
      store(down_ + i, of_y);
    }
    const int64_t at = ((b * p_.queries + q) * p_.heads + h) * p_.points;
    if (p_.grad_weights != nullptr)
      write_floats(p_.weights.dtype, p_.grad_weights, at, p_.points, weight_, p_.stream_samples);
    if (p_.grad_locations == nullptr) return;
    for (int64_t i = 0; i < padded; ++i) {
      place_[2 * i] = across_[i];
      place_[2 * i + 1] = down_[i];
    }
    write_floats(p_.locations.dtype, p_.grad_locations, 2 * at, 2 * p_.points, place_, p_.stream_samples);
  }

 private:
  static int64_t floats(const DeformableParams& p) { return (round_up(p.points, VW) + 16) * (23 + 4 * VW); }
  int32_t* ints(Carver& carve) const { return reinterpret_cast<int32_t*>(carve.take(padded)); }
  static vi load_ints(const int32_t* p) { return (vi)load(reinterpret_cast<const float*>(p)); }
  static void store_ints(int32_t* p, vi x) { store(reinterpret_cast<float*>(p), (vf)x); }
  static vi to_ints(vf x) { return __builtin_convertvector(x, vi); }

  // The pair of pixels around a position along one axis of n, with their shares, and which of them there are.
  struct Pair {
    vf first, second, first_share, second_share, fraction;
    vi has_first, has_second;
  };
  static Pair around(vf position, vf n) {
    Pair r;
    const vf half = set1(0.5f), below = round_down(position);
    const vf fraction = position - below, rest = set1(1.f) - fraction;
    r.fraction = fraction;
    r.has_first = below >= zero();
    r.has_second = below + set1(1.f) < n;
    r.first = max(below, zero());
    r.second = select(r.has_second, below + set1(1.f), below);
    r.first_share = select(r.has_first, select(r.has_second, rest, half * rest), half * fraction);
    r.second_share = select(r.has_second, select(r.has_first, fraction, half * fraction), half * rest);
    return r;
  }

  void place_bilinear(int64_t i) {
    const vf width = load(width_ + i), height = load(height_ + i);
    vf x = fma(load(across_ + i), width, set1(-0.5f)), y = fma(load(down_ + i), height, set1(-0.5f));
    const vi reaches = (x >= set1(-1.f)) & (x < width) & (y >= set1(-1.f)) & (y < height);
    x = select(reaches, x, zero());
    y = select(reaches, y, zero());
    const Pair columns = around(x, width), lines = around(y, height);
    const vi first_row = load_ints(first_row_ + i), pitch = to_ints(select(reaches, width, zero()));
    const vi upper = first_row + to_ints(lines.first) * pitch, lower = first_row + to_ints(lines.second) * pitch;
    const vi left = to_ints(columns.first), right = to_ints(columns.second);
    const vf weight = load(weight_ + i), up = weight * lines.first_share, low = weight * lines.second_share;
    store_ints(reaches_ + i, reaches);
    store(across_ + i, columns.fraction);
    store(down_ + i, lines.fraction);
    set(0, i, upper + left, up * columns.first_share, reaches & lines.has_first & columns.has_first);
    set(1, i, upper + right, up * columns.second_share, reaches & lines.has_first & columns.has_second);
    set(2, i, lower + left, low * columns.first_share, reaches & lines.has_second & columns.has_first);
    set(3, i, lower + right, low * columns.second_share, reaches & lines.has_second & columns.has_second);
  }

  void place_nearest(int64_t i) {
    const vf width = load(width_ + i), height = load(height_ + i), x = load(across_ + i), y = load(down_ + i);
    const vi reaches = (x - x == zero()) & (y - y == zero()) & (width == width);
    const auto nearest = [&](vf at, vf n) {
      const vf pixel = max(zero(), min(n - set1(1.f), fma(at, n, set1(0.5f))));
      return to_ints(select(reaches, pixel, zero()));  // positive: rounded down
    };
    const vi pitch = to_ints(select(reaches, width, zero()));
    store_ints(reaches_ + i, reaches);
    set(0, i, load_ints(first_row_ + i) + nearest(y, height) * pitch + nearest(x, width), load(weight_ + i), reaches);
  }

  void set(int corner, int64_t i, vi row, vf share, vi valid) {
    store_ints(rows[corner] + i, row);
    store(shares[corner] + i, share);
    store_ints(valid_[corner] + i, valid);
  }

  const DeformableParams& p_;

 public:
  const int corners;
  const int64_t padded;  // points, in whole vectors

 private:
  Scratch memory_;
  float *place_, *weight_, *height_, *width_, *across_, *down_;
  int32_t *first_row_, *reaches_, *valid_[4];

 public:
  int32_t *indices, *rows[4];
  float *shares[4], *dots;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
