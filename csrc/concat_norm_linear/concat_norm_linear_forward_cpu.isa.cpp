//   c = [x₁; …; x_M],  x̂ = (c - mean) · rstd,  z = (x̂ ∘ g + h) Wᵀ + b,  y = act(z)
//
// Tiling     csrc/concat/forward.h, in blocks of 48 rows: a block's statistics are taken as it begins, and its rows are
//            normalised, a chunk of columns at a time, into the operand of the product; where W comes in blocks
//            (csrc/concat/weight_blocks.h), all rows before the first of them.
// Precision  statistics in float32 by two passes; normalised rows in float32, or rounded to bfloat16 where products run
//            on its pairs, as a norm of its own would round them.
// Limits     any widths; rows at up to two strides.
#include "csrc/concat/forward.h"
#include "csrc/concat_linear/epilogue.h"
#include "csrc/concat_norm_linear/concat_norm_linear.h"
#include "csrc/concat_norm_linear/normalize.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kNormRows = kFeatureRows * (48 / kFeatureRows);

class NormLoader {
 public:
  static constexpr bool kPreparesRows = true;

  static int64_t floats(const ConcatNormLinearParams& p) {
    return 2 * round_up(p.linear.sources.columns + VW, 16) + p.linear.workers.count * kStatistics;
  }

  NormLoader(const ConcatNormLinearParams& p, float* memory) : p_(p) {
    const ConcatSources& sources = p.linear.sources;
    const int64_t padded = round_up(sources.columns + VW, 16);
    gain_ = floats_of(sources.dtype, p.norm_weight, 1, sources.columns, memory);
    shift_ = floats_of(sources.dtype, p.norm_bias, 1, sources.columns, memory + padded);
    statistics_ = memory + 2 * padded;
    // Of few rows, several tasks may need the same: all are taken first.
    const int64_t few = max(kFewRows, 4 * p.linear.workers.count * kNormRows);
    if (p.statistics == nullptr || sources.rows > few) return;
    for_each_claim(p.linear.workers, sources.rows, kNormRows, [&](int, int64_t begin, int64_t end) {
      take_statistics(begin, end - begin, p.statistics + 2 * begin);
    });
    known_ = true;
  }

  void prepare(int worker, int64_t first, int64_t count) const {
    float* to = statistics_ + worker * kStatistics;
    const auto bytes = sizeof(float) * static_cast<size_t>(2 * count);
    if (known_) {
      std::memcpy(to, p_.statistics + 2 * first, bytes);
      return;
    }
    take_statistics(first, count, to);
    if (p_.statistics != nullptr) std::memcpy(p_.statistics + 2 * first, to, bytes);
  }

  class Rows {
   public:
    Rows(const NormLoader& loader, const float* statistics, int64_t s, int64_t first, int64_t count)
        : loader_(loader), statistics_(statistics), s_(s), first_(first), count_(count) {}
    int64_t count() const { return count_; }
    const int32_t* map() const { return nullptr; }

    template <bool kPairs>
    Operand operand(int64_t column, int64_t width, float* copy) const {
      const ConcatSources& sources = loader_.p_.linear.sources;
      const ConcatSource& source = sources.items[s_];
      const int64_t stride = copy_stride<kPairs>(width);
      const int64_t at = source.column + column;
      for_row_addresses(source.x, sources.dtype, first_, count_, [&](int64_t i, const char* row) {
        normalize_row<kPairs>(sources.dtype, row + column * element_size(sources.dtype), width,
                              {statistics_[2 * i], statistics_[2 * i + 1]}, loader_.gain_ + at,
                              loader_.shift_ == nullptr ? nullptr : loader_.shift_ + at, copy + i * stride);
      });
      return {copy, stride};
    }

   private:
    const NormLoader& loader_;
    const float* statistics_;
    int64_t s_, first_, count_;
  };
  Rows rows(int worker, int64_t s, int64_t first, int64_t count) const {
    return Rows(*this, statistics_ + worker * kStatistics, s, first, count);
  }

 private:
  static constexpr int64_t kStatistics = 2 * (kBlockRows > kMostLanes ? kBlockRows : kMostLanes);

  void take_statistics(int64_t first, int64_t count, float* to) const {
    rows_statistics(p_.linear.sources, first, count, p_.rms, p_.eps, to);
  }

  const ConcatNormLinearParams& p_;
  const float *gain_ = nullptr, *shift_ = nullptr;
  float* statistics_ = nullptr;  // of the block that a worker is at
  bool known_ = false;           // whether p.statistics holds all rows'
};

}  // namespace

void concat_norm_linear_forward(const ConcatNormLinearParams& p) {
  const ConcatSources& sources = p.linear.sources;
  Scratch vectors(LinearEpilogue::floats(p.linear)), memory(NormLoader::floats(p));
  const LinearEpilogue finish(p.linear, vectors.data());
  const NormLoader loader(p, memory.data());
  with_pairs(sources.dtype, p.linear.workers.tiles, is_worth_tiles(sources),
             [&](auto pairs) { multiply_concatenation<pairs>(sources, p.linear.workers, loader, kNormRows, finish); });
}

}  // namespace MMK_ISA
}  // namespace mmk
