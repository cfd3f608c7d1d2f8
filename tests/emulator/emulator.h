// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda/device.h means on a CPU: the same words, run by fibers (block.h) in memory that is watched (memory.h).
//
// It finds: accesses out of bounds, misaligned, of unset shared memory, or in a race; copies that nobody waited for;
// lanes and threads that diverge at a collective or a barrier; deadlocks. It cannot show: bank conflicts, the order in
// which blocks see each other's memory, time.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "memory.h"

#define DRSEG_KERNEL(threads, blocks) inline void
#define DRSEG_DEVICE inline
#define DRSEG_UNROLL
#define DRSEG_UNROLL_BY(times)

namespace drseg::device {

using emulator::Access;
using emulator::Arena;
using emulator::block;
using emulator::Index3;
using emulator::LANES;
using emulator::Where;

using half = _Float16;
struct bfloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(half value) { return float(value); }
inline float widen(bfloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }
template <class T>
T narrow(float value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    // to the nearest, ties to even
    const auto bits = std::bit_cast<uint32_t>(value);
    if (value != value) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return T(value);
  }
}

inline int thread_index() { return block().me; }
inline int lane_index() { return block().me % LANES; }
inline int warp_index() { return block().me / LANES; }
inline Index3 block_index() { return block().index; }

inline int bits_of(float value) { return std::bit_cast<int>(value); }
inline float float_of(int bits) { return std::bit_cast<float>(bits); }
inline int count_bits(unsigned value) { return std::popcount(value); }
inline int first_bit(unsigned value) { return std::countr_zero(value); }
// max(value, 0), and NaN of NaN
inline float positive(float value) { return value < 0 ? 0.0f : value; }
using std::exp;
using std::fma;
using std::log1p;
using std::sqrt;
inline float reciprocal_root(float value) { return 1 / std::sqrt(value); }

inline void sync_block(Where where = Where::current()) { block().sync_block(where); }
inline void sync_warp(Where where = Where::current()) { block().sync_warp(where); }
// Of so many threads, whole warps; `id` from 1 to 15.
inline void sync_named(int id, unsigned threads, Where where = Where::current()) { block().sync_named(id, threads, where); }

inline unsigned ballot(bool mine, Where where = Where::current()) {
  return block().collective("ballot", mine, where, [](auto of) {
    unsigned found = 0;
    for (int l = 0; l < LANES; ++l) found |= unsigned(of(l)) << l;
    return found;
  });
}
template <class T>
T shuffle(T value, int lane, Where where = Where::current()) {
  return block().collective("shuffle", value, where, [lane](auto of) { return T(of(lane & 31)); });
}
template <class T>
T shuffle_xor(T value, int mask, Where where = Where::current()) {
  const int lane = lane_index() ^ mask;
  return block().collective("shuffle_xor", value, where, [lane](auto of) { return T(of(lane & 31)); });
}
template <class Join>
int reduced(const char* what, int value, Where where, Join join) {
  return block().collective(what, value, where, [&](auto of) {
    int found = of(0);
    for (int l = 1; l < LANES; ++l) found = join(found, of(l));
    return found;
  });
}
inline int warp_sum(int value, Where where = Where::current()) {
  return reduced("warp_sum", value, where, [](int a, int b) { return a + b; });
}
inline int warp_min(int value, Where where = Where::current()) {
  return reduced("warp_min", value, where, [](int a, int b) { return std::min(a, b); });
}
inline int warp_max(int value, Where where = Where::current()) {
  return reduced("warp_max", value, where, [](int a, int b) { return std::max(a, b); });
}

// Memory of the device, as a kernel is given it.
template <class T>
class Global : public emulator::View<T, emulator::GlobalMemory> {
 public:
  using emulator::View<T, emulator::GlobalMemory>::View;

  // What begins with element i.
  Global from(int64_t i) const { return {this->start_ + i, this->size_ - i}; }
};

// Memory of a block: `count` elements that begin so many bytes into what the launch gives it.
template <class T>
class Shared : public emulator::View<T, emulator::SharedMemory> {
 public:
  Shared(size_t offset, int64_t count, Where where = Where::current())
      : emulator::View<T, emulator::SharedMemory>(reinterpret_cast<T*>(emulator::arena().start() + offset), count) {
    if (offset + count * sizeof(T) > emulator::arena().size())
      block().fault("shared memory out of bounds: " + std::to_string(offset + count * sizeof(T)) + " bytes of " +
                        std::to_string(emulator::arena().size()),
                    where);
    if (offset % alignof(T)) block().fault("shared memory is not aligned: byte " + std::to_string(offset), where);
  }

  // What begins with element i.
  Shared from(int64_t i) const {
    Shared found = *this;
    found.start_ += i;
    found.size_ -= i;
    return found;
  }
};

// 16 bytes from `from[j]` to `to[i]`, or zeros. They arrive when this thread waits for their group, no earlier.
template <class T>
void copy_async(const Shared<T>& to, int64_t i, const Global<const T>& from, int64_t j, bool on = true,
                Where where = Where::current()) {
  constexpr int64_t count = 16 / sizeof(T);
  T* target = to.address(i, count, 16, where);
  const T* source = on ? from.address(j, count, 16, where) : nullptr;
  if (emulator::arena().checks) {
    const size_t first = size_t(reinterpret_cast<unsigned char*>(target) - emulator::arena().start()) / 2;
    for (size_t n = first; n < first + 8; ++n) {
      emulator::Place& place = emulator::arena().places[n];
      if (place.in_flight) block().fault("two copies to one place are under way", where);
      emulator::note(place, "shared", n, Access::write, where);
      place.in_flight = true;
    }
  }
  block().thread().copies.back().push_back({target, source, where});
}
inline void copies_end_group() { block().thread().copies.emplace_back(); }
// Until at most so many of this thread's groups are under way.
template <int GROUPS>
void copies_wait() {
  auto& groups = block().thread().copies;
  while (int(groups.size()) - 1 > GROUPS) {
    for (const emulator::Copy& copy : groups.front()) {
      if (emulator::arena().checks) {
        const size_t first = size_t(static_cast<unsigned char*>(copy.to) - emulator::arena().start()) / 2;
        for (size_t n = first; n < first + 8; ++n) emulator::arena().places[n].in_flight = false;
        emulator::touch_shared(copy.to, 16, Access::write, copy.where);
      }
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

// A barrier in shared memory at which threads arrive without waiting; it has phases 0, 1, 0, ...
class MemoryBarrier {
 public:
  explicit MemoryBarrier(const Shared<uint64_t>& place, Where where = Where::current())
      : state_(block().memory_barrier(place.address(0, 1, 8, where))) {}
  void set_up(unsigned threads) const { state_.expected = threads; }
  void arrive(Where where = Where::current()) const { block().arrive(state_, where); }
  // Until the phase of this parity is complete.
  void wait(unsigned parity, Where where = Where::current()) const { block().wait_for(state_, parity, where); }

 private:
  emulator::MemoryBarrier& state_;
};

// Four 8 x 8 matrices of 16-bit elements, whose rows begin where the lanes say: lane l those of matrix l / 8, row l % 8.
template <bool TRANSPOSED = false, class T>
void load_matrices(uint32_t (&to)[4], const Shared<T>& from, int64_t i, Where where = Where::current()) {
  static_assert(sizeof(T) == 2);
  const T* row = from.address(i, 8, 16, where);
  emulator::touch_shared(row, 16, Access::read, where);
  const int lane = lane_index();
  block().collective("load_matrices", row, where, [&](auto of) {
    for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int n = 0; n < 2; ++n) {
        const int r = TRANSPOSED ? 2 * (lane % 4) + n : lane / 4, c = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + n;
        std::memcpy(&pair[n], of(8 * m + r) + c, 2);
      }
      std::memcpy(&to[m], pair, 4);
    }
    return 0;
  });
}

// A tensor core keeps fewer digits of a sum than are in it, and cuts off what is left.
inline float cut(double value) {
  float near = float(value);
  if (std::isfinite(near) && std::abs(double(near)) > std::abs(value)) near = std::nextafter(near, 0.0f);
  return near;
}

struct Fragment {
  uint32_t a[4], b[2];
};

// sums (16, 8) += a (16, K) b (K, 8) of a warp, each lane with its share as mma.sync has it; `at(word, part)` reads one
// of the elements of a register.
template <int DEPTH, int PER_WORD, class At>
void multiply_add(const char* what, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, At at,
                  const Where& where) {
  const int group = lane_index() / 4, quad = lane_index() % 4;
  block().collective(what, Fragment{{a[0], a[1], a[2], a[3]}, {b0, b1}}, where, [&](auto of) {
    constexpr int HALF = DEPTH / 2;
    for (int n = 0; n < 4; ++n) {
      const int row = group + 8 * (n / 2), column = 2 * quad + n % 2;
      double sum = sums[n];
      for (int k = 0; k < DEPTH; ++k) {
        const int word = k % HALF / PER_WORD, part = k % PER_WORD;
        const Fragment &left = of(row % 8 * 4 + word), &right = of(column * 4 + word);
        sum += double(at(left.a[row / 8 + 2 * (k / HALF)], part)) * double(at(right.b[k / HALF], part));
      }
      sums[n] = cut(sum);
    }
    return 0;
  });
}

// of float16 or bfloat16, 16 deep
template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where = Where::current()) {
  static_assert(sizeof(T) == 2);
  multiply_add<16, 2>("multiply_add", sums, a, b0, b1,
                      [](uint32_t word, int part) { return widen(std::bit_cast<T>(uint16_t(word >> 16 * part))); }, where);
}
// of TF32, 8 deep: float32 whose last 13 bits count for nothing
inline void multiply_add_tf32(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              Where where = Where::current()) {
  multiply_add<8, 1>("multiply_add_tf32", sums, a, b0, b1,
                     [](uint32_t word, int) { return std::bit_cast<float>(word & ~uint32_t(0x1fff)); }, where);
}

// What every architecture has that the kernels are built for.
inline size_t most_shared_bytes() { return 99 << 10; }
inline int blocks_at_once(size_t, unsigned) { return 8; }

struct Launch {
  unsigned blocks_x, blocks_y, threads;
  size_t shared_bytes;
  void* stream = nullptr;
};

// How many there have been. With DRSEG_EMULATOR_RUN=0 they are counted alone, which leaves the host's part of the time.
inline int64_t& launches() {
  static int64_t count = 0;
  return count;
}

// Runs a kernel's blocks one after another, in an order of their own.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
  const char *seed = std::getenv("DRSEG_EMULATOR_SEED"), *check = std::getenv("DRSEG_EMULATOR_CHECK");
  const char* runs = std::getenv("DRSEG_EMULATOR_RUN");
  ++launches();
  if (runs && std::string(runs) == "0") return;
  if (how.threads == 0 || how.threads % LANES || how.threads > 1024 || how.shared_bytes > most_shared_bytes())
    throw std::runtime_error("emulator: a launch of " + std::to_string(how.threads) + " threads with " +
                             std::to_string(how.shared_bytes) + " bytes of shared memory");
  auto call = [&] { kernel(Parameters(arguments)...); };
  using Call = decltype(call);
  emulator::Block each({how.blocks_x, how.blocks_y, 1}, how.threads, seed ? unsigned(std::atoi(seed)) : 1u,
                       [](void* given) { (*static_cast<Call*>(given))(); }, &call);
  Arena memory;
  memory.bytes.resize(how.shared_bytes + 128);
  memory.places.resize(how.shared_bytes / 2);
  memory.checks = !check || std::string(check) != "0";
  struct Guard {
    explicit Guard(Arena& own) { Arena::current() = &own; }
    ~Guard() {
      Arena::current() = nullptr;
      emulator::Block::current() = nullptr;
    }
  } guard(memory);
  std::vector<unsigned> order(size_t(how.blocks_x) * how.blocks_y);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), each.random());
  for (unsigned n : order) {
    each.index = {n % how.blocks_x, n / how.blocks_x, 0};
    each.number = n + 1;
    // NaN, also as float16
    std::memset(memory.bytes.data(), 0xff, memory.bytes.size());
    each.run();
  }
}

}  // namespace drseg::device
