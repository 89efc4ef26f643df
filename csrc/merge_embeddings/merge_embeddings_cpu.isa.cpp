//
//   merged[r] = mask[r] ? modal[number of true positions before r] : text[r],   r over batch and length
//
// Tiling     a task owns a run of positions; how many true positions come before each run is counted first, so that
//            tasks do not wait for each other. The modal tensors follow one another as if concatenated.
// Limits     rows of any number of bytes, any strides of batch and token.
#include "csrc/cpu/schedule.h"
#include "csrc/merge_embeddings/merge_embeddings.h"

namespace mmk {
namespace MMK_ISA {
namespace {

constexpr int64_t kRun = 64;  // positions of a task
constexpr int64_t kVector = VW * 4;

char* address(const ByteRows& rows, int64_t b, int64_t l) { return rows.data + b * rows.batch + l * rows.row; }

// A copy; `from` null: zeros. Streamed, the part that is aligned in `to` bypasses the caches.
void write_row(char* to, const char* from, int64_t bytes, bool streamed) {
  if (!kStreams || !streamed || bytes < 4 * kVector) {
    from == nullptr ? std::memset(to, 0, static_cast<size_t>(bytes))
                    : std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kVector - 1);
  if (head > 0) write_row(to, from, head, false);
  int64_t i = head;
  if (from == nullptr) {
    for (; i + kVector <= bytes; i += kVector) stream(reinterpret_cast<float*>(to + i), zero());
  } else {
    for (; i + kVector <= bytes; i += kVector) {
      stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
    }
  }
  if (i < bytes) write_row(to + i, from == nullptr ? nullptr : from + i, bytes - i, false);
}

// The rows of the modal tensors one after the other, from row `t` of all on.
class ModalCursor {
 public:
  ModalCursor(const MergeParams& p, int64_t t) : modal_(p.modals), end_(p.modals + p.modal_count), row_(t) { settle(); }
  char* take() {
    char* row = modal_->rows.data == nullptr ? nullptr : address(modal_->rows, 0, row_);
    ++row_;
    settle();
    return row;
  }
  bool done() const { return modal_ == end_; }

 private:
  void settle() {
    for (; modal_ != end_ && row_ >= modal_->length; ++modal_) row_ -= modal_->length;
  }
  const ModalRows* modal_;
  const ModalRows* end_;
  int64_t row_;
};

// f(r, b, l, cursor) on every position of the claimed runs, the cursor standing at the next modal row.
template <class Function>
void for_each_position(const MergeParams& p, Function f) {
  const int64_t positions = p.batch * p.length, runs = ceil_div(positions, kRun);
  const Scratch memory(2 * runs);
  auto* before = reinterpret_cast<int64_t*>(memory.data());  // true positions before each run
  int64_t total = 0;
  for (int64_t run = 0; run < runs; ++run) {
    before[run] = total;
    total += count_true(p.mask + run * kRun, min(kRun, positions - run * kRun));
  }
  for_each_claim(p.workers, runs, 1, [&](int, int64_t first, int64_t last) {
    ModalCursor cursor(p, before[first]);
    int64_t b = first * kRun / p.length, l = first * kRun % p.length;
    for (int64_t r = first * kRun; r < min(last * kRun, positions); ++r) {
      f(r, b, l, cursor);
      if (++l == p.length) {
        l = 0;
        ++b;
      }
    }
    stream_fence();
  });
}

}  // namespace

int64_t count_true(const uint8_t* mask, int64_t size) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += mask[i] != 0;
  return count;
}

void merge_rows(const MergeParams& p) {
  for_each_position(p, [&](int64_t r, int64_t b, int64_t l, ModalCursor& modal) {
    const char* from = p.mask[r] != 0 ? modal.take() : address(p.text, b, l);
    write_row(address(p.merged, b, l), from, p.row_bytes, p.stream);
  });
}

void split_rows(const MergeParams& p) {
  for_each_position(p, [&](int64_t r, int64_t b, int64_t l, ModalCursor& modal) {
    const char* from = address(p.merged, b, l);
    if (p.mask[r] != 0) {
      if (char* to = modal.take(); to != nullptr) write_row(to, from, p.row_bytes, p.stream);
      from = nullptr;
    }
    if (p.text.data != nullptr) write_row(address(p.text, b, l), from, p.row_bytes, p.stream);
  });
  for (ModalCursor unused(p, count_true(p.mask, p.batch * p.length)); !unused.done();) {
    if (char* to = unused.take(); to != nullptr) write_row(to, nullptr, p.row_bytes, false);
  }
}

}  // namespace MMK_ISA
}  // namespace mmk
