// SPDX-License-Identifier: Apache-2.0
// The best of many scores by (score descending, node ascending): bisection on integer keys, never a sort.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/level.h"
#include "cpu/vector.h"

namespace drseg {

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// An integer that orders as the score does. Adding zero makes one of the two zeros.
template <class T>
DRSEG_INLINE Key<T> key_of(T score) {
  score += T(0);
  Key<T> bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<Key<T>>::max());
}

template <class T>
DRSEG_INLINE T score_of(Key<T> key) {
  const Key<T> bits = key ^ ((key >> (8 * sizeof(T) - 1)) & std::numeric_limits<Key<T>>::max());
  T score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// Keys of all scores; the least of those above -inf (or the largest key there is) and the most.
template <class T, int kBytes>
DRSEG_INLINE void make_keys(const T* score, int64_t count, Key<T>* key, Key<T>* least, Key<T>* most) {
  typedef Register<T, kBytes> R;
  typedef Register<Key<T>, kBytes> K;
  constexpr Key<T> farthest = std::numeric_limits<Key<T>>::max();
  const Key<T> none = key_of(-std::numeric_limits<T>::infinity());
  *least = farthest;
  *most = none;
  const typename R::type zero = {};
  auto low = typename K::type{} + farthest, high = typename K::type{} + none;
  const auto nothing = high, everything = low;
  int64_t n = 0;
  for (; n + R::lanes <= count; n += R::lanes) {
    const auto bits = reinterpret_cast<typename K::type>(R::load(score + n) + zero);
    const auto value = bits ^ ((bits >> (8 * sizeof(T) - 1)) & everything);
    K::store(key + n, value);
    const auto candidate = value > nothing ? value : everything;
    low = candidate < low ? candidate : low;
    high = value > high ? value : high;
  }
  for (int l = 0; l < K::lanes; ++l) {
    *least = std::min<Key<T>>(*least, low[l]);
    *most = std::max<Key<T>>(*most, high[l]);
  }
  for (; n < count; ++n) {
    key[n] = key_of(score[n]);
    if (key[n] > none) *least = std::min(*least, key[n]);
    *most = std::max(*most, key[n]);
  }
}

template <class T, int kBytes>
DRSEG_INLINE int64_t count_from(const Key<T>* key, int64_t count, Key<T> least) {
  typedef Register<Key<T>, kBytes> K;
  // a true lane is -1
  typename K::type sum[2] = {};
  const auto border = typename K::type{} + least;
  int64_t n = 0, total = 0;
  for (; n + 2 * K::lanes <= count; n += 2 * K::lanes)
    for (int r = 0; r < 2; ++r) sum[r] -= K::load(key + n + r * K::lanes) >= border;
  const auto both = sum[0] + sum[1];
  for (int l = 0; l < K::lanes; ++l) total += both[l];
  for (; n < count; ++n) total += key[n] >= least;
  return total;
}

// Places of the set bytes among `count`, ascending; `flag` is padded with zeros to a multiple of eight.
DRSEG_INLINE int64_t set_places(const uint8_t* flag, int64_t count, int32_t* place) {
  int64_t found = 0;
  for (int64_t n = 0; n < count; n += 8) {
    uint64_t bits;
    std::memcpy(&bits, flag + n, sizeof(bits));
    for (; bits != 0; bits &= bits - 1) place[found++] = static_cast<int32_t>(n + (std::countr_zero(bits) >> 3));
  }
  return found;
}

// A key between two others. Halfway by score finds a place among evenly spread scores fast. Every third time it is
// halfway by key, which ends after as many steps as a key has bits.
template <class T>
DRSEG_INLINE Key<T> between(Key<T> low, Key<T> high, int step) {
  const Key<T> middle = (low & high) + ((low ^ high) >> 1);
  if (step % 3 == 2) return middle;
  const Key<T> even = key_of(score_of<T>(low) / 2 + score_of<T>(high) / 2);
  return even > low && even < high ? even : middle;
}

// What a selection works with.
template <class T>
struct Selection {
  std::vector<Key<T>> key;
  std::vector<int32_t> tied;
  std::vector<uint8_t> flag;
  std::vector<int32_t> slot;  // the answer

  Selection(int64_t count, int64_t want) : key(count), tied(count), flag(count + 8), slot(want) {}
};

// Slots of the `want` best of `count` scores, ascending; fewer where fewer are above -inf. No score is NaN.
// Scores equal at the border go to the lowest `node` (nullptr: to the lowest slot).
template <class T, int kBytes>
DRSEG_INLINE int64_t select_best(const T* score, const int32_t* node, int64_t count, int64_t want, Selection<T>& work) {
  if (want <= 0 || count == 0) return 0;
  Key<T> least, most, *key = work.key.data();
  make_keys<T, kBytes>(score, count, key, &least, &most);
  // `taken` keys are from `high` on, more than `want` from `low` on
  Key<T> low = least, high = low;
  int64_t taken = count_from<T, kBytes>(key, count, low);
  if (taken > want) {
    high = most + 1;
    taken = 0;
    for (int step = 0; high - 1 > low && taken != want; ++step) {
      const Key<T> middle = between<T>(low, high, step);
      const int64_t above = count_from<T, kBytes>(key, count, middle);
      (above > want ? low : high) = middle;
      if (above <= want) taken = above;
    }
  }
  // everything above the border, and of what lies on it as many as there is room for
  const Key<T> border = high - 1;
  uint8_t* flag = work.flag.data();
  for (int64_t n = 0; n < count; ++n) flag[n] = key[n] > border;
  std::fill_n(flag + count, 8, uint8_t(0));
  if (taken < want && high > low) {
    int32_t* tied = work.tied.data();
    int64_t ties = 0;
    for (int64_t n = 0; n < count; ++n) {
      tied[ties] = static_cast<int32_t>(n);
      ties += key[n] == border;
    }
    const int64_t room = want - taken;
    if (node != nullptr)
      std::nth_element(tied, tied + room, tied + ties, [node](int32_t a, int32_t b) { return node[a] < node[b]; });
    for (int64_t n = 0; n < room; ++n) flag[tied[n]] = 1;
  }
  return set_places(flag, count, work.slot.data());
}

}  // namespace drseg
