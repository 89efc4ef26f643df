//
//   out[b, start_i + l] = norm(x_i[b, l] + type[i] + position_i[l]) · weight + bias,   i over the sources
//
// Tiling     Positions outside, batch elements inside, so that type + position is formed once for all of a position's
//            rows; rows are taken in that order, a few at a time, and normalised by csrc/norm. A task owns positions of
//            one source for a part of the batch.
// Backward   The same rows again. A task sums its rows for type, weight and bias; a position's gradient is complete in
//            its task unless the batch is cut into parts, whose sums are then added up.
// Precision  float32. Sums in a fixed order: within a task, then over tasks, whatever the number of threads.
// Limits     any number of sources, any C, any strides of batch and token.
#include "csrc/concat_tokens/concat_tokens.h"
#include "csrc/cpu/schedule.h"
#include "csrc/cpu/tile.h"
#include "csrc/norm/row_norm.h"
#include "csrc/norm/vectors.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kTaskRows = 128;  // about: a backward task's sums are then 3/128 of its rows
constexpr int64_t kColumns = 256;   // features of a task that adds up the sums

RowNorm row_norm(const ConcatTokensParams& p) { return {p.norm, p.eps, p.features, p.dtype, p.out_dtype, p.stream}; }

bool has_addend(const ConcatTokensParams& p) {
  for (int64_t i = 0; i < p.source_count; ++i) {
    if (p.sources[i].type != nullptr || p.sources[i].position.data != nullptr) return true;
  }
  return false;
}

// How positions and batch are cut into tasks: a function of the shape alone.
struct Cut {
  int64_t positions, batch, batch_parts;  // of a task, of a part; parts

  explicit Cut(const ConcatTokensParams& p)
      : positions(ceil_div(kTaskRows, max(1, min(p.batch, kTaskRows)))),
        batch(ceil_div(p.batch, max(1, ceil_div(p.batch, kTaskRows)))),
        batch_parts(p.batch == 0 ? 0 : ceil_div(p.batch, batch)) {}
  int64_t tasks(const TokenSource& s) const { return ceil_div(s.length, positions) * batch_parts; }
  int64_t tasks(const ConcatTokensParams& p) const {
    int64_t total = 0;
    for (int64_t i = 0; i < p.source_count; ++i) total += tasks(p.sources[i]);
    return total;
  }
};

struct Task {
  int64_t source, start;    // the source's first position in the output
  int64_t l_first, l_last;  // positions within the source
  int64_t part, b_first, b_last;
};

Task task_at(const ConcatTokensParams& p, const Cut& cut, int64_t index) {
  int64_t source = 0, start = 0;
  while (index >= cut.tasks(p.sources[source])) {
    index -= cut.tasks(p.sources[source]);
    start += p.sources[source++].length;
  }
  const int64_t l = index / cut.batch_parts * cut.positions, part = index % cut.batch_parts;
  return {source,
          start,
          l,
          min(l + cut.positions, p.sources[source].length),
          part,
          part * cut.batch,
          min((part + 1) * cut.batch, p.batch)};
}

// addend = type + position as floats; the next position's row is fetched meanwhile.
void add_embeddings(const ConcatTokensParams& p, const TokenSource& s, int64_t l, float* addend) {
  if (s.type == nullptr && s.position.data == nullptr) return clear_vector(addend, padded_features(p.features));
  if (s.position.data == nullptr) return load_vector(p.dtype, s.type, p.features, addend);
  const char* const next = row_address(s.position, 0, l + 1 < s.length ? l + 1 : l, p.dtype);
  for (int64_t byte = 0; byte < p.features * element_size(p.dtype); byte += 64) __builtin_prefetch(next + byte);
  with_element_type(p.dtype, row_address(s.position, 0, l, p.dtype), [&](const auto* of_position) {
    const auto* of_type = static_cast<decltype(of_position)>(s.type);
    with_bool(of_type != nullptr, [&](auto both) {
      for_each_vector(p.features, [&](int64_t k, int64_t n) {
        const vf x = load_as_float(of_position + k, n);
        store(addend + k, both ? x + load_as_float(of_type + k, n) : x);
      });
    });
  });
}

// The rows of claimed tasks, one after the other, with what is added to each.
class Walk {
 public:
  // `ring` holds one addend for each position that pending rows may have; null where nothing is added.
  Walk(const ConcatTokensParams& p, const Cut& cut, int64_t first, int64_t last, float* ring, int64_t slots)
      : p_(p), cut_(cut), index_(first), last_(last), ring_(ring), slots_(slots) {
    if (index_ < last_) enter();
  }

  // Rows that n pending ones may belong to, at `run` rows a position.
  static int64_t slots(int64_t n, int64_t run) { return ceil_div(n - 1, run) + 1; }

  NormRows take(int limit) {
    NormRows rows;
    rows.count = 0;
    rows.add[0] = nullptr;
    for (; rows.count < limit && index_ < last_; ++rows.count) {
      if (ring_ != nullptr && !addend_ready_) {
        slot_ = slot_ + 1 < slots_ ? slot_ + 1 : 0;
        add_embeddings(p_, source(), l_, addend());
        addend_ready_ = true;
      }
      const int j = rows.count;
      rows.x[j] = row_address(source().x, b_, l_, p_.dtype);
      rows.add[j] = ring_ != nullptr ? addend() : nullptr;
      rows.out[j] = row_address(p_.out, b_, task_.start + l_, p_.out_dtype);
      advance();
    }
    return rows;
  }

 private:
  const TokenSource& source() const { return p_.sources[task_.source]; }
  float* addend() const { return ring_ + slot_ * padded_features(p_.features); }
  void enter() {
    task_ = task_at(p_, cut_, index_);
    l_ = task_.l_first;
    b_ = task_.b_first;
    addend_ready_ = false;
  }
  void advance() {
    if (++b_ < task_.b_last) return;
    b_ = task_.b_first;
    addend_ready_ = false;
    if (++l_ == task_.l_last && ++index_ < last_) enter();
  }

  const ConcatTokensParams& p_;
  const Cut& cut_;
  int64_t index_, last_;
  float* ring_;
  int64_t slots_, slot_ = 0, l_ = 0, b_ = 0;
  bool addend_ready_ = false;
  Task task_{};
};

// gain and offset as floats, 1 and 0 where one is absent; null where both are.
struct Affine {
  float *gain, *offset;

  Affine(const ConcatTokensParams& p, float* memory) : gain(nullptr), offset(nullptr) {
    if (p.weight == nullptr && p.bias == nullptr) return;
    const int64_t padded = padded_features(p.features);
    gain = memory;
    offset = memory + padded;
    clear_vector(offset, padded);
    if (p.bias != nullptr) load_vector(p.dtype, p.bias, p.features, offset);
    for (int64_t k = 0; k < padded; ++k) gain[k] = 1.f;
    if (p.weight != nullptr) load_vector(p.dtype, p.weight, p.features, gain);
  }
};

// One source's rows at a position, for backward.
NormRows rows_at(const ConcatTokensParams& p, const Task& task, int64_t l, int64_t b, int64_t count,
                 const float* addend) {
  const TokenSource& s = p.sources[task.source];
  NormRows rows;
  rows.count = static_cast<int>(max(0, count));
  rows.add[0] = nullptr;
  rows.grad_x[0] = nullptr;
  for (int j = 0; j < rows.count; ++j) {
    rows.x[j] = row_address(s.x, b + j, l, p.dtype);
    rows.add[j] = addend;
    rows.grad_out[j] = row_address(p.grad_out, b + j, task.start + l, p.out_dtype);
    if (s.grad_x.data != nullptr) rows.grad_x[j] = row_address(s.grad_x, b + j, l, p.dtype);
  }
  return rows;
}

// What the backward sums: which sums each task keeps, and where.
struct Sums {
  bool affine, types, positions;
  int64_t padded, per_task;                              // floats
  float *partials = nullptr, *position_parts = nullptr;  // [tasks][3][padded], [parts][Σ length][padded]

  Sums(const ConcatTokensParams& p) : padded(padded_features(p.features)) {
    affine = p.grad_weight != nullptr || p.grad_bias != nullptr;
    types = positions = false;
    for (int64_t i = 0; i < p.source_count; ++i) {
      types |= p.sources[i].grad_type != nullptr;
      positions |= p.sources[i].grad_position.data != nullptr;
    }
    per_task = (affine || types ? 3 : 0) * padded;
  }
  float* z(int64_t task) const { return partials + task * per_task; }
  float* gain(int64_t task) const { return z(task) + padded; }
  float* offset(int64_t task) const { return z(task) + 2 * padded; }
};

int64_t total_length(const ConcatTokensParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.source_count; ++i) total += p.sources[i].length;
  return total;
}

// The gradients of one task's rows, and its sums.
void run_task(const ConcatTokensParams& p, const RowNorm& norm, const Cut& cut, const Sums& sums, int64_t index,
              const float* gain, float* addend, float* position_sum, float* scratch) {
  const Task task = task_at(p, cut, index);
  const TokenSource& s = p.sources[task.source];
  if (sums.per_task > 0) clear_vector(sums.z(index), sums.per_task);
  const bool of_position = s.grad_position.data != nullptr, of_type = s.grad_type != nullptr;
  if (!sums.affine && !of_position && !of_type && s.grad_x.data == nullptr) return;
  NormSums into;
  if (sums.affine) {
    into.gain = sums.gain(index);
    into.offset = sums.offset(index);
  }
  into.z = of_position ? position_sum : of_type ? sums.z(index) : nullptr;
  const bool adds = s.type != nullptr || s.position.data != nullptr;
  const int64_t step = norm_rows(p.features, true), rows = task.b_last - task.b_first;
  for (int64_t l = task.l_first; l < task.l_last; ++l) {
    if (adds && (s.position.data != nullptr || l == task.l_first)) add_embeddings(p, s, l, addend);
    if (of_position) clear_vector(position_sum, sums.padded);
    for (int64_t i = 0; i < rows; i += step) {
      const int64_t b = task.b_first + i;
      const bool stays = i + step < rows;  // the next rows are of this position
      const NormRows next =
          stays ? rows_at(p, task, l, b + step, min(step, rows - i - step), nullptr)
                : rows_at(p, task, l + 1, task.b_first, l + 1 < task.l_last ? min(step, rows) : 0, nullptr);
      normalize_rows_backward(norm, rows_at(p, task, l, b, min(step, rows - i), adds ? addend : nullptr), next, gain,
                              into, scratch);
    }
    if (!of_position) continue;
    if (of_type) add_vector(sums.z(index), position_sum, p.features);
    if (cut.batch_parts == 1) {
      store_vector(p.dtype, row_address(s.grad_position, 0, l, p.dtype), p.features, position_sum);
    } else {
      float* part = sums.position_parts + (task.part * total_length(p) + task.start + l) * sums.padded;
      std::memcpy(part, position_sum, static_cast<size_t>(sums.padded) * sizeof(float));
    }
  }
}

// to[k0 …] = the sum over tasks first … last - 1 of what is at `from` of each.
void reduce_tasks(const ConcatTokensParams& p, const Sums& sums, const float* from, int64_t first, int64_t last,
                  int64_t k0, void* to) {
  alignas(64) float total[kColumns] = {};
  const int64_t count = min(kColumns, p.features - k0);
  for (int64_t task = first; task < last; ++task) add_vector(total, from + task * sums.per_task + k0, count);
  store_vector(p.dtype, static_cast<char*>(to) + k0 * element_size(p.dtype), count, total);
}

void reduce_columns(const ConcatTokensParams& p, const Cut& cut, const Sums& sums, int64_t k0) {
  int64_t first = 0;
  for (int64_t i = 0; i < p.source_count; ++i) {
    const TokenSource& s = p.sources[i];
    const int64_t last = first + cut.tasks(s);
    if (s.grad_type != nullptr) reduce_tasks(p, sums, sums.z(0), first, last, k0, s.grad_type);
    first = last;
  }
  if (p.grad_weight != nullptr) reduce_tasks(p, sums, sums.gain(0), 0, first, k0, p.grad_weight);
  if (p.grad_bias != nullptr) reduce_tasks(p, sums, sums.offset(0), 0, first, k0, p.grad_bias);
}

// The gradient of one position from those of the parts of the batch; `position` counts in the output.
void reduce_position(const ConcatTokensParams& p, const Cut& cut, const Sums& sums, int64_t position) {
  const TokenSource* s = p.sources;
  int64_t l = position;
  for (; l >= s->length; ++s) l -= s->length;
  if (s->grad_position.data == nullptr) return;
  float* total = sums.position_parts + position * sums.padded;
  for (int64_t part = 1; part < cut.batch_parts; ++part) {
    add_vector(total, total + part * total_length(p) * sums.padded, p.features);
  }
  store_vector(p.dtype, row_address(s->grad_position, 0, l, p.dtype), p.features, total);
}

}  // namespace

void concat_tokens_forward(const ConcatTokensParams& p) {
  const RowNorm norm = row_norm(p);
  const Cut cut(p);
  const int64_t padded = padded_features(p.features), tasks = cut.tasks(p);
  if (tasks == 0) return;
  const int limit = norm_rows(p.features, false);
  const int64_t slots = has_addend(p) ? Walk::slots(2 * limit, cut.batch) : 0;
  const int64_t per_worker = slots * padded + norm_scratch(p.features);
  const Scratch memory(2 * padded + p.workers.count * per_worker);
  const Affine affine(p, memory.data());
  for_each_claim(p.workers, tasks, 1, [&](int worker, int64_t first, int64_t last) {
    float* ring = memory.data() + 2 * padded + worker * per_worker;
    float* scratch = ring + slots * padded;
    Walk walk(p, cut, first, last, slots > 0 ? ring : nullptr, slots);
    for (NormRows rows = walk.take(limit); rows.count > 0;) {
      const NormRows next = walk.take(limit);
      normalize_rows(norm, rows, next, affine.gain, affine.offset, scratch);
      rows = next;
    }
    finish_streaming();
  });
}

void concat_tokens_backward(const ConcatTokensParams& p) {
  const RowNorm norm = row_norm(p);
  const Cut cut(p);
  Sums sums(p);
  const int64_t padded = sums.padded, tasks = cut.tasks(p), positions = total_length(p);
  const int64_t part_floats = sums.positions && cut.batch_parts > 1 ? cut.batch_parts * positions * padded : 0;
  const int64_t per_worker = 2 * padded + norm_scratch(p.features);
  const Scratch memory(2 * padded + tasks * sums.per_task + part_floats + p.workers.count * per_worker);
  const Affine affine(p, memory.data());
  sums.partials = memory.data() + 2 * padded;
  sums.position_parts = sums.partials + tasks * sums.per_task;
  float* workspace = sums.position_parts + part_floats;
  for_each_claim(p.workers, tasks, 1, [&](int worker, int64_t first, int64_t last) {
    float* addend = workspace + worker * per_worker;
    float *position_sum = addend + padded, *scratch = position_sum + padded;
    for (int64_t task = first; task < last; ++task) {
      run_task(p, norm, cut, sums, task, affine.gain, addend, position_sum, scratch);
    }
    finish_streaming();
  });
  if (sums.per_task > 0) {
    for_each_claim(p.workers, ceil_div(p.features, kColumns), 1, [&](int, int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) reduce_columns(p, cut, sums, block * kColumns);
    });
  }
  if (part_floats > 0) {
    for_each_claim(p.workers, positions, 16, [&](int, int64_t first, int64_t last) {
      for (int64_t l = first; l < last; ++l) reduce_position(p, cut, sums, l);
    });
  }
}

}  // namespace MMK_ISA
}  // namespace mmk
