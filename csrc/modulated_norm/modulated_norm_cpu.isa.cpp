//
//   out = x̂ · gain + offset,   gain = weight · (1 + scale),   offset = bias · (1 + scale) + shift
//
//   With G = grad_out ∘ x̂ and H = grad_out, summed over the tokens that share a scale:
//   grad_scale = G · weight + H · bias,   grad_shift = H,
//   grad_weight = Σ G · (1 + scale),      grad_bias = Σ H · (1 + scale)
//
// Tiling     a task owns a run of tokens of one batch element; gain and offset are formed once for the element, or for
//            every token that has its own. The rows are normalised by csrc/norm.
// Precision  float32. Sums over tokens: a task's own, then the tasks' in their order, whatever the number of threads.
// Limits     any C and any strides of batch and token.
#include "csrc/cpu/schedule.h"
#include "csrc/modulated_norm/modulated_norm.h"
#include "csrc/norm/row_norm.h"
#include "csrc/norm/vectors.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kRun = 64;       // tokens of a forward task
constexpr int64_t kChunk = 128;    // tokens of a backward task: its two sums are then 1/64 of its rows
constexpr int64_t kColumns = 256;  // features of a task that adds up the sums

RowNorm row_norm(const ModulatedNormParams& p) { return {p.norm, p.eps, p.features, p.dtype, p.dtype, p.stream}; }

// The affine weights as floats; null where absent.
struct Affine {
  const float *weight, *bias;

  Affine(const ModulatedNormParams& p, float* memory) : weight(nullptr), bias(nullptr) {
    const int64_t padded = padded_features(p.features);
    if (p.weight != nullptr) {
      load_vector(p.dtype, p.weight, p.features, memory);
      weight = memory;
    }
    if (p.bias != nullptr) {
      load_vector(p.dtype, p.bias, p.features, memory + padded);
      bias = memory + padded;
    }
  }
};

void modulate(const ModulatedNormParams& p, const Affine& affine, int64_t b, int64_t l, float* gain, float* offset) {
  with_element_type(p.dtype, row_address(p.scale, b, l, p.dtype), [&](const auto* scale) {
    const auto* shift = reinterpret_cast<decltype(scale)>(row_address(p.shift, b, l, p.dtype));
    for_each_vector(p.features, [&](int64_t k, int64_t n) {
      const vf factor = load_as_float(scale + k, n) + set1(1.f);
      const vf added = load_as_float(shift + k, n);
      store(gain + k, affine.weight != nullptr ? load(affine.weight + k) * factor : factor);
      store(offset + k, affine.bias != nullptr ? fma(load(affine.bias + k), factor, added) : added);
    });
  });
}

NormRows rows_at(const ModulatedNormParams& p, int64_t b, int64_t l, int64_t count) {
  NormRows rows;
  rows.count = static_cast<int>(max(0, count));
  rows.add[0] = nullptr;
  rows.grad_x[0] = nullptr;
  for (int j = 0; j < rows.count; ++j) {
    rows.x[j] = row_address(p.x, b, l + j, p.dtype);
    if (p.out.data != nullptr) rows.out[j] = row_address(p.out, b, l + j, p.dtype);
    if (p.grad_out.data != nullptr) rows.grad_out[j] = row_address(p.grad_out, b, l + j, p.dtype);
    if (p.grad_x.data != nullptr) rows.grad_x[j] = row_address(p.grad_x, b, l + j, p.dtype);
  }
  return rows;
}

// f(b, first token, last token, task) on the claimed tasks, which are runs of `run` tokens.
template <class Function>
void for_runs_of_tokens(const ModulatedNormParams& p, int64_t run, int64_t first, int64_t last, Function f) {
  const int64_t runs = ceil_div(p.length, run);
  for (int64_t task = first; task < last; ++task) {
    const int64_t begin = task % runs * run;
    f(task / runs, begin, min(begin + run, p.length), task);
  }
}

// From the sums G and H of tokens that share a scale to the gradients, for features k0 … k0 + count - 1. The sums start
// at feature k0, everything else at feature 0.
void pull_modulation(const ModulatedNormParams& p, const Affine& affine, int64_t b, int64_t l, int64_t k0,
                     int64_t count, const float* gain_sum, const float* offset_sum, float* weight_sum,
                     float* bias_sum) {
  with_element_type(p.dtype, row_address(p.scale, b, l, p.dtype), [&](const auto* scale) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(scale)>>;
    T* dscale = p.grad_scale.data != nullptr ? reinterpret_cast<T*>(row_address(p.grad_scale, b, l, p.dtype)) : nullptr;
    T* dshift = p.grad_shift.data != nullptr ? reinterpret_cast<T*>(row_address(p.grad_shift, b, l, p.dtype)) : nullptr;
    for_each_vector(count, [&](int64_t i, int64_t n) {
      const int64_t k = k0 + i;
      const vf g = load(gain_sum + i), h = load(offset_sum + i);
      if (dscale != nullptr) {
        vf d = affine.weight != nullptr ? g * load(affine.weight + k) : g;
        if (affine.bias != nullptr) d = fma(h, load(affine.bias + k), d);
        store_from_float(dscale + k, d, n);
      }
      if (dshift != nullptr) store_from_float(dshift + k, h, n);
      if (weight_sum != nullptr) {
        const vf factor = load_as_float(scale + k, n) + set1(1.f);
        store(weight_sum + i, fma(g, factor, load(weight_sum + i)));
        store(bias_sum + i, fma(h, factor, load(bias_sum + i)));
      }
    });
  });
}

void write_affine(const ModulatedNormParams& p, int64_t k0, int64_t count, const float* weight_sum,
                  const float* bias_sum) {
  const int64_t byte = k0 * element_size(p.dtype);
  if (p.grad_weight != nullptr) store_vector(p.dtype, static_cast<char*>(p.grad_weight) + byte, count, weight_sum);
  if (p.grad_bias != nullptr) store_vector(p.dtype, static_cast<char*>(p.grad_bias) + byte, count, bias_sum);
}

}  // namespace

void modulated_norm_forward(const ModulatedNormParams& p) {
  const RowNorm norm = row_norm(p);
  const int64_t padded = padded_features(p.features), per_worker = 2 * padded + norm_scratch(p.features);
  const Scratch memory(2 * padded + p.workers.count * per_worker);
  const Affine affine(p, memory.data());
  const int64_t step = p.per_token ? 1 : norm_rows(p.features, false);
  for_each_claim(p.workers, p.batch * ceil_div(p.length, kRun), 1, [&](int worker, int64_t first, int64_t last) {
    float* gain = memory.data() + 2 * padded + worker * per_worker;
    float *offset = gain + padded, *scratch = offset + padded;
    int64_t element = -1;  // whose gain and offset these are
    for_runs_of_tokens(p, kRun, first, last, [&](int64_t b, int64_t begin, int64_t end, int64_t) {
      if (!p.per_token && b != element) modulate(p, affine, b, 0, gain, offset);
      element = b;
      for (int64_t l = begin; l < end; l += step) {
        if (p.per_token) modulate(p, affine, b, l, gain, offset);
        const NormRows next = rows_at(p, b, l + step, min(step, p.length - l - step));
        normalize_rows(norm, rows_at(p, b, l, min(step, end - l)), next, gain, offset, scratch);
      }
    });
    finish_streaming();
  });
}

void modulated_norm_backward(const ModulatedNormParams& p) {
  const RowNorm norm = row_norm(p);
  const int64_t chunks = ceil_div(p.length, kChunk), padded = padded_features(p.features);
  const int64_t per_worker = 4 * padded + norm_scratch(p.features);
  const bool affine_sums = p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool wants_sums = affine_sums || p.grad_shift.data != nullptr || p.grad_scale.data != nullptr;
  // A task's two sums: G and H of its tokens, or where every token has its own scale, those of weight and bias.
  const bool keeps_sums = p.per_token ? affine_sums : wants_sums;
  const int64_t partial_floats = keeps_sums ? p.batch * chunks * 2 * padded : 0;
  const Scratch memory(2 * padded + partial_floats + p.workers.count * per_worker);
  const Affine affine(p, memory.data());
  float *partials = memory.data() + 2 * padded, *workspace = partials + partial_floats;
  const int64_t step = p.per_token ? 1 : norm_rows(p.features, true);

  for_each_claim(p.workers, p.batch * chunks, 1, [&](int worker, int64_t first, int64_t last) {
    float* gain = workspace + worker * per_worker;
    float *offset = gain + padded, *token_sums = offset + padded, *scratch = token_sums + 2 * padded;
    int64_t element = -1;
    for_runs_of_tokens(p, kChunk, first, last, [&](int64_t b, int64_t begin, int64_t end, int64_t task) {
      float* partial = keeps_sums ? partials + task * 2 * padded : nullptr;
      if (keeps_sums) clear_vector(partial, 2 * padded);
      if (!p.per_token && b != element) modulate(p, affine, b, 0, gain, offset);
      element = b;
      float* into = !wants_sums ? nullptr : p.per_token ? token_sums : partial;
      const NormSums sums{into, into == nullptr ? nullptr : into + padded, nullptr};
      for (int64_t l = begin; l < end; l += step) {
        if (p.per_token) {
          modulate(p, affine, b, l, gain, offset);
          clear_vector(token_sums, 2 * padded);
        }
        const NormRows next = rows_at(p, b, l + step, min(step, p.length - l - step));
        normalize_rows_backward(norm, rows_at(p, b, l, min(step, end - l)), next, gain, sums, scratch);
        if (p.per_token && wants_sums) {
          pull_modulation(p, affine, b, l, 0, p.features, token_sums, token_sums + padded, partial,
                          partial == nullptr ? nullptr : partial + padded);
        }
      }
    });
    finish_streaming();
  });
  if (!keeps_sums) return;

  for_each_claim(p.workers, ceil_div(p.features, kColumns), 1, [&](int, int64_t first, int64_t last) {
    for (int64_t k0 = first * kColumns; k0 < min(last * kColumns, p.features); k0 += kColumns) {
      const int64_t count = min(kColumns, p.features - k0);
      alignas(64) float weight_sum[kColumns] = {}, bias_sum[kColumns] = {};
      for (int64_t b = 0; b < p.batch; ++b) {
        alignas(64) float gain_sum[kColumns] = {}, offset_sum[kColumns] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const float* partial = partials + (b * chunks + chunk) * 2 * padded + k0;
          add_vector(p.per_token ? weight_sum : gain_sum, partial, count);
          add_vector(p.per_token ? bias_sum : offset_sum, partial + padded, count);
        }
        if (!p.per_token) {
          pull_modulation(p, affine, b, 0, k0, count, gain_sum, offset_sum, affine_sums ? weight_sum : nullptr,
                          affine_sums ? bias_sum : nullptr);
        }
      }
      write_affine(p, k0, count, weight_sum, bias_sum);
    }
  });
}

}  // namespace MMK_ISA
}  // namespace mmk
