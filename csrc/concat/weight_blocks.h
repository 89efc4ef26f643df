// The products with W of concatenation fusion on cores whose level-2 cache is large (those with tiles, float32
// included): W in blocks of columns that stay there while many rows pass, each packed when it is needed. Nothing is
// packed into memory that is farther away, and rows are read a few times, not once for every 100 of them.
#pragma once

#include "csrc/concat/product.h"
#include "csrc/cpu/schedule.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kWeightBlock = 192 * 1024;  // floats: 768 KB

inline bool has_weight_blocks(const Workers& workers) { return workers.tiles != TileUnit::none; }

// Columns of a block of W of `depth` units that has `columns` in all; fewer where that leaves a worker without one.
MMK_INLINE int64_t block_columns_of(int64_t depth, int64_t columns, int64_t least_blocks) {
  const int64_t most = max(kPanel, kWeightBlock / max(1, depth) / kPanel * kPanel);
  return max(kPanel, round_up(ceil_div(columns, max(1, max(least_blocks, ceil_div(columns, most)))), kPanel));
}

// Rows of units → rows as far apart as those of a copy.
inline void copy_units(Operand x, int64_t rows, int64_t width, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * spread_stride(width), x.data + i * x.stride, sizeof(float) * static_cast<size_t>(width));
  }
}

// z = [x₁; …; x_M] Wᵀ of sources of one term each, all with the same columns of z; `loader` and `epilogue` as in
// forward.h. Rows that a loader makes (normalised ones) are made once, for as many rows as kMadeFloats hold, and so are
// copies of wide rows for tiles, which run through memory in the order in which they are read.
template <bool kPairs, class Loader, class Epilogue>
void multiply_weight_blocks(const ConcatSources& sources, const Workers& workers, const Loader& loader,
                            Epilogue epilogue) {
  constexpr int64_t kRows = kPairs ? 64 : kBlockRows, kMadeFloats = 4 << 20;  // 16 MB
  int64_t weight_units = 0, row_floats = 0;
  for (int64_t s = 0; s < sources.count; ++s) {
    const ConcatSource& source = sources.items[s];
    if (!source.shares_weights) weight_units += units<kPairs>(source.width);
    for_chunks<kPairs>(source.width,
                       [&](int64_t, int64_t width, int64_t) { row_floats += copy_stride<kPairs>(width); });
  }
  const int64_t columns = block_columns_of(weight_units, sources.features, 1);
  const int64_t splits = ceil_div(sources.features, columns);
  const bool far_rows = kPairs && weight_units > kDepth / 2 && !has_row_presence(sources);
  const bool made_once = (Loader::kPreparesRows || far_rows) && splits > 1;
  const int64_t most_rows = made_once ? max(kRows, kMadeFloats / max(1, row_floats) / kRows * kRows) : sources.rows;
  const int64_t packed_floats = weight_units * columns, copy_floats = round_up(kRows * kCopyStride, 16);
  const int64_t stride = spread_stride(columns), each = packed_floats + copy_floats + kRows * stride;
  Scratch scratch(workers.count * each);
  Scratch made(made_once ? round_up(min(most_rows, sources.rows), kRows) * row_floats : 0);
  const bool whole = first_source_fills(sources);

  const auto pack = [&](int64_t column, int64_t count, float* to) {
    for (int64_t s = 0; s < sources.count; ++s) {
      const ConcatSource& source = sources.items[s];
      if (source.shares_weights) continue;
      for_chunks<kPairs>(source.width, [&](int64_t k, int64_t width, int64_t) {
        const int64_t depth = units<kPairs>(width);
        for (int64_t p = 0; p < count; p += kPanel, to += depth * kPanel) {
          pack_lanes(kPairs, sources.dtype, from_element(source.terms[0].weight, sources.dtype, column + p, k),
                     min(kPanel, count - p), width, to, kPanel);
        }
      });
    }
  };
  // Calls f(s, rows of the source, first column, width) for the chunks of a block of rows.
  const auto for_row_chunks = [&](int worker, int64_t first, int64_t rows, auto f) {
    loader.prepare(worker, first, rows);
    for (int64_t s = 0; s < sources.count; ++s) {
      const auto present = loader.rows(worker, s, first, rows);
      for_chunks<kPairs>(sources.items[s].width, [&](int64_t k, int64_t width, int64_t) { f(s, present, k, width); });
    }
  };

  for (int64_t start = 0; start < sources.rows; start += most_rows) {
    const int64_t end_row = min(sources.rows, start + most_rows), blocks = ceil_div(end_row - start, kRows);
    if (made_once) {
      for_each_claim(workers, blocks, 1, [&](int worker, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          float* to = made.data() + block * kRows * row_floats;
          const int64_t first = start + block * kRows;
          for_row_chunks(worker, first, min(kRows, end_row - first),
                         [&](int64_t, const auto& present, int64_t k, int64_t width) {
                           const Operand x = present.template operand<kPairs>(k, width, to);
                           if (x.data != to) copy_units(x, present.count(), units<kPairs>(width), to);
                           to += kRows * copy_stride<kPairs>(width);
                         });
        }
      });
    }
    const int64_t runs = workers.count == 1 ? 1 : min(blocks, ceil_div(4 * workers.count, splits));
    for_each_claim(workers, splits * runs, 1, [&](int worker, int64_t begin, int64_t end) {
      float* const packed = scratch.data() + worker * each;
      float *const copy = packed + packed_floats, *const z = copy + copy_floats;
      int64_t packed_column = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task / runs * columns, count = min(columns, sources.features - column);
        if (packed_column != column) pack(column, count, packed);
        packed_column = column;
        for (int64_t block = blocks * (task % runs) / runs; block < blocks * (task % runs + 1) / runs; ++block) {
          const int64_t first = start + block * kRows, rows = min(kRows, end_row - first);
          if (!whole) std::memset(z, 0, sizeof(float) * static_cast<size_t>(rows * stride));
          bool add = !whole;
          const float *panels = packed, *shared = panels;
          const float* row = made.data() + block * kRows * row_floats;
          int64_t last = -1;
          const auto multiply = [&](int64_t s, int64_t width, Operand x, int64_t present, const int32_t* map) {
            if (s != last) sources.items[s].shares_weights ? panels = shared : shared = panels;
            last = s;
            const int64_t depth = units<kPairs>(width);
            if (present > 0) {
              multiply_panels(kPairs, x, present, panels, depth, {z, stride, count, add, map}, {}, true);
            }
            panels += depth * round_up(count, kPanel);
            add = true;
          };
          if (made_once) {
            for (int64_t s = 0; s < sources.count; ++s) {
              for_chunks<kPairs>(sources.items[s].width, [&](int64_t, int64_t width, int64_t) {
                multiply(s, width, {row, copy_stride<kPairs>(width)}, rows, nullptr);
                row += kRows * copy_stride<kPairs>(width);
              });
            }
          } else {
            for_row_chunks(worker, first, rows, [&](int64_t s, const auto& present, int64_t k, int64_t width) {
              const bool any = present.count() > 0;
              multiply(s, width, any ? present.template operand<kPairs>(k, width, copy) : Operand{}, present.count(),
                       present.map());
            });
          }
          epilogue(first, rows, column, count, z, stride);
        }
      }
    });
  }
}

// dx_i = dz W_i of a chunk of rows whose dz lies in memory, for sources of one term each that are present in all rows.
template <bool kPairs>
class RowGradients {
 public:
  RowGradients(const ConcatSources& sources, const Workers& workers, bool finishes_rows)
      : sources_(sources), workers_(workers), finishes_rows_(finishes_rows) {}

  static bool serve(const ConcatSources& sources, const Workers& workers) {
    bool served = has_weight_blocks(workers);
    for (int64_t s = 0; s < sources.count; ++s) {
      const ConcatSource& source = sources.items[s];
      served &=
          source.term_count == 1 && source.present == nullptr && !source.shares_weights && source.terms[0].features > 0;
    }
    return served;
  }

  // Memory for chunks of `rows` rows.
  int64_t floats(int64_t rows) {
    rows_ = rows;
    packed_floats_ = sums_floats_ = whole_floats_ = 0;
    for (int64_t s = 0; s < sources_.count; ++s) {
      const ConcatSource& source = sources_.items[s];
      if (source.grad.data == nullptr) continue;
      const int64_t depth = min(kMostUnits, units<kPairs>(source.terms[0].features)), columns = columns_of(source);
      packed_floats_ = max(packed_floats_, depth * columns);
      sums_floats_ = max(sums_floats_, min(rows, kMostRows) * spread_stride(columns));
      whole_floats_ = max(whole_floats_, rows * round_up(source.width, VW));
    }
    if (is_straight() || finishes_rows_) sums_floats_ = 0;
    if (!finishes_rows_) whole_floats_ = 0;
    return workers_.count * (packed_floats_ + sums_floats_) + whole_floats_;
  }

  // finish(s, first row, rows, dx, stride) receives dz W_s where rows are finished, at most kBlockRows at a time.
  template <class Finish>
  void multiply(Operand dz, int64_t start, int64_t rows, float* memory, Finish finish) const {
    float* const whole = memory + workers_.count * (packed_floats_ + sums_floats_);
    for (int64_t s = 0; s < sources_.count; ++s) {
      const ConcatSource& source = sources_.items[s];
      if (source.grad.data == nullptr) continue;
      const int64_t columns = columns_of(source), splits = ceil_div(source.width, columns);
      const int64_t each = round_up(ceil_div(rows, ceil_div(rows, kMostRows)), kBlockRows);
      const int64_t runs = ceil_div(rows, each), stride = round_up(source.width, VW);
      for_each_claim(workers_, splits * runs, 1, [&](int worker, int64_t begin, int64_t end) {
        float* const packed = memory + worker * (packed_floats_ + sums_floats_);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task % runs * each, last = min(rows, first + each);
          const int64_t column = task / runs * columns, count = min(columns, source.width - column);
          char* const grad = grad_address(source, start + first) + column * element_size(sources_.dtype);
          Block c{packed + packed_floats_, spread_stride(columns), count, false};
          if (is_straight()) {
            c.data = reinterpret_cast<float*>(grad);
            c.stride = source.grad.inner_stride;
          } else if (finishes_rows_) {
            c.data = whole + first * stride + column;
            c.stride = stride;
          }
          multiply_block(source.terms[0], {dz.data + first * dz.stride, dz.stride}, last - first, column, packed, c);
          if (is_straight() || finishes_rows_) continue;
          write_rows(c.data, c.stride, last - first, count, sources_.dtype, grad, source.grad.inner_stride);
        }
      });
      if (!finishes_rows_) continue;
      for_each_claim(workers_, ceil_div(rows, kBlockRows), 1, [&](int, int64_t begin, int64_t end) {
        for (int64_t row = begin * kBlockRows; row < min(rows, end * kBlockRows); row += kBlockRows) {
          finish(s, start + row, min(kBlockRows, rows - row), whole + row * stride, stride);
        }
      });
    }
  }

 private:
  static constexpr int64_t kMostUnits = 768, kMostRows = 8 * kBlockRows;  // of W, and of dx, in cache at a time

  bool is_straight() const { return !finishes_rows_ && sources_.dtype == Dtype::f32; }
  int64_t columns_of(const ConcatSource& source) const {
    const int64_t depth = min(kMostUnits, units<kPairs>(source.terms[0].features));
    const int64_t runs = ceil_div(rows_, kMostRows), least = workers_.count == 1 ? 1 : 4 * workers_.count / runs;
    return min(4 * kPanel, block_columns_of(depth, source.width, least));
  }
  char* grad_address(const ConcatSource& source, int64_t row) const {
    return static_cast<char*>(source.grad.data) + row * source.grad.inner_stride * element_size(sources_.dtype);
  }

  void multiply_block(const ConcatTerm& term, Operand dz, int64_t rows, int64_t column, float* packed, Block c) const {
    const int64_t skip = kPairs ? term.column / 2 : term.column;
    constexpr int64_t kMost = kPairs ? 2 * kMostUnits : kMostUnits;
    float* const to = c.data;
    for (int64_t n = 0; n < term.features; n += kMost) {
      const int64_t count = min(kMost, term.features - n), depth = units<kPairs>(count);
      pack_panels<kPairs>(sources_.dtype, from_element(term.weight, sources_.dtype, n, column), count, c.columns,
                          packed, depth * kPanel);
      c.add = n > 0;
      for (int64_t row = 0; row < rows; row += kBlockRows) {
        c.data = to + row * c.stride;
        multiply_panels(kPairs, {dz.data + row * dz.stride + skip + (kPairs ? n / 2 : n), dz.stride},
                        min(kBlockRows, rows - row), packed, depth, c, {}, true);
      }
    }
  }

  const ConcatSources& sources_;
  const Workers& workers_;
  bool finishes_rows_;
  int64_t rows_ = 0, packed_floats_ = 0, sums_floats_ = 0, whole_floats_ = 0;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
