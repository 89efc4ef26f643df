#pragma once

#include <cstdint>

namespace mmk {

enum class Activation : int8_t { none, relu, gelu, gelu_tanh, silu, tanh, sigmoid, quick_gelu };

// Whether the derivative follows from the activation's value alone.
constexpr bool derives_from_output(Activation a) {
  return a == Activation::none || a == Activation::relu || a == Activation::tanh || a == Activation::sigmoid;
}

}  // namespace mmk
