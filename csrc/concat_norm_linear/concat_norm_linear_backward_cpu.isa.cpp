// With a = dz (W ∘ g), one row of the gradient of x̂, and K features in all:
//
//   dx = rstd · (a - mean(a) - x̂ · mean(a ∘ x̂)),  G = dzᵀ x̂
//   dW = G ∘ g + db hᵀ,  dg_k = Σ_n W_nk G_nk,  dh = Wᵀ db
//
// Neither mean needs the whole row of a: mean(a) = Σ_n dz_n Σ_k W_nk g_k / K, and since Σ_k W_nk g_k x̂_k = z_n - b'_n
// with b' = b + W h, mean(a ∘ x̂) = Σ_n dz_n (z_n - b'_n) / K. Both are known as soon as dz is, and dx is finished on
// the tile that the product leaves. rms: mean(a) does not appear. Few rows of one source: few_rows_gradient.h.
//
// Tiling     csrc/concat/backward.h; x̂ is made again, from the rows and their statistics, as the operand of G.
// Precision  float32 beside the products; x̂ is rounded to bfloat16 where products run on its pairs.
// Limits     as forward; a gradient that nobody asked for costs nothing.
#include "csrc/concat_linear/gradient.h"
#include "csrc/concat_norm_linear/concat_norm_linear.h"
#include "csrc/concat_norm_linear/few_rows_gradient.h"
#include "csrc/concat_norm_linear/normalize.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs>
class NormLinearGradient {
 public:
  static constexpr int kSums = LinearGradient<kPairs>::kSums;
  static constexpr bool kFinishesRows = true, kFinishesWeights = true;

  static int64_t floats(const ConcatNormLinearParams& p) {
    const ConcatSources& s = p.linear.sources;
    return 2 * round_up(s.columns + VW, 16) + 2 * round_up(s.features, 16) + round_up(2 * s.rows, 16);
  }

  NormLinearGradient(const ConcatNormLinearParams& p, const LinearEpilogue& epilogue, float* memory)
      : p_(p), sources_(p.linear.sources), linear_(p.linear, epilogue) {
    Carver carver(memory);
    float* const gain = carver.take(sources_.columns + VW);
    float* const shift = carver.take(sources_.columns + VW);
    gained_ = carver.take(sources_.features);
    offset_ = carver.take(sources_.features);
    means_ = carver.take(2 * sources_.rows);
    gain_ = floats_of(sources_.dtype, p.norm_weight, 1, sources_.columns, gain);
    shift_ = floats_of(sources_.dtype, p.norm_bias, 1, sources_.columns, shift);
    if (needs_means()) sum_weights();
    if (p.linear.bias != nullptr) {
      const float* bias = epilogue.bias();
      for (int64_t n = 0; n < sources_.features; ++n) offset_[n] += bias[n];
    }
  }

  bool wants_weights() const { return p_.grad_weight != nullptr || p_.grad_norm_weight != nullptr; }

  void make(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums) const {
    linear_.make(first, rows, dz, stride, sums);
    if (needs_means()) {
      with_element_type(sources_.dtype, p_.linear.preactivation, [&](auto* z) {
        for (int64_t i = 0; i < rows; ++i) take_means(first + i, z + (first + i) * sources_.features, dz + i * stride);
      });
    }
  }

  template <class T>
  void finish_rows(int64_t s, int64_t first, int64_t rows, const float* dx, int64_t stride, T* out,
                   int64_t out_stride) const {
    const ConcatSource& source = sources_.items[s];
    const float* gain = gain_ + source.column;
    for (int64_t i = 0; i < rows; ++i, dx += stride, out += out_stride) {
      const int64_t row = first + i;
      const T* x = reinterpret_cast<const T*>(row_address(source.x, sources_.dtype, row));
      const float rstd = p_.statistics[2 * row + 1];
      const vf mean = set1(p_.statistics[2 * row]), scale = set1(rstd);
      const vf constant = set1(rstd * means_[2 * row]), slope = set1(rstd * rstd * means_[2 * row + 1]);
      const auto finish = [&](int64_t k, vf value) {
        return load(dx + k) * load(gain + k) * scale - fma(value - mean, slope, constant);
      };
      int64_t k = 0;
      for (; k + VW <= source.width; k += VW) store_from_float(out + k, finish(k, load_as_float(x + k)));
      const int64_t rest = source.width - k;
      if (rest > 0) store_from_float(out + k, finish(k, load_as_float(x + k, rest)), rest);
    }
  }

  void columns(int64_t s, int64_t first, int64_t count, int64_t column, int64_t width, float* panels) const {
    pack_normalized_columns<kPairs>(sources_, s, p_.statistics, {first, count, column, width}, nullptr, nullptr,
                                    panels);
  }

  void finish_sums(const float* sums) const {
    linear_.finish_sums(sums);
    if (p_.grad_norm_bias == nullptr || wants_weights()) return;
    if (by_columns()) {
      return for_columns([&](const ConcatSource& source, const auto* weight, int64_t k, int64_t width) {
        for (int64_t c = 0; c < width; ++c) {
          const auto* down = weight + c * source.terms[0].weight.stride;
          vf total = zero();
          for_vectors(sources_.features, [&](int64_t, int64_t f, int64_t n) {
            total = fma(load_as_float(down + f, n), load(sums + f), total);
          });
          put(p_.grad_norm_bias, source.column + k + c, set1(sum(total)), 1);
        }
      });
    }
    for_columns([&](const ConcatSource& source, const auto* weight, int64_t k, int64_t width) {
      vf totals[kRun] = {};
      for (int64_t f = 0; f < sources_.features; ++f) {
        const vf db = set1(sums[f]);
        for_vectors(width, [&](int64_t v, int64_t c, int64_t n) {
          totals[v] = fma(load_as_float(weight + f * source.terms[0].weight.stride + c, n), db, totals[v]);
        });
      }
      for_vectors(
          width, [&](int64_t v, int64_t c, int64_t n) { put(p_.grad_norm_bias, source.column + k + c, totals[v], n); });
    });
  }

  void finish_weights(int64_t s, int64_t first, int64_t width, const float* products, int64_t turned_stride,
                      const float* sums) const {
    const ConcatSource& source = sources_.items[s];
    const Matrix& matrix = source.terms[0].weight;
    with_element_type(sources_.dtype, matrix.data, [&](const auto* weight) {
      if (matrix.by_columns) return finish_by_columns(source, weight, first, width, products, turned_stride, sums);
      for (int64_t c = 0; c < width; c += kFinished * VW) {
        const int64_t columns = min(kFinished * VW, width - c), last = (columns - 1) % VW + 1;
        with_constant<kFinished>(ceil_div(columns, VW), [&](auto vectors) {
          with_bool(last < VW, [&](auto partial) {
            finish_columns<static_cast<int>(vectors), decltype(partial)::value>(
                weight + first + c, matrix.stride, source.column + first + c, last, products + c, sums);
          });
        });
      }
    });
    if (streams_weights()) stream_fence();
  }

 private:
  bool needs_means() const {
    for (int64_t s = 0; s < sources_.count; ++s) {
      if (sources_.items[s].grad.data != nullptr) return true;
    }
    return false;
  }

  static constexpr int kFinished = 4;  // vectors of columns whose sums stay in registers all down W

  // Whether dW is large, and its vectors lie where they can be written past the caches.
  bool streams_weights() const {
    constexpr int64_t kStreamedFloats = 1 << 19;
    return kStreams && sources_.dtype == Dtype::f32 && sources_.features * sources_.columns >= kStreamedFloats &&
           sources_.columns % VW == 0 && reinterpret_cast<uintptr_t>(p_.grad_weight) % (VW * sizeof(float)) == 0;
  }

  // What becomes of G in V vectors of columns, the last of them with `last` columns.
  template <int V, bool kPartial, class T>
  void finish_columns(const T* weight, int64_t weight_stride, int64_t column, int64_t last, const float* products,
                      const float* sums) const {
    T* grad = static_cast<T*>(p_.grad_weight) + (p_.grad_weight == nullptr ? 0 : column);
    const bool streams = streams_weights() && !kPartial && column % VW == 0;
    const float *gain = gain_ + column, *shift = shift_ == nullptr ? nullptr : shift_ + column;
    vf gains[V], shifts[V];
    MMK_UNROLL for (int v = 0; v < V; ++v) gains[v] = shifts[v] = zero();
    for (int64_t f = 0; f < sources_.features; ++f, weight += weight_stride, products += kGroup) {
      constexpr int64_t kAhead = 16;  // rows of W on their way into cache
      __builtin_prefetch(weight + kAhead * weight_stride);
      __builtin_prefetch(weight + kAhead * weight_stride + V * VW - 1);
      const vf db = set1(sums[f]);
      MMK_UNROLL for (int v = 0; v < V; ++v) {
        const bool partial = kPartial && v == V - 1;
        const vf product = load(products + v * VW);
        const vf w = partial ? load_as_float(weight + v * VW, last) : load_as_float(weight + v * VW);
        gains[v] = fma(w, product, gains[v]);
        shifts[v] = fma(w, db, shifts[v]);
        if (p_.grad_weight == nullptr) continue;
        vf g = product * load(gain + v * VW);
        if (shift != nullptr) g = fma(load(shift + v * VW), db, g);
        if constexpr (std::is_same_v<T, float>) {
          if (streams) {
            stream(grad + v * VW, g);
            continue;
          }
        }
        partial ? store_from_float(grad + v * VW, g, last) : store_from_float(grad + v * VW, g);
      }
      grad += sources_.columns;
    }
    MMK_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t n = kPartial && v == V - 1 ? last : VW;
      if (p_.grad_norm_weight != nullptr) put(p_.grad_norm_weight, column + v * VW, gains[v], n);
      if (p_.grad_norm_bias != nullptr) put(p_.grad_norm_bias, column + v * VW, shifts[v], n);
    }
  }

  // As finish_columns, of a weight that lies by columns, as its gradient does: features are in the lanes, of Gᵀ, which
  // is made unless turned_stride says that it is given.
  template <class T>
  void finish_by_columns(const ConcatSource& source, const T* weight, int64_t first, int64_t width,
                         const float* products, int64_t turned_stride, const float* sums) const {
    const ConcatTerm& term = source.terms[0];
    const int64_t features = sources_.features;
    const int64_t stride = turned_stride > 0 ? turned_stride : round_up(features, VW);
    const Scratch scratch(turned_stride > 0 ? 0 : kGroup * stride);
    const float* const turned = turned_stride > 0 ? products : scratch.data();
    if (turned_stride == 0) pack_lanes(false, Dtype::f32, products, kGroup, features, width, scratch.data(), stride);
    for (int64_t c = 0; c < width; ++c) {
      const int64_t column = source.column + first + c;
      const T* down = weight + (first + c) * term.weight.stride;
      T* grad = static_cast<T*>(term.grad) + (term.grad == nullptr ? 0 : (first + c) * term.grad_stride);
      const vf gain = set1(gain_[column]), shift = set1(shift_ == nullptr ? 0.f : shift_[column]);
      vf gains = zero(), shifts = zero();
      for_vectors(features, [&](int64_t, int64_t f, int64_t n) {
        const vf w = load_as_float(down + f, n), db = load(sums + f);
        const vf product = load_as_float(turned + c * stride + f, n);  // anything may be behind the last feature
        gains = fma(w, product, gains);
        shifts = fma(w, db, shifts);
        if (term.grad != nullptr) store_from_float(grad + f, fma(shift, db, product * gain), n);
      });
      if (p_.grad_norm_weight != nullptr) put(p_.grad_norm_weight, column, set1(sum(gains)), 1);
      if (p_.grad_norm_bias != nullptr) put(p_.grad_norm_bias, column, set1(sum(shifts)), 1);
    }
  }

  bool by_columns() const { return sources_.count > 0 && sources_.items[0].terms[0].weight.by_columns; }

  void put(void* to, int64_t at, vf x, int64_t n) const {
    with_element_type(sources_.dtype, to, [&](auto* p) { store_from_float(p + at, x, n); });
  }

  static constexpr int64_t kRun =
      kGroup / VW;  // vectors of columns that go down the rows of W together: whole lines, few pages

  // f(vector, its first column, how many of VW)
  template <class Function>
  MMK_INLINE static void for_vectors(int64_t width, Function f) {
    for (int64_t v = 0, c = 0; c < width; ++v, c += VW) f(v, c, min(VW, width - c));
  }

  // f(source, its columns of W from k on, k, how many of them) over all sources, on all workers.
  template <class Function>
  void for_columns(Function f) const {
    for (int64_t s = 0; s < sources_.count; ++s) {
      const ConcatSource& source = sources_.items[s];
      for_each_claim(p_.linear.workers, ceil_div(source.width, kRun * VW), 1, [&](int, int64_t begin, int64_t end) {
        const Matrix& matrix = source.terms[0].weight;
        with_element_type(sources_.dtype, matrix.data, [&](const auto* weight) {
          for (int64_t run = begin; run < end; ++run) {
            const int64_t k = run * kRun * VW;
            f(source, weight + (matrix.by_columns ? k * matrix.stride : k), k, min(kRun * VW, source.width - k));
          }
        });
      });
    }
  }

  // gained_[n] = Σ_k W_nk g_k, offset_[n] = Σ_k W_nk h_k
  void sum_weights() {
    if (by_columns()) return sum_weight_columns();
    for_each_claim(p_.linear.workers, sources_.features, 16, [&](int, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        vf gained = zero(), offset = zero();
        for (int64_t s = 0; s < sources_.count; ++s) {
          const ConcatSource& source = sources_.items[s];
          const Matrix& matrix = source.terms[0].weight;
          with_element_type(sources_.dtype, matrix.data, [&](const auto* weight) {
            for (int64_t k = 0; k < source.width; k += VW) {
              // The weight's lanes behind the row are zero, whatever the others hold there.
              const vf w = load_as_float(weight + n * matrix.stride + k, source.width - k);
              const int64_t lanes = source.width - k;
              const auto vector = [&](const float* from) {
                return lanes < VW ? load_partial(from + source.column + k, lanes) : load(from + source.column + k);
              };
              gained = fma(w, vector(gain_), gained);
              if (shift_ != nullptr) offset = fma(w, vector(shift_), offset);
            }
          });
        }
        gained_[n] = sum(gained);
        offset_[n] = sum(offset);
      }
    });
  }

  // The same of a weight that lies by columns: features in the lanes, in runs of columns so that a long sum keeps its
  // digits.
  void sum_weight_columns() {
    constexpr int64_t kColumns = 64;
    for_each_claim(p_.linear.workers, ceil_div(sources_.features, kPanel), 1, [&](int, int64_t begin, int64_t end) {
      for (int64_t first = begin * kPanel; first < min(sources_.features, end * kPanel); first += kPanel) {
        const int64_t lanes = min(kPanel, sources_.features - first);
        vf gained[kFeatureVectors] = {}, offset[kFeatureVectors] = {};
        for (int64_t s = 0; s < sources_.count; ++s) {
          const ConcatSource& source = sources_.items[s];
          const Matrix& matrix = source.terms[0].weight;
          with_element_type(sources_.dtype, matrix.data, [&](const auto* weight) {
            for (int64_t start = 0; start < source.width; start += kColumns) {
              vf of_gain[kFeatureVectors] = {}, of_shift[kFeatureVectors] = {};
              for (int64_t k = start; k < min(source.width, start + kColumns); ++k) {
                const vf gain = set1(gain_[source.column + k]);
                const vf shift = set1(shift_ == nullptr ? 0.f : shift_[source.column + k]);
                for_vectors(lanes, [&](int64_t v, int64_t n, int64_t) {
                  const vf w = load_as_float(weight + k * matrix.stride + first + n, lanes - n);
                  of_gain[v] = fma(w, gain, of_gain[v]);
                  of_shift[v] = fma(w, shift, of_shift[v]);
                });
              }
              MMK_UNROLL for (int v = 0; v < kFeatureVectors; ++v) {
                gained[v] = gained[v] + of_gain[v];
                offset[v] = offset[v] + of_shift[v];
              }
            }
          });
        }
        for_vectors(lanes, [&](int64_t v, int64_t n, int64_t) {
          store_from_float(gained_ + first + n, gained[v], lanes - n);
          store_from_float(offset_ + first + n, offset[v], lanes - n);
        });
      }
    });
  }

  template <class T>
  void take_means(int64_t row, const T* z, const float* dz) const {
    vf a = zero(), ax = zero();
    for (int64_t n = 0; n < sources_.features; n += VW) {
      const int64_t lanes = sources_.features - n;
      const auto vector = [&](const float* from) {
        return lanes < VW ? load_partial(from + n, lanes) : load(from + n);
      };
      const vf d = load(dz + n);
      a = fma(d, vector(gained_), a);
      ax = fma(d, load_as_float(z + n, lanes) - vector(offset_), ax);
    }
    const auto columns = static_cast<float>(sources_.columns);
    means_[2 * row] = p_.rms ? 0.f : sum(a) / columns;
    means_[2 * row + 1] = sum(ax) / columns;
  }

  const ConcatNormLinearParams& p_;
  const ConcatSources& sources_;
  LinearGradient<kPairs> linear_;
  const float *gain_ = nullptr, *shift_ = nullptr;
  float *gained_ = nullptr, *offset_ = nullptr;
  float* means_ = nullptr;  // of a and of a ∘ x̂, per row
};

template <bool kPairs, class Gradient>
void backward(const ConcatNormLinearParams& p) {
  Scratch vectors(LinearEpilogue::floats(p.linear)), memory(Gradient::floats(p));
  const LinearEpilogue epilogue(p.linear, vectors.data());
  Gradient gradient(p, epilogue, memory.data());
  ConcatBackward<kPairs, Gradient>(p.linear.sources, p.linear.workers, gradient).run();
}

}  // namespace

void concat_norm_linear_backward(const ConcatNormLinearParams& p) {
  with_pairs(p.linear.sources.dtype, p.linear.workers.tiles, is_worth_tiles(p.linear.sources), [&](auto pairs) {
    if (FewRowsNormGradient<pairs>::takes(p)) return backward<pairs, FewRowsNormGradient<pairs>>(p);
    backward<pairs, NormLinearGradient<pairs>>(p);
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
