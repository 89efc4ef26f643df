//
//   P_i[r] = [1; x_i] F_i[r],  y = Σ_r w[r] · Π_i P_i[r] + bias
//
//   dP_i[r] = w[r] · dy ∘ Π_{j≠i} P_j[r],  dx_i = Σ_r dP_i[r] F_i[r]ᵀ,  dF_i[r] = [1; x_i]ᵀ dP_i[r],
//   dw[r] = Σ dy ∘ Π_i P_i[r],  dbias = Σ_b dy
//
// Tiling     forward: a task owns kRows rows × kOutputs outputs; a rank after the other, the product over the
//            modalities is taken on the register tile and added to y, which stay in the second cache.
//            backward: a task owns a rank, and walks over blocks of rows; P is formed again, dF stays in scratch.
//            few rows: factors are read as they lie, which for one of P and dx takes dot products with their rows.
//            bfloat16 is multiplied in pairs where the instruction set has them (kPairs): depths are in units.
// Threads    ranks are added to dx in their order, whichever worker has them; no other sum is shared by two tasks.
// Precision  float32; as pairs, dP is rounded to bfloat16.
// Limits     any number of modalities, any widths and ranks.
#include "csrc/cpu/products.h"
#include "csrc/low_rank_fusion/low_rank_fusion.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kRows = 96, kOutputs = 128;
constexpr int64_t kBackwardFloats = 48 << 10;       // P of all modalities for a block of rows
constexpr int64_t kRowsInPlace = 2 * kFeatureRows;  // up to so many, packing a factor costs more than it saves
constexpr int64_t kDots = 48;                       // rows of a factor at a time whose lanes are then added up

const void* element(const void* data, Dtype dtype, int64_t at) {
  return static_cast<const char*>(data) + at * element_size(dtype);
}
void* element(void* data, Dtype dtype, int64_t at) { return static_cast<char*>(data) + at * element_size(dtype); }

float scalar(Dtype dtype, const void* data, int64_t at) {
  float value = 0.f;
  with_element_type(dtype, data, [&](const auto* p) { value = sum(load_as_float(p + at, 1)); });
  return value;
}

// [1; x_i] of a block of rows, all modalities side by side, in units along a row.
template <bool kPairs>
class Inputs {
 public:
  Inputs(const LowRankParams& p, Carver& memory, int64_t rows) : p_(&p) {
    for (int64_t i = 0; i < p.count; ++i) stride_ += offset(i);
    stride_ = spread_stride(stride_);
    data_ = memory.take(rows * stride_);
  }
  // Fills modality by modality; calls f(i, [1; x_i]) for each.
  template <class Function>
  void for_each(Function f) const {
    float* at = data_;
    for (int64_t i = 0; i < p_->count; at += offset(i++)) f(i, at);
  }
  void fill(int64_t first, int64_t rows) const {
    for_each([&](int64_t i, float* to) {
      const LowRankModality& m = p_->modalities[i];
      const void* from = element(m.x, p_->dtype, first * m.x_stride);
      if constexpr (kPairs) {
        constexpr uint16_t kOne = 0x3f80;
        for (int64_t b = 0; b < rows; ++b) {
          if (m.width % 2 == 0) to[b * stride_ + m.width / 2] = 0.f;
          auto* halves = reinterpret_cast<uint16_t*>(to + b * stride_);
          halves[0] = kOne;
          std::memcpy(halves + 1, static_cast<const uint16_t*>(from) + b * m.x_stride,
                      static_cast<size_t>(m.width) * sizeof(uint16_t));
        }
      } else {
        for (int64_t b = 0; b < rows; ++b) to[b * stride_] = 1.f;
        pack_rows_as_float(p_->dtype, from, m.x_stride, rows, m.width, to + 1, stride_);
      }
    });
  }
  int64_t stride() const { return stride_; }

 private:
  int64_t offset(int64_t i) const { return round_up(units<kPairs>(p_->modalities[i].width + 1), VW) + VW; }

  const LowRankParams* p_;
  int64_t stride_ = 0;
  float* data_;
};

int64_t widest(const LowRankParams& p) {
  int64_t width = 0;
  for (int64_t i = 0; i < p.count; ++i) width = max(width, p.modalities[i].width);
  return width;
}

// F_i[r]
MMK_INLINE Matrix rank_of(const LowRankParams& p, const LowRankModality& m, int64_t r) {
  return {element(m.factor.data, p.dtype, r * m.factor_rank_stride), m.factor.stride, m.factor.by_columns};
}

// Whether what is read as it lies, in part by dot products, costs less than packing factors for these rows.
bool are_few(const LowRankParams& p) { return p.batch <= (p.dtype == Dtype::f32 ? 2 : 1) * kRowsInPlace; }

struct DotMemory {
  float *partial, *copy;  // [rows][kDots][VW]; rows of a factor in units

  template <bool kPairs>
  static DotMemory take(const LowRankParams& p, Carver& memory) {
    const int64_t depth = spread_stride(units<kPairs>(max(widest(p) + 1, p.outputs)));
    float* const partial = memory.take(are_few(p) ? p.batch * kDots * VW : 0);
    return {partial, memory.take(are_few(p) && p.dtype != Dtype::f32 ? kDots * depth : 0)};
  }
};

// C = A[rows][units of depth] · Bᵀ of B's dense rows, `others` of them, for few rows of A.
template <bool kPairs>
void multiply_dots(Dtype dtype, const float* a, int64_t lda, int64_t rows, const Matrix& b, int64_t others,
                   int64_t depth, const DotMemory& t, const Result& c) {
  for (int64_t j = 0; j < others; j += kDots) {
    const int64_t some = min(kDots, others - j);
    const Operand from = operand_of_rows<kPairs>(dtype, element(b.data, dtype, j * b.stride), b.stride, some, depth,
                                                 t.copy, spread_stride(units<kPairs>(depth)));
    std::memset(t.partial, 0, static_cast<size_t>(rows * kDots * VW) * sizeof(float));
    dot_rows(kPairs, a, lda, rows, from.data, from.stride, some, units<kPairs>(depth), t.partial, kDots);
    with_combine(c, [&](auto combine) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t n = 0; n < some; n += VW) {
          combine(finish_dots(t.partial + i * kDots * VW, n), i * c.stride + j + n);
        }
      }
    });
  }
}

// Columns `first` … of F_i[r], [units of width + 1][columns].
template <bool kPairs>
Operand factor(const LowRankParams& p, const LowRankModality& m, int64_t r, int64_t first, int64_t columns,
               bool in_place, float* scratch, int64_t stride) {
  return operand_of_columns<kPairs>(p.dtype, from_element(rank_of(p, m, r), p.dtype, 0, first), m.width + 1, columns,
                                    in_place, scratch, stride);
}

// F_i[r]ᵀ but for the entries that 1 is multiplied by, [units of N][width].
template <bool kPairs>
Operand transposed_factor(const LowRankParams& p, const LowRankModality& m, int64_t r, bool in_place, float* scratch) {
  return operand_of_columns<kPairs>(p.dtype, transposed(from_element(rank_of(p, m, r), p.dtype, 1, 0)), p.outputs,
                                    m.width, in_place && m.width % VW == 0, scratch, spread_stride(m.width));
}

// Columns of P_i[r] of a block of rows.
template <bool kPairs>
void project(const LowRankParams& p, const LowRankModality& m, int64_t r, int64_t first, int64_t outputs,
             const float* x, int64_t ldx, int64_t rows, float* scratch, int64_t stride, const DotMemory& dots,
             const Result& c) {
  if (m.factor.by_columns && are_few(p)) {
    const Matrix columns = transposed(from_element(rank_of(p, m, r), p.dtype, 0, first));
    return multiply_dots<kPairs>(p.dtype, x, ldx, rows, columns, outputs, m.width + 1, dots, c);
  }
  const bool in_place = rows <= kRowsInPlace && outputs % VW == 0;  // a copy pays when it is read again
  const Operand f = factor<kPairs>(p, m, r, first, outputs, in_place, scratch, stride);
  multiply(kPairs, x, ldx, 1, rows, f.data, f.stride, units<kPairs>(m.width + 1), outputs, c);
}

// --- forward ---

template <bool kPairs>
struct ForwardTile {
  Inputs<kPairs> x;
  float *factor, *product, *sum;  // [units of width + 1][outputs], [rows][outputs] each
  DotMemory dots;
  int64_t floats;

  ForwardTile(const LowRankParams& p, Carver memory, int64_t rows, int64_t stride)
      : x(p, memory, rows),
        factor(memory.take(units<kPairs>(widest(p) + 1) * stride)),
        product(memory.take(rows * stride)),
        sum(memory.take(rows * stride)),
        dots(DotMemory::take<kPairs>(p, memory)),
        floats(memory.used()) {}
};

template <bool kPairs>
void forward_task(const LowRankParams& p, const ForwardTile<kPairs>& t, int64_t stride, int64_t first_row, int64_t rows,
                  int64_t first, int64_t outputs) {
  t.x.fill(first_row, rows);
  for (int64_t b = 0; b < rows; ++b) {
    if (p.bias != nullptr) {
      pack_rows_as_float(p.dtype, element(p.bias, p.dtype, first), 0, 1, outputs, t.sum + b * stride, stride);
    } else {
      std::memset(t.sum + b * stride, 0, static_cast<size_t>(round_up(outputs, VW)) * sizeof(float));
    }
    if (p.count == 1) {
      for (int64_t n = 0; n < outputs; n += VW) store(t.product + b * stride + n, set1(1.f));
    }
  }
  for (int64_t r = 0; r < p.rank; ++r) {
    const float weight = scalar(p.dtype, p.rank_weights, r);
    t.x.for_each([&](int64_t i, const float* x) {
      const Combine how = i + 1 == p.count ? Combine::add_product : i == 0 ? Combine::store : Combine::multiply;
      project<kPairs>(p, p.modalities[i], r, first, outputs, x, t.x.stride(), rows, t.factor, stride, t.dots,
                      {how, t.product, stride, t.sum, weight});
    });
  }
  write_rows(t.sum, stride, rows, outputs, p.dtype, element(p.out, p.dtype, first_row * p.outputs + first), p.outputs);
}

// --- backward ---

// dF_i[r] as it lies, [width + 1][N] or its transposed where F_i lies by columns.
struct GradFactor {
  int64_t rows, columns, stride;  // stride: of its sums in scratch
  bool by_columns;

  GradFactor(const LowRankParams& p, const LowRankModality& m)
      : rows(m.factor.by_columns ? p.outputs : m.width + 1),
        columns(m.factor.by_columns ? m.width + 1 : p.outputs),
        stride(spread_stride(columns)),
        by_columns(m.factor.by_columns) {}
  int64_t floats() const { return rows * stride; }
  void* data(const LowRankParams& p, const LowRankModality& m, int64_t r, int64_t row, int64_t column) const {
    return element(m.grad_factor, p.dtype, (r * rows + row) * columns + column);
  }

  // A part of [1; x_i]ᵀ dP from both in units of rows of a block, or of its transposed.
  void multiply_part(bool pairs, Operand x, Operand grad_projection, int64_t depth, int64_t row, int64_t count,
                     int64_t column, int64_t width, const Result& c) const {
    const Operand &a = by_columns ? grad_projection : x, &b = by_columns ? x : grad_projection;
    multiply(pairs, a.data + row, 1, a.stride, count, b.data + column, b.stride, depth, width, c);
  }

  // All of it where one block is all rows: float32 as far as whole vectors go at once, the rest while it is in cache.
  template <bool kPairs>
  void write(const LowRankParams& p, const LowRankModality& m, int64_t r, Operand x, Operand grad_projection,
             int64_t depth, float* sums) const {
    const int64_t whole = p.dtype == Dtype::f32 ? columns / VW * VW : 0;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = min(kRows, rows - row);
      if (whole > 0) {
        multiply_part(kPairs, x, grad_projection, depth, row, count, 0, whole,
                      {Combine::store, static_cast<float*>(data(p, m, r, row, 0)), columns});
      }
      if (whole == columns) continue;
      multiply_part(kPairs, x, grad_projection, depth, row, count, whole, columns - whole,
                    {Combine::store, sums, stride});
      write_rows(sums, stride, count, columns - whole, p.dtype, data(p, m, r, row, whole), columns);
    }
  }
};

template <bool kPairs>
struct BackwardTile {
  Inputs<kPairs> x;
  float *factors, *transposed, *grad_factors;  // [Σ units of width + 1][N], [units of N][Σ width], all dF_i
  float* projections;                          // [M][rows][N]
  float *by_outputs, *by_rows;                 // dP in units of outputs, [rows][N], and of rows: the same for float
  float* columns;                              // pairs alone: [1; x_i] in units of rows, [units of rows][width + 1]
  DotMemory dots;
  int64_t floats;

  BackwardTile(const LowRankParams& p, Carver memory, int64_t rows, int64_t ldn) : x(p, memory, rows) {
    int64_t gradients = 0, depth = 0, transposed_width = 0;
    for (int64_t i = 0; i < p.count; ++i) {
      gradients += GradFactor(p, p.modalities[i]).floats();
      depth += units<kPairs>(p.modalities[i].width + 1);
      transposed_width += spread_stride(p.modalities[i].width);
    }
    factors = memory.take(depth * ldn);
    transposed = memory.take(units<kPairs>(p.outputs) * transposed_width);
    grad_factors = memory.take(gradients);
    projections = memory.take(p.count * rows * ldn);
    by_outputs = by_rows = memory.take(rows * ldn);
    columns = nullptr;
    if (kPairs) {
      by_rows = memory.take(units<true>(rows) * ldn);
      columns = memory.take(units<true>(rows) * spread_stride(widest(p) + 1));
    }
    dots = DotMemory::take<kPairs>(p, memory);
    floats = memory.used();
  }
};

// dy · weight · Π_{j≠i} P_j of row b, as a vector of outputs from n on.
template <bool kPairs>
MMK_INLINE vf product_of_others(const LowRankParams& p, const BackwardTile<kPairs>& t, int64_t i, vf weight,
                                const float* grad_out, int64_t block, int64_t ldn, int64_t b, int64_t n) {
  vf g = load(grad_out + b * ldn + n) * weight;
  for (int64_t j = 0; j < p.count; ++j) {
    if (j != i) g = g * load(t.projections + (j * block + b) * ldn + n);
  }
  return g;
}

// dP of modality i, times the weight of the rank.
template <bool kPairs>
void form_grad_projection(const LowRankParams& p, const BackwardTile<kPairs>& t, int64_t i, float weight,
                          const float* grad_out, int64_t rows, int64_t block, int64_t ldn) {
  const auto at = [&](int64_t b, int64_t n) {
    return product_of_others(p, t, i, set1(weight), grad_out, block, ldn, b, n);
  };
  if constexpr (!kPairs) {
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t n = 0; n < p.outputs; n += VW) store(t.by_outputs + b * ldn + n, at(b, n));
    }
  } else {
    for (int64_t b = 0; b < rows; b += 2) {
      const bool single = b + 1 == rows;
      for (int64_t n = 0; n < p.outputs; n += 2 * VW) {
        const bool half = n + VW >= p.outputs;
        const vf even = at(b, n), even_next = half ? zero() : at(b, n + VW);
        const vf odd = single ? zero() : at(b + 1, n), odd_next = single || half ? zero() : at(b + 1, n + VW);
        store(t.by_outputs + b * ldn + n / 2, to_bf16(even, even_next));
        if (!single) store(t.by_outputs + (b + 1) * ldn + n / 2, to_bf16(odd, odd_next));
        store(t.by_rows + b / 2 * ldn + n, pair(even, odd));
        if (!half) store(t.by_rows + b / 2 * ldn + n + VW, pair(even_next, odd_next));
      }
    }
  }
}

// Σ dy ∘ Π P over a block of rows.
template <bool kPairs>
float sum_products(const LowRankParams& p, const BackwardTile<kPairs>& t, const float* grad_out, int64_t rows,
                   int64_t block, int64_t ldn) {
  vf total = zero();
  for (int64_t b = 0; b < rows; ++b) {
    vf of_row = zero();                            // apart from the other rows', so that a long sum keeps its digits
    for (int64_t n = 0; n < p.outputs; n += VW) {  // beyond the last output dy is zero, and so is the copied factor
      of_row = of_row + product_of_others(p, t, -1, set1(1.f), grad_out, block, ldn, b, n);
    }
    total = total + of_row;
  }
  return sum(total);
}

struct InputGradients {
  float* const* sums;  // per modality [B][stride], null where not wanted
  const int64_t* strides;
  int32_t* turns;  // per block of rows: how many ranks have been added
};

template <bool kPairs>
void backward_rank(const LowRankParams& p, const BackwardTile<kPairs>& t, int64_t r, const float* grad_out, int64_t ldn,
                   int64_t block, const InputGradients& inputs) {
  const float weight = scalar(p.dtype, p.rank_weights, r);
  const bool few = are_few(p), one_block = p.batch <= block;
  float *copies = t.factors, *transposed = t.transposed;
  for (int64_t i = 0; i < p.count && !few; ++i) {
    const LowRankModality& m = p.modalities[i];
    factor<kPairs>(p, m, r, 0, p.outputs, false, copies, ldn);
    copies += units<kPairs>(m.width + 1) * ldn;
    if (m.grad_x != nullptr) transposed_factor<kPairs>(p, m, r, false, transposed);
    transposed += units<kPairs>(p.outputs) * spread_stride(m.width);
  }
  float grad_weight = 0.f;
  for (int64_t first = 0; first < p.batch; first += block) {
    const int64_t rows = min(block, p.batch - first);
    const float* dy = grad_out + first * ldn;
    t.x.fill(first, rows);
    float* f = t.factors;
    t.x.for_each([&](int64_t i, const float* x) {
      const int64_t depth = units<kPairs>(p.modalities[i].width + 1);
      const Result projection{Combine::store, t.projections + i * block * ldn, ldn};
      if (few) {
        project<kPairs>(p, p.modalities[i], r, 0, p.outputs, x, t.x.stride(), rows, f, ldn, t.dots, projection);
      } else {
        multiply(kPairs, x, t.x.stride(), 1, rows, f, ldn, depth, p.outputs, projection);
      }
      f += depth * ldn;
    });
    if (p.grad_rank_weights != nullptr) grad_weight += sum_products(p, t, dy, rows, block, ldn);
    int32_t* turn = inputs.turns + first / block;
    wait_turn(turn, static_cast<int32_t>(r));
    float *grad_factor = t.grad_factors, *columns = t.transposed;
    t.x.for_each([&](int64_t i, const float* x) {
      const LowRankModality& m = p.modalities[i];
      const GradFactor grad(p, m);
      if (m.grad_x != nullptr || m.grad_factor != nullptr) {
        form_grad_projection(p, t, i, weight, dy, rows, block, ldn);
      }
      if (m.grad_factor != nullptr) {
        Operand entries{x, t.x.stride()};
        if constexpr (kPairs) {
          entries = {t.columns, spread_stride(m.width + 1)};
          pack_columns_as_pairs(reinterpret_cast<const uint16_t*>(x), 2 * t.x.stride(), rows, m.width + 1, t.columns,
                                entries.stride);
        }
        const Operand grad_projection{t.by_rows, ldn};
        if (one_block) {
          grad.write<kPairs>(p, m, r, entries, grad_projection, units<kPairs>(rows), grad_factor);
        } else {
          grad.multiply_part(kPairs, entries, grad_projection, units<kPairs>(rows), 0, grad.rows, 0, grad.columns,
                             {first == 0 ? Combine::store : Combine::add, grad_factor, grad.stride});
        }
      }
      if (m.grad_x != nullptr) {
        const Result to{r == 0 ? Combine::store : Combine::add, inputs.sums[i] + first * inputs.strides[i],
                        inputs.strides[i]};
        if (few && !m.factor.by_columns) {
          multiply_dots<kPairs>(p.dtype, t.by_outputs, ldn, rows, from_element(rank_of(p, m, r), p.dtype, 1, 0),
                                m.width, p.outputs, t.dots, to);
        } else {
          Operand f{columns, spread_stride(m.width)};
          if (few) f = transposed_factor<kPairs>(p, m, r, true, columns);
          multiply(kPairs, t.by_outputs, ldn, 1, rows, f.data, f.stride, units<kPairs>(p.outputs), m.width, to);
        }
      }
      grad_factor += grad.floats();
      columns += units<kPairs>(p.outputs) * spread_stride(m.width);
    });
    end_turn(turn, static_cast<int32_t>(r));
  }
  const float* grad_factor = t.grad_factors;
  for (int64_t i = 0; i < p.count && !one_block; ++i) {
    const LowRankModality& m = p.modalities[i];
    const GradFactor grad(p, m);
    if (m.grad_factor != nullptr) {
      write_rows(grad_factor, grad.stride, grad.rows, grad.columns, p.dtype, grad.data(p, m, r, 0, 0), grad.columns);
    }
    grad_factor += grad.floats();
  }
  if (p.grad_rank_weights != nullptr) {
    with_element_type(p.dtype, p.grad_rank_weights, [&](auto* to) { store_from_float(to + r, set1(grad_weight), 1); });
  }
}

}  // namespace

void low_rank_forward(const LowRankParams& p) {
  const int64_t rows = min(p.batch, kRows), row_blocks = ceil_div(p.batch, kRows);
  // Fewer outputs a task where there are fewer rows than workers could use; no sum depends on it.
  const int64_t parts = max(ceil_div(p.outputs, kOutputs), ceil_div(p.workers.count, row_blocks));
  const int64_t outputs = round_up(ceil_div(p.outputs, parts), VW), stride = spread_stride(outputs);
  const int64_t blocks = ceil_div(p.outputs, outputs);
  with_pairs(p.dtype, [&](auto pairs) {
    const int64_t floats = ForwardTile<pairs>(p, Carver(nullptr), rows, stride).floats;
    const Scratch memory(floats * p.workers.count);
    for_each_claim(p.workers, row_blocks * blocks, 1, [&](int worker, int64_t begin, int64_t end) {
      const ForwardTile<pairs> tile(p, Carver(memory.data() + worker * floats), rows, stride);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks * kRows, n = task % blocks * outputs;
        forward_task(p, tile, stride, b, min(kRows, p.batch - b), n, min(outputs, p.outputs - n));
      }
    });
  });
}

void low_rank_backward(const LowRankParams& p) {
  const int64_t ldn = spread_stride(p.outputs);
  const int64_t block = min(p.batch, max(kFeatureRows, min(kRows, kBackwardFloats / (p.count * ldn))));
  const int64_t blocks = ceil_div(p.batch, block);

  Carver shared(nullptr);
  const auto carve = [&](Carver& memory) {
    struct Pieces {
      float* grad_out;
      float** sums;
      int64_t* strides;
      int32_t* turns;
    } s;
    s.grad_out = memory.take(p.batch * ldn);
    s.sums = reinterpret_cast<float**>(memory.take(2 * p.count));
    s.strides = reinterpret_cast<int64_t*>(memory.take(2 * p.count));
    s.turns = reinterpret_cast<int32_t*>(memory.take(blocks));
    for (int64_t i = 0; i < p.count; ++i) {
      const LowRankModality& m = p.modalities[i];
      const bool in_place = p.dtype == Dtype::f32 && m.width % VW == 0;
      const int64_t stride = in_place ? m.width : spread_stride(m.width);
      float* sums = m.grad_x == nullptr ? nullptr
                    : in_place          ? static_cast<float*>(m.grad_x)
                                        : memory.take(p.batch * stride);
      if (s.sums == nullptr) continue;
      s.sums[i] = sums;
      s.strides[i] = stride;
    }
    return s;
  };
  carve(shared);
  const Scratch shared_memory(shared.used());
  Carver carver(shared_memory.data());
  const auto s = carve(carver);
  std::memset(s.turns, 0, static_cast<size_t>(blocks) * sizeof(int32_t));
  for (int64_t b = 0; b < p.batch; ++b) {  // zeros behind the last output
    pack_rows_as_float(p.dtype, element(p.grad_out, p.dtype, b * p.grad_out_stride), 0, 1, p.outputs,
                       s.grad_out + b * ldn, ldn);
  }
  if (p.grad_bias != nullptr) sum_columns(s.grad_out, ldn, p.batch, p.outputs, p.dtype, p.grad_bias);

  with_pairs(p.dtype, [&](auto pairs) {
    const int64_t floats = BackwardTile<pairs>(p, Carver(nullptr), block, ldn).floats;
    const Scratch memory(floats * p.workers.count);
    for_each_claim(p.workers, p.rank, 1, [&](int worker, int64_t begin, int64_t end) {
      const BackwardTile<pairs> tile(p, Carver(memory.data() + worker * floats), block, ldn);
      for (int64_t r = begin; r < end; ++r) {
        backward_rank(p, tile, r, s.grad_out, ldn, block, {s.sums, s.strides, s.turns});
      }
    });
  });
  for (int64_t i = 0; i < p.count; ++i) {
    const LowRankModality& m = p.modalities[i];
    if (m.grad_x == nullptr || s.sums[i] == m.grad_x) continue;
    write_rows(s.sums[i], s.strides[i], p.batch, m.width, p.dtype, m.grad_x, m.width);
  }
}

}  // namespace MMK_ISA
}  // namespace mmk
