// SPDX-License-Identifier: Apache-2.0
// The k best of every row of a small graph, from products that a library has made. A warp is a row, and a lane keeps the
// keys of every 32nd column in registers. No key is sorted: the k-th is found by bisection with counts.
//
// From products of rows rounded to float16 the choice is the same. A bound on the rounding leaves some scores around the
// k-th place open. They are computed again from the float32 rows (kernels/drseg_kernels/knn_rounded.py has the bound).
#pragma once

#include "cuda/warp.cuh"

namespace drseg::cuda {

enum class Join { subtract, clamped, product };

constexpr int LOWEST = -2147483647 - 1;

// Integers that order as the float32 do; the two zeros are equal, and no number maps to the lowest integer.
DRSEG_DEVICE int ordered_bits(float value) {
  const int bits = bits_of(value == 0 ? 0.0f : value);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
DRSEG_DEVICE float ordered_float(int key) { return float_of(key < 0 ? key ^ 0x7fffffff : key); }

DRSEG_DEVICE float joined(float cosine, float decay, Join join) {
  if (join == Join::subtract) return cosine - decay;
  return (join == Join::clamped && cosine < 0 ? 0.0f : cosine) * decay;
}

// Of the keys whose bit in `among` is set, the highest that at least `want` reach; there are more than that, and want > 0.
template <int ITEMS>
DRSEG_DEVICE int kth_key(const int (&key)[ITEMS], unsigned among, int want) {
  int low = 0x7fffffff, high = LOWEST;
  DRSEG_UNROLL
  for (int n = 0; n < ITEMS; ++n) {
    const bool in = among >> n & 1;
    low = in && key[n] < low ? key[n] : low;
    high = in && key[n] > high ? key[n] : high;
  }
  low = warp_min(low);
  high = warp_max(high);
  while (low < high) {
    // the mean, rounded up; the sum of the two may leave the range
    const int guess = (low | high) - ((low ^ high) >> 1);
    int reach = 0;
    DRSEG_UNROLL
    for (int n = 0; n < ITEMS; ++n) reach += (among >> n & 1) && key[n] >= guess;
    reach = warp_sum(reach);
    if (reach >= want) low = guess;
    if (reach <= want) high = reach == want ? guess : guess - 1;
  }
  return low;
}

struct Selection {
  int nodes, channels, width, k;
  Join join;
  bool include_self;
  // of a float32 prior with rounded products; without, the products are those of the rows
  bool rounded;
  // what sums over the channels may be off by, of a cosine
  float slack;
  bool counts;
};

// index and score (B, N, k) of an image's rows from product (images, N, N), which begins with image `first`. In `count`
// (B, N), if it is asked for, stands how many scores of a row were computed again.
template <int ITEMS>
DRSEG_KERNEL(128, 3)
select_rows(
    Global<const float> product, Global<const float> prior, Global<const float> inverse_norm,
    Global<const float> residual, Global<const float> table, Global<int> index, Global<float> score, Global<int> count,
    Selection how, int first) {
  const int row = int(block_index().y) * 4 + warp_index(), lane = lane_index(), nodes = how.nodes;
  if (row >= nodes) return;
  const int64_t image = first + block_index().x, sample = image * nodes, node = sample + row;
  const auto products = product.from((int64_t(block_index().x) * nodes + row) * nodes);
  const auto inverses = inverse_norm.from(sample), residuals = residual.from(how.rounded ? sample : 0);
  const float own = inverses.get(row);
  const int own_y = row / how.width, own_x = row % how.width;
  const bool finite = is_number(own);

  int key[ITEMS];
  unsigned regular = 0;
  bool self = false;
  float own_score = 0, loss = 0;
  const int step_y = LANES / how.width, step_x = LANES % how.width;
  int y = lane / how.width, x = lane % how.width;
  DRSEG_UNROLL
  for (int n = 0; n < ITEMS; ++n) {
    const int j = n * LANES + lane;
    key[n] = LOWEST;
    if (j < nodes) {
      const float inverse = inverses.get(j);
      const float decay = table.get(distance(own_y, y) * how.width + distance(own_x, x));
      const float value = joined(products.get(j) * own * inverse, decay, how.join);
      if (how.rounded) {
        const float lost = residuals.get(j);
        loss = lost > loss ? lost : loss;
      }
      key[n] = ordered_bits(value);
      // a node that is not finite neither chooses nor is chosen; beyond a radius the table has no number, nor the score
      const bool allowed = finite && is_number(inverse) && is_number(value);
      if (j == row) {
        self = allowed && how.include_self;
        own_score = value;
      } else if (allowed) {
        regular |= 1u << n;
      }
    }
    x += step_x;
    y += step_y;
    if (x >= how.width) {
      x -= how.width;
      ++y;
    }
  }

  const bool takes_self = ballot(self) != 0;
  const int want = how.k - takes_self;
  // what is certainly chosen, and what is to be decided among
  unsigned sure = regular, open = 0;
  int room = 0, threshold = LOWEST, again = 0;
  if (want == 0) {
    sure = 0;
  } else if (warp_sum(count_bits(regular)) > want) {
    threshold = kth_key(key, regular, want);
    const float border = ordered_float(threshold);
    float margin = 0;
    // the scores of a row of zeros are exact
    if (how.rounded && own != 0) {
      loss = warp_largest(loss);
      const float lost = residuals.get(row);
      margin = 2 * (lost + loss * (1 + lost) + how.slack) + magnitude(border) * 0x1p-21f;
    }
    sure = 0;
    DRSEG_UNROLL
    for (int n = 0; n < ITEMS; ++n) {
      const float value = ordered_float(key[n]);
      const bool in = regular >> n & 1;
      sure |= unsigned(in && (margin > 0 ? value > border + margin : key[n] > threshold)) << n;
      open |= unsigned(in && (margin > 0 ? magnitude(value - border) <= margin : key[n] == threshold)) << n;
    }
    room = want - warp_sum(count_bits(sure));
    again = warp_sum(count_bits(open));
    if (again <= room) {
      // there is room for all that remain
      sure |= open;
      open = 0;
      again = 0;
    } else if (margin > 0) {
      // two or three of a row: a loop of its own, for which the keys' code is not unrolled
      unsigned left = open;
      const auto rows = prior.from(sample * how.channels);
      for (int one = 0; one < again; ++one) {
        const int n = warp_min(left != 0 ? first_bit(left) : ITEMS);
        const int l = first_bit(ballot(left >> n & 1)), j = n * LANES + l;
        float total = 0;
        for (int d = lane; d < how.channels; d += LANES)
          total = fma(rows.get(row * how.channels + d), rows.get(j * how.channels + d), total);
        total = warp_total(total);
        const float decay = table.get(distance(own_y, j / how.width) * how.width + distance(own_x, j % how.width));
        const float value = joined(total * own * inverses.get(j), decay, how.join);
        if (lane == l) {
          left &= left - 1;
          DRSEG_UNROLL
          for (int m = 0; m < ITEMS; ++m) key[m] = m == n ? ordered_bits(value) : key[m];
        }
      }
      threshold = kth_key(key, open, room);
      DRSEG_UNROLL
      for (int n = 0; n < ITEMS; ++n) {
        const bool in = open >> n & 1;
        sure |= unsigned(in && key[n] > threshold) << n;
        open &= ~(unsigned(in && key[n] != threshold) << n);
      }
      room = want - warp_sum(count_bits(sure));
    } else {
      again = 0;
    }
  }
  if (how.counts && lane == 0) count.set(node, again);

  // in the order of their indices; of what is equal at the border, the first
  const unsigned before = (1u << lane) - 1u;
  const auto indices = index.from(node * how.k);
  const auto values = score.from(node * how.k);
  int place = 0, tied = 0;
  DRSEG_UNROLL
  for (int n = 0; n < ITEMS; ++n) {
    const bool is_self = takes_self && n * LANES + lane == row;
    const unsigned equal = ballot(open >> n & 1);
    const bool mine = (sure >> n & 1) || is_self || ((open >> n & 1) && tied + count_bits(equal & before) < room);
    const unsigned chosen = ballot(mine);
    if (mine) {
      indices.set(place + count_bits(chosen & before), n * LANES + lane);
      values.set(place + count_bits(chosen & before), is_self ? own_score : ordered_float(key[n]));
    }
    place += count_bits(chosen);
    tied += count_bits(equal);
  }
  // slots without a candidate
  for (int s = place + lane; s < how.k; s += LANES) {
    indices.set(s, row);
    values.set(s, finite ? -INFINITE : not_a_number());
  }
}

}  // namespace drseg::cuda
