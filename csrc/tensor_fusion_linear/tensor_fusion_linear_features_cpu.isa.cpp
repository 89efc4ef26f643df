//
//   dA[b, k] = Σ_n dy[b, n] · W[n, k],  and from it dx_i[b, j] = Σ_{k with index j in i} dA[b, k] · Π_{m≠i} [1; x_m][b]
//
// Tiling     a task owns a block of rows, cut into panels of a few vectors with the rows in the lanes. kDepth entries
//            of W at a time are copied to scratch, dA of a panel is formed for them and contracted at once, lane by
//            lane: with the last modality as it comes, with each slower one whenever a run of the faster ones is
//            complete. Fewer rows than lanes: the entries are in the lanes instead, and rows are contracted one by one.
//            bfloat16 is multiplied in pairs of outputs where the instruction set has them.
// Threads    a task writes the gradients of its own rows; what a lane sums does not depend on the block.
// Precision  float32.
// Limits     as the forward.
#include "csrc/tensor_fusion_linear/panel.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kDepth = 128, kFewRowsDepth = 512;

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

struct FewRowsTile {
  Factors x, gradients;
  Position at;
  float *grad_out, *weight, *grad, *up;  // rows of units of N, [units of N][kFewRowsDepth], rows of kFewRowsDepth, of M
  int64_t floats;

  FewRowsTile(const TensorFusionParams& p, Carver memory)
      : x(p, memory, p.batch),
        gradients(p, memory, p.batch),
        at(p, memory),
        grad_out(memory.take(p.batch * spread_stride(p.outputs))),
        weight(memory.take(p.outputs * spread_stride(kFewRowsDepth))),
        grad(memory.take(p.batch * spread_stride(kFewRowsDepth))),
        up(memory.take(p.batch * p.count)),
        floats(memory.used()) {}
};

// dx is one sum over all entries: one task.
template <bool kPairs>
void grad_features_few_rows(const TensorFusionParams& p) {
  const Scratch memory(FewRowsTile(p, Carver(nullptr)).floats);
  FewRowsTile t(p, Carver(memory.data()));
  t.x.fill(0, p.batch);
  t.gradients.clear(p.batch);
  std::memset(t.up, 0, static_cast<size_t>(p.batch * p.count) * sizeof(float));
  const Operand grad_out = operand_of_rows<kPairs>(p.dtype, p.grad_out, p.grad_out_stride, p.batch, p.outputs,
                                                   t.grad_out, spread_stride(p.outputs));
  constexpr int64_t ld = spread_stride(kFewRowsDepth);
  for (int64_t k = 0; k < p.features; k += kFewRowsDepth) {
    const int64_t count = min(kFewRowsDepth, p.features - k);
    const Operand weight = operand_of_columns<kPairs>(p.dtype, from_element(p.weight, p.dtype, 0, k), p.outputs, count,
                                                      count % VW == 0, t.weight, ld);
    multiply(kPairs, grad_out.data, grad_out.stride, 1, p.batch, weight.data, weight.stride, units<kPairs>(p.outputs),
             count, {Combine::store, t.grad, ld});
    t.at.start_at(k);
    for (int64_t b = 0; b < p.batch; ++b) {
      contract_row(t.x, t.gradients, b, t.at, count, t.grad + b * ld, t.up + b * p.count);
    }
  }
  for (int64_t i = 0; i < p.count; ++i) {
    const FusedModality& m = p.modalities[i];
    for (int64_t b = 0; m.grad != nullptr && b < p.batch; ++b) {
      write_rows(t.gradients.of(b, i) + 1, 0, 1, m.width, p.dtype,
                 static_cast<char*>(m.grad) + b * m.width * element_size(p.dtype), m.width);
    }
  }
}

}  // namespace

void tensor_fusion_grad_features(const TensorFusionParams& p) {
  if (are_few(p.batch)) return with_pairs(p.dtype, [&](auto pairs) { grad_features_few_rows<pairs>(p); });
  const PanelPlan plan(p, p.workers.count);
  const int64_t panels = plan.panels, lanes = plan.lanes, block = plan.block, ldw = spread_stride(kDepth);
  int64_t widest = 0;
  for (int64_t i = 0; i < p.count; ++i) widest = max(widest, p.modalities[i].width);

  struct Pieces {
    Carver memory;
    Position at;
    float *weight, *grad, *rows;  // [units of N][kDepth], [kDepth][lanes], [lanes][widest]
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
        s.at.start_at(k);
        with_pairs(p.dtype, [&](auto pairs) {
          operand_of_columns<pairs>(p.dtype, from_element(p.weight, p.dtype, 0, k), p.outputs, count, false, s.weight,
                                    ldw);
          for (int64_t i = 0; i < panels && rows_of(i) > 0; ++i) {
            const Panel t = panel(i);
            multiply(pairs, s.weight, 1, ldw, count, t.grad_out(), lanes, units<pairs>(p.outputs), lanes,
                     {Combine::store, s.grad, lanes});
            with_constant<kFeatureVectors>(
                plan.vectors, [&](auto width) { contract<static_cast<int>(width)>(t, s.at, count, s.grad); });
          }
        });
      }
      for (int64_t i = 0; i < panels && rows_of(i) > 0; ++i) {
        panel(i).write_gradients(task * block + i * lanes, rows_of(i), s.rows);
      }
    }
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
