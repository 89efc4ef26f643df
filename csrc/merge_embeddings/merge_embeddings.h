// merge_embeddings: rows of text, some replaced by the rows of a list of modal tensors in turn. Bytes are copied,
// whatever they mean. Torch-free.
#pragma once

#include "csrc/cpu/isa.h"
#include "csrc/cpu/workers.h"

namespace mmk {

// Row l of batch element b starts at data + b·batch + l·row (in bytes).
struct ByteRows {
  char* data = nullptr;
  int64_t batch = 0, row = 0;
};

struct ModalRows {
  ByteRows rows;  // data null: a gradient that is not needed
  int64_t length = 0;
};

struct MergeParams {
  int64_t batch = 0, length = 0, row_bytes = 0;
  const uint8_t* mask = nullptr;  // [B, L], dense
  ModalRows* modals = nullptr;    // together at least as many rows as the mask has true positions
  int64_t modal_count = 0;
  ByteRows text, merged;  // backward: the gradients; text's data null where not needed
  bool stream = false;    // the large results bypass the caches
  Workers workers{};
};

MMK_KERNEL(int64_t, count_true, const uint8_t* mask, int64_t size);  // bytes that are not 0
MMK_KERNEL(void, merge_rows, const MergeParams&);
// The other way: rows of merged go to the modals where the mask is true, else to text; the rest of both is zeroed.
MMK_KERNEL(void, split_rows, const MergeParams&);

}  // namespace mmk
