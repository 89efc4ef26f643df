//
//   dA[b, k] = Σ_n dy[b, n] · W[n, k],  and from it dx_i[b, j] = Σ_{k with index j in i} dA[b, k] · Π_{m≠i} [1; x_m][b]
//
// Tiling     a task owns a block of rows, cut into panels of a few vectors with the rows in the lanes. kDepth entries
// of
//            W at a time are copied to scratch, dA of a panel is formed for them and contracted at once, lane by lane:
//            with the last modality as it comes, with each slower one whenever a run of the faster ones is complete.
// Threads    a task writes the gradients of its own rows; what a lane sums does not depend on the block.
// Precision  float32.
// Limits     as the forward.
#include "csrc/tensor_fusion_linear/panel.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kDepth = 128;

// The gradient of the prefix of modality i is complete: it goes into the factor before and that one's prefix.
void pass_up(const Panel& t, const Position& at, int64_t i, int64_t lanes) {
  float *complete = t.prefix_gradient(i), *gradient = t.gradient(i - 1, at[i - 1]), *up = t.prefix_gradient(i - 1);
  const float *factor = t.factor(i - 1, at[i - 1]), *prefix = t.prefix(i - 1);
  for (int64_t b = 0; b < lanes; b += VW) {
    const vf g = load(complete + b);
    store(gradient + b, fma(g, load(prefix + b), load(gradient + b)));
    store(up + b, fma(g, load(factor + b), load(up + b)));
    store(complete + b, zero());
  }
}

// `count` entries of dA, [count][NR·VW], from where `at` started.
template <int NR>
MMK_NOINLINE void contract(const Panel& t, Position& at, int64_t count, const float* grad) {
  constexpr int64_t kLanes = NR * VW;
  const int64_t last = at.last(), size = at.size(last);
  at.rewind();
  form_prefixes(t, at, 1, kLanes);
  for (int64_t done = 0; done < count;) {
    const int64_t j = at[last], run = min(size - j, count - done);
    const float* factor = t.factor(last, j);
    float *gradient = t.gradient(last, j), *up = t.prefix_gradient(last);
    vf prefix[NR], total[NR];
    MMK_UNROLL for (int v = 0; v < NR; ++v) {
      prefix[v] = load(t.prefix(last) + v * VW);
      total[v] = load(up + v * VW);
    }
    for (const float* end = grad + run * kLanes; grad < end; grad += kLanes, factor += kLanes, gradient += kLanes) {
      MMK_UNROLL for (int v = 0; v < NR; ++v) {
        const vf g = load(grad + v * VW);
        total[v] = fma(g, load(factor + v * VW), total[v]);
        store(gradient + v * VW, fma(g, prefix[v], load(gradient + v * VW)));
      }
    }
    MMK_UNROLL for (int v = 0; v < NR; ++v) store(up + v * VW, total[v]);
    done += run;
    if (j + run == size) {
      int64_t i = last;
      for (; i > 0; --i) {
        pass_up(t, at, i, kLanes);
        if (at[i - 1] + 1 < at.size(i - 1)) break;
      }
      if (i == 0) return;  // that was the last entry of all
    }
    form_prefixes(t, at, at.advance(run) + 1, kLanes);
  }
}

}  // namespace

void tensor_fusion_grad_features(const TensorFusionParams& p) {
  const PanelPlan plan(p, p.workers.count);
  const int64_t panels = plan.panels, lanes = plan.lanes, block = plan.block, ldw = spread_stride(kDepth);
  int64_t widest = 0;
  for (int64_t i = 0; i < p.count; ++i) widest = max(widest, p.modalities[i].width);

  struct Pieces {
    Carver memory;
    Position at;
    float *weight, *grad, *rows;  // [N][kDepth], [kDepth][lanes], [lanes][widest]
  };
  const auto carve = [&](float* base) {
    Carver memory(base);
    Position at(p, memory);
    float* weight = memory.take(p.outputs * ldw);
    float* grad = memory.take(kDepth * lanes);
    float* rows = memory.take(lanes * spread_stride(widest));
    return Pieces{memory, at, weight, grad, rows};
  };
  const auto panel_floats = [&] {
    Carver counter(nullptr);
    Panel(p, counter, lanes, true);
    return counter.used();
  }();
  const int64_t floats = carve(nullptr).memory.used() + panels * panel_floats;
  const Scratch memory(floats * p.workers.count);
  for_each_claim(p.workers, ceil_div(p.batch, block), 1, [&](int worker, int64_t begin, int64_t end) {
    Pieces s = carve(memory.data() + worker * floats);
    float* base = memory.data() + worker * floats + s.memory.used();
    const auto panel = [&](int64_t i) {
      Carver carver(base + i * panel_floats);
      return Panel(p, carver, lanes, true);
    };
    for (int64_t task = begin; task < end; ++task) {
      const auto rows_of = [&](int64_t i) { return min(lanes, p.batch - task * block - i * lanes); };
      for (int64_t i = 0; i < panels && rows_of(i) > 0; ++i) panel(i).fill(task * block + i * lanes, rows_of(i));
      for (int64_t k = 0; k < p.features; k += kDepth) {
        const int64_t count = min(kDepth, p.features - k);
        copy_rows(p.dtype, static_cast<const char*>(p.weight) + k * element_size(p.dtype), p.weight_stride, p.outputs,
                  count, s.weight, ldw);
        s.at.start_at(k);
        for (int64_t i = 0; i < panels && rows_of(i) > 0; ++i) {
          const Panel t = panel(i);
          multiply(s.weight, Constant<1>{}, ldw, count, t.grad_out(), lanes, p.outputs, lanes,
                   {Combine::store, s.grad, lanes});
          with_constant<kFeatureVectors>(
              plan.vectors, [&](auto width) { contract<static_cast<int>(width)>(t, s.at, count, s.grad); });
        }
      }
      for (int64_t i = 0; i < panels && rows_of(i) > 0; ++i) {
        panel(i).write_gradients(task * block + i * lanes, rows_of(i), s.rows);
      }
    }
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
