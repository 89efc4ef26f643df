//   s, t = softmax(student / T), softmax(teacher / T),   KL(a‖b) = Σ a log(a/b)
//   of z_a and z_b, over T:  dKL(a‖b)/dz_a = a (log(a/b) − KL),   dKL(a‖b)/dz_b = b − a
//   jsd: β KL(t‖m) + (1−β) KL(s‖m), m = β t + (1−β) s:   dz_t = β t (log(t/m) − KL(t‖m)),
//                                                        dz_s = (1−β) s (log(s/m) − KL(s‖m))
//
// Tiling     a row at a time. Forward: one pass over each of both rows for its softmax, one over both for the
// divergence,
//            from cache. Backward: one pass, from the numbers of the row that the forward kept, which may write the
//            gradients where the logits are.
// Threads    no sum is shared by two rows.
// Precision  float32. log(a/b) is the difference of the distances from the maxima; log(·/m) is taken of a number
// between
//            min(β, 1−β) and 1, whichever probability is the larger.
// Limits     any V. A logit of −inf: 0 log 0 = 0, and gradient 0.
#include "csrc/cpu/schedule.h"
#include "csrc/distillation_loss/distillation_loss.h"
#include "csrc/logits/log.h"
#include "csrc/logits/softmax.h"

namespace mmk {
namespace MMK_ISA {
namespace {

#define MMK_LAMBDA __attribute__((always_inline))
constexpr int kGroup = 4;  // vectors of a turn, each with sums of its own
constexpr int64_t kRowsPerTask = 4;

// f(c, j) over the vectors of a row, j numbering those of a turn.
template <class Function>
MMK_INLINE void for_vectors(int64_t classes, Function f) {
  for_logits<kGroup>(classes, [&](int64_t c, auto vectors) MMK_LAMBDA {
    MMK_UNROLL for (int j = 0; j < decltype(vectors)::value; ++j) f(c + j * VW, j);
  });
}

MMK_INLINE float total_of(const vf (&sums)[kGroup]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// log (b's sum / a's sum), where they have any.
float log_of_totals(const SoftmaxRow& a, const SoftmaxRow& b) {
  return a.total == 0.f || b.total == 0.f ? 0.f : std::log(b.total / a.total);
}

// Two rows of logits with their softmaxes, a vector at a time.
template <class T>
class Pair {
 public:
  struct Vectors {
    vf x_a, x_b;  // distances from the maxima
    MMK_INLINE vi a_excluded() const { return x_a == set1(-kInfinity); }
    MMK_INLINE vi b_excluded() const { return x_b == set1(-kInfinity); }
  };

  Pair(const T* a, const SoftmaxRow& row_a, const T* b, const SoftmaxRow& row_b, int64_t classes, float scale)
      : a_(a),
        b_(b),
        classes_(classes),
        top_a_(set1(row_a.top)),
        top_b_(set1(row_b.top)),
        scale_(set1(scale)),
        log2e_(set1(scale * kLog2e)),
        inverse_a_(set1(row_a.inverse())),
        inverse_b_(set1(row_b.inverse())),
        offset_(set1(log_of_totals(row_a, row_b))) {}

  MMK_INLINE Vectors load(int64_t c) const {
    return {load_logits(a_ + c, classes_ - c) - top_a_, load_logits(b_ + c, classes_ - c) - top_b_};
  }
  MMK_INLINE vf a(const Vectors& v) const { return exp_scaled(v.x_a, log2e_) * inverse_a_; }
  MMK_INLINE vf b(const Vectors& v) const { return exp_scaled(v.x_b, log2e_) * inverse_b_; }
  MMK_INLINE vf log_ratio(const Vectors& v) const { return fma(v.x_a - v.x_b, scale_, offset_); }  // log(a/b)

 private:
  const T *a_, *b_;
  int64_t classes_;
  vf top_a_, top_b_, scale_, log2e_, inverse_a_, inverse_b_, offset_;
};

// a · value, 0 where a is excluded.
MMK_INLINE vf weighed(vi excluded, vf a, vf value) { return select(excluded, zero(), a * value); }

// p log(p/q) − p + q, from log(p/q).
MMK_INLINE vf divergence_term(vf p, vf q, vf log_ratio) {
  const vf near = p * (log_ratio * log_ratio) * exp_remainder(-log_ratio);
  return select(max(log_ratio, -log_ratio) < set1(0.5f), near, fma(p, log_ratio, q - p));
}

// KL(a‖b).
template <class T>
float divergence(const Pair<T>& pair, int64_t classes) {
  vf sums[kGroup] = {zero(), zero(), zero(), zero()};
  for_vectors(classes, [&](int64_t c, int j) MMK_LAMBDA {
    const auto v = pair.load(c);
    const vf b = pair.b(v);
    const vf term = select(v.b_excluded(), set1(kInfinity), divergence_term(pair.a(v), b, pair.log_ratio(v)));
    sums[j] = sums[j] + select(v.a_excluded(), b, term);
  });
  return total_of(sums);
}

// log(a/m) and log(b/m), m = α a + β b, α + β = 1, from d = log(a/b): m over the larger of both is 1 + β (e^-|d| − 1),
// or with α.
struct MixtureRatios {
  vf a, b;
  MMK_INLINE MixtureRatios(vf d, vf of_a, vf of_b) {
    const vi above = d > zero();
    const vf below = min(d, -d);
    const vf less = select(below > set1(-0.5f), fma(below * below, exp_remainder(below), below),
                           exp_scaled(below, set1(kLog2e)) - set1(1.f));  // e^-|d| − 1
    const vf log_m = log1p(select(above, of_b, of_a) * less);
    a = select(above, zero(), d) - log_m;
    b = select(above, -d, zero()) - log_m;
  }
};

SoftmaxRow student_of(const DistillationRow& row) { return {row.student_top, row.student_total}; }
SoftmaxRow teacher_of(const DistillationRow& row) { return {row.teacher_top, row.teacher_total}; }

// Where m is one of both, the divergence is 0.
bool is_constant(const DistillationParams& p) { return p.kind == Divergence::jsd && (p.beta <= 0.f || p.beta >= 1.f); }

template <class T>
class Rows {
 public:
  explicit Rows(const DistillationParams& p) : p_(p) {}

  void forward(int64_t row) const {
    DistillationRow& kept = p_.statistics[row];
    kept = {};
    p_.losses[row] = 0.f;
    if (is_ignored(row)) return;
    const SoftmaxRow s = softmax_row(student(row), p_.classes, p_.scale);
    const SoftmaxRow t = softmax_row(teacher(row), p_.classes, p_.scale);
    kept = {s.top, s.total, t.top, t.total, 0.f, 0.f};
    if (is_constant(p_)) return;
    if (p_.kind == Divergence::jsd) {
      if (s.total == 0.f || t.total == 0.f) {  // m is a multiple of the one that has classes
        if (t.total > 0.f) kept.first = -std::log(p_.beta);
        if (s.total > 0.f) kept.second = -std::log(1.f - p_.beta);
        p_.losses[row] = p_.beta * kept.first + (1.f - p_.beta) * kept.second;
        return;
      }
      mixture_divergences(Pair<T>(teacher(row), t, student(row), s, p_.classes, p_.scale), kept);
      p_.losses[row] = p_.beta * kept.first + (1.f - p_.beta) * kept.second;
      return;
    }
    const bool forward = p_.kind == Divergence::forward_kl;
    const SoftmaxRow &a = forward ? t : s, &b = forward ? s : t;
    if (a.total == 0.f) return;  // 0 log 0
    const Pair<T> pair(forward ? teacher(row) : student(row), a, forward ? student(row) : teacher(row), b, p_.classes,
                       p_.scale);
    p_.losses[row] = kept.first = divergence(pair, p_.classes);
  }

  void backward(int64_t row) const {
    T *const ds = gradient(p_.grad_student, row), *const dt = gradient(p_.grad_teacher, row);
    if (is_ignored(row) || is_constant(p_)) return clear(ds, dt);
    const DistillationRow& kept = p_.statistics[row];
    const SoftmaxRow s = student_of(kept), t = teacher_of(kept);
    if (p_.kind == Divergence::jsd) {
      if (s.total == 0.f || t.total == 0.f) return clear(ds, dt);
      const Pair<T> pair(teacher(row), t, student(row), s, p_.classes, p_.scale);
      return pull_mixture(pair, kept, dt, ds);
    }
    const bool forward = p_.kind == Divergence::forward_kl;
    if ((forward ? t : s).total == 0.f) return clear(ds, dt);
    const Pair<T> pair(forward ? teacher(row) : student(row), forward ? t : s, forward ? student(row) : teacher(row),
                       forward ? s : t, p_.classes, p_.scale);
    pull(pair, kept.first, forward ? dt : ds, forward ? ds : dt);
  }

 private:
  using Vectors = typename Pair<T>::Vectors;

  bool is_ignored(int64_t row) const { return p_.ignored != nullptr && p_.ignored[row] != 0; }
  const T* student(int64_t row) const { return static_cast<const T*>(p_.student) + row * p_.student_stride; }
  const T* teacher(int64_t row) const { return static_cast<const T*>(p_.teacher) + row * p_.teacher_stride; }
  T* gradient(void* grad, int64_t row) const {
    return grad == nullptr ? nullptr : static_cast<T*>(grad) + row * p_.classes;
  }
  void clear(T* ds, T* dt) const {
    for (T* grad : {ds, dt}) {
      if (grad != nullptr) std::memset(grad, 0, static_cast<size_t>(p_.classes) * sizeof(T));
    }
  }

  // KL(t‖m) and KL(s‖m), a being the teacher.
  void mixture_divergences(const Pair<T>& pair, DistillationRow& kept) const {
    const vf beta = set1(p_.beta), rest = set1(1.f - p_.beta);
    vf of_a[kGroup] = {zero(), zero(), zero(), zero()}, of_b[kGroup] = {zero(), zero(), zero(), zero()};
    for_vectors(p_.classes, [&](int64_t c, int j) MMK_LAMBDA {
      const Vectors v = pair.load(c);
      const MixtureRatios log_over_m(pair.log_ratio(v), beta, rest);
      const vf a = pair.a(v), b = pair.b(v), m = fma(beta, a, rest * b);
      of_a[j] = of_a[j] + select(v.a_excluded(), m, divergence_term(a, m, log_over_m.a));
      of_b[j] = of_b[j] + select(v.b_excluded(), m, divergence_term(b, m, log_over_m.b));
    });
    kept.first = total_of(of_a);
    kept.second = total_of(of_b);
  }

  // value_a(vectors) where da is not null, and value_b where db is not. A vector of both rows is read before one is
  // written.
  template <class ValueA, class ValueB>
  MMK_INLINE void write(const Pair<T>& pair, T* da, ValueA value_a, T* db, ValueB value_b) const {
    const auto write_those = [&](auto of_a, auto of_b) MMK_LAMBDA {
      for_vectors(p_.classes, [&](int64_t c, int) MMK_LAMBDA {
        const Vectors v = pair.load(c);
        if constexpr (decltype(of_a)::value) store_from_float(da + c, value_a(v), p_.classes - c);
        if constexpr (decltype(of_b)::value) store_from_float(db + c, value_b(v), p_.classes - c);
      });
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (da != nullptr && db != nullptr) return write_those(yes, yes);
    if (da != nullptr) return write_those(yes, no);
    write_those(no, yes);
  }

  // Of the logits of a, a (log(a/b) − KL), and of those of b, b − a.
  void pull(const Pair<T>& pair, float kl, T* da, T* db) const {
    const vf grad = set1(p_.grad), mean = set1(kl);
    write(
        pair, da,
        [&](const Vectors& v)
            MMK_LAMBDA { return weighed(v.a_excluded(), pair.a(v) * grad, pair.log_ratio(v) - mean); },
        db, [&](const Vectors& v) MMK_LAMBDA { return weighed(v.b_excluded(), grad, pair.b(v) - pair.a(v)); });
  }

  // The same of the jsd, a being the teacher.
  void pull_mixture(const Pair<T>& pair, const DistillationRow& kept, T* dt, T* ds) const {
    const vf beta = set1(p_.beta), rest = set1(1.f - p_.beta);
    const vf grad_t = set1(p_.grad * p_.beta), grad_s = set1(p_.grad * (1.f - p_.beta));
    const vf mean_t = set1(kept.first), mean_s = set1(kept.second);
    const auto over_mixture = [&](const Vectors& v) MMK_LAMBDA { return MixtureRatios(pair.log_ratio(v), beta, rest); };
    write(
        pair, dt,
        [&](const Vectors& v)
            MMK_LAMBDA { return weighed(v.a_excluded(), pair.a(v) * grad_t, over_mixture(v).a - mean_t); },
        ds,
        [&](const Vectors& v)
            MMK_LAMBDA { return weighed(v.b_excluded(), pair.b(v) * grad_s, over_mixture(v).b - mean_s); });
  }

  const DistillationParams& p_;
};

// f(Rows<T>, row) for every row.
template <class Function>
void for_each_row(const DistillationParams& p, Function f) {
  with_element_type(p.dtype, p.student, [&](const auto* typed) {
    const Rows<std::decay_t<decltype(*typed)>> rows(p);
    for_each_claim(p.workers, p.rows, kRowsPerTask, [&](int, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) f(rows, row);
    });
  });
}

}  // namespace

void distillation_loss_forward(const DistillationParams& p) {
  const bool gradients = p.grad_student != nullptr || p.grad_teacher != nullptr;
  for_each_row(p, [&](const auto& rows, int64_t row) {
    rows.forward(row);
    if (gradients) rows.backward(row);
  });
}

void distillation_loss_backward(const DistillationParams& p) {
  for_each_row(p, [](const auto& rows, int64_t row) { rows.backward(row); });
}

}  // namespace MMK_ISA
}  // namespace mmk
