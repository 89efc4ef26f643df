// The weights of concatenation fusion as the product dz W reads them.
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

}  // namespace
}  // namespace MMK_ISA
}  // namespace mmk
