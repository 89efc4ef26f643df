// Whether the core has instructions for products of a half precision. Without, torch's matrix products of it take many
// times as long as those of float32: of bfloat16 8 times on Zen 3.
#pragma once

namespace mmk {

inline bool has_bf16_products() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

inline bool has_f16_products() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512fp16");
#else
  return true;
#endif
}

}  // namespace mmk
