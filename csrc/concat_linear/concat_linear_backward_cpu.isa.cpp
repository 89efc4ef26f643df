//   dz = dy · tanh(gate) · act'(z),  db = Σ dz,  dgate = Σ dy · act(z) · (1 - tanh² gate),  dx_i = dz W_i,  dW_i = dzᵀ
//   x_i
//
// Tiling     csrc/concat/backward.h. dz is made a block of rows at a time and used while it is in cache.
// Precision  as forward; dz is rounded to bfloat16 where products run on its pairs, and stays float32 elsewhere. Sums
//            over rows: blocks of 96 in float32, then the blocks in order.
// Limits     as forward; a gradient that nobody asked for costs nothing.
#include "csrc/concat/backward.h"
#include "csrc/concat_linear/gradient.h"

namespace mmk {
namespace MMK_ISA {
namespace {

template <bool kPairs>
void backward(const ConcatLinearParams& p) {
  Scratch vectors(LinearEpilogue::floats(p));
  const LinearEpilogue epilogue(p, vectors.data());
  LinearGradient<kPairs> gradient(p, epilogue);
  ConcatBackward<kPairs, LinearGradient<kPairs>>(p.sources, p.workers, gradient).run();
}

}  // namespace

void concat_linear_backward(const ConcatLinearParams& p) {
  with_pairs(p.sources.dtype, p.workers.tiles, is_worth_tiles(p.sources), [&](auto pairs) { backward<pairs>(p); });
}

}  // namespace MMK_ISA
}  // namespace mmk
