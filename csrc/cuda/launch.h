// Launching a kernel on a stream, or in the emulator: the last words between host and device.
#pragma once

#include <stdexcept>
#include <string>

#include "csrc/cuda/device.h"

namespace mmk::cuda {

#ifdef MMK_SIMT
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

struct Launch {
  const char* name;  // of the op and its pass, for errors
  dim3 grid;         // no program runs where one is 0
  dim3 block;
  int shared_bytes;
  Stream stream;
};

#ifndef MMK_SIMT
inline void check(cudaError_t status, const Launch& at, const char* what) {
  if (status == cudaSuccess) return;
  const auto size = [](const dim3& d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
  };
  throw std::runtime_error(std::string(at.name) + ": " + what + " failed with " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + "): grid " + size(at.grid) + ", block " + size(at.block) +
                           ", " + std::to_string(at.shared_bytes) + " bytes of shared memory");
}
#endif

template <typename... Parameters, typename... Arguments>
void launch(const Launch& at, void (*kernel)(Parameters...), Arguments... arguments) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return;
#ifdef MMK_SIMT
  simt::launch(at.grid, at.block, size_t(at.shared_bytes), [=] { kernel(arguments...); });
#else
  if (at.shared_bytes > 48 * 1024) {
    const void* symbol = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, at.shared_bytes), at,
          "asking for shared memory");
  }
  kernel<<<at.grid, at.block, at.shared_bytes, at.stream>>>(arguments...);
  check(cudaGetLastError(), at, "the launch");
#endif
}

}  // namespace mmk::cuda
