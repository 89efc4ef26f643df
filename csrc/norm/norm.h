// What the row ops (modulated_norm, concat_tokens) have in common. Torch-free.
#pragma once

#include <cstdint>

namespace mmk {

enum class Norm : int8_t { none, layer, rms };

// Row l of batch element b starts at data + b·batch + l·row (in elements); its features are contiguous.
struct TokenRows {
  void* data = nullptr;
  int64_t batch = 0, row = 0;
};

}  // namespace mmk
