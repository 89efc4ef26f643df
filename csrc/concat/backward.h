// The backward products of concatenation fusion, from the gradient dz of z = Σ_i x_i W_iᵀ:
//
//   dx_i = dz W_i,  dW_i = dzᵀ x_i
//
// Rows are worked on in chunks, so that dz, which is made once, never leaves the caches for long. A chunk has two
// stages. First, a task is a block of rows: it makes their dz, multiplies it by the weights straight into the dx_i, and
// leaves it transposed. Then a task is a group of columns of one source: it packs them, 256 rows at a time, and adds
// their products with dz, in order of the rows, to the columns of dW that it alone writes. Of few rows and weights that
// lie by columns, the second stage is dWᵀ = xᵀ dz, in the order that dW lies in. Where the level-2 cache is large, a
// chunk's dz is kept, and its dx_i are made by blocks of W (weight_blocks.h). No sum depends on the number of threads.
//
// The call's Policy makes dz and may stand between a source's rows and the products (a norm, say).
#pragma once

#include "csrc/concat/packed_columns.h"
#include "csrc/concat/weight_blocks.h"

namespace mmk {
namespace MMK_ISA {
namespace {

inline void zero_elements(Dtype dtype, char* at, int64_t count) {
  std::memset(at, 0, static_cast<size_t>(count * element_size(dtype)));
}

// Policy:
//   kSums
//     how many sums over rows it wants per column of z
//   make(first, rows, dz, stride, sums)
//     writes dz [rows][stride], zero up to a multiple of VW, adds to sums [kSums][…]
//   finish_sums(sums)
//     receives the sums over all rows, [kSums][padded columns of z]
//   columns(s, first, count, column, width, panels)
//     packs columns of a source's rows as the product sees them
//   kFinishesRows, finish_rows(s, first, rows, dx, stride, out, out_stride)
//     writes what becomes of dz W, [rows][width], of sources that are present in every row
//   kFinishesWeights, finish_weights(s, column, width, products, turned_stride, sums)
//     receives dzᵀ x of columns of a source of one term, [features][kGroup] or, where turned_stride is not 0, its
//     transposed [width][turned_stride], and the sums over rows; writes its grad
template <bool kPairs, class Policy>
class ConcatBackward {
 public:
  ConcatBackward(const ConcatSources& sources, const Workers& workers, Policy& policy)
      : sources_(sources),
        workers_(workers),
        policy_(policy),
        packed_(sources),
        row_gradients_(sources, workers, Policy::kFinishesRows),
        padded_(round_up(sources.features, VW)),
        dz_stride_(spread_stride(padded_)) {
    for (int64_t s = 0; s < sources.count; ++s) {
      const ConcatSource& source = sources.items[s];
      widest_ = max(widest_, source.width);
      most_features_ = max(most_features_, features_of(source));
      any_dx_ |= source.grad.data != nullptr;
      shares_ |= source.shares_weights;
      for (int64_t t = 0; t < source.term_count; ++t) {
        any_dw_ |= source.terms[t].grad != nullptr;
        by_columns_ |= source.terms[t].weight.by_columns;
        by_rows_ |= !source.terms[t].weight.by_columns;
      }
    }
    if constexpr (Policy::kFinishesWeights) any_dw_ = policy.wants_weights();
    const bool rows_in_place = !by_rows_ || (!kPairs && sources.dtype == Dtype::f32);
    in_place_ = rows_in_place && sources.rows <= (by_rows_ ? kInPlaceRows : 4 * kInPlaceRows);
    one_block_ = sources.rows <= kBlockRows;
    turned_ = !by_rows_ && sources.rows <= chunk_elements<kPairs>();
    by_blocks_ = any_dx_ && !in_place_ && !one_block_ && RowGradients<kPairs>::serve(sources, workers);
    const int64_t chunk_floats = has_weight_blocks(workers) ? (kPairs ? 4 << 20 : 2 << 20) : 1 << 20;  // of dz
    const int64_t most = max(4 * kBlockRows, chunk_floats / max(1, sources.features) / kBlockRows * kBlockRows);
    chunk_ = round_up(ceil_div(sources.rows, max(1, ceil_div(sources.rows, most))), kBlockRows);
    if (turned_) chunk_ = round_up(sources.rows, kBlockRows);
    block_rows_ = min(kBlockRows, sources.rows);
    transposed_stride_ = sources.rows <= 16 ? 16 : round_up(units<kPairs>(chunk_), 16) + 16;
    if (turned_) transposed_stride_ = round_up(padded_, 16) | 16;
    if (sums_in_place() && !turned_ && sources.columns >= 8 * kGroup * workers.count) group_ = 2 * kGroup;
    if (has_weight_blocks(workers) && !Policy::kFinishesWeights && !turned_) {
      group_ = kGroup * max(1, min(4, sources.columns / (2 * kGroup * workers.count)));
      if (kPairs) most_rows_ = 4 * kMostDepth;
      sums_stride_ = spread_stride(group_);
    }
    for (int64_t s = 0; s < sources.count; ++s) groups_ += groups_of(sources.items[s]);
  }

  void run() {
    const int64_t chunk_blocks = chunk_ / kBlockRows, sums = Policy::kSums * padded_;
    Carver count(nullptr);
    carve(count, chunk_blocks, sums);
    Scratch scratch(count.used());
    Carver carver(scratch.data());
    carve(carver, chunk_blocks, sums);
    if (packs_weights()) packed_.pack(packed_memory_, workers_);
    std::memset(totals_, 0, sizeof(float) * static_cast<size_t>(sums));
    for (int64_t start = 0; start < sources_.rows; start += chunk_) {
      const int64_t rows = min(chunk_, sources_.rows - start), blocks = ceil_div(rows, kBlockRows);
      const auto work = [&](int worker, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          row_block(worker, start, block, min(kBlockRows, rows - block * kBlockRows));
        }
      };
      one_block_ ? work(0, 0, blocks) : for_each_claim(workers_, blocks, 1, work);
      if (by_blocks_) {
        row_gradients_.multiply({kept_, kept_stride()}, start, rows, row_memory_, [&](auto&&... x) { finish(x...); });
      }
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t i = 0; i < sums; i += VW) {
          store(totals_ + i, load(totals_ + i) + load(partial_ + block * sums + i));
        }
      }
      if (!any_dw_) continue;
      for_each_claim(workers_, groups_, 1, [&](int worker, int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) weight_columns(worker, group, start, rows);
      });
    }
    policy_.finish_sums(totals_);
  }

 private:
  void carve(Carver& carver, int64_t chunk_blocks, int64_t sums) {
    packed_memory_ = carver.take(packs_weights() ? packed_.floats() : 0);
    totals_ = carver.take(sums);
    partial_ = carver.take(chunk_blocks * sums);
    const int64_t depth = units<kPairs>(sources_.rows);
    transposed_ = carver.take(any_dw_ ? (turned_ ? depth * transposed_stride_ + VW : padded_ * transposed_stride_) : 0);
    weight_sums_ = carver.take(any_dw_ && !sums_in_place() && !in_one_chunk() ? weight_floats() : 0);
    dz_floats_ = block_rows_ * dz_stride_;
    dx_floats_ = round_up(block_rows_ * round_up(widest_, VW), 16);
    panel_floats_ = group_ * units<kPairs>(most_rows_);
    group_stride_ = round_up(group_features(), VW);
    group_floats_ = any_dw_ && !sums_in_place() && in_one_chunk() ? group_stride_ * sums_stride_ : 0;
    rows_stride_ = round_up(depth, 16) | 16;
    turned_floats_ = any_dw_ && turned_ ? kGroup * rows_stride_ : 0;
    each_ = (kPairs ? 3 : 2) * dz_floats_ + dx_floats_ + panel_floats_ + group_floats_ + turned_floats_;
    worker_memory_ = carver.take(workers_.count * each_);
    kept_ = carver.take(by_blocks_ ? min(chunk_, sources_.rows) * kept_stride() : 0);
    row_memory_ = carver.take(by_blocks_ ? row_gradients_.floats(min(chunk_, sources_.rows)) : 0);
  }

  // Whether W is packed beforehand: for one block of rows it is packed as the product comes to it, or read as it lies.
  bool packs_weights() const { return any_dx_ && !in_place_ && !one_block_ && !by_blocks_; }

  // Whether the sums over rows are kept in the gradients themselves.
  bool sums_in_place() const {
    return !Policy::kFinishesWeights && (turned_ || !by_columns_) && sources_.dtype == Dtype::f32;
  }

  // Whether a group's sums over rows are done at once: each worker has memory for one, still in cache when it is read.
  bool in_one_chunk() const { return sources_.rows <= chunk_; }

  // Whether the sums over rows are done at once for every block of features, and written as they come.
  bool in_one_product() const {
    const bool few_rows = in_one_chunk() && sources_.rows <= most_rows_;
    return !Policy::kFinishesWeights && !sums_in_place() && !shares_ && few_rows;
  }
  int64_t group_features() const { return in_one_product() ? min(kBlockRows, most_features_) : most_features_; }

  // Those of all groups, one after the other, [features of all terms][sums_stride_] each.
  int64_t weight_floats() const {
    int64_t floats = 0;
    for (int64_t s = 0; s < sources_.count; ++s) {
      floats += groups_of(sources_.items[s]) * features_of(sources_.items[s]) * sums_stride_;
    }
    return floats;
  }

  // Groups of columns of dW; the sources that share a weight are summed in those of the first.
  int64_t groups_of(const ConcatSource& source) const {
    return source.shares_weights ? 0 : ceil_div(source.width, group_);
  }

  static int64_t features_of(const ConcatSource& source) {
    int64_t features = 0;
    for (int64_t t = 0; t < source.term_count; ++t) features += source.terms[t].features;
    return features;
  }

  float* panels_of(int worker) const {
    return worker_memory_ + worker * each_ + (kPairs ? 3 : 2) * dz_floats_ + dx_floats_;
  }

  // --- first stage: dz and dx of a block of rows ---

  // Of dz in units, where that of a chunk is kept.
  int64_t kept_stride() const { return kPairs ? padded_ / 2 : dz_stride_; }

  void row_block(int worker, int64_t start, int64_t block, int64_t rows) {
    float* const own = worker_memory_ + worker * each_;
    float* const kept = kept_ + block * kBlockRows * kept_stride();
    float* const dz = by_blocks_ && !kPairs ? kept : own;
    float* const spare = by_blocks_ && kPairs ? kept : own + dz_floats_;  // units, or rows of a source absent in some
    float* const dx = worker_memory_ + worker * each_ + (kPairs ? 3 : 2) * dz_floats_;
    const int64_t first = start + block * kBlockRows, sums = Policy::kSums * padded_;
    float* const partial = partial_ + block * sums;
    std::memset(partial, 0, sizeof(float) * static_cast<size_t>(sums));
    policy_.make(first, rows, dz, dz_stride_, partial);
    if (!any_dx_ && !any_dw_) return;
    Operand operand{dz, dz_stride_};
    if constexpr (kPairs) operand = as_pairs(dz, rows, spare);
    if (any_dw_) transpose_block(operand, block * kBlockRows, rows, dx);
    if (by_blocks_) return;
    const float *panels = packed_.data(), *shared = nullptr;  // the next source's; those of the sources that share them
    for (int64_t s = 0; s < sources_.count; ++s) {
      const ConcatSource& source = sources_.items[s];
      if (!source.shares_weights) shared = nullptr;
      if (source.grad.data == nullptr) continue;
      const float* own = shared != nullptr ? shared : panels;
      if (shared == nullptr) shared = own;
      row_gradient(s, first, rows, operand, own, spare + (kPairs ? dz_floats_ : 0), dx, dx + dx_floats_);
      panels = own;
    }
  }

  // Rows of pairs, [rows][units of features].
  Operand as_pairs(const float* dz, int64_t rows, float* to) const {
    auto* half = reinterpret_cast<Bf16*>(to);
    const int64_t stride = round_up(padded_, 2);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < padded_; c += VW) store_from_float(half + i * stride + c, load(dz + i * dz_stride_ + c));
    }
    return {to, stride / 2};
  }

  // Rows of the block → lanes of [features][rows of the chunk], in pairs of rows where products run on pairs; for dWᵀ,
  // [rows of the chunk][features].
  void transpose_block(Operand dz, int64_t at, int64_t rows, float* spare) const {
    if (turned_) {
      operand_of_columns<kPairs>(kPairs ? Dtype::bf16 : Dtype::f32, dz.data, kPairs ? 2 * dz.stride : dz.stride, rows,
                                 sources_.features, false, transposed_ + units<kPairs>(at) * transposed_stride_,
                                 transposed_stride_);
    } else if constexpr (kPairs) {
      // `spare` holds [units of rows][features] for a moment.
      pack_columns_as_pairs(reinterpret_cast<const uint16_t*>(dz.data), 2 * dz.stride, rows, sources_.features,
                            const_cast<float*>(spare_pairs(spare)), padded_);
      pack_lanes(false, Dtype::f32, spare_pairs(spare), padded_, units<true>(rows), sources_.features,
                 transposed_ + at / 2, transposed_stride_);
    } else {
      pack_lanes(false, Dtype::f32, dz.data, dz.stride, rows, sources_.features, transposed_ + at, transposed_stride_);
    }
  }
  float* spare_pairs(float* dx) const { return dx - dz_floats_; }  // the third of the blocks of dz

  // dx of one source; `panels` moves on to the next source's.
  void row_gradient(int64_t s, int64_t first, int64_t rows, Operand dz, const float*& panels, float* gathered,
                    float* dx, float* panel_memory) const {
    const ConcatSource& source = sources_.items[s];
    const SourceRows present(source, sources_.dtype, first, rows);
    char* const grad =
        static_cast<char*>(source.grad.data) + first * source.grad.inner_stride * element_size(sources_.dtype);
    const bool straight = !Policy::kFinishesRows && sources_.dtype == Dtype::f32 && present.map() == nullptr;
    Operand a = dz;
    if (present.map() != nullptr) {
      for (int64_t i = 0; i < present.count(); ++i) {
        std::memcpy(gathered + i * dz.stride, dz.data + present.map()[i] * dz.stride,
                    sizeof(float) * static_cast<size_t>(dz.stride));
      }
      a.data = gathered;
    }
    const int64_t stride = straight ? source.grad.inner_stride : round_up(source.width, VW);
    float* const to = straight ? reinterpret_cast<float*>(grad) : dx;
    bool add = false;
    for (int64_t t = 0; t < source.term_count; ++t) {
      const ConcatTerm& term = source.terms[t];
      const int64_t depth = units<kPairs>(term.features), skip = kPairs ? term.column / 2 : term.column;
      if (in_place_) {
        multiply_weights_in_place<kPairs>(sources_.dtype, {a.data + skip, a.stride}, present.count(), term,
                                          {to, stride, source.width, add}, panel_memory);
        add |= depth > 0;
        continue;
      }
      if (one_block_) {
        multiply_weights_by_groups({a.data + skip, a.stride}, present.count(), term, {to, stride, source.width, add});
        add |= depth > 0;
        continue;
      }
      for (int64_t column = 0; column < source.width; column += kPanel, panels += depth * kPanel) {
        for (int64_t n = 0; n < depth; n += kDepth) {
          const Block c{to + column, stride, min(kPanel, source.width - column), add || n > 0};
          multiply_panels(kPairs, {a.data + skip + n, a.stride}, present.count(), panels + n * kPanel,
                          min(kDepth, depth - n), c);
        }
      }
      add |= depth > 0;
    }
    for (int64_t i = 0; i < rows && !add; ++i) {  // no feature, no sum
      std::memset(to + i * stride, 0, sizeof(float) * static_cast<size_t>(source.width));
    }
    if (straight) return;
    with_element_type(sources_.dtype, static_cast<void*>(grad), [&](auto* out) {
      if constexpr (Policy::kFinishesRows) {
        return policy_.finish_rows(s, first, rows, dx, stride, out, source.grad.inner_stride);
      }
      int64_t from = 0;
      for (int64_t i = 0; i < rows; ++i) {
        auto* row = out + i * source.grad.inner_stride;
        if (present.map() != nullptr && (from == present.count() || present.map()[from] != i)) {
          zero_elements(sources_.dtype, reinterpret_cast<char*>(row), source.width);
          continue;
        }
        for (int64_t c = 0; c < source.width; c += VW) {
          store_from_float(row + c, load(dx + from * stride + c), source.width - c);
        }
        ++from;
      }
    });
  }

  void finish(int64_t s, int64_t first, int64_t rows, const float* dx, int64_t stride) const {
    if constexpr (Policy::kFinishesRows) {
      const ConcatSource& source = sources_.items[s];
      with_element_type(sources_.dtype, source.grad.data, [&](auto* out) {
        const int64_t out_stride = source.grad.inner_stride;
        policy_.finish_rows(s, first, rows, dx, stride, out + first * out_stride, out_stride);
      });
    }
  }

  // Of one block of rows: by all workers, each of which packs some columns of W and multiplies by them.
  void multiply_weights_by_groups(Operand dz, int64_t rows, const ConcatTerm& term, const Block& c) const {
    for_each_claim(workers_, ceil_div(c.columns, kGroup), 1, [&](int worker, int64_t begin, int64_t end) {
      float* const panels = panels_of(worker);
      for (int64_t column = begin * kGroup; column < min(c.columns, end * kGroup); column += kGroup) {
        const int64_t columns = min(kGroup, c.columns - column);
        for_chunks<kPairs>(term.features, [&](int64_t n, int64_t count, int64_t unit) {
          const int64_t depth = units<kPairs>(count);
          pack_panels<kPairs>(sources_.dtype, from_element(term.weight, sources_.dtype, n, column), count, columns,
                              panels, depth * kPanel);
          multiply_panels(kPairs, {dz.data + unit, dz.stride}, rows, panels, depth,
                          {c.data + column, c.stride, columns, c.add || n > 0}, {}, true);
        });
      }
    });
  }

  // --- second stage: columns of dW ---

  void weight_columns(int worker, int64_t group, int64_t start, int64_t rows) const {
    float* const panels = panels_of(worker);
    int64_t s = 0, at = 0;
    for (; group >= groups_of(sources_.items[s]); ++s) {
      group -= groups_of(sources_.items[s]);
      at += groups_of(sources_.items[s]) * features_of(sources_.items[s]) * sums_stride_;
    }
    const ConcatSource& source = sources_.items[s];
    const int64_t column = group * group_, width = min(group_, source.width - column);
    float* const sums =
        in_one_chunk() ? panels + panel_floats_ : weight_sums_ + at + group * features_of(source) * sums_stride_;
    add_products(s, column, start, rows, false, sums, panels);
    for (int64_t next = s + 1; next < sources_.count && sources_.items[next].shares_weights; ++next) {
      add_products(next, column, start, rows, true, sums, panels);
    }
    if (sums_in_place() || in_one_product() || start + rows < sources_.rows) return;
    if constexpr (Policy::kFinishesWeights) {
      policy_.finish_weights(s, column, width, sums, turned_ ? group_stride_ : 0, totals_);
    } else {
      write_weights(source, column, width, sums);
    }
  }

  // Adds a chunk's rows of a source to columns of dW, in as few passes of one length as panels allow; the first rows of
  // all replace what is there, unless `add`.
  void add_products(int64_t s, int64_t column, int64_t start, int64_t rows, bool add, float* sums,
                    float* panels) const {
    const ConcatSource& source = sources_.items[s];
    if (turned_) return add_turned(source, column, s, add, sums, panels);
    const int64_t width = min(group_, source.width - column);
    const int64_t step = round_up(ceil_div(rows, ceil_div(rows, most_rows_)), kPairs ? 32 : 8);
    for (int64_t row = 0; row < rows; row += step) {
      const int64_t count = min(step, rows - row);
      for (int64_t c = 0; c < width; c += kGroup) {
        policy_.columns(s, start + row, count, column + c, min(kGroup, width - c), panels + c * units<kPairs>(count));
      }
      // What is packed next: the rows behind these, or the first of the columns behind them.
      const bool last = row + count == rows;
      const int64_t next = last ? start : start + row + count, from = last ? column + group_ : column;
      const RowsAhead columns_ahead =
          prefetch_rows(sources_, s, next, min(step, start + rows - next), min(from, source.width),
                        min(group_, max(0, source.width - from)), tiles_of(kBlockRows, width));
      int64_t features = 0;
      for (int64_t t = 0; t < source.term_count; ++t) {
        const ConcatTerm& term = source.terms[t];
        if (Policy::kFinishesWeights || term.grad != nullptr) {
          Block c{in_one_product() ? sums : sums + features * sums_stride_, sums_stride_, width,
                  add || start + row > 0};
          if (sums_in_place()) {
            c.data = static_cast<float*>(term.grad) + column;
            c.stride = term.grad_stride;
          }
          multiply_features(term, column, kPairs ? row / 2 : row, units<kPairs>(count), panels, c, columns_ahead);
        }
        features += term.features;
      }
    }
  }

  // As `add_products`, of all rows: columns of dWᵀ = xᵀ dz, [width][features of all terms] where they are not in place.
  void add_turned(const ConcatSource& source, int64_t column, int64_t s, bool add, float* sums, float* panels) const {
    const int64_t width = min(kGroup, source.width - column), depth = units<kPairs>(sources_.rows);
    float* const x = panels + panel_floats_ + group_floats_;
    policy_.columns(s, 0, sources_.rows, column, width, panels);
    for (int64_t c = 0; c < width; c += kPanel) {
      pack_lanes(false, Dtype::f32, panels + c * depth, kPanel, depth, min(kPanel, width - c), x + c * rows_stride_,
                 rows_stride_);
    }
    int64_t features = 0;
    for (int64_t t = 0; t < source.term_count; features += source.terms[t++].features) {
      const ConcatTerm& term = source.terms[t];
      if (!Policy::kFinishesWeights && term.grad == nullptr) continue;
      const int64_t step = in_one_product() ? group_stride_ : term.features;
      for (int64_t n = 0; n < term.features; n += step) {
        Block c{in_one_product() ? sums : sums + features, group_stride_, min(step, term.features - n), add};
        if (sums_in_place()) {
          c.data = static_cast<float*>(term.grad) + column * term.grad_stride + n;
          c.stride = term.grad_stride;
        }
        const Operand dz{transposed_ + term.column + n, transposed_stride_};
        multiply_in_place(kPairs, {x, rows_stride_}, width, dz, depth, c);
        if (in_one_product()) write_features(term, n, c.columns, column, width, sums);
      }
    }
  }

  // dzᵀ of a term, `depth` units of rows from `unit` on, times panels: in blocks of features that stay in cache while
  // all panels pass. Meanwhile the next block is fetched, or during the last one what comes then.
  void multiply_features(const ConcatTerm& term, int64_t column, int64_t unit, int64_t depth, const float* panels,
                         Block c, const RowsAhead& then) const {
    const float* dz = transposed_ + term.column * transposed_stride_ + unit;
    float* const to = c.data;
    for (int64_t n = 0; n < term.features; n += kBlockRows) {
      const int64_t count = min(kBlockRows, term.features - n), left = term.features - n - count;
      if (!in_one_product()) c.data = to + n * c.stride;
      const float* next = dz + (n + count) * transposed_stride_;
      multiply_panels(kPairs, {dz + n * transposed_stride_, transposed_stride_}, count, panels, depth, c,
                      left == 0 ? then
                                : RowsAhead{next, depth * 4, transposed_stride_ * 4, min(kBlockRows, left),
                                            tiles_of(count, c.columns)},
                      true);
      if (in_one_product()) write_features(term, n, count, column, c.columns, to);
    }
  }

  // Columns of dW from their float sums.
  void write_weights(const ConcatSource& source, int64_t column, int64_t width, const float* sums) const {
    for (int64_t t = 0; t < source.term_count; sums += source.terms[t++].features * (turned_ ? 1 : sums_stride_)) {
      if (source.terms[t].grad != nullptr) {
        write_features(source.terms[t], 0, source.terms[t].features, column, width, sums);
      }
    }
  }

  void write_features(const ConcatTerm& term, int64_t first, int64_t count, int64_t column, int64_t width,
                      const float* sums) const {
    const auto at = [&](int64_t element) {
      return static_cast<char*>(term.grad) + element * element_size(sources_.dtype);
    };
    const int64_t stride = term.grad_stride;
    if (turned_) {
      write_rows(sums, group_stride_, width, count, sources_.dtype, at(column * stride + first), stride);
    } else if (term.weight.by_columns) {
      write_transposed(sums, sums_stride_, count, width, sources_.dtype, at(column * stride + first), stride);
    } else {
      write_rows(sums, sums_stride_, count, width, sources_.dtype, at(first * stride + column), stride);
    }
  }

  const ConcatSources& sources_;
  const Workers& workers_;
  Policy& policy_;
  PackedWeightColumns<kPairs> packed_;
  RowGradients<kPairs> row_gradients_;
  int64_t padded_, dz_stride_, widest_ = 0, most_features_ = 0, chunk_ = 0, block_rows_ = 0, transposed_stride_ = 0;
  int64_t group_ = kGroup, sums_stride_ = kGroup, most_rows_ = most_elements<kPairs>(), groups_ = 0, dz_floats_ = 0,
          dx_floats_ = 0, panel_floats_ = 0, group_floats_ = 0, each_ = 0;
  int64_t group_stride_ = 0, rows_stride_ = 0, turned_floats_ = 0;
  bool any_dx_ = false, any_dw_ = false, by_columns_ = false, by_rows_ = false, shares_ = false;
  bool in_place_ = false, one_block_ = false, turned_ = false, by_blocks_ = false;
  float *packed_memory_ = nullptr, *totals_ = nullptr, *partial_ = nullptr, *transposed_ = nullptr;
  float *weight_sums_ = nullptr, *worker_memory_ = nullptr, *kept_ = nullptr, *row_memory_ = nullptr;
};

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
