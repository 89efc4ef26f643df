//
//   y[b, n] = Σ_k W[n, k] · A[b, k] + bias[n],  A[b] = vec(⊗_i [1; x_i[b]])      dW[n, k] = Σ_b dy[b, n] · A[b, k]
//
// Tiling     forward: a task owns a block of rows, cut into panels of a few vectors with the rows in the lanes, and a
//            block of outputs. kDepth entries of a panel's A at a time are formed in the first cache and multiplied by
//            W's rows as they lie, one element at a time. Fewer rows than lanes: the entries are in the lanes instead,
//            and rows of A and of W are multiplied as dot products.
//            dW: a task owns kColumns entries of all outputs, and forms them for kBatch rows at a time.
//            bfloat16 is multiplied in pairs where the instruction set has them (kPairs): a piece of A is paired where
//            it was formed.
// Threads    no sum is shared by two tasks.
// Precision  float32; the forward's sums run over kDepth entries at a time. As pairs, A is rounded to bfloat16.
// Limits     any number of modalities, any widths; A itself is never held.
#include "csrc/tensor_fusion_linear/panel.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kDepth = 256;          // entries of A formed at a time
constexpr int64_t kFewRowsDepth = 1024;  // bound by reading W: longer runs of each of its rows
constexpr int64_t kBatch = 256, kColumns = 128;

void* element(void* data, Dtype dtype, int64_t at) { return static_cast<char*>(data) + at * element_size(dtype); }

// --- few rows
// ----------------------------------------------------------------------------------------------------------

struct FewRowsTile {
  Factors x;
  Position at;
  float *expanded, *weight, *partial;  // [B][kFewRowsDepth], [kDotOthers][kFewRowsDepth], [B][outputs][VW]

  FewRowsTile(const TensorFusionParams& p, Carver memory, int64_t outputs)
      : x(p, memory, p.batch),
        at(p, memory),
        expanded(memory.take(p.batch * spread_stride(kFewRowsDepth + VW))),
        weight(memory.take(p.weight.by_columns     ? kDepth * spread_stride(outputs)
                           : p.dtype == Dtype::f32 ? 0
                                                   : kDotOthers * spread_stride(kFewRowsDepth))),
        partial(memory.take(p.batch * outputs * VW)),
        floats(memory.used()) {}
  int64_t floats;
};

template <bool kPairs>
void few_rows_task(const TensorFusionParams& p, FewRowsTile& t, int64_t first_output, int64_t outputs) {
  constexpr int64_t kCopied = kPairs ? 2 * kDepth : kDepth;  // columns of W that are copied at once
  constexpr int64_t ldw = spread_stride(kFewRowsDepth);
  const int64_t rows = p.batch, lda = spread_stride(kFewRowsDepth + VW), ldp = round_up(outputs, VW);
  t.x.fill(0, rows);
  std::memset(t.partial, 0, static_cast<size_t>(rows * ldp * VW) * sizeof(float));
  for (int64_t k = 0; k < p.features; k += kFewRowsDepth) {
    const int64_t count = min(kFewRowsDepth, p.features - k);
    t.at.start_at(k);
    for (int64_t b = 0; b < rows; ++b) expand_row(t.x, b, t.at, count, t.expanded + b * lda);
    if constexpr (kPairs) pair_columns_in_place(t.expanded, lda, rows, count);
    if (p.weight.by_columns) {  // its outputs are in the lanes as they lie
      for (int64_t j = 0; j < count; j += kCopied) {
        const int64_t width = min(kCopied, count - j);
        const Operand weight = operand_of_columns<kPairs>(
            p.dtype, transposed(from_element(p.weight, p.dtype, first_output, k + j)), width, outputs,
            rows <= 2 * kFeatureRows && outputs % VW == 0, t.weight, spread_stride(outputs));
        multiply(kPairs, t.expanded + units<kPairs>(j), lda, Constant<1>{}, rows, weight.data, weight.stride,
                 units<kPairs>(width), outputs, {Combine::add, t.partial, ldp});
      }
      continue;
    }
    const auto weight_from = [&](int64_t n) { return from_element(p.weight, p.dtype, first_output + n, k).data; };
    const bool in_place = lies_in_units<kPairs>(p.dtype, weight_from(0), p.weight.stride, count);
    const int64_t step = in_place ? outputs : kDotOthers;
    for (int64_t n = 0; n < outputs; n += step) {
      const int64_t some = min(step, outputs - n);
      const Operand weight =
          operand_of_rows<kPairs>(p.dtype, weight_from(n), p.weight.stride, some, count, t.weight, ldw);
      dot_rows(kPairs, t.expanded, lda, rows, weight.data, weight.stride, some, units<kPairs>(count),
               t.partial + n * VW, ldp);
    }
  }
  with_element_type(p.dtype, p.out, [&](auto* out) {
    const auto* bias = static_cast<decltype(out)>(const_cast<void*>(p.bias));
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t n = 0; n < outputs; n += VW) {
        const int64_t at = first_output + n, some = outputs - n;
        vf y = p.weight.by_columns ? load(t.partial + b * ldp + n) : finish_dots(t.partial + b * ldp * VW, n);
        if (bias != nullptr) y = y + load_as_float(bias + at, some);
        store_from_float(out + b * p.outputs + at, y, some);
      }
    }
  });
}

void forward_few_rows(const TensorFusionParams& p) {
  const int64_t outputs = round_up(ceil_div(p.outputs, p.workers.count), VW);
  const int64_t floats = FewRowsTile(p, Carver(nullptr), outputs).floats;
  const Scratch memory(floats * p.workers.count);
  for_each_claim(p.workers, ceil_div(p.outputs, outputs), 1, [&](int worker, int64_t begin, int64_t end) {
    FewRowsTile tile(p, Carver(memory.data() + worker * floats), outputs);
    with_pairs(p.dtype, [&](auto pairs) {
      for (int64_t task = begin; task < end; ++task) {
        few_rows_task<pairs>(p, tile, task * outputs, min(outputs, p.outputs - task * outputs));
      }
    });
  });
}

// --- rows in the lanes
// --------------------------------------------------------------------------------------------------

struct ForwardTile {
  Position at;
  float *weight, *expanded, *rows,
      *sums;  // [outputs][kDepth], [kDepth][lanes], [lanes][outputs], panels of [outputs][lanes]
  int64_t floats, panel_floats;
  float* panels;

  ForwardTile(const TensorFusionParams& p, Carver memory, const PanelPlan& plan, int64_t outputs)
      : at(p, memory),
        weight(memory.take(weight_copy_floats(p.dtype, p.weight, outputs, kDepth))),
        expanded(memory.take(kDepth * plan.lanes)),
        rows(memory.take(plan.lanes * spread_stride(outputs))),
        sums(memory.take(plan.panels * outputs * plan.lanes)) {
    Carver counter(nullptr);
    Panel(p, counter, plan.lanes, false);
    panel_floats = counter.used();
    panels = memory.take(plan.panels * panel_floats);
    floats = memory.used();
  }
  Panel panel(const TensorFusionParams& p, const PanelPlan& plan, int64_t i) const {
    Carver memory(panels + i * panel_floats);
    return Panel(p, memory, plan.lanes, false);
  }
};

// `count` entries of a panel's A, [count][NR·VW], from where `at` started.
template <int NR>
MMK_NOINLINE void expand_panel(const Panel& t, Position& at, int64_t count, float* out) {
  constexpr int64_t kLanes = NR * VW;
  const int64_t last = at.last(), size = at.size(last);
  at.rewind();
  form_prefixes(t, at, 1, kLanes);
  for (int64_t done = 0;;) {
    const int64_t j = at[last], run = min(size - j, count - done);
    const float* factor = t.factor(last, j);
    vf prefix[NR];
    MMK_UNROLL for (int v = 0; v < NR; ++v) prefix[v] = load(t.prefix(last) + v * VW);
    for (const float* end = out + run * kLanes; out < end; out += kLanes, factor += kLanes) {
      MMK_UNROLL for (int v = 0; v < NR; ++v) store(out + v * VW, prefix[v] * load(factor + v * VW));
    }
    done += run;
    if (done == count) return;
    form_prefixes(t, at, at.advance(run) + 1, kLanes);
  }
}

template <bool kPairs>
void forward_task(const TensorFusionParams& p, ForwardTile& t, const PanelPlan& plan, int64_t first_row,
                  int64_t first_output, int64_t outputs) {
  const int64_t lanes = plan.lanes, rows = min(plan.block, p.batch - first_row), panels = ceil_div(rows, lanes);
  const auto sums_of = [&](int64_t i) { return t.sums + i * outputs * lanes; };
  for (int64_t i = 0; i < panels; ++i) {
    t.panel(p, plan, i).fill(first_row + i * lanes, min(lanes, rows - i * lanes));
  }
  for (int64_t k = 0; k < p.features; k += kDepth) {
    const int64_t count = min(kDepth, p.features - k);
    const WeightOperand<kPairs> weight(p.dtype, from_element(p.weight, p.dtype, first_output, k), outputs, count,
                                       t.weight, spread_stride(kDepth));
    t.at.start_at(k);
    for (int64_t i = 0; i < panels; ++i) {
      with_constant<kFeatureVectors>(plan.vectors, [&](auto width) {
        expand_panel<static_cast<int>(width)>(t.panel(p, plan, i), t.at, count, t.expanded);
      });
      if constexpr (kPairs) pair_rows_in_place(t.expanded, lanes, count, lanes);
      weight.multiply_into({k == 0 ? Combine::store : Combine::add, sums_of(i), lanes}, t.expanded, lanes,
                           units<kPairs>(count), lanes);
    }
  }
  const int64_t stride = spread_stride(outputs);
  with_element_type(p.dtype, p.out, [&](auto* out) {
    const auto* bias = static_cast<decltype(out)>(const_cast<void*>(p.bias));
    for (int64_t i = 0; i < panels; ++i) {
      pack_lanes(false, Dtype::f32, sums_of(i), lanes, outputs, lanes, t.rows, stride);
      for (int64_t b = i * lanes; b < min(rows, (i + 1) * lanes); ++b) {
        for (int64_t n = 0; n < outputs; n += VW) {
          vf y = load(t.rows + (b - i * lanes) * stride + n);
          if (bias != nullptr) y = y + load_as_float(bias + first_output + n, outputs - n);
          store_from_float(out + (first_row + b) * p.outputs + first_output + n, y, outputs - n);
        }
      }
    }
  });
}

// --- the weight's gradient
// ----------------------------------------------------------------------------------------------

struct WeightGradientTile {
  Factors x;
  Position at;
  float *expanded, *sums;  // [kBatch][kColumns], [outputs][kColumns]
  int64_t floats;

  WeightGradientTile(const TensorFusionParams& p, Carver memory)
      : x(p, memory, min(p.batch, kBatch)),
        at(p, memory),
        expanded(memory.take(min(p.batch, kBatch) * spread_stride(kColumns + VW))),
        sums(memory.take(p.outputs * spread_stride(kColumns))),
        floats(memory.used()) {}
};

}  // namespace

void tensor_fusion_forward(const TensorFusionParams& p) {
  if (are_few(p.batch)) return forward_few_rows(p);
  const PanelPlan plan(p, 1);
  const int64_t row_blocks = ceil_div(p.batch, plan.block);
  // Fewer outputs a task where there are fewer rows than workers could use; no sum depends on it.
  const int64_t outputs = round_up(ceil_div(p.outputs, ceil_div(p.workers.count, row_blocks)), kFeatureRows);
  const int64_t blocks = ceil_div(p.outputs, outputs);
  const int64_t floats = ForwardTile(p, Carver(nullptr), plan, outputs).floats;
  const Scratch memory(floats * p.workers.count);
  for_each_claim(p.workers, row_blocks * blocks, 1, [&](int worker, int64_t begin, int64_t end) {
    ForwardTile tile(p, Carver(memory.data() + worker * floats), plan, outputs);
    with_pairs(p.dtype, [&](auto pairs) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks * plan.block, n = task % blocks * outputs;
        forward_task<pairs>(p, tile, plan, b, n, min(outputs, p.outputs - n));
      }
    });
  });
}

void tensor_fusion_grad_weight(const TensorFusionParams& p) {
  const int64_t ldy = spread_stride(p.outputs);
  const Scratch grad_out(p.batch * ldy);
  pack_rows_as_float(p.dtype, p.grad_out, p.grad_out_stride, p.batch, p.outputs, grad_out.data(), ldy);
  if (p.grad_bias != nullptr) sum_columns(grad_out.data(), ldy, p.batch, p.outputs, p.dtype, p.grad_bias);
  if (p.grad_weight == nullptr) return;

  const int64_t lda = spread_stride(kColumns + VW), lds = spread_stride(kColumns);
  const int64_t floats = WeightGradientTile(p, Carver(nullptr)).floats;
  const Scratch memory(floats * p.workers.count);
  with_pairs(p.dtype, [&](auto pairs) {
    if constexpr (pairs) pair_rows_in_place(grad_out.data(), ldy, p.batch, p.outputs);
    for_each_claim(p.workers, ceil_div(p.features, kColumns), 4, [&](int worker, int64_t begin, int64_t end) {
      WeightGradientTile t(p, Carver(memory.data() + worker * floats));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task * kColumns, count = min(kColumns, p.features - k);
        t.at.start_at(k);
        for (int64_t b = 0; b < p.batch; b += kBatch) {
          const int64_t rows = min(kBatch, p.batch - b);
          if (task == begin || p.batch > kBatch) t.x.fill(b, rows);
          for (int64_t i = 0; i < rows; ++i) expand_row(t.x, i, t.at, count, t.expanded + i * lda);
          if constexpr (pairs) pair_rows_in_place(t.expanded, lda, rows, count);
          multiply(pairs, grad_out.data() + units<pairs>(b) * ldy, 1, ldy, p.outputs, t.expanded, lda,
                   units<pairs>(rows), count, {b == 0 ? Combine::store : Combine::add, t.sums, lds});
        }
        if (p.weight.by_columns) {
          write_transposed(t.sums, lds, p.outputs, count, p.dtype, element(p.grad_weight, p.dtype, k * p.outputs),
                           p.outputs);
          continue;
        }
        write_rows(t.sums, lds, p.outputs, count, p.dtype, element(p.grad_weight, p.dtype, k), p.features);
      }
    });
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
