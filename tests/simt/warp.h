// What the 32 lanes of a warp do together: shuffles, votes, matrix loads and products; and copies to shared memory that
// go on in the background. The names are those of csrc/cuda/device.h.
#pragma once

#include "simt.h"

namespace simt {

// --- shuffles and votes ----------------------------------------------------------------------------------------------

struct Shuffled {
  uint32_t value, result;
  unsigned from;  // lane
};

inline void shuffle_lanes(void** arguments) {
  for (unsigned i = 0; i < kLanes; ++i) {
    auto* self = static_cast<Shuffled*>(arguments[i]);
    self->result = static_cast<Shuffled*>(arguments[self->from % kLanes])->value;
  }
}

inline unsigned lane() {
  const World& w = world();
  return unsigned(w.current - w.threads.data()) % kLanes;
}

template <typename T>
T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) == 4);
  Shuffled s{0, 0, from};
  std::memcpy(&s.value, &value, 4);
  meet(shuffle_lanes, &s);
  std::memcpy(&value, &s.result, 4);
  return value;
}

struct Vote {
  bool yes;
  unsigned all;
};

inline void count_votes(void** arguments) {
  unsigned all = 0;
  for (unsigned i = 0; i < kLanes; ++i) all |= unsigned(static_cast<Vote*>(arguments[i])->yes) << i;
  for (unsigned i = 0; i < kLanes; ++i) static_cast<Vote*>(arguments[i])->all = all;
}

inline void nothing(void**) {}

// --- 16-bit formats --------------------------------------------------------------------------------------------------

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;  // as the hardware's
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float fp16_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return float(x);
}

inline uint16_t float_to_fp16(float x) {
  const _Float16 narrow = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return x != x ? 0x7fff : bits;
}

// --- mma.m16n8k16 and ldmatrix ---------------------------------------------------------------------------------------

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

template <float (*to_float)(uint16_t)>
void multiply_tiles(void** arguments) {
  float a[16][16], b[16][8], c[16][8];
  ++world().statistics.mma;
  const auto low = [](uint32_t pair) { return to_float(uint16_t(pair)); };
  const auto high = [](uint32_t pair) { return to_float(uint16_t(pair >> 16)); };
  for (unsigned i = 0; i < kLanes; ++i) {
    const auto* p = static_cast<const Product*>(arguments[i]);
    const unsigned group = i / 4, t = i % 4 * 2;
    for (unsigned j = 0; j < 4; ++j) {
      const unsigned row = group + j % 2 * 8, column = t + j / 2 * 8;
      a[row][column] = low(p->a[j]);
      a[row][column + 1] = high(p->a[j]);
      c[group + j / 2 * 8][t + j % 2] = p->d[j];
    }
    b[t][group] = low(p->b0);
    b[t + 1][group] = high(p->b0);
    b[t + 8][group] = low(p->b1);
    b[t + 9][group] = high(p->b1);
  }
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned k = 0; k < 16; ++k)
      for (unsigned column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (unsigned i = 0; i < kLanes; ++i) {
    auto* p = static_cast<Product*>(arguments[i]);
    for (unsigned j = 0; j < 4; ++j) p->d[j] = c[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
  }
}

struct MatrixLoad {
  uint16_t row[8];
  uint32_t* result;
  const void* address;
};

template <bool kTransposed>
void load_matrices(void** arguments) {
  Statistics& statistics = world().statistics;
  ++statistics.matrix_loads;
  const auto of = [&](unsigned i) { return static_cast<MatrixLoad*>(arguments[i]); };
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    unsigned rows_in_bank[8] = {}, most = 0;  // banks of 16 bytes
    for (unsigned k = 0; k < 8; ++k) {
      const uintptr_t bank = reinterpret_cast<uintptr_t>(of(8 * matrix + k)->address) / 16 % 8;
      most = std::max(most, ++rows_in_bank[bank]);
    }
    statistics.bank_conflicts += most - 1;
  }
  for (unsigned i = 0; i < kLanes; ++i) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](unsigned row, unsigned column) { return uint32_t(of(8 * matrix + row)->row[column]); };
      const unsigned g = i / 4, t = i % 4 * 2;
      of(i)->result[matrix] =
          kTransposed ? element(t, g) | element(t + 1, g) << 16 : element(g, t) | element(g, t + 1) << 16;
    }
  }
}

inline void check_aligned(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail(std::string(what) + " at an address that 16 does not divide");
}

inline void check_shared(const void* address, size_t bytes, const char* what) {
  const World& w = world();
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < w.shared || p + bytes > w.shared + w.shared_bytes) fail(std::string(what) + " beyond the shared memory");
}

template <bool kTransposed>
void load_matrix(uint32_t (&result)[4], const void* address) {
  check_aligned(address, "ldmatrix");
  check_shared(address, 16, "ldmatrix");
  MatrixLoad load;
  std::memcpy(load.row, address, 16);
  load.result = result;
  load.address = address;
  meet(load_matrices<kTransposed>, &load);
}

// --- cp.async --------------------------------------------------------------------------------------------------------

/// The target is NaN until the copy has been waited for, and the source is read only then.
inline void start_copy(void* to, const void* from) {
  check_aligned(to, "cp.async to");
  check_aligned(from, "cp.async from");
  check_shared(to, 16, "cp.async to");
  auto* halves = static_cast<uint16_t*>(to);
  for (int i = 0; i < 8; ++i) halves[i] = 0x7fc1;
  Unobserved unobserved;
  world().current->open.push_back({to, from});
  ++world().statistics.copies;
}

inline void commit_copies() {
  Thread& t = *world().current;
  t.committed.push_back(std::move(t.open));
  t.open.clear();
}

inline void wait_for_copies(size_t but) {
  auto& committed = world().current->committed;
  while (committed.size() > but) {
    for (const Copy& copy : committed.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    committed.erase(committed.begin());
  }
}

}  // namespace simt

inline void __syncwarp() {
  simt::World& w = simt::world();
  void* address = &w.threads[w.current->warp * simt::kLanes];
  simt::release(address);
  simt::meet(simt::nothing, nullptr);
  simt::acquire(address);
}
