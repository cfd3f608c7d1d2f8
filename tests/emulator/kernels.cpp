// SPDX-License-Identifier: Apache-2.0
// Kernels that are right, and kernels with one fault each: `kernels NAME` runs one and says what the emulator found.
#include <cstdio>
#include <functional>

#include "emulator.h"

using namespace drseg::device;

namespace {

template <class T>
Global<T> view(std::vector<T>& values) {
  return {values.data(), int64_t(values.size())};
}
template <class T>
Global<const T> constant(const std::vector<T>& values) {
  return {values.data(), int64_t(values.size())};
}

void expect(bool right, const char* what) {
  if (!right) throw std::runtime_error(std::string("wrong result: ") + what);
}

// ------------------------------------------------------------------ barriers and races

DRSEG_KERNEL(64, 1) reverse(Global<const float> in, Global<float> out, bool barrier) {
  Shared<float> kept(0, 64);
  const int t = thread_index();
  kept.set(t, in.get(t));
  if (barrier) sync_block();
  out.set(t, kept.get(63 - t));
}

// Every thread reads, then one writes: a race with the reads, which only a barrier between them orders.
DRSEG_KERNEL(64, 1) overwrite(Global<const float> in, Global<float> out, bool barrier) {
  Shared<float> kept(0, 1);
  const int t = thread_index();
  if (t == 0) kept.set(0, in.get(0));
  sync_block();
  out.set(t, kept.get(0));
  if (barrier) sync_block();
  if (t == 63) kept.set(0, 1.0f);
}

// Lanes of one warp are ordered by sync_warp, and by nothing less.
DRSEG_KERNEL(32, 1) within_a_warp(Global<float> out, bool barrier) {
  Shared<float> kept(0, 32);
  const int t = thread_index();
  kept.set(t, float(t));
  if (barrier)
    sync_warp();
  else
    ballot(true);
  out.set(t, kept.get(t ^ 1));
}

// Two halves of a word by two threads are no race.
DRSEG_KERNEL(32, 1) halves(Global<float> out) {
  Shared<half> kept(0, 32);
  const int t = thread_index();
  kept.set(t, half(t));
  sync_warp();
  out.set(t, float(kept.get(t)));
}

// Warps 0 and 1 exchange by a barrier of their own, while warp 2 stays out of it.
DRSEG_KERNEL(96, 1) named(Global<float> out, bool all) {
  Shared<float> kept(0, 96);
  const int t = thread_index();
  if (t < 64) {
    kept.set(t, float(t));
    sync_named(1, 64);
    out.set(t, kept.get(63 - t));
  } else if (all) {
    out.set(t, kept.get(t - 64));
  }
}

// Warp 0 makes, warp 1 takes, eight times over in one place.
DRSEG_KERNEL(64, 1) produce(Global<float> out, bool waits) {
  Shared<uint64_t> places(0, 2);
  Shared<float> kept(64, 32);
  MemoryBarrier full(Shared<uint64_t>(0, 1)), empty(Shared<uint64_t>(8, 1));
  const int t = thread_index(), lane = lane_index();
  full.set_up(32);
  empty.set_up(32);
  sync_block();
  for (unsigned n = 0; n < 8; ++n) {
    if (t < 32) {
      if (n > 0 && waits) empty.wait((n - 1) & 1);
      kept.set(lane, float(n * 32 + lane));
      full.arrive();
    } else {
      full.wait(n & 1);
      out.set(n * 32 + lane, kept.get(31 - lane));
      empty.arrive();
    }
  }
}

DRSEG_KERNEL(64, 1) leaves(Global<float> out) {
  const int t = thread_index();
  if (t == 5) return;
  sync_block();
  out.set(t, 1.0f);
}
DRSEG_KERNEL(64, 1) other_barrier(Global<float> out) {
  const int t = thread_index();
  if (t < 32)
    sync_block();
  else
    sync_block();
  out.set(t, 1.0f);
}
DRSEG_KERNEL(32, 1) other_collective(Global<int> out) {
  const int t = thread_index();
  if (t < 16)
    out.set(t, warp_sum(1));
  else
    out.set(t, warp_max(1));
}
DRSEG_KERNEL(32, 1) lane_is_missing(Global<int> out) {
  const int t = thread_index();
  if (t != 7) out.set(t, warp_sum(1));
}
DRSEG_KERNEL(64, 1) named_of_too_many(Global<float> out) {
  const int t = thread_index();
  if (t < 32) sync_named(2, 64);
  out.set(t, 1.0f);
}

// ------------------------------------------------------------------ memory

DRSEG_KERNEL(32, 1) unset(Global<float> out) {
  Shared<float> kept(0, 64);
  const int t = thread_index();
  kept.set(t, 1.0f);
  sync_warp();
  out.set(t, kept.get(t + 1));
}
DRSEG_KERNEL(32, 1) outside_global(Global<const float> in, Global<float> out) { out.set(thread_index(), in.get(thread_index() + 1)); }
DRSEG_KERNEL(32, 1) outside_shared(Global<float> out) {
  Shared<float> kept(0, 31);
  kept.set(thread_index(), 1.0f);
}
DRSEG_KERNEL(32, 1) too_much_shared(Global<float> out) { Shared<float> kept(64, 32); }
DRSEG_KERNEL(32, 1) misaligned(Global<const float> in, Global<float> out) {
  struct alignas(16) Four {
    float value[4];
  };
  out.set(thread_index(), in.get_as<Four>(thread_index() == 3 ? 2 : 0).value[0]);
}
DRSEG_KERNEL(32, 1) two_blocks_write(Global<int> out, bool atomic) {
  const int t = thread_index();
  if (atomic)
    out.add(t, 1);
  else
    out.set(t, int(block_index().x));
}
DRSEG_KERNEL(64, 1) count(Global<int> out, bool atomic) {
  Shared<int> counted(0, 1);
  const int t = thread_index();
  if (t == 0) counted.set(0, 0);
  sync_block();
  if (atomic)
    counted.add(0, 1);
  else
    counted.set(0, counted.get(0) + 1);
  sync_block();
  out.set(t, counted.get(0));
}

// ------------------------------------------------------------------ copies

// Sums of eight rows, copied three at a time. LOOSE waits for one group too few.
template <int GROUPS>
DRSEG_KERNEL(64, 1) staged(Global<const float> in, Global<float> out, bool barrier, bool early) {
  const int t = thread_index();
  Shared<float> rows(0, 3 * 256);
  const auto load = [&](int n) {
    if (n < 8) copy_async(rows, n % 3 * 256 + 4 * t, in, n * 256 + 4 * t);
    copies_end_group();
  };
  float total = 0;
  load(0);
  load(1);
  for (int n = 0; n < 8; ++n) {
    if (early) load(n + 2);
    copies_wait<GROUPS>();
    if (barrier) sync_block();
    if (!early) load(n + 2);
    for (int c = 0; c < 4; ++c) total += rows.get(n % 3 * 256 + (4 * t + 97 + c) % 256);
  }
  copies_wait<0>();
  out.set(t, total);
}
DRSEG_KERNEL(32, 1) unwaited(Global<const float> in, Global<float> out) {
  Shared<float> kept(0, 128);
  copy_async(kept, 4 * thread_index(), in, 4 * thread_index());
  copies_end_group();
  out.set(thread_index(), 1.0f);
}

// ------------------------------------------------------------------ tensor cores

template <class T>
DRSEG_KERNEL(32, 1) product(Global<const T> left, Global<const T> right, Global<float> out, bool transposed) {
  // (16, 16) times (16, 8), given by columns, or by rows where it is transposed
  Shared<T> a(0, 256), b(512, 256);
  const int t = thread_index();
  for (int n = t; n < 256; n += 32) a.set(n, left.get(n));
  for (int n = t; n < 256; n += 32) b.set(n, n < 128 ? right.get(n) : narrow<T>(0.0f));
  sync_warp();
  uint32_t fa[4], fb[4];
  load_matrices(fa, a, (t & 15) * 16 + (t >> 4) * 8);
  if (transposed)
    load_matrices<true>(fb, b, (t & 15) * 8);
  else
    load_matrices(fb, b, (t & 7) * 16 + (t >> 3 & 1) * 8);
  float sums[4] = {1, 2, 3, 4};
  multiply_add<T>(sums, fa, fb[0], fb[1]);
  for (int n = 0; n < 4; ++n) out.set((t / 4 + n / 2 * 8) * 8 + t % 4 * 2 + n % 2, sums[n]);
}
DRSEG_KERNEL(32, 1) product_tf32(Global<const float> left, Global<const float> right, Global<float> out) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  const auto bits = [](float value) { return std::bit_cast<uint32_t>(value); };
  uint32_t a[4];
  for (int n = 0; n < 4; ++n) a[n] = bits(left.get((g + n % 2 * 8) * 8 + q + n / 2 * 4));
  float sums[4] = {};
  multiply_add_tf32(sums, a, bits(right.get(g * 8 + q)), bits(right.get(g * 8 + q + 4)));
  for (int n = 0; n < 4; ++n) out.set((g + n / 2 * 8) * 8 + q * 2 + n % 2, sums[n]);
}
// One product of two and a sum that it does not fit into: 2^24 + 1.5 is cut to 2^24, where rounding gives 2^24 + 2.
DRSEG_KERNEL(32, 1) cut_off(Global<float> out) {
  float sums[4] = {16777216.0f, 16777216.0f, 16777216.0f, 16777216.0f};
  const auto pair = [](float low) { return uint32_t(std::bit_cast<uint16_t>(half(low))); };
  const uint32_t a[4] = {pair(lane_index() % 4 == 0 ? 1.5f : 0.0f), 0, 0, 0};
  multiply_add<half>(sums, a, pair(lane_index() % 4 == 0 ? 1.0f : 0.0f), 0);
  out.set(lane_index(), sums[0]);
}

template <class T>
void check_product(bool transposed) {
  std::vector<T> left(256), right(128), given(128);
  std::minstd_rand random(7);
  // integers, whose sums are exact
  const auto draw = [&] { return narrow<T>(float(int(random() % 17) - 8)); };
  for (T& value : left) value = draw();
  for (T& value : right) value = draw();
  for (int k = 0; k < 16; ++k)
    for (int c = 0; c < 8; ++c) given[transposed ? k * 8 + c : c * 16 + k] = right[k * 8 + c];
  std::vector<float> out(128);
  launch(product<T>, {1, 1, 32, 1024}, constant(left), constant(given), view(out), transposed);
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      float sum = float(1 + r / 8 * 2 + c % 2);
      for (int k = 0; k < 16; ++k) sum += widen(left[r * 16 + k]) * widen(right[k * 8 + c]);
      expect(out[r * 8 + c] == sum, "product");
    }
}

void check_reverse(bool barrier) {
  std::vector<float> in(64), out(64);
  std::iota(in.begin(), in.end(), 0.0f);
  launch(reverse, {1, 1, 64, 256}, constant(in), view(out), barrier);
  for (int t = 0; t < 64; ++t) expect(out[t] == 63 - t, "reverse");
}

template <int GROUPS>
void check_staged(bool barrier, bool early) {
  std::vector<float> in(8 * 256), out(64);
  for (size_t n = 0; n < in.size(); ++n) in[n] = float(n % 89);
  launch(staged<GROUPS>, {1, 1, 64, 3 * 1024}, constant(in), view(out), barrier, early);
  for (int t = 0; t < 64; ++t) {
    float total = 0;
    for (int n = 0; n < 8; ++n)
      for (int c = 0; c < 4; ++c) total += in[n * 256 + (4 * t + 97 + c) % 256];
    expect(out[t] == total, "staged");
  }
}

template <class Kernel, class... Given>
std::function<void()> simply(Kernel kernel, Launch how, Given... given) {
  return [=] {
    std::vector<float> in(how.threads * 4), out(how.threads * 8);
    if constexpr (std::is_invocable_v<Kernel, Global<const float>, Global<float>, Given...>)
      launch(kernel, how, Global<const float>(in.data(), how.threads), view(out), given...);
    else if constexpr (std::is_invocable_v<Kernel, Global<float>, Given...>)
      launch(kernel, how, view(out), given...);
    else {
      std::vector<int> whole(how.threads * 8);
      launch(kernel, how, view(whole), given...);
    }
  };
}

const std::map<std::string, std::function<void()>> KERNELS = {
    {"reverse", [] { check_reverse(true); }},
    {"race", [] { check_reverse(false); }},
    {"overwrite", simply(overwrite, {1, 1, 64, 64}, true)},
    {"race_with_reads", simply(overwrite, {1, 1, 64, 64}, false)},
    {"within_a_warp", simply(within_a_warp, {1, 1, 32, 128}, true)},
    {"race_within_a_warp", simply(within_a_warp, {1, 1, 32, 128}, false)},
    {"halves", simply(halves, {1, 1, 32, 64})},
    {"named", simply(named, {1, 1, 96, 384}, false)},
    {"race_past_a_named_barrier", simply(named, {1, 1, 96, 384}, true)},
    {"produce",
     [] {
       std::vector<float> out(256);
       launch(produce, {1, 1, 64, 256}, view(out), true);
       for (int n = 0; n < 256; ++n) expect(out[n] == float(n / 32 * 32 + 31 - n % 32), "produce");
     }},
    {"race_with_what_is_made", simply(produce, {1, 1, 64, 256}, false)},
    {"leaves", simply(leaves, {1, 1, 64, 0})},
    {"other_barrier", simply(other_barrier, {1, 1, 64, 0})},
    {"other_collective", simply(other_collective, {1, 1, 32, 0})},
    {"lane_is_missing", simply(lane_is_missing, {1, 1, 32, 0})},
    {"deadlock", simply(named_of_too_many, {1, 1, 64, 0})},
    {"unset", simply(unset, {1, 1, 32, 256})},
    {"outside_global", simply(outside_global, {1, 1, 32, 0})},
    {"outside_shared", simply(outside_shared, {1, 1, 32, 256})},
    {"too_much_shared", simply(too_much_shared, {1, 1, 32, 128})},
    {"misaligned", simply(misaligned, {1, 1, 32, 0})},
    {"atomic", simply(two_blocks_write, {2, 1, 32, 0}, true)},
    {"two_blocks_write", simply(two_blocks_write, {2, 1, 32, 0}, false)},
    {"count",
     [] {
       std::vector<int> out(64);
       launch(count, {1, 1, 64, 4}, view(out), true);
       expect(out[0] == 64 && out[63] == 64, "count");
     }},
    {"race_of_counts", simply(count, {1, 1, 64, 4}, false)},
    {"staged", [] { check_staged<1>(true, false); }},
    {"wait_too_loose", [] { check_staged<2>(true, false); }},
    {"staged_without_barrier", [] { check_staged<1>(false, false); }},
    {"copied_over_what_is_read", [] { check_staged<2>(true, true); }},
    {"unwaited", [] {
       std::vector<float> in(128), out(32);
       launch(unwaited, {1, 1, 32, 512}, constant(in), view(out));
     }},
    {"product",
     [] {
       check_product<half>(false);
       check_product<half>(true);
       check_product<bfloat16>(false);
       check_product<bfloat16>(true);
     }},
    {"product_tf32",
     [] {
       std::vector<float> left(128), right(64), out(128);
       for (size_t n = 0; n < left.size(); ++n) left[n] = float(int(n * 7 % 13) - 6);
       for (size_t n = 0; n < right.size(); ++n) right[n] = float(int(n * 5 % 11) - 5);
       launch(product_tf32, {1, 1, 32, 0}, constant(left), constant(right), view(out));
       for (int r = 0; r < 16; ++r)
         for (int c = 0; c < 8; ++c) {
           float sum = 0;
           for (int k = 0; k < 8; ++k) sum += left[r * 8 + k] * right[c * 8 + k];
           expect(out[r * 8 + c] == sum, "product_tf32");
         }
     }},
    {"cut_off",
     [] {
       std::vector<float> out(32);
       launch(cut_off, {1, 1, 32, 0}, view(out));
       expect(out[0] == 16777216.0f, "cut_off");
     }},
    {"too_many_threads", simply(halves, {1, 1, 33, 64})},
};

}  // namespace

int main(int count, char** names) {
  int bad = 0;
  for (int n = 1; n < count; ++n) try {
      KERNELS.at(names[n])();
      std::printf("%s: right\n", names[n]);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", names[n], error.what());
      bad = 1;
    }
  return bad;
}
