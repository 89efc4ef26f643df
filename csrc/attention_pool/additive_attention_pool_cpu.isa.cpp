//   e_i = v · tanh(W x_i + W_q q + b),  a = softmax over present i of e,  pooled = Σ a_i x_i
//
//   s_i = dpooled · x_i + da_i,  de_i = a_i (s_i - Σ_j a_j s_j),  du_i = de_i · v ∘ (1 - t_i²),  t_i the tanh
//   dx_i = a_i dpooled + du_i W,  dW = Σ du_iᵀ x_i,  dv = Σ de_i t_i,  db = Σ du_i,  d(W_q q) = Σ_i du_i
//
// Tiling     the modalities of a block of rows, and the query, are the sources of one product (csrc/concat/forward.h)
//            with one weight; its float tile becomes energies, softmax and pooled rows while x is in cache. Nothing of
//            size B·M·A is stored but in training, t. The backward is one product likewise (csrc/concat/backward.h).
//            Few rows (flat) are one source of B·M rows instead, so that W is read once, and in place.
// Precision  float32 beside the products; t has the inputs' dtype.
// Limits     any sizes; rows of absent modalities are neither read nor multiplied.
#include "csrc/attention_pool/additive_attention_pool.h"
#include "csrc/attention_pool/rows.h"
#include "csrc/concat/backward.h"
#include "csrc/concat/forward.h"

namespace mmk {
namespace MMK_ISA {
namespace {

MMK_INLINE vf load_some(const float* p, int64_t n) { return n >= VW ? load(p) : load_partial(p, n); }
MMK_INLINE void store_some(float* p, vf x, int64_t n) { n >= VW ? store(p, x) : store_partial(p, x, n); }

// Where modality i of row b stands in a tile of z or dz: b · row + i · modality.
struct TileStrides {
  int64_t row, modality;
  TileStrides(const AdditivePoolParams& p, int64_t stride)
      : row(p.flat ? p.pool.modalities * stride : stride), modality(p.flat ? stride : p.hidden) {}
};

// v and b as floats, whole vectors with zeros behind.
class HiddenVectors {
 public:
  explicit HiddenVectors(const AdditivePoolParams& p) : padded_(round_up(p.hidden, VW)), memory_(2 * padded_) {
    set_to_zero(memory_.data(), 2 * padded_);
    copy(p.pool.dtype, p.vector, p.hidden, memory_.data());
    copy(p.pool.dtype, p.bias, p.hidden, memory_.data() + padded_);
  }
  const float* vector() const { return memory_.data(); }
  const float* bias() const { return memory_.data() + padded_; }

 private:
  static void copy(Dtype dtype, const void* from, int64_t count, float* to) {
    if (from != nullptr) pack_rows_as_float(dtype, from, 0, 1, count, to, 0);
  }
  int64_t padded_;
  Scratch memory_;
};

// Energies, softmax and pooled features from a tile of z.
class PoolEpilogue {
 public:
  PoolEpilogue(const AdditivePoolParams& p, const HiddenVectors& vectors) : p_(p), vectors_(vectors) {}

  void operator()(int64_t first, int64_t rows, int64_t, int64_t, const float* z, int64_t stride) const {
    with_element_type(p_.pool.dtype, p_.pool.pooled,
                      [&](auto* out) { finish<std::decay_t<decltype(*out)>>(first, rows, z, stride); });
  }

 private:
  template <class T>
  void finish(int64_t first, int64_t rows, const float* z, int64_t stride) const {
    const Pool& pool = p_.pool;
    Carver size(nullptr);
    size.take(pool.modalities), size.take(round_up(pool.modalities, VW)), size.take(round_up(p_.hidden, VW));
    const Scratch scratch(size.used());
    Carver memory(scratch.data());
    PresentModalities<T> present(pool, memory.take(pool.modalities));
    float* const e = memory.take(round_up(pool.modalities, VW));
    float* const shared = memory.take(round_up(p_.hidden, VW));
    const TileStrides strides(p_, stride);
    for (int64_t i = 0; i < rows; ++i, z += strides.row) {
      const int64_t row = first + i;
      present.select(row);
      const float* own = shared_terms(z, shared);
      for (int64_t k = 0; k < present.count(); ++k) {
        const int64_t modality = present.index(k);
        e[k] = energy(z + modality * strides.modality, own, activations_of<T>(row, modality));
      }
      if (p_.activations != nullptr && present.count() < pool.modalities) clear_absent<T>(row);
      finish_pooled_row(pool, row, present, e);
    }
  }

  // W_q q + b of a row.
  const float* shared_terms(const float* z, float* sums) const {
    if (!p_.has_query || p_.flat) return vectors_.bias();
    const float* query = z + p_.pool.modalities * p_.hidden;
    for (int64_t c = 0; c < p_.hidden; c += VW)
      store(sums + c, load_some(query + c, p_.hidden - c) + load(vectors_.bias() + c));
    return sums;
  }

  template <class T>
  T* activations_of(int64_t row, int64_t i) const {
    if (p_.activations == nullptr) return nullptr;
    return static_cast<T*>(p_.activations) + (row * p_.pool.modalities + i) * p_.hidden;
  }

  template <class T>
  float energy(const float* z, const float* shared, T* activations) const {
    vf total = zero();
    for (int64_t c = 0; c < p_.hidden; c += VW) {
      const vf t = tanh(load_some(z + c, p_.hidden - c) + load(shared + c));
      if (activations != nullptr) store_from_float(activations + c, t, p_.hidden - c);
      total = fma(t, load(vectors_.vector() + c), total);
    }
    return sum(total);
  }

  template <class T>
  void clear_absent(int64_t row) const {
    for (int64_t i = 0; i < p_.pool.modalities; ++i) {
      if (!is_present(p_.pool, row, i)) set_to_zero(activations_of<T>(row, i), p_.hidden);
    }
  }

  const AdditivePoolParams& p_;
  const HiddenVectors& vectors_;
};

// du of all modalities side by side, then their sum where there is a query; sums over rows of du and of de_i t_i.
template <bool kPairs>
class PoolGradient {
 public:
  static constexpr int kSums = 2;
  static constexpr bool kFinishesRows = true, kFinishesWeights = false;

  PoolGradient(const AdditivePoolParams& p, const HiddenVectors& vectors) : p_(p), vectors_(vectors) {}

  void make(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums) const {
    const int64_t modalities = p_.flat ? p_.pool.modalities : 1;  // that rows are counted in
    with_element_type(p_.pool.dtype, p_.pool.weights, [&](auto* weights) {
      make_rows<std::decay_t<decltype(*weights)>>(first / modalities, rows / modalities, dz, stride, sums);
    });
  }

  void columns(int64_t s, int64_t first, int64_t count, int64_t column, int64_t width, float* panels) const {
    pack_source_columns<kPairs>(p_.sources.items[s], p_.pool.dtype, first, count, column, width, panels);
  }

  // dx_i = a_i dpooled + du_i W; of one modality, `dx` has the rows in which it is present.
  template <class T>
  void finish_rows(int64_t s, int64_t first, int64_t rows, const float* dx, int64_t stride, T* out,
                   int64_t out_stride) const {
    const Pool& pool = p_.pool;
    if (p_.has_query && s == p_.sources.count - 1) {
      const int64_t each = p_.flat ? pool.modalities : 1, width = p_.sources.items[s].width;
      for (int64_t i = 0; i < rows; i += each, dx += each * stride, out += out_stride) {
        for (int64_t c = 0; c < width; c += VW) {
          vf total = load(dx + c);
          for (int64_t m = 1; m < each; ++m) total = total + load(dx + m * stride + c);
          store_from_float(out + c, total, width - c);
        }
      }
    } else if (p_.flat) {
      for (int64_t i = 0; i < rows; ++i, dx += stride) finish_row<T>(i / pool.modalities, i % pool.modalities, dx);
    } else {
      for (int64_t row = first; row < first + rows; ++row) {
        finish_row<T>(row, p_.modalities[s], dx);
        if (is_present(pool, row, p_.modalities[s])) dx += stride;
      }
    }
  }

  void finish_sums(const float* sums) const {
    const int64_t padded = round_up(p_.sources.features, VW);
    const auto write = [&](void* to, auto sum_of) {
      if (to == nullptr) return;
      with_element_type(p_.pool.dtype, to, [&](auto* out) {
        for (int64_t c = 0; c < p_.hidden; c += VW) store_from_float(out + c, sum_of(c), p_.hidden - c);
      });
    };
    write(p_.grad_vector, [&](int64_t c) { return load_some(sums + padded + c, p_.hidden - c); });
    write(p_.grad_bias, [&](int64_t c) {
      vf total = zero();
      for (int64_t i = 0; i < (p_.flat ? 1 : p_.pool.modalities); ++i)
        total = total + load_some(sums + i * p_.hidden + c, p_.hidden - c);
      return total;
    });
  }

 private:
  // The gradient of a modality in a row.
  template <class T>
  void finish_row(int64_t row, int64_t modality, const float* dx) const {
    const Pool& pool = p_.pool;
    const PoolModality& item = pool.items[modality];
    if (item.grad == nullptr) return;
    T* const out = static_cast<T*>(item.grad) + row * item.grad_stride;
    if (!is_present(pool, row, modality)) {
      set_to_zero(out, pool.width);
      return;
    }
    const vf a = set1(number(static_cast<const T*>(pool.weights) + row * pool.modalities + modality));
    const T* grad = row_of<T>(pool.grad_pooled, row);
    for (int64_t c = 0; c < pool.width; c += VW) {
      const int64_t n = pool.width - c;
      store_from_float(out + c, fma(a, load_as_float(grad + c, n), load(dx + c)), n);
    }
  }

  template <class T>
  void make_rows(int64_t first, int64_t rows, float* dz, int64_t stride, float* sums) const {
    const Pool& pool = p_.pool;
    const int64_t hidden = p_.hidden, all = pool.modalities * hidden;
    const Scratch scratch(3 * round_up(pool.modalities, 16));
    Carver memory(scratch.data());
    PresentModalities<T> present(pool, memory.take(pool.modalities));
    float *const a = memory.take(pool.modalities), *const de = memory.take(pool.modalities);
    const TileStrides strides(p_, stride);
    const int64_t modality_sums = p_.flat ? 0 : hidden;
    for (int64_t i = 0; i < rows; ++i, dz += strides.row) {
      const int64_t row = first + i;
      set_to_zero(dz, strides.row);
      present.select(row);
      energy_gradients(pool, row, present, a, de);
      const T* activations = static_cast<const T*>(p_.activations) + row * all;
      for (int64_t c = 0; c < hidden; c += VW) {
        const int64_t n = hidden - c;
        const vf v = load(vectors_.vector() + c);
        vf of_vector = zero(), of_query = zero();
        for (int64_t k = 0; k < present.count(); ++k) {
          const int64_t modality = present.index(k);
          const vf t = load_as_float(activations + modality * hidden + c, n), d = set1(de[k]);
          const vf du = d * v * (set1(1.f) - t * t);
          store_some(dz + modality * strides.modality + c, du, n);
          float* const own_sums = sums + modality * modality_sums + c;
          store_some(own_sums, load_some(own_sums, n) + du, n);
          of_query = of_query + du;
          of_vector = fma(d, t, of_vector);
        }
        if (p_.has_query && !p_.flat) store_some(dz + all + c, of_query, n);
        float* const vector_sums = sums + round_up(p_.sources.features, VW) + c;
        store_some(vector_sums, load_some(vector_sums, n) + of_vector, n);
      }
    }
  }

  const AdditivePoolParams& p_;
  const HiddenVectors& vectors_;
};

template <bool kPairs>
void forward(const AdditivePoolParams& p) {
  const HiddenVectors vectors(p);
  const PoolEpilogue epilogue(p, vectors);
  const int64_t columns = p.sources.features;
  if (columns == 0) return epilogue(0, p.pool.rows, 0, 0, nullptr, 0);
  if (p.flat) {
    const Scratch z(p.sources.rows * columns);
    multiply_concatenation<kPairs>(
        p.sources, p.pool.workers, PlainLoader{p.sources}, kBlockRows,
        [&](int64_t first, int64_t rows, int64_t column, int64_t count, const float* tile, int64_t stride) {
          for (int64_t i = 0; i < rows; ++i) {
            std::memcpy(z.data() + (first + i) * columns + column, tile + i * stride,
                        sizeof(float) * static_cast<size_t>(count));
          }
        });
    return epilogue(0, p.pool.rows, 0, 0, z.data(), columns);
  }
  // A block's tile of z and its rows of x stay in the second cache, where that leaves enough rows to a tile of
  // registers.
  constexpr int64_t kBlockBytes = 512 << 10;
  const int64_t row_bytes = columns * 4 + p.pool.modalities * p.pool.width * element_size(p.pool.dtype);
  const int64_t rows = min(kBlockRows, max(2, kBlockBytes / row_bytes / kFeatureRows) * kFeatureRows);
  multiply_rows_broadcast<kPairs>(p.sources, p.pool.workers, PlainLoader{p.sources}, rows, round_up(columns, kPanel),
                                  epilogue);
}

template <bool kPairs>
void backward(const AdditivePoolParams& p) {
  const HiddenVectors vectors(p);
  PoolGradient<kPairs> gradient(p, vectors);
  ConcatBackward<kPairs, PoolGradient<kPairs>>(p.sources, p.pool.workers, gradient).run();
}

}  // namespace

void additive_pool_forward(const AdditivePoolParams& p) {
  if constexpr (kBf16Dot) {
    if (p.pool.dtype == Dtype::bf16) return forward<true>(p);
  }
  forward<false>(p);
}

void additive_pool_backward(const AdditivePoolParams& p) {
  // Pairs of features of dz must not straddle two terms.
  if constexpr (kBf16Dot) {
    if (p.pool.dtype == Dtype::bf16 && p.hidden % 2 == 0) return backward<true>(p);
  }
  backward<false>(p);
}

}  // namespace MMK_ISA
}  // namespace mmk
