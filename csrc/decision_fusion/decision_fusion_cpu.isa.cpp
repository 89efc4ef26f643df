//   p_i = softmax(z_i);   mean: y = Σ w_i p_i,   dz_i = w_i p_i (g − g · p_i),   dw_i = g · p_i
//   log, product: y = softmax(u), u = Σ w_i log p_i,   du = y (g − g · y),   dz_i = w_i du,   dw_i = du · log p_i
//   max: y = m / s, m = max_i p_i, s = Σ m,   dm = (g − g · y) / s goes to those that are the maximum, in equal parts
//   vote: y = Σ w_i [argmax z_i] / Σ w_i
//
// Tiling     a row at a time, whose M · C exponentials are in scratch memory: one exponential for each logit, and in
// log
//            and product, which need but the maxima of z_i, one for each class.
// Threads    no sum is shared by two rows; the backward repeats the forward of its row.
// Precision  float32. What "log" adds up are distances from the maxima.
// Limits     any sizes. A modality that is absent, or all of whose logits are −inf, is not in the row.
#include "csrc/attention_pool/rows.h"
#include "csrc/decision_fusion/decision_fusion.h"
#include "csrc/logits/softmax.h"

namespace mmk {
namespace MMK_ISA {
namespace {

#define MMK_LAMBDA __attribute__((always_inline))
constexpr int kGroup = 4;  // vectors of a turn, each with a sum of its own

// f(c, j) over whole vectors of a padded row, j numbering the vectors of a turn.
template <class Function>
MMK_INLINE void for_padded(int64_t classes, Function f) {
  for_logits<kGroup>(classes, [&](int64_t c, auto vectors) MMK_LAMBDA {
    MMK_UNROLL for (int j = 0; j < decltype(vectors)::value; ++j) f(c + j * VW, j);
  });
}

MMK_INLINE vf sum_of(const vf (&sums)[kGroup]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// The largest logit; kLowest where all are −inf. A NaN is passed over.
template <class T>
float largest(const T* z, int64_t classes) {
  vf most[kGroup];
  MMK_UNROLL for (vf& m : most) m = set1(kLowest);
  for_padded(classes, [&](int64_t c, int j) MMK_LAMBDA { most[j] = max(load_logits(z + c, classes - c), most[j]); });
  return max_lane(max(max(most[0], most[1]), max(most[2], most[3])));
}

// e = exp(z − max z), zeros behind the last class; e may be z. Fetches a row that will be asked for next.
template <class T>
SoftmaxRow exponentials(const T* z, int64_t classes, float* e, const T* next) {
  const float top = largest(z, classes);
  const vf shift = set1(top), log2e = set1(kLog2e);
  vf sums[kGroup] = {zero(), zero(), zero(), zero()};
  for_padded(classes, [&](int64_t c, int j) MMK_LAMBDA {
    const vf x = exp_scaled(load_logits(z + c, classes - c) - shift, log2e);
    __builtin_prefetch(next + c);
    store(e + c, x);
    sums[j] = sums[j] + x;
  });
  return {top, sum(sum_of(sums))};
}

template <class T>
int64_t first_largest(const T* z, int64_t classes, float top) {
  const vf wanted = set1(top);
  for (int64_t c = 0; c < classes; c += kGroup * VW) {
    vf hits = zero();
    for (int64_t at = c; at < min(classes, c + kGroup * VW); at += VW) {
      hits = select(load_logits(z + at, classes - at) == wanted, set1(1.f), hits);
    }
    if (max_lane(hits) == 0.f) continue;
    while (number(z + c) != top) ++c;
    return c;
  }
  return 0;
}

// Memory of a row: numbers of its modalities, exponentials of each, a row of its own.
struct Memory {
  float *index, *share, *top, *inverse, *slope, *e, *row;
  int64_t padded;

  static int64_t floats(const Pool& pool) {
    Carver counter(nullptr);
    Memory(pool, counter);
    return counter.used();
  }
  Memory(const Pool& pool, Carver& carver) : padded(round_up(pool.width, VW)) {
    for (float** piece : {&index, &share, &top, &inverse, &slope}) *piece = carver.take(pool.modalities);
    e = carver.take(pool.modalities * padded);
    row = carver.take(padded);
  }
  float* exponentials(int64_t k) const { return e + k * padded; }
};

// One row after the other: which modalities it has and what each counts for.
template <class T>
class Row {
 public:
  Row(const DecisionFusionParams& p, const Memory& memory) : p_(p), pool_(p.pool), m_(memory) {}

  void forward(int64_t row) {
    enter(row);
    T* const out = static_cast<T*>(pool_.pooled) + row * pool_.width;
    if (count_ == 0) return set_to_zero(out, pool_.width);
    switch (p_.method) {
      case FusionMethod::mean:
        return add_up(out);
      case FusionMethod::log:
      case FusionMethod::product:
        return write_scaled(out, energies());
      case FusionMethod::max:
        return write_scaled(out, maxima());
      case FusionMethod::vote:
        return write_scaled(out, votes());
    }
  }

  void backward(int64_t row) {
    enter(row);
    grad_ = row_of<T>(pool_.grad_pooled, row);
    for (int64_t i = 0; i < pool_.modalities; ++i) {
      if (p_.grad_weights != nullptr) p_.grad_weights[row * pool_.modalities + i] = 0.f;
      if (T* const out = gradient(row, i); out != nullptr && !has(i)) set_to_zero(out, pool_.width);
    }
    if (count_ == 0) return;
    for (int64_t k = 0; k < count_; ++k) m_.slope[k] = 0.f;
    if (p_.method == FusionMethod::mean) {
      pull_mean(row);
    } else if (p_.method == FusionMethod::max) {
      pull_max(row);
    } else {
      pull_log(row);
    }
    if (p_.grad_weights != nullptr) pull_weights(row);
  }

 private:
  bool weighs() const { return p_.method == FusionMethod::mean || p_.method == FusionMethod::log; }
  bool takes_exponentials() const { return p_.method == FusionMethod::mean || p_.method == FusionMethod::max; }
  int64_t index(int64_t k) const { return reinterpret_cast<const int32_t*>(m_.index)[k]; }
  const T* logits(int64_t k) const { return modality(index(k)); }
  const T* modality(int64_t i) const {
    const PoolModality& item = pool_.items[i];
    return static_cast<const T*>(item.x) + row_ * item.stride;
  }
  // The modality in the next row, or once more in this one, the last.
  const T* following(int64_t i) const { return modality(i) + (row_ + 1 < pool_.rows ? pool_.items[i].stride : 0); }
  T* gradient(int64_t row, int64_t i) const {
    const PoolModality& item = pool_.items[i];
    return item.grad == nullptr ? nullptr : static_cast<T*>(item.grad) + row * item.grad_stride;
  }
  bool has(int64_t i) const {
    for (int64_t k = 0; k < count_; ++k) {
      if (index(k) == i) return true;
    }
    return false;
  }

  void enter(int64_t row) {
    row_ = row;
    count_ = 0;
    for (int64_t i = 0; i < pool_.modalities; ++i) {
      if (!is_present(pool_, row, i)) continue;
      SoftmaxRow softmax;
      if (takes_exponentials()) {
        softmax = exponentials(modality(i), pool_.width, m_.exponentials(count_), following(i));
        if (softmax.total == 0.f) continue;
      } else {
        softmax = {largest(modality(i), pool_.width), 1.f};
        if (softmax.top == kLowest && all_excluded(modality(i))) continue;
      }
      m_.top[count_] = softmax.top;
      m_.inverse[count_] = softmax.inverse();
      reinterpret_cast<int32_t*>(m_.index)[count_++] = static_cast<int32_t>(i);
    }
    set_shares();
  }

  // Whether every logit is −inf, where the largest of the others is the lowest number, or there are but NaNs.
  bool all_excluded(const T* z) const {
    for (int64_t c = 0; c < pool_.width; ++c) {
      if (number(z + c) != -kInfinity) return false;
    }
    return true;
  }

  void set_shares() {
    const T* weights = static_cast<const T*>(p_.weights);
    if (weights != nullptr) weights += row_ * p_.weights_stride;
    total_ = 0.f;
    for (int64_t k = 0; k < count_; ++k) {
      m_.share[k] = weights == nullptr ? 1.f : number(weights + index(k));
      total_ += m_.share[k];
    }
    lacks_ = count_ < pool_.modalities && total_ != 0.f;
    if (weights == nullptr || lacks_) {
      for (int64_t k = 0; k < count_; ++k) m_.share[k] /= total_;
    }
  }
  float factor(int64_t k) const { return p_.method == FusionMethod::product ? 1.f : m_.share[k]; }

  void add_up(T* out) {
    for (int64_t k = 0; k < count_; ++k) m_.slope[k] = m_.share[k] * m_.inverse[k];
    for_logits<kGroup>(pool_.width, [&](int64_t c, auto vectors) MMK_LAMBDA {
      constexpr int kVectors = decltype(vectors)::value;
      vf sums[kVectors];
      MMK_UNROLL for (int j = 0; j < kVectors; ++j) sums[j] = zero();
      const float* e = m_.e + c;
      for (int64_t k = 0; k < count_; ++k, e += m_.padded) {
        const vf factor = set1(m_.slope[k]);
        MMK_UNROLL for (int j = 0; j < kVectors; ++j) sums[j] = fma(factor, load(e + j * VW), sums[j]);
      }
      MMK_UNROLL for (int j = 0; j < kVectors; ++j) {
        store_from_float(out + c + j * VW, sums[j], pool_.width - c - j * VW);
      }
    });
  }

  // exp of Σ w log p less its maximum; returns what brings it to a sum of 1, 0 where no class is left.
  float energies() {
    float* const u = m_.row;
    const vf excluded = set1(-kInfinity);
    for_padded(pool_.width, [&](int64_t c, int) MMK_LAMBDA {
      vf total = zero();
      for (int64_t k = 0; k < count_; ++k) {
        const float w = factor(k);
        if (w == 0.f) continue;
        const vf x = load_logits(logits(k) + c, pool_.width - c) - set1(m_.top[k]);
        total = select(x == excluded, excluded, fma(set1(w), x, total));
      }
      store(u + c, total);
    });
    return exponentials(u, pool_.width, u, u).inverse();
  }

  // max_i p_i, and 1 / its sum.
  float maxima() {
    vf sums[kGroup] = {zero(), zero(), zero(), zero()};
    for_padded(pool_.width, [&](int64_t c, int j) MMK_LAMBDA {
      vf most = zero();
      for (int64_t k = 0; k < count_; ++k) most = max(most, probability(k, c));
      store(m_.row + c, most);
      sums[j] = sums[j] + most;
    });
    return 1.f / sum(sum_of(sums));
  }
  MMK_INLINE vf probability(int64_t k, int64_t c) const { return load(m_.exponentials(k) + c) * set1(m_.inverse[k]); }

  float votes() {
    std::memset(m_.row, 0, static_cast<size_t>(m_.padded) * sizeof(float));
    float total = 0.f;
    for (int64_t k = 0; k < count_; ++k) {
      m_.row[first_largest(logits(k), pool_.width, m_.top[k])] += m_.share[k];
      total += m_.share[k];
    }
    return total == 0.f ? 1.f : 1.f / total;
  }

  void write_scaled(T* out, float scale) {
    for_padded(pool_.width, [&](int64_t c, int) MMK_LAMBDA {
      store_from_float(out + c, load(m_.row + c) * set1(scale), pool_.width - c);
    });
  }

  MMK_INLINE vf grad(int64_t c) const { return load_as_float(grad_ + c, pool_.width - c); }

  // Σ g · y, where y is `scale` times the row.
  float grad_dot(const float* y, float scale) const {
    vf sums[kGroup] = {zero(), zero(), zero(), zero()};
    for_padded(pool_.width, [&](int64_t c, int j) MMK_LAMBDA { sums[j] = fma(grad(c), load(y + c), sums[j]); });
    return scale * sum(sum_of(sums));
  }

  void pull_mean(int64_t row) {
    for (int64_t k = 0; k < count_; ++k) {
      const float* const e = m_.exponentials(k);
      const float dot = grad_dot(e, m_.inverse[k]);
      m_.slope[k] = dot;
      T* const out = gradient(row, index(k));
      if (out == nullptr) continue;
      const vf factor = set1(m_.share[k] * m_.inverse[k]), mean = set1(dot);
      for_padded(pool_.width, [&](int64_t c, int) MMK_LAMBDA {
        store_from_float(out + c, factor * load(e + c) * (grad(c) - mean), pool_.width - c);
      });
    }
  }

  void pull_log(int64_t row) {
    const float scale = energies();
    float* const du = m_.row;
    const vf factor = set1(scale), mean = set1(grad_dot(du, scale));
    for_padded(pool_.width,
               [&](int64_t c, int) MMK_LAMBDA { store(du + c, factor * load(du + c) * (grad(c) - mean)); });
    for (int64_t k = 0; k < count_; ++k) {
      const T* const z = logits(k);
      if (T* const out = gradient(row, index(k)); out != nullptr) {
        const vf w = set1(this->factor(k));
        for_padded(pool_.width,
                   [&](int64_t c, int) MMK_LAMBDA { store_from_float(out + c, w * load(du + c), pool_.width - c); });
      }
      if (p_.grad_weights == nullptr || !weighs()) continue;
      // Σ du = 0: distances from the maximum serve for log p, but where du goes to classes that k excludes, whose log p
      // is not counted. It has no weight there.
      const vf top = set1(m_.top[k]), excluded = set1(-kInfinity);
      vf sums[kGroup] = {zero(), zero(), zero(), zero()}, lost = zero();
      for_padded(pool_.width, [&](int64_t c, int j) MMK_LAMBDA {
        const vf x = load_logits(z + c, pool_.width - c), slope = load(du + c);
        sums[j] = select(x == excluded, sums[j], fma(slope, x - top, sums[j]));
        lost = select(x == excluded, lost + slope, lost);
      });
      m_.slope[k] = sum(sum_of(sums));
      if (const float elsewhere = sum(lost); elsewhere != 0.f) {
        m_.slope[k] += elsewhere * std::log(softmax_row(z, pool_.width, 1.f).total);
      }
    }
  }

  void pull_max(int64_t row) {
    float* const dm = m_.row;
    const float scale = maxima();
    const vf factor = set1(scale), mean = set1(grad_dot(dm, scale));
    // Where a modality is the maximum its exponentials are negated, so that the maximum itself need not be kept.
    for_padded(pool_.width, [&](int64_t c, int) MMK_LAMBDA {
      const vf most = load(dm + c);
      vf ties = zero();
      for (int64_t k = 0; k < count_; ++k) {
        const vf e = load(m_.exponentials(k) + c);
        const vi is_most = probability(k, c) == most;
        ties = ties + select(is_most, set1(1.f), zero());
        store(m_.exponentials(k) + c, select(is_most, -e, e));
      }
      store(dm + c, factor * (grad(c) - mean) / max(set1(1.f), ties));
    });
    for (int64_t k = 0; k < count_; ++k) {
      T* const out = gradient(row, index(k));
      if (out == nullptr) continue;
      const auto pulled = [&](int64_t c) MMK_LAMBDA {  // p dp
        const vf p = probability(k, c);
        return select(p < zero(), -p * load(dm + c), zero());
      };
      vf sums[kGroup] = {zero(), zero(), zero(), zero()};
      for_padded(pool_.width, [&](int64_t c, int j) MMK_LAMBDA { sums[j] = sums[j] + pulled(c); });
      const vf total = set1(sum(sum_of(sums)));
      for_padded(pool_.width, [&](int64_t c, int) MMK_LAMBDA {
        const vf p = probability(k, c), size = max(p, -p);
        store_from_float(out + c, pulled(c) - size * total, pool_.width - c);
      });
    }
  }

  // From the gradients of the shares.
  void pull_weights(int64_t row) {
    float* const out = p_.grad_weights + row * pool_.modalities;
    float mean = 0.f;
    for (int64_t k = 0; k < count_ && lacks_; ++k) mean += m_.share[k] * m_.slope[k];
    for (int64_t k = 0; k < count_; ++k) out[index(k)] = lacks_ ? (m_.slope[k] - mean) / total_ : m_.slope[k];
  }

  const DecisionFusionParams& p_;
  const Pool& pool_;
  const Memory m_;
  const T* grad_ = nullptr;
  int64_t row_ = 0, count_ = 0;
  float total_ = 0.f;   // of the weights of present modalities
  bool lacks_ = false;  // whether they were divided by it
};

// f(Row<T>&, row) for every row.
template <class Function>
void for_each_row(const DecisionFusionParams& p, const void* any, Function f) {
  const int64_t floats = Memory::floats(p.pool);
  const Scratch scratch(floats * p.pool.workers.count);
  with_element_type(p.pool.dtype, any, [&](const auto* typed) {
    using T = std::decay_t<decltype(*typed)>;
    for_each_claim(p.pool.workers, p.pool.rows, kPoolRows, [&](int worker, int64_t begin, int64_t end) {
      Carver carver(scratch.data() + worker * floats);
      Row<T> row(p, Memory(p.pool, carver));
      for (int64_t i = begin; i < end; ++i) f(row, i);
    });
  });
}

}  // namespace

void decision_fusion_forward(const DecisionFusionParams& p) {
  for_each_row(p, p.pool.pooled, [](auto& row, int64_t i) { row.forward(i); });
}

void decision_fusion_backward(const DecisionFusionParams& p) {
  for_each_row(p, p.pool.grad_pooled.data, [](auto& row, int64_t i) { row.backward(i); });
}

}  // namespace MMK_ISA
}  // namespace mmk
