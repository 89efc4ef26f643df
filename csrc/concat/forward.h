// The forward product of concatenation fusion, z = [x₁; …; x_M] Wᵀ, and the ways it is cut:
//
//   rows broadcast      W is packed once, transposed; rows are the broadcast operand. For many rows.
//   features broadcast  a block of rows is packed, transposed; W is the broadcast operand as it lies, and tiles come
//                       out transposed. For few rows, where packing W would cost more than multiplying by it.
//   dot products        of rows of x and rows of W, nothing packed. For so few rows that lanes would be left idle.
//   columns of W        for few rows and a W whose columns are dense (the view of a transposed one): features are in
//                       the lanes as they lie.
//   blocks of W         csrc/concat/weight_blocks.h, in place of rows broadcast where the level-2 cache is large.
//
// The rows may be what a source holds or something made from it (Loader: a normalised row, say). What is done with a
// finished tile of z, still in cache, is the caller's epilogue.
#pragma once

#include "csrc/concat/weight_blocks.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kBlockColumns = (768 + kPanel - 1) / kPanel * kPanel;

// The weights of all sources, transposed, in panels: for each chunk of each source, for each term,
// [panels][units][kPanel].
template <bool kPairs>
class PackedWeights {
 public:
  explicit PackedWeights(const ConcatSources& sources) : sources_(sources) {
    for (int64_t s = 0; s < sources.count; ++s) {
      if (!sources.items[s].shares_weights) floats_ += units<kPairs>(sources.items[s].width) * lanes(s);
    }
  }
  int64_t floats() const { return round_up(floats_, 16); }

  void pack(float* memory, const Workers& workers) {
    memory_ = memory;
    const int64_t panels = ceil_div(sources_.features, kPanel);
    for_each_claim(workers, panels, 1, [&](int, int64_t begin, int64_t end) {
      for (int64_t s = 0, at = 0; s < sources_.count; ++s) {
        const ConcatSource& source = sources_.items[s];
        if (source.shares_weights) continue;
        for_chunks<kPairs>(source.width, [&](int64_t k, int64_t width, int64_t) {
          const int64_t depth = units<kPairs>(width);
          for (int64_t t = 0; t < source.term_count; ++t) {
            const ConcatTerm& term = source.terms[t];
            for (int64_t p = begin; p < min(end, ceil_div(term.features, kPanel)); ++p) {
              pack_lanes(kPairs, sources_.dtype, from_element(term.weight, sources_.dtype, p * kPanel, k),
                         min(kPanel, term.features - p * kPanel), width, memory_ + at + p * depth * kPanel, kPanel);
            }
            at += depth * round_up(term.features, kPanel);
          }
        });
      }
    });
  }
  const float* data() const { return memory_; }

 private:
  int64_t lanes(int64_t s) const {
    int64_t sum = 0;
    for (int64_t t = 0; t < sources_.items[s].term_count; ++t)
      sum += round_up(sources_.items[s].terms[t].features, kPanel);
    return sum;
  }

  const ConcatSources& sources_;
  int64_t floats_ = 0;
  float* memory_ = nullptr;
};

// Reads rows as they are.
struct PlainLoader {
  const ConcatSources& sources;

  static constexpr bool kPreparesRows = false;  // whether prepare(), called before a block, reads its rows
  void prepare(int, int64_t, int64_t) const {}
  SourceRows rows(int, int64_t s, int64_t first, int64_t count) const {
    return SourceRows(sources.items[s], sources.dtype, first, count);
  }
};

// Calls epilogue(first row, rows, first column, columns, z, stride of z) for tiles of z: all columns of at most
// `block_rows` rows, or where every source has one and the same columns, kBlockColumns of them.
template <bool kPairs, class Loader, class Epilogue>
void multiply_rows_broadcast(const ConcatSources& sources, const Workers& workers, const Loader& loader,
                             int64_t block_rows, int64_t block_columns, Epilogue epilogue) {
  PackedWeights<kPairs> packed(sources);
  const int64_t columns = min(block_columns, round_up(sources.features, VW));
  const int64_t copy_floats = block_rows * kCopyStride, each = round_up(copy_floats + block_rows * columns, 16);
  Scratch scratch(packed.floats() + workers.count * each);
  packed.pack(scratch.data(), workers);
  float* const tiles = scratch.data() + packed.floats();

  const int64_t blocks = ceil_div(sources.rows, block_rows), splits = ceil_div(sources.features, block_columns);
  const bool whole = first_source_fills(sources);
  const bool split = blocks < 4 * workers.count;  // else a block is one task, and its rows stay in cache
  // What is to come into cache while a chunk of source s from column k on is multiplied: the chunk behind it, or where
  // a block's rows are read as a whole before, the same chunk of the next block.
  const auto next_chunk = [&](int64_t s, int64_t k, int64_t first, int64_t steps) {
    if (Loader::kPreparesRows) {
      first += block_rows;
    } else if ((k += chunk_elements<kPairs>()) >= sources.items[s].width) {
      k = 0;
      if (++s == sources.count) s = 0, first += block_rows;
    }
    if (first >= sources.rows) return RowsAhead();
    return prefetch_rows(sources, s, first, block_rows, k, min(chunk_elements<kPairs>(), sources.items[s].width - k),
                         steps);
  };
  for_each_claim(workers, split ? blocks * splits : blocks, 1, [&](int worker, int64_t begin, int64_t end) {
    float* copy = tiles + worker * each;
    float* z = copy + round_up(copy_floats, 16);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = (split ? task / splits : task) * block_rows, rows = min(block_rows, sources.rows - first);
      const int64_t from = split ? task % splits * block_columns : 0;
      const int64_t to = split ? min(sources.features, from + block_columns) : sources.features;
      loader.prepare(worker, first, rows);
      for (int64_t column = from; column < to; column += block_columns) {
        if (!whole) std::memset(z, 0, sizeof(float) * static_cast<size_t>(rows * columns));
        bool add = !whole;
        const float *panels = packed.data(), *shared = panels;
        for (int64_t s = 0; s < sources.count; ++s) {
          const ConcatSource& source = sources.items[s];
          if (source.shares_weights) {
            panels = shared;
          } else {
            shared = panels;
          }
          const auto present = loader.rows(worker, s, first, rows);
          for_chunks<kPairs>(source.width, [&](int64_t k, int64_t width, int64_t) {
            const int64_t depth = units<kPairs>(width);
            const Operand x = present.count() == 0 ? Operand{} : present.template operand<kPairs>(k, width, copy);
            for (int64_t t = 0; t < source.term_count; ++t) {
              const ConcatTerm& term = source.terms[t];
              const int64_t skipped = max(0, column - term.column);  // a multiple of kPanel
              const Block c{z + max(0, term.column - column), columns, min(block_columns, term.features - skipped), add,
                            present.map()};
              if (present.count() > 0) {
                multiply_panels(kPairs, x, present.count(), panels + skipped * depth, depth, c,
                                t == 0 ? next_chunk(s, k, first, tiles_of(rows, c.columns)) : RowsAhead());
              }
              panels += depth * round_up(term.features, kPanel);
            }
            add = true;
          });
        }
        epilogue(first, rows, column, min(block_columns, to - column), z, columns);
      }
    }
  });
}

// Calls f(term, its first feature, features, their column in the tile) for what a source adds to a tile of columns of
// z.
template <class Function>
MMK_INLINE void for_terms(const ConcatSource& source, int64_t column, int64_t columns, Function f) {
  for (int64_t t = 0; t < source.term_count; ++t) {
    const ConcatTerm& term = source.terms[t];
    const int64_t begin = max(column, term.column), end = min(column + columns, term.column + term.features);
    if (begin < end) f(term, begin - term.column, end - begin, begin - column);
  }
}

// [rows][stride] → [columns][to_stride], the transposed.
inline void transpose_tile(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                           int64_t to_stride) {
  pack_lanes(false, Dtype::f32, from, stride, rows, columns, to, to_stride);
}

template <bool kPairs, class Loader, class Epilogue>
void multiply_features_broadcast(const ConcatSources& sources, const Workers& workers, const Loader& loader,
                                 Epilogue epilogue) {
  int64_t all_units = 0;
  for (int64_t s = 0; s < sources.count; ++s) all_units += units<kPairs>(sources.items[s].width);
  // Tiles multiply all rows of a call by a feature once it is there.
  const int64_t most = kPairs && has_weight_blocks(workers) ? kMostLanes : kBlockRows / kPanel * kPanel;
  const int64_t blocks = ceil_div(sources.rows, most), block = round_up(ceil_div(sources.rows, blocks), kPanel);
  // Features of a task: as many as keep a chunk of W in the level-2 cache, fewer to give every worker some.
  constexpr int64_t kMost = 240, kLeast = 48;
  const int64_t tasks = workers.count == 1 ? 1 : ceil_div(2 * workers.count, blocks);
  const int64_t even = ceil_div(sources.features, max(tasks, ceil_div(sources.features, kMost)));
  const int64_t features = round_up(max(even, kLeast), VW);
  const int64_t splits = ceil_div(sources.features, features);
  const int64_t panels = all_units * block, tile = features * block, copy = max(features, block) * kCopyStride;
  const int64_t each = panels + 2 * tile + copy;
  Scratch scratch(workers.count * each);
  for_each_claim(workers, blocks * splits, 1, [&](int worker, int64_t begin, int64_t end) {
    float* const packed = scratch.data() + worker * each;
    float *const z_lanes = packed + panels, *const z = z_lanes + tile, *const chunk = z + tile;
    int64_t packed_block = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / splits * block, rows = min(block, sources.rows - first);
      const int64_t feature = task % splits * features, count = min(features, sources.features - feature);
      const bool pack = packed_block != first;
      packed_block = first;
      if (pack) loader.prepare(worker, first, rows);
      bool add = !first_source_fills(sources);
      if (add) std::memset(z_lanes, 0, sizeof(float) * static_cast<size_t>(count * block));
      int64_t unit = 0;
      for (int64_t s = 0; s < sources.count; ++s) {
        const ConcatSource& source = sources.items[s];
        const auto present = loader.rows(worker, s, first, rows);
        for_chunks<kPairs>(source.width, [&](int64_t k, int64_t width, int64_t) {
          const int64_t depth = units<kPairs>(width);
          float* to = packed + unit * block;
          if (pack) {
            const Operand x = present.template operand<kPairs>(k, width, chunk);
            for (int64_t p = 0; p < rows; p += kPanel) {
              transpose_tile(x.data + p * x.stride, x.stride, min(kPanel, rows - p), depth, to + p * depth, kPanel);
            }
          }
          for_terms(source, feature, count, [&](const ConcatTerm& term, int64_t from, int64_t some, int64_t at) {
            const Matrix weight = from_element(term.weight, sources.dtype, from, k);
            const Operand w = operand_of_rows<kPairs>(sources.dtype, weight.data, weight.stride, some, width, chunk,
                                                      copy_stride<kPairs>(width));
            const Block c{z_lanes + at * block, block, round_up(rows, VW), add};
            multiply_panels(kPairs, w, some, to, depth, c);
          });
          add = true;
          unit += depth;
        });
      }
      transpose_tile(z_lanes, block, count, rows, z, features);
      epilogue(first, rows, feature, count, z, features);
    }
  });
}

constexpr int64_t kDotRows = 4;

template <bool kPairs, class Loader, class Epilogue>
void multiply_dot_products(const ConcatSources& sources, const Workers& workers, const Loader& loader,
                           Epilogue epilogue) {
  constexpr int64_t kFeatures = 64;  // of a task
  const int64_t chunk_floats = (kDotRows + kFeatures) * kCopyStride, each = chunk_floats + kDotRows * kFeatures;
  Scratch scratch(workers.count * each);
  for_each_claim(workers, ceil_div(sources.features, kFeatures), 1, [&](int worker, int64_t begin, int64_t end) {
    float* const rows_copy = scratch.data() + worker * each;
    float* const weight_copy = rows_copy + kDotRows * kCopyStride;
    float* const z = rows_copy + chunk_floats;
    loader.prepare(worker, 0, sources.rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t feature = task * kFeatures, count = min(kFeatures, sources.features - feature);
      bool add = !first_source_fills(sources);
      if (add) std::memset(z, 0, sizeof(float) * kDotRows * kFeatures);
      for (int64_t s = 0; s < sources.count; ++s) {
        const ConcatSource& source = sources.items[s];
        const auto present = loader.rows(worker, s, 0, sources.rows);
        for_chunks<kPairs>(source.width, [&](int64_t k, int64_t width, int64_t) {
          const Operand x = present.template operand<kPairs>(k, width, rows_copy);
          for_terms(source, feature, count, [&](const ConcatTerm& term, int64_t from, int64_t some, int64_t at) {
            const Matrix weight = from_element(term.weight, sources.dtype, from, k);
            const Operand w = operand_of_rows<kPairs>(sources.dtype, weight.data, weight.stride, some, width,
                                                      weight_copy, copy_stride<kPairs>(width));
            multiply_dots(kPairs, x, sources.rows, w, some, units<kPairs>(width), z + at, kFeatures, add);
          });
          add = true;
        });
      }
      epilogue(0, sources.rows, feature, count, z, kFeatures);
    }
  });
}

// Whether some weight lies by columns.
inline bool has_weight_by_columns(const ConcatSources& sources) {
  for (int64_t s = 0; s < sources.count; ++s) {
    for (int64_t t = 0; t < sources.items[s].term_count; ++t) {
      if (sources.items[s].terms[t].weight.by_columns) return true;
    }
  }
  return false;
}

// C (+)= A · Wᵀ of `depth` columns of W [features, depth], a weight of float rows by columns, which is read as it lies
// but for its last features, which do not fill a vector. A few columns at a time, so that long lines of memory are
// read.
inline void multiply_columns_in_place(Operand x, int64_t rows, const Matrix& weight, int64_t depth, const Block& c,
                                      float* memory) {
  constexpr int64_t kRun = 16;
  const int64_t whole = c.columns / VW * VW, rest = c.columns - whole;
  for (int64_t k = 0; k < depth; k += kRun) {
    const int64_t run = min(kRun, depth - k);
    const Matrix columns = from_element(weight, Dtype::f32, 0, k);
    multiply_in_place(false, {x.data + k, x.stride}, rows, {static_cast<const float*>(columns.data), weight.stride},
                      run, {c.data, c.stride, whole, c.add || k > 0});
  }
  if (rest == 0) return;
  pack_lanes(false, Dtype::f32, from_element(weight, Dtype::f32, whole, 0), rest, depth, memory, kPanel);
  multiply_panels(false, x, rows, memory, depth, {c.data + whole, c.stride, rest, c.add});
}

// Of weights that lie by columns, with features in the lanes: W is read as it lies, or a chunk of a task's features is
// packed where that pays.
template <bool kPairs, class Loader, class Epilogue>
void multiply_weight_columns(const ConcatSources& sources, const Workers& workers, const Loader& loader,
                             Epilogue epilogue) {
  constexpr int64_t kFeatures = 4 * kPanel;  // of a task
  const int64_t block = min(kBlockRows, sources.rows), blocks = ceil_div(sources.rows, block);
  const int64_t splits = ceil_div(sources.features, kFeatures);
  const int64_t copy = round_up(block * kCopyStride, 16), panels = kFeatures * kDepth;
  const int64_t each = copy + panels + round_up(block * kFeatures, 16);
  const bool in_place = !kPairs && sources.dtype == Dtype::f32 && sources.rows <= kInPlaceRows;
  Scratch scratch(workers.count * each);
  for_each_claim(workers, blocks * splits, 1, [&](int worker, int64_t begin, int64_t end) {
    float* const rows_copy = scratch.data() + worker * each;
    float *const weight_copy = rows_copy + copy, *const z = weight_copy + panels;
    int64_t prepared = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / splits * block, rows = min(block, sources.rows - first);
      const int64_t feature = task % splits * kFeatures, count = min(kFeatures, sources.features - feature);
      if (prepared != first) loader.prepare(worker, first, rows);
      prepared = first;
      bool add = !first_source_fills(sources);
      if (add) std::memset(z, 0, sizeof(float) * static_cast<size_t>(rows * kFeatures));
      for (int64_t s = 0; s < sources.count; ++s) {
        const ConcatSource& source = sources.items[s];
        const auto present = loader.rows(worker, s, first, rows);
        for_chunks<kPairs>(source.width, [&](int64_t k, int64_t width, int64_t) {
          const int64_t depth = units<kPairs>(width);
          const Operand x = present.template operand<kPairs>(k, width, rows_copy);
          for_terms(source, feature, count, [&](const ConcatTerm& term, int64_t from, int64_t some, int64_t at) {
            const Matrix weight = from_element(term.weight, sources.dtype, from, k);
            const Block c{z + at, kFeatures, some, add};
            if (in_place && weight.by_columns) {
              return multiply_columns_in_place(x, rows, weight, depth, c, weight_copy);
            }
            for (int64_t p = 0; p < some; p += kPanel) {
              pack_lanes(kPairs, sources.dtype, from_element(weight, sources.dtype, p, 0), min(kPanel, some - p), width,
                         weight_copy + p * depth, kPanel);
            }
            multiply_panels(kPairs, x, rows, weight_copy, depth, c);
          });
          add = true;
        });
      }
      epilogue(first, rows, feature, count, z, kFeatures);
    }
  });
}

constexpr int64_t kFewRows = 512;  // beyond, packing W costs nothing beside multiplying by it

// Whether packing W would cost too much. It depends on the shape alone.
inline bool are_few_rows(const ConcatSources& sources) {
  if (has_row_presence(sources)) return false;
  if (has_weight_by_columns(sources)) return sources.rows <= kBlockRows;  // it is packed without being transposed
  return sources.rows <= max(kDotRows, min(sources.features, kFewRows));
}

// Without packing W; the epilogue gets some columns of a block of rows.
template <bool kPairs, class Loader, class Epilogue>
void multiply_few_rows(const ConcatSources& sources, const Workers& workers, const Loader& loader, Epilogue epilogue) {
  if (has_weight_by_columns(sources)) {
    multiply_weight_columns<kPairs>(sources, workers, loader, epilogue);
  } else if (sources.rows <= kDotRows) {
    multiply_dot_products<kPairs>(sources, workers, loader, epilogue);
  } else {
    multiply_features_broadcast<kPairs>(sources, workers, loader, epilogue);
  }
}

// The cheapest of the three, where every source has one term and all have the same columns of z.
template <bool kPairs, class Loader, class Epilogue>
void multiply_concatenation(const ConcatSources& sources, const Workers& workers, const Loader& loader,
                            int64_t block_rows, Epilogue epilogue) {
  if (are_few_rows(sources)) {
    multiply_few_rows<kPairs>(sources, workers, loader, epilogue);
  } else if (has_weight_blocks(workers)) {
    multiply_weight_blocks<kPairs>(sources, workers, loader, epilogue);
  } else {
    multiply_rows_broadcast<kPairs>(sources, workers, loader, block_rows, kBlockColumns, epilogue);
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
