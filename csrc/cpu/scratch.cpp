#include "csrc/cpu/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "csrc/cpu/huge_pages.h"

namespace mmk {
namespace {

constexpr size_t kMostKept = size_t{32} << 20;  // bytes, of all blocks of a thread

bool keeps_blocks() {
  static const bool keeps = [] {
    const char* asked = std::getenv("MMKERNELS_KEEP_SCRATCH");
    return asked == nullptr || std::strcmp(asked, "0") != 0;
  }();
  return keeps;
}

// What a thread has given back.
struct Kept {
  ScratchBlock blocks[4];

  // The smallest that has enough, or an empty one.
  ScratchBlock take(size_t bytes) {
    ScratchBlock* found = nullptr;
    for (ScratchBlock& block : blocks) {
      if (block.bytes >= bytes && (found == nullptr || block.bytes < found->bytes)) found = &block;
    }
    return found == nullptr ? ScratchBlock{} : std::exchange(*found, ScratchBlock{});
  }

  // In the place of the smallest, which is returned, as is what all blocks together have too much.
  ScratchBlock put(ScratchBlock given) {
    ScratchBlock* smallest = &given;
    size_t others = given.bytes;
    for (ScratchBlock& block : blocks) {
      others += block.bytes;
      if (block.bytes < smallest->bytes) smallest = &block;
    }
    if (others - smallest->bytes > kMostKept) return given;
    std::swap(*smallest, given);
    return given;
  }

  ~Kept() {
    for (const ScratchBlock& block : blocks) std::free(block.data);
  }
};

thread_local Kept kept;

}  // namespace

ScratchBlock take_scratch(size_t bytes) {
  if (bytes <= kMostKept && keeps_blocks()) {
    if (const ScratchBlock block = kept.take(bytes); block.data != nullptr) return block;
  }
  const bool large = bytes >= kWorthHugePages;
  const size_t alignment = large ? kHugePage : 64, size = (bytes + alignment - 1) / alignment * alignment;
  const ScratchBlock block{static_cast<float*>(std::aligned_alloc(alignment, size)), size};
  if (block.data == nullptr) throw std::bad_alloc();
  if (large) ask_for_huge_pages(block.data, size);
  return block;
}

void give_back_scratch(ScratchBlock block) noexcept {
  if (block.bytes <= kMostKept && keeps_blocks()) block = kept.put(block);
  std::free(block.data);
}

}  // namespace mmk
