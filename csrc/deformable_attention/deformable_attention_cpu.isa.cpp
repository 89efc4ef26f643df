//
//   out[b, q, h] = Σ_k a_k · sample(value[b, :, h], location_k)
//   dvalue[row] += a_k · share · dout,   da_k = Σ share · (dout · value[row]),   over the four rows of a sample
//
// Tiling     a task is a head of a batch element, or some of its queries. Where its maps are read often, they are first
//            packed into float32 rows next to each other, which stay in the cache. Rows and shares of a query's points
//            are computed in vectors (samples.h), then the rows are read whole.
// Sums       dvalue is scattered by one owner per head, in the order of the queries, into rows of float32. Where there
//            are few heads, parts of the queries have rows of their own, added up in the order of the parts. The parts
//            follow from the shapes alone, so that any number of threads gives the same bits.
// Precision  positions, samples and sums in float32.
// Limits     any D, any points, maps of less than 2^31 pixels in all.
#include <memory>

#include "csrc/deformable_attention/samples.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int kColumnVectors = 8;  // of a row's features at a time, in registers

constexpr int64_t kQueriesAhead = 6;  // whose inputs and outputs are on their way
constexpr int64_t kRowsAhead = 24;    // of a map that is packed

// Whether rows next to each other are worth a copy: on average, a pixel is read this often.
bool worth_packing(const DeformableParams& p) { return p.queries * p.points >= p.rows; }

// Calls f(integral constant, first column) for runs of 8, 4, 2 or 1 vectors of features.
template <class Function>
MMK_INLINE void for_each_run(int64_t width, Function f) {
  int64_t column = 0;
  for (int64_t left = ceil_div(width, VW); left > 0;) {
    int64_t taken = 1;
    if (left >= 8) {
      taken = 8;
      f(std::integral_constant<int, 8>{}, column);
    } else if (left >= 4) {
      taken = 4;
      f(std::integral_constant<int, 4>{}, column);
    } else if (left >= 2) {
      taken = 2;
      f(std::integral_constant<int, 2>{}, column);
    } else {
      f(std::integral_constant<int, 1>{}, column);
    }
    left -= taken;
    column += taken * VW;
  }
}

// A head's maps, packed or as they are.
template <class R>
struct Maps {
  const R* rows;
  int64_t stride;
  bool apart;  // not packed
};

// The columns of one output row, kVectors of them.
template <int kVectors, int kCorners, class R>
MMK_INLINE void sum_samples(const Maps<R>& maps, const Samples& s, int64_t count, int64_t column, float* out) {
  constexpr int kSums = kCorners < kColumnVectors / kVectors ? kCorners : kColumnVectors / kVectors;  // hide latency
  vf sums[kSums][kVectors];
  MMK_UNROLL for (int u = 0; u < kSums; ++u) { MMK_UNROLL for (int v = 0; v < kVectors; ++v) sums[u][v] = zero(); }
  const R* base = maps.rows + column;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t i = s.indices[j];
    MMK_UNROLL for (int k = 0; k < kCorners; ++k) {
      const R* row = base + s.rows[k][i] * maps.stride;
      const vf share = set1(s.shares[k][i]);
      MMK_UNROLL for (int v = 0; v < kVectors; ++v) {
        sums[k % kSums][v] = fma(share, load_as_float(row + v * VW), sums[k % kSums][v]);
      }
    }
  }
  MMK_UNROLL for (int v = 0; v < kVectors; ++v) {
    vf total = sums[0][v];
    MMK_UNROLL for (int u = 1; u < kSums; ++u) total = total + sums[u][v];
    store(out + column + v * VW, total);
  }
}

// The gradient of the output, spread over the rows of every sample and multiplied with them.
template <int kVectors, int kCorners, class R>
MMK_INLINE void spread(const Maps<R>& maps, float* grad_rows, int64_t grad_stride, const float* grad_out,
                       const Samples& s, int64_t count, int64_t column, bool multiply) {
  vf grad[kVectors];
  MMK_UNROLL for (int v = 0; v < kVectors; ++v) grad[v] = load(grad_out + column + v * VW);
  const R* base = maps.rows + column;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t i = s.indices[j];
    MMK_UNROLL for (int k = 0; k < kCorners; ++k) {
      const int64_t r = s.rows[k][i];
      if (multiply) {
        const R* row = base + r * maps.stride;
        float* dot = s.dots + (static_cast<int64_t>(i) * kCorners + k) * VW;
        vf sum = grad[0] * load_as_float(row);
        MMK_UNROLL for (int v = 1; v < kVectors; ++v) sum = fma(grad[v], load_as_float(row + v * VW), sum);
        store(dot, column == 0 ? sum : sum + load(dot));
      }
      if (grad_rows == nullptr) continue;
      float* to = grad_rows + column + r * grad_stride;
      const vf share = set1(s.shares[k][i]);
      MMK_UNROLL for (int v = 0; v < kVectors; ++v) store(to + v * VW, fma(share, grad[v], load(to + v * VW)));
    }
  }
}

// What one worker has: the samples of a query, the head whose maps it has packed, a row of the output or its gradient.
class Worker {
 public:
  explicit Worker(const DeformableParams& p)
      : p_(p), samples{Samples(p), Samples(p)}, stride(round_up(p.width, VW)), row_(stride) {
    std::memset(row_.data(), 0, sizeof(float) * static_cast<size_t>(stride));
  }

  // f(maps) with the maps of a head.
  template <class Function>
  void with_maps(int64_t b, int64_t h, Function f) {
    if (b != batch_) {
      for (Samples& s : samples) s.set_batch(b);
    }
    batch_ = b;
    if (!worth_packing(p_) && p_.source_count == 1 && p_.width % VW == 0) {
      const DeformableSource& source = p_.sources[0];
      with_element_type(p_.dtype, source.value, [&](const auto* value) {
        f(Maps<std::remove_const_t<std::remove_pointer_t<decltype(value)>>>{
            value + b * source.batch_stride + h * source.head_stride, source.row_stride, true});
      });
      return;
    }
    if (packed_ == nullptr) packed_ = std::make_unique<Scratch>(max(p_.rows * stride, 1));
    if (packed_head_ != b * p_.heads + h) pack(b, h);
    packed_head_ = b * p_.heads + h;
    f(Maps<float>{packed_->data(), stride, false});
  }

  float* row() const { return row_.data(); }

  // Float32 rows for the gradient of a head's maps.
  float* gradient_rows() {
    if (gradient_ == nullptr) gradient_ = std::make_unique<Scratch>(max(p_.rows * stride, 1));
    return gradient_->data();
  }

 private:
  void pack(int64_t b, int64_t h) {
    float* to = packed_->data();
    for (int64_t s = 0; s < p_.source_count; ++s) {
      const DeformableSource& source = p_.sources[s];
      const bool present = p_.presence == nullptr || p_.presence[b * p_.presence_stride + s] != 0;
      if (present) {
        with_element_type(p_.dtype, source.value, [&](const auto* value) {
          const auto* from = value + b * source.batch_stride + h * source.head_stride;
          for (int64_t r = 0; r < source.rows; ++r) {
            ask_for_lines<false>(from + min(r + kRowsAhead, source.rows - 1) * source.row_stride, p_.width);
            for (int64_t c = 0; c < p_.width; c += VW) {
              store(to + r * stride + c, load_as_float(from + r * source.row_stride + c, p_.width - c));
            }
          }
        });
      }
      to += source.rows * stride;
    }
  }

  const DeformableParams& p_;

 public:
  Samples samples[2];    // of a query and of the next one
  const int64_t stride;  // of packed rows

 private:
  Scratch row_;
  std::unique_ptr<Scratch> packed_, gradient_;
  int64_t batch_ = -1, packed_head_ = -1;
};

struct Part {
  int64_t b, h, begin, end;  // the queries [begin, end) of a head
};

// f(worker, part, its number) on every head, its queries cut into `parts`, which come one after another.
template <class Function>
void for_each_part(const DeformableParams& p, int64_t parts, Function f) {
  const int64_t length = ceil_div(p.queries, parts);
  const std::unique_ptr<std::unique_ptr<Worker>[]> made(new std::unique_ptr<Worker>[p.workers.count]);
  for_each_claim(p.workers, p.batch * p.heads * parts, 1, [&](int worker, int64_t first, int64_t last) {
    if (made[worker] == nullptr) made[worker] = std::make_unique<Worker>(p);
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / parts, begin = min(task % parts * length, p.queries);
      f(*made[worker], Part{head / p.heads, head % p.heads, begin, min(begin + length, p.queries)}, task);
    }
    stream_fence();
  });
}

// Calls f(query, its samples, how many reach a map) on the queries of a part, whose memory is asked for ahead: inputs
// and outputs of a head are far apart, and so are, unless they are packed, the rows of its maps and of their gradient.
template <int kCorners, class R, class Function>
void for_each_query(const DeformableParams& p, Worker& w, const Part& part, const Maps<R>& maps, float* grad_rows,
                    Function f) {
  if (part.begin >= part.end) return;
  int64_t count = w.samples[part.begin % 2].place(part.b, part.begin, part.h);
  for (int64_t q = part.begin; q < part.end; ++q) {
    int64_t next_count = 0;
    if (q + 1 < part.end) {
      Samples& next = w.samples[(q + 1) % 2];
      next.ask_for(part.b, min(q + kQueriesAhead, part.end - 1), part.h);
      next_count = next.place(part.b, q + 1, part.h);
      if (maps.apart || grad_rows != nullptr) {
        for (int64_t j = 0; j < next_count; ++j) {
          for (int k = 0; k < kCorners; ++k) {
            const int64_t row = next.rows[k][next.indices[j]];
            if (maps.apart) ask_for_lines<false>(maps.rows + row * maps.stride, p.width);
            if (grad_rows != nullptr) ask_for_lines<true>(grad_rows + row * w.stride, p.width);
          }
        }
      }
    }
    f(q, w.samples[q % 2], count);
    count = next_count;
  }
}

template <int kCorners, class R>
void sum_part(const DeformableParams& p, Worker& w, const Part& part, const Maps<R>& maps) {
  for_each_query<kCorners>(p, w, part, maps, nullptr, [&](int64_t q, Samples& samples, int64_t count) {
    for_each_run(p.width, [&](auto vectors, int64_t column) {
      sum_samples<vectors(), kCorners>(maps, samples, count, column, w.row());
    });
    write_floats(p.dtype, p.out, ((part.b * p.queries + q) * p.heads + part.h) * p.width, p.width, w.row(),
                 p.stream_out);
  });
}

// The gradients of a part's locations and weights, and that of the maps added to rows that may be absent.
template <int kCorners, class R>
void spread_part(const DeformableParams& p, Worker& w, const Part& part, const Maps<R>& maps, float* grad_rows) {
  const bool multiply = p.grad_locations != nullptr || p.grad_weights != nullptr;
  for_each_query<kCorners>(p, w, part, maps, grad_rows, [&](int64_t q, Samples& samples, int64_t count) {
    const int64_t at = part.b * p.grad_batch_stride + q * p.grad_query_stride + part.h * p.width;
    read_floats(p.dtype, p.grad_out, at, p.width, w.row());
    for_each_run(p.width, [&](auto vectors, int64_t column) {
      spread<vectors(), kCorners>(maps, grad_rows, w.stride, w.row(), samples, count, column, multiply);
    });
    if (multiply) samples.write_gradients(part.b, q, part.h);
  });
}

// f(source, where row `first` of a head goes in its gradient, first, last) on the sources whose gradient is needed.
template <class Function>
void for_each_gradient(const DeformableParams& p, int64_t b, int64_t h, int64_t begin, int64_t end, Function f) {
  int64_t start = 0;
  for (int64_t s = 0; s < p.source_count; ++s) {
    const DeformableSource& source = p.sources[s];
    const int64_t first = max(begin, start), last = min(end, start + source.rows);
    if (source.grad != nullptr && first < last) {
      f(source, ((b * source.rows + first - start) * p.heads + h) * p.width, first, last);
    }
    start += source.rows;
  }
}

// Rows [begin, end) of a head's gradient: the sum of `parts` of them, each `size` floats after the other, which ends in
// the first.
void write_gradient(const DeformableParams& p, int64_t b, int64_t h, int64_t begin, int64_t end, float* rows,
                    int64_t stride, int64_t parts, int64_t size) {
  for_each_gradient(p, b, h, begin, end, [&](const DeformableSource& source, int64_t at, int64_t first, int64_t last) {
    with_element_type(p.dtype, source.grad, [&](auto* to) {
      to += at;
      for (int64_t r = first; r < last; ++r, to += p.heads * p.width) {
        float* row = rows + r * stride;
        for (int64_t part = 1; part < parts; ++part) {
          for (int64_t c = 0; c < p.width; c += VW) store(row + c, load(row + c) + load(row + part * size + c));
        }
        write_row(to, p.width, row, source.stream);
      }
    });
  });
}

// As many as give eight tasks, where zeroing and adding up their rows costs less than spreading.
int64_t gradient_parts(const DeformableParams& p) {
  if (!p.needs_values) return ceil_div(8, p.batch * p.heads);
  const int64_t wanted = ceil_div(8, p.batch * p.heads), spread_rows = p.queries * p.points * 2;
  return max(1, min(min(wanted, p.queries), spread_rows / max(p.rows, 1)));
}

template <int kCorners>
void backward(const DeformableParams& p) {
  const int64_t parts = gradient_parts(p), stride = round_up(p.width, VW), size = p.rows * stride;
  const auto spread_to = [&](Worker& w, const Part& part, float* rows) {
    w.with_maps(part.b, part.h, [&](const auto& maps) { spread_part<kCorners>(p, w, part, maps, rows); });
  };
  if (!p.needs_values) {
    for_each_part(p, parts, [&](Worker& w, const Part& part, int64_t) { spread_to(w, part, nullptr); });
    return;
  }
  if (parts == 1) {
    for_each_part(p, 1, [&](Worker& w, const Part& part, int64_t) {
      float* rows = w.gradient_rows();
      std::memset(rows, 0, sizeof(float) * static_cast<size_t>(size));
      spread_to(w, part, rows);
      write_gradient(p, part.b, part.h, 0, p.rows, rows, stride, 1, 0);
    });
    return;
  }
  const Scratch memory(max(p.batch * p.heads * parts * size, 1));
  for_each_part(p, parts, [&](Worker& w, const Part& part, int64_t task) {
    float* rows = memory.data() + task * size;
    std::memset(rows, 0, sizeof(float) * static_cast<size_t>(size));
    spread_to(w, part, rows);
  });
  constexpr int64_t kRows = 256;
  const int64_t pieces = ceil_div(p.rows, kRows);
  for_each_claim(p.workers, p.batch * p.heads * pieces, 1, [&](int, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / pieces, begin = task % pieces * kRows;
      float* rows = memory.data() + head * parts * size;
      write_gradient(p, head / p.heads, head % p.heads, begin, min(begin + kRows, p.rows), rows, stride, parts, size);
    }
    stream_fence();
  });
}

template <int kCorners>
void forward(const DeformableParams& p) {
  const int64_t heads = p.batch * p.heads;  // whole heads are packed once; few of them are cut for the threads
  const int64_t parts = p.workers.count == 1 ? 1 : min(ceil_div(4 * p.workers.count, heads), p.queries);
  for_each_part(p, parts, [&](Worker& w, const Part& part, int64_t) {
    w.with_maps(part.b, part.h, [&](const auto& maps) { sum_part<kCorners>(p, w, part, maps); });
  });
}

}  // namespace

void deformable_attention_forward(const DeformableParams& p) { p.discrete ? forward<1>(p) : forward<4>(p); }

void deformable_attention_backward(const DeformableParams& p) { p.discrete ? backward<1>(p) : backward<4>(p); }

}  // namespace MMK_ISA
}  // namespace mmk
