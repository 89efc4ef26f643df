//   z = [x₁; …; x_M] Wᵀ + b,  y = residual + tanh(gate) · act(z)
//
// Tiling     a task is a block of about 96 rows by 256 features. The sources' columns are walked in chunks of 256, the
//            sums of a block staying in a float tile (96 KB), which the epilogue turns into y while it is in cache.
//            See csrc/concat/forward.h for which operand is packed, and for cores with a large level-2 cache.
// Precision  products in float32, or bfloat16 pairs with float32 sums; the epilogue in float32. Chunks are added to the
//            tile in order, so that bits depend neither on the tiling of rows nor on threads.
// Limits     any widths, also 0; rows at up to two strides; absent rows are neither read nor multiplied.
#include "csrc/concat/forward.h"
#include "csrc/concat_linear/epilogue.h"

namespace mmk {
namespace MMK_ISA {

void concat_linear_forward(const ConcatLinearParams& p) {
  Scratch vectors(LinearEpilogue::floats(p));
  const LinearEpilogue epilogue(p, vectors.data());
  const PlainLoader loader{p.sources};
  with_pairs(p.sources.dtype, p.workers.tiles, is_worth_tiles(p.sources),
             [&](auto pairs) { multiply_concatenation<pairs>(p.sources, p.workers, loader, kBlockRows, epilogue); });
}

}  // namespace MMK_ISA
}  // namespace mmk
