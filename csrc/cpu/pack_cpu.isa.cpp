// Packing, compiled once for all kernels of an instruction set.
#include "csrc/cpu/pack.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs>
void pack_units_in_lanes(Dtype dtype, const void* source, int64_t row_stride, int64_t count, int64_t features,
                         float* out, int64_t stride) {
  const int64_t columns = units<kPairs>(features), whole_columns = kPairs ? features / 2 : features;
  const auto pack = [&](auto load_chunk, auto load_tile) {
    for (int64_t i = 0; i < count; i += VW) {
      for (int64_t c = 0; c < columns; c += VW) {
        float* to = out + c * stride + i;
        vf r[VW];
        if (i + VW <= count && c + VW <= whole_columns) {
          load_tile(i, c, r);
          MMK_UNROLL for (int x = 0; x < VW; ++x) store(to + x * stride, r[x]);
          continue;
        }
        for (int x = 0; x < VW; ++x) r[x] = i + x < count ? load_chunk(i + x, c) : zero();
        transpose(r);
        for (int x = 0; x < VW && c + x < columns; ++x) store(to + x * stride, r[x]);
      }
    }
  };
  if constexpr (kPairs) {
    const auto* p = static_cast<const uint16_t*>(source);
    pack([&](int64_t row, int64_t unit) { return load_pairs(p + row * row_stride + 2 * unit, features - 2 * unit); },
         [&](int64_t row, int64_t unit, vf(&r)[VW]) {
           load_transposed(static_cast<const void*>(p + row * row_stride + 2 * unit), row_stride * 2, r);
         });
  } else {
    with_element_type(dtype, source, [&](const auto* p) {
      pack([&](int64_t row, int64_t c) { return load_as_float(p + row * row_stride + c, features - c); },
           [&](int64_t row, int64_t c, vf(&r)[VW]) { load_transposed(p + row * row_stride + c, row_stride, r); });
    });
  }
}

}  // namespace

void pack_lanes(bool pairs, Dtype dtype, const void* source, int64_t row_stride, int64_t count, int64_t features,
                float* out, int64_t stride) {
  if constexpr (kBf16Dot) {
    if (pairs) return pack_units_in_lanes<true>(dtype, source, row_stride, count, features, out, stride);
  }
  pack_units_in_lanes<false>(dtype, source, row_stride, count, features, out, stride);
}

void pack_lanes(bool pairs, Dtype dtype, const Matrix& m, int64_t count, int64_t features, float* out, int64_t stride) {
  if (!m.by_columns) return pack_lanes(pairs, dtype, m.data, m.stride, count, features, out, stride);
  if (pairs) {
    pack_columns_as_pairs(static_cast<const uint16_t*>(m.data), m.stride, features, count, out, stride);
  } else {
    pack_rows_as_float(dtype, m.data, m.stride, features, count, out, stride);
  }
}

void pack_rows_as_float(Dtype dtype, const void* source, int64_t row_stride, int64_t count, int64_t features,
                        float* out, int64_t stride) {
  with_element_type(dtype, source, [&](const auto* p) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < features; c += VW) {
        store(out + i * stride + c, load_as_float(p + i * row_stride + c, features - c));
      }
    }
  });
}

void pack_columns_as_pairs(const uint16_t* source, int64_t row_stride, int64_t count, int64_t features, float* out,
                           int64_t stride) {
  if constexpr (kBf16Dot) {
    constexpr int64_t kAhead = 8;  // rows
    for (int64_t i = 0; i < count; i += 2) {
      const uint16_t* even = source + i * row_stride;
      const uint16_t* later = source + max(0, min(i + kAhead, count - 2)) * row_stride;
      for (int64_t c = 0; c < features; c += 2 * VW) {
        const int64_t n = features - c;
        __builtin_prefetch(later + c, 0, 2);
        __builtin_prefetch(later + row_stride + c, 0, 2);
        float* to = out + i / 2 * stride + c;
        vf first, second;
        pair_rows(load_pairs(even + c, n), i + 1 < count ? load_pairs(even + row_stride + c, n) : zero(), first,
                  second);
        store(to, first);
        if (n > VW) store(to + VW, second);
      }
    }
  }
}

void pack_columns_as_turned_pairs(const uint16_t* source, int64_t row_stride, int64_t count, int64_t features,
                                  float* out, int64_t stride) {
  if constexpr (kBf16Dot) {
    for (int64_t i = 0; i < count; i += 2 * VW) {
      for (int64_t c = 0; c < features; c += 2 * VW) {
        const bool whole = i + 2 * VW <= count && c + 2 * VW <= features;
        // Pairs of features in the rows, every second of the source in the lanes.
        const auto load_pairs_in_lanes = [&](int64_t first, vf(&r)[VW]) {
          const uint16_t* const from = source + first * row_stride + c;
          if (whole) return load_transposed(static_cast<const void*>(from), 2 * row_stride * 2, r);
          for (int x = 0; x < VW; ++x) {
            r[x] = first + 2 * x < count ? load_pairs(from + 2 * x * row_stride, features - c) : zero();
          }
          transpose(r);
        };
        const uint16_t* later = source + (i + 2 * VW) * row_stride + c;
        for (int64_t x = min(2 * VW, count - i - 2 * VW); x > 0; --x, later += row_stride) __builtin_prefetch(later);
        vf even[VW], odd[VW];
        load_pairs_in_lanes(i, even);
        load_pairs_in_lanes(i + 1, odd);
        float* const to = out + c * stride + i / 2;
        const auto store_rows = [&](int x) {
          const vi a = (vi)even[x], b = (vi)odd[x];
          store(to + 2 * x * stride, (vf)((a & 0xffff) | (b << 16)));
          store(to + (2 * x + 1) * stride, (vf)(((a >> 16) & 0xffff) | (b & -0x10000)));
        };
        MMK_UNROLL for (int x = 0; x < VW / 2; ++x) store_rows(x);
        if (features - c <= VW) continue;
        MMK_UNROLL for (int x = VW / 2; x < VW; ++x) store_rows(x);
      }
    }
  }
}

void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, Dtype dtype, void* to,
                int64_t stride) {
  with_element_type(dtype, to, [&](auto* p) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < columns; c += VW) {
        store_from_float(p + i * stride + c, load(from + i * from_stride + c), columns - c);
      }
    }
  });
}

void write_transposed(const float* from, int64_t from_stride, int64_t rows, int64_t columns, Dtype dtype, void* to,
                      int64_t stride) {
  with_element_type(dtype, to, [&](auto* p) {
    for (int64_t c = 0; c < columns; c += VW) {
      for (int64_t i = 0; i < rows; i += VW) {
        vf r[VW];
        for (int x = 0; x < VW; ++x) {
          r[x] = i + x < rows ? load_as_float(from + (i + x) * from_stride + c, columns - c) : zero();
        }
        transpose(r);
        for (int x = 0; x < VW && c + x < columns; ++x) store_from_float(p + (c + x) * stride + i, r[x], rows - i);
      }
    }
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
