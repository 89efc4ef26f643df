//
//   P = U xᵀ,  Q = V yᵀ,  z[b, n] = Σ_{j < rank} P[n·rank + j, b] · Q[n·rank + j, b]
//
//   dP[c, b] = dz[b, c / rank] · Q[c, b],  dx = dPᵀ U,  dU = dP x,  and alike for the other side
//
// Tiling     forward: a task owns a block of rows, cut into panels with the rows in the lanes, and the projections of
//            whole outputs; products, pooling and all happen on the tile, lane by lane. kDepth features of x at a time
//            are transposed; U and V are read as they lie. Too few rows for the lanes: the features are in the lanes,
//            and rows of x and of U are multiplied as dot products.
//            backward: a task owns a tile of one gradient; dP is formed in scratch, kChunk of the summed dim at a time.
//            bfloat16 is multiplied in pairs where the instruction set has them (kPairs): depths are in units.
// Threads    no sum is shared by two tasks.
// Precision  float32; the kept projections, and dP in pairs, have the inputs' dtype, as where plain code keeps them.
// Limits     any sizes.
#include "csrc/bilinear_fusion/bilinear_fusion.h"
#include "csrc/cpu/products.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kMostLanes = 128, kProjections = 256, kDepth = 128;
constexpr int64_t kFewRowsDepth = 1024;
constexpr int64_t kTileRows = 256, kTileColumns = 256, kChunk = 128, kRowsAtOnce = 16;

const void* element(const void* data, Dtype dtype, int64_t at) {
  return static_cast<const char*>(data) + at * element_size(dtype);
}
void* element(void* data, Dtype dtype, int64_t at) { return static_cast<char*>(data) + at * element_size(dtype); }

// Elements of so many units.
template <bool kPairs>
constexpr int64_t elements(int64_t units) {
  return kPairs ? 2 * units : units;
}

// --- forward
// ----------------------------------------------------------------------------------------------------------

// Whether so many rows leave too many lanes of a panel idle.
bool are_few(int64_t rows) { return 2 * rows <= 3 * VW; }

// A block of rows [panels][lanes], and the projections of the outputs that a task owns.
struct ForwardPlan {
  bool few;
  int64_t panels, lanes, block, outputs, projections;

  explicit ForwardPlan(const BilinearParams& p) : few(are_few(p.batch)) {
    const int64_t vectors = max(1, min(kMostLanes / VW, ceil_div(p.batch, VW)));
    panels = few ? 1 : ceil_div(vectors, kFeatureVectors);
    lanes = VW * ceil_div(vectors, panels);
    block = panels * lanes;
    const int64_t most = max(1, kProjections / p.rank);
    const int64_t parts = max(ceil_div(p.outputs, most), ceil_div(p.workers.count, ceil_div(p.batch, block)));
    outputs = ceil_div(p.outputs, parts);
    projections = outputs * p.rank;
  }
};

struct ForwardTile {
  float *features, *weight;   // panels of [kDepth][lanes]; [projections][kDepth]
  float* projections[2];      // panels of [projections][lanes]
  float *pooled, *rows;       // [outputs][lanes], [lanes][outputs]
  float *x, *partial, *dots;  // few rows: [B][kFewRowsDepth], [B][projections][VW], [B][projections]
  int64_t floats;

  ForwardTile(const BilinearParams& p, const ForwardPlan& plan, Carver memory) {
    const bool converts = p.dtype != Dtype::f32;
    const int64_t lane_depth = plan.few ? 0 : kDepth;
    features = memory.take(plan.block * lane_depth);
    int64_t weight_floats = 0;
    for (const BilinearSide& side : p.sides) {
      const int64_t of_few = !side.weight.by_columns ? (converts ? kDotOthers * spread_stride(kFewRowsDepth) : 0)
                                                     : kDepth * spread_stride(plan.projections);
      weight_floats =
          max(weight_floats, plan.few ? of_few : weight_copy_floats(p.dtype, side.weight, plan.projections, kDepth));
    }
    weight = memory.take(weight_floats);
    for (float*& side : projections) side = memory.take(plan.projections * plan.block);
    pooled = memory.take(plan.outputs * plan.lanes);
    rows = memory.take(plan.lanes * spread_stride(plan.outputs));
    x = memory.take(plan.few && converts ? p.batch * spread_stride(kFewRowsDepth) : 0);
    partial = memory.take(plan.few ? p.batch * round_up(plan.projections, VW) * VW : 0);
    dots = memory.take(plan.few ? p.batch * spread_stride(plan.projections) : 0);
    floats = memory.used();
  }
};

// The projections `first` … of a block of rows, into panels of [projections][lanes].
template <bool kPairs>
void project(const BilinearParams& p, const BilinearSide& side, const ForwardPlan& plan, const ForwardTile& t,
             int64_t first_row, int64_t rows, int64_t first, int64_t projections, float* out) {
  const int64_t lanes = plan.lanes, panels = ceil_div(rows, lanes);
  if (side.width == 0) std::memset(out, 0, static_cast<size_t>(plan.projections * plan.block) * sizeof(float));
  for (int64_t k = 0; k < side.width; k += elements<kPairs>(kDepth)) {
    const int64_t width = min(elements<kPairs>(kDepth), side.width - k), depth = units<kPairs>(width);
    const WeightOperand<kPairs> weight(p.dtype, from_element(side.weight, p.dtype, first, k), projections, width,
                                       t.weight, spread_stride(kDepth));
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t row = first_row + i * lanes, some = min(lanes, rows - i * lanes);
      float* features = t.features + i * kDepth * lanes;
      if (some <= lanes - VW) std::memset(features, 0, static_cast<size_t>(depth * lanes) * sizeof(float));
      pack_lanes(kPairs, p.dtype, element(side.x, p.dtype, row * side.x_stride + k), side.x_stride, some, width,
                 features, lanes);
      weight.multiply_into({k == 0 ? Combine::store : Combine::add, out + i * plan.projections * lanes, lanes},
                           features, lanes, depth, lanes);
    }
  }
}

// As `project` for so few rows that the features are in the lanes.
template <bool kPairs>
void project_few_rows(const BilinearParams& p, const BilinearSide& side, const ForwardPlan& plan, const ForwardTile& t,
                      int64_t first, int64_t projections, float* out) {
  constexpr int64_t kMost = elements<kPairs>(kFewRowsDepth), ld = spread_stride(kFewRowsDepth);
  const int64_t ldp = round_up(plan.projections, VW), ldd = spread_stride(plan.projections);
  if (side.weight.by_columns) {
    // Its projections are in the lanes as they lie.
    for (int64_t b = 0; side.width == 0 && b < p.batch; ++b) {
      std::memset(t.dots + b * ldd, 0, static_cast<size_t>(ldd) * sizeof(float));
    }
    for (int64_t k = 0; k < side.width; k += elements<kPairs>(kDepth)) {
      const int64_t width = min(elements<kPairs>(kDepth), side.width - k);
      const Operand x =
          operand_of_rows<kPairs>(p.dtype, element(side.x, p.dtype, k), side.x_stride, p.batch, width, t.x, ld);
      const Operand weight = operand_of_columns<kPairs>(
          p.dtype, transposed(from_element(side.weight, p.dtype, first, k)), width, projections,
          p.batch <= 2 * kFeatureRows && projections % VW == 0, t.weight, spread_stride(plan.projections));
      multiply(kPairs, x.data, x.stride, 1, p.batch, weight.data, weight.stride, units<kPairs>(width), projections,
               {k == 0 ? Combine::store : Combine::add, t.dots, ldd});
    }
    pack_lanes(false, Dtype::f32, t.dots, ldd, p.batch, projections, out, plan.lanes);
    return;
  }
  std::memset(t.partial, 0, static_cast<size_t>(p.batch * ldp * VW) * sizeof(float));
  for (int64_t k = 0; k < side.width; k += kMost) {
    const int64_t width = min(kMost, side.width - k);
    const auto weight_from = [&](int64_t c) { return from_element(side.weight, p.dtype, first + c, k).data; };
    const Operand x =
        operand_of_rows<kPairs>(p.dtype, element(side.x, p.dtype, k), side.x_stride, p.batch, width, t.x, ld);
    const bool in_place = lies_in_units<kPairs>(p.dtype, weight_from(0), side.weight.stride, width);
    const int64_t step = in_place ? projections : kDotOthers;
    for (int64_t c = 0; c < projections; c += step) {
      const int64_t some = min(step, projections - c);
      const Operand weight =
          operand_of_rows<kPairs>(p.dtype, weight_from(c), side.weight.stride, some, width, t.weight, ld);
      dot_rows(kPairs, x.data, x.stride, p.batch, weight.data, weight.stride, some, units<kPairs>(width),
               t.partial + c * VW, ldp);
    }
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t c = 0; c < projections; c += VW) {
      store(t.dots + b * ldd + c, finish_dots(t.partial + b * ldp * VW, c));
    }
  }
  pack_lanes(false, Dtype::f32, t.dots, ldd, p.batch, projections, out, plan.lanes);
}

template <bool kPairs>
void forward_task(const BilinearParams& p, const ForwardPlan& plan, const ForwardTile& t, int64_t first_row,
                  int64_t first_output) {
  const int64_t rows = min(plan.block, p.batch - first_row), outputs = min(plan.outputs, p.outputs - first_output);
  const int64_t first = first_output * p.rank, projections = outputs * p.rank, lanes = plan.lanes;
  for (int s = 0; s < 2; ++s) {
    if (plan.few) {
      project_few_rows<kPairs>(p, p.sides[s], plan, t, first, projections, t.projections[s]);
    } else {
      project<kPairs>(p, p.sides[s], plan, t, first_row, rows, first, projections, t.projections[s]);
    }
  }
  for (int64_t i = 0; i < ceil_div(rows, lanes); ++i) {
    const int64_t at = i * plan.projections * lanes, row = first_row + i * lanes, some = min(lanes, rows - i * lanes);
    for (int64_t n = 0; n < outputs; ++n) {
      for (int64_t b = 0; b < lanes; b += VW) {
        vf z = zero();
        for (int64_t c = n * p.rank; c < (n + 1) * p.rank; ++c) {
          z = fma(load(t.projections[0] + at + c * lanes + b), load(t.projections[1] + at + c * lanes + b), z);
        }
        store(t.pooled + n * lanes + b, z);
      }
    }
    const int64_t stride = spread_stride(plan.outputs);
    pack_lanes(false, Dtype::f32, t.pooled, lanes, outputs, lanes, t.rows, stride);
    write_rows(t.rows, stride, some, outputs, p.dtype, element(p.out, p.dtype, row * p.outputs + first_output),
               p.outputs);
    for (int s = 0; s < 2; ++s) {
      if (p.sides[s].projection == nullptr) continue;
      write_rows(t.projections[s] + at, lanes, projections, some, p.dtype,
                 element(p.sides[s].projection, p.dtype, first * p.batch + row), p.batch);
    }
  }
}

// --- backward
// ---------------------------------------------------------------------------------------------------------

bool any_by_columns(const BilinearParams& p) { return p.sides[0].weight.by_columns || p.sides[1].weight.by_columns; }

struct BackwardTile {
  // In units, kChunk of the summed dim: [kChunk][kTileRows] or the reverse, [kChunk][kTileColumns]; the tile.
  float *grad_projection, *operand, *sums, *turned;  // for a weight by columns, dP with projections in the lanes
  int64_t floats;

  BackwardTile(const BilinearParams& p, Carver memory)
      : grad_projection(memory.take(spread_stride(kTileRows) * spread_stride(kChunk))),
        operand(memory.take(kChunk * spread_stride(kTileColumns))),
        sums(memory.take(spread_stride(kTileRows) * spread_stride(kTileColumns))),
        turned(memory.take(any_by_columns(p) ? kChunk * spread_stride(kTileRows) : 0)),
        floats(memory.used()) {}
};

// dP of `projections` × `rows`, [projections][rows]: dz of the output times the other side's projection. For pairs,
// a unit is of two projections or, along rows, of two rows.
template <bool kPairs, bool kAlongRows>
void form_grad_projection(const BilinearParams& p, const void* other, const float* grad_out, int64_t ldg, int64_t first,
                          int64_t projections, int64_t first_row, int64_t rows, float* out, int64_t ldo) {
  constexpr int64_t kTogether = kPairs && !kAlongRows ? 2 : 1;
  with_element_type(p.dtype, other, [&](const auto* q) {
    for (int64_t c = 0; c < projections; c += kTogether) {
      const auto row_of = [&](int64_t i) {
        const float* g = grad_out + i / p.rank * ldg + first_row;
        const auto* row = q + i * p.batch + first_row;
        return [=](int64_t b) { return b < rows ? load(g + b) * load_as_float(row + b, rows - b) : zero(); };
      };
      const auto at = row_of(first + c);
      float* to = out + c / kTogether * ldo;
      if constexpr (!kPairs) {
        for (int64_t b = 0; b < rows; b += VW) store(to + b, at(b));
      } else if constexpr (kAlongRows) {
        for (int64_t b = 0; b < rows; b += 2 * VW) store(to + b / 2, to_bf16(at(b), at(b + VW)));
      } else if (c + 1 < projections) {
        const auto next = row_of(first + c + 1);
        for (int64_t b = 0; b < rows; b += VW) store(to + b, pair(at(b), next(b)));
      } else {
        for (int64_t b = 0; b < rows; b += VW) store(to + b, pair(at(b), zero()));
      }
    }
  });
}

// to = Σ_b weights[b] · x[b] of whole vectors; past the caches, or not.
template <bool kStream>
void weigh_rows(const float* weights, const float* x, int64_t stride, int64_t rows, int64_t width, float* to) {
  for_runs<4>(width / VW, [&](auto vectors, int64_t v) {
    constexpr int kVectors = static_cast<int>(vectors);
    vf acc[1][kVectors];
    clear(acc);
    accumulate<false>(acc, weights, Constant<0>{}, Constant<1>{}, x + v * VW, stride, rows);
    MMK_UNROLL for (int j = 0; j < kVectors; ++j) {
      float* const at = to + (v + j) * VW;
      if constexpr (kStream) {
        stream(at, acc[0][j]);
      } else {
        store(at, acc[0][j]);
      }
    }
  });
}

template <bool kPairs>
void backward_side(const BilinearParams& p, const BilinearSide& side, const void* other, const float* grad_out,
                   int64_t ldg, float* memory, int64_t floats) {
  const int64_t all = p.outputs * p.rank, column_tiles = ceil_div(side.width, kTileColumns);
  constexpr int64_t ldo = spread_stride(kTileColumns), kMost = elements<kPairs>(kChunk);
  constexpr int64_t ldr = spread_stride(kTileRows), ldc = spread_stride(kChunk);  // dP's, by projections and by rows
  // A copy pays when it is read again, and columns come in whole vectors only from a copy.
  const auto is_in_place = [&](int64_t rows) { return rows <= 2 * kFeatureRows && side.width % VW == 0; };
  // Of a few rows of float32 the weight's gradient is more to write than to compute: whole rows, where they belong.
  const bool writes_rows = !kPairs && p.dtype == Dtype::f32 && !side.weight.by_columns && is_in_place(p.batch);
  if (side.grad_x != nullptr) {
    for_each_claim(p.workers, ceil_div(p.batch, kTileRows) * column_tiles, 1, [&](int worker, int64_t t, int64_t end) {
      const BackwardTile tile(p, Carver(memory + worker * floats));
      for (; t < end; ++t) {
        const int64_t row = t / column_tiles * kTileRows, column = t % column_tiles * kTileColumns;
        const int64_t rows = min(kTileRows, p.batch - row), columns = min(kTileColumns, side.width - column);
        for (int64_t c = 0; c < all; c += kMost) {
          const int64_t some = min(kMost, all - c);
          form_grad_projection<kPairs, false>(p, other, grad_out, ldg, c, some, row, rows, tile.grad_projection, ldr);
          const Operand weight = operand_of_columns<kPairs>(p.dtype, from_element(side.weight, p.dtype, c, column),
                                                            some, columns, is_in_place(rows), tile.operand, ldo);
          // Of a weight that is read where it lies, a few rows at a time: long lines of memory.
          const int64_t depth = units<kPairs>(some), run = is_in_place(rows) ? kRowsAtOnce : depth;
          for (int64_t k = 0; k < depth; k += run) {
            multiply(kPairs, tile.grad_projection + k * ldr, 1, ldr, rows, weight.data + k * weight.stride,
                     weight.stride, min(run, depth - k), columns,
                     {c + k == 0 ? Combine::store : Combine::add, tile.sums, ldo});
          }
        }
        write_rows(tile.sums, ldo, rows, columns, p.dtype, element(side.grad_x, p.dtype, row * side.width + column),
                   side.width);
      }
    });
  }
  if (side.grad_weight == nullptr) return;
  if (writes_rows) {
    for_each_claim(p.workers, ceil_div(all, kTileRows), 1, [&](int worker, int64_t t, int64_t end) {
      const BackwardTile tile(p, Carver(memory + worker * floats));
      for (; t < end; ++t) {
        const int64_t c = t * kTileRows, rows = min(kTileRows, all - c);
        form_grad_projection<false, true>(p, other, grad_out, ldg, c, rows, 0, p.batch, tile.grad_projection, ldc);
        for (int64_t i = 0; i < rows; ++i) {
          with_bool(side.stream, [&](auto stream) {
            weigh_rows<stream>(tile.grad_projection + i * ldc, static_cast<const float*>(side.x), side.x_stride,
                               p.batch, side.width, static_cast<float*>(side.grad_weight) + (c + i) * side.width);
          });
        }
      }
      if (side.stream) stream_fence();
    });
    return;
  }
  for_each_claim(p.workers, ceil_div(all, kTileRows) * column_tiles, 1, [&](int worker, int64_t t, int64_t end) {
    const BackwardTile tile(p, Carver(memory + worker * floats));
    for (; t < end; ++t) {
      const int64_t c = t / column_tiles * kTileRows, column = t % column_tiles * kTileColumns;
      const int64_t rows = min(kTileRows, all - c), columns = min(kTileColumns, side.width - column);
      for (int64_t b = 0; b < p.batch; b += kMost) {
        const int64_t some = min(kMost, p.batch - b);
        form_grad_projection<kPairs, true>(p, other, grad_out, ldg, c, rows, b, some, tile.grad_projection, ldc);
        const Operand x =
            operand_of_columns<kPairs>(p.dtype, element(side.x, p.dtype, b * side.x_stride + column), side.x_stride,
                                       some, columns, is_in_place(rows), tile.operand, ldo);
        const Combine how = b == 0 ? Combine::store : Combine::add;
        if (side.weight.by_columns) {
          pack_lanes(false, Dtype::f32, tile.grad_projection, ldc, rows, units<kPairs>(some), tile.turned, ldr);
          multiply(kPairs, x.data, 1, x.stride, columns, tile.turned, ldr, units<kPairs>(some), rows,
                   {how, tile.sums, ldr});
        } else {
          multiply(kPairs, tile.grad_projection, ldc, 1, rows, x.data, x.stride, units<kPairs>(some), columns,
                   {how, tile.sums, ldo});
        }
      }
      if (side.weight.by_columns) {
        write_rows(tile.sums, ldr, columns, rows, p.dtype, element(side.grad_weight, p.dtype, column * all + c), all);
        continue;
      }
      write_rows(tile.sums, ldo, rows, columns, p.dtype, element(side.grad_weight, p.dtype, c * side.width + column),
                 side.width);
    }
  });
}

}  // namespace

void bilinear_forward(const BilinearParams& p) {
  const ForwardPlan plan(p);
  const int64_t parts = ceil_div(p.outputs, plan.outputs);
  const int64_t floats = ForwardTile(p, plan, Carver(nullptr)).floats;
  const Scratch memory(floats * p.workers.count);
  for_each_claim(p.workers, ceil_div(p.batch, plan.block) * parts, 1, [&](int worker, int64_t begin, int64_t end) {
    const ForwardTile tile(p, plan, Carver(memory.data() + worker * floats));
    with_pairs(p.dtype, [&](auto pairs) {
      for (int64_t task = begin; task < end; ++task) {
        forward_task<pairs>(p, plan, tile, task / parts * plan.block, task % parts * plan.outputs);
      }
    });
  });
}

void bilinear_backward(const BilinearParams& p) {
  const int64_t ldg = spread_stride(p.batch), floats = BackwardTile(p, Carver(nullptr)).floats;
  const Scratch grad_out(p.outputs * ldg), memory(floats * p.workers.count);  // dzᵀ, [N][B]
  pack_lanes(false, p.dtype, p.grad_out, p.grad_out_stride, p.batch, p.outputs, grad_out.data(), ldg);
  with_pairs(p.dtype, [&](auto pairs) {
    for (int s = 0; s < 2; ++s) {
      backward_side<pairs>(p, p.sides[s], p.sides[1 - s].projection, grad_out.data(), ldg, memory.data(), floats);
    }
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
