// The weights of concatenation fusion as the product dz W reads them: packed, or of few rows as they lie.
#pragma once

#include "csrc/concat/product.h"
#include "csrc/cpu/schedule.h"

namespace mmk {
namespace MMK_ISA {
namespace {

// W of each term in panels of the source's columns: for each source and term, for each chunk of features,
// [panels][units of features][kPanel].
template <bool kPairs>
class PackedWeightColumns {
 public:
  explicit PackedWeightColumns(const ConcatSources& sources) : sources_(sources) {
    for_each_group([&](const ConcatSource& source, const ConcatTerm& term, int64_t column) {
      floats_ += units<kPairs>(term.features) * round_up(min(kGroup, source.width - column), kPanel);
      ++groups_;
    });
  }
  int64_t floats() const { return round_up(floats_, 16); }

  void pack(float* memory, const Workers& workers) {
    memory_ = memory;
    for_each_claim(workers, groups_, max(1, groups_ / (8 * workers.count)), [&](int, int64_t begin, int64_t end) {
      int64_t index = 0;
      float* at = memory;
      for_each_group([&](const ConcatSource& source, const ConcatTerm& term, int64_t column) {
        const int64_t columns = min(kGroup, source.width - column), stride = units<kPairs>(term.features) * kPanel;
        if (index >= begin && index < end) {
          for_chunks<kPairs>(term.features, [&](int64_t n, int64_t count, int64_t unit) {
            pack_panels<kPairs>(sources_.dtype, from_element(term.weight, sources_.dtype, n, column), count, columns,
                                at + unit * kPanel, stride);
          });
        }
        ++index;
        at += ceil_div(columns, kPanel) * stride;
      });
    });
  }
  const float* data() const { return memory_; }

 private:
  template <class Function>
  void for_each_group(Function f) const {
    bool packed = false;  // the weights, for a source that shares them
    for (int64_t s = 0; s < sources_.count; ++s) {
      const ConcatSource& source = sources_.items[s];
      packed &= source.shares_weights;
      if (source.grad.data == nullptr || packed) continue;
      packed = true;
      for (int64_t t = 0; t < source.term_count; ++t) {
        for (int64_t column = 0; column < source.width; column += kGroup) f(source, source.terms[t], column);
      }
    }
  }

  const ConcatSources& sources_;
  int64_t floats_ = 0, groups_ = 0;
  float* memory_ = nullptr;
};

// dz W of few rows and a weight that lies by columns: dot products of dz with these as they lie.
template <bool kPairs>
void multiply_by_columns(Dtype dtype, Operand dz, int64_t rows, const ConcatTerm& term, const Block& c, float* memory) {
  for_chunks<kPairs>(term.features, [&](int64_t n, int64_t count, int64_t unit) {
    for (int64_t column = 0; column < c.columns; column += kGroup) {
      const int64_t some = min(kGroup, c.columns - column);
      const Matrix columns = from_element(term.weight, dtype, n, column);
      const Operand w =
          operand_of_rows<kPairs>(dtype, columns.data, columns.stride, some, count, memory, copy_stride<kPairs>(count));
      multiply_dots(kPairs, {dz.data + unit, dz.stride}, rows, w, some, units<kPairs>(count), c.data + column, c.stride,
                    c.add || n > 0);
    }
  });
}

// dz W of few rows: W as it lies, but for its last columns, which do not fill a vector.
template <bool kPairs>
void multiply_weights_in_place(Dtype dtype, Operand dz, int64_t rows, const ConcatTerm& term, const Block& c,
                               float* memory) {
  if (term.weight.by_columns) return multiply_by_columns<kPairs>(dtype, dz, rows, term, c, memory);
  const int64_t whole = c.columns / VW * VW, rest = c.columns - whole;
  const auto* weight = static_cast<const float*>(term.weight.data);
  for (int64_t n = 0; n < term.features; n += kDepth) {
    const int64_t depth = min(kDepth, term.features - n);
    const Operand a{dz.data + n, dz.stride};
    const float* rows_of_weight = weight + n * term.weight.stride;
    multiply_in_place(false, a, rows, {rows_of_weight, term.weight.stride}, depth,
                      {c.data, c.stride, whole, c.add || n > 0});
    if (rest > 0) {
      pack_rows_as_float(Dtype::f32, rows_of_weight + whole, term.weight.stride, depth, rest, memory, kPanel);
      multiply_panels(false, a, rows, memory, depth, {c.data + whole, c.stride, rest, c.add || n > 0});
    }
  }
}

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
