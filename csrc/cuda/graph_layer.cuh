// SPDX-License-Identifier: Apache-2.0
// Weighted sums of neighbours' rows in a small graph with the bias and activation that follow, and their gradients
// (arXiv 2604.02010, Eq. 9).
//
// A block keeps GROUP x 16 bytes of every row of an image in shared memory, and gathers from there. So each row is read
// from global memory once a block, and not once an edge. Whole rows never meet in a block, so LayerNorm is a launch of
// its own.
//
// Order of a sum over edges: of each pair of steps a group of lanes takes two edges one after the other, then a tree
// over the groups. Of a mean: a lane takes every 32nd piece in ascending order, then a tree over the lanes. Of a
// coefficient's gradient: edge_sums.cuh.
#pragma once

#include "cuda/edge_sums.cuh"

namespace drseg::cuda {

// An edge of a sum: the node at its far end, or where its row lies, and how often that counts.
struct alignas(8) Term {
  int place;
  float factor;
};
struct alignas(16) TwoTerms {
  Term term[2];
};

enum class Activation { none, relu, layer_norm };

struct Layer {
  int nodes, slots, channels;
  bool scaled, shifted, relu;
  // rows of a block
  int rows;
};

template <int GROUP, int WARPS>
struct LayerSizes {
  static constexpr int THREADS = WARPS * LANES;
  // edges that a warp looks at in one step, and those of a row for which it has room at a time
  static constexpr int STEP = 2 * LANES / GROUP, ROOM = 96;
  static_assert(ROOM % STEP == 0 && ROOM % LANES == 0);
  static constexpr size_t NODE_BYTES = GROUP * 16;
  // a row of zeros follows the image's, for what is no edge
  static size_t bytes(int nodes) { return (nodes + 1) * NODE_BYTES + WARPS * ROOM * sizeof(Term); }
};

// y (B, N, C): sums over a row's edges, or, LISTED, over the terms (E) from `begin` (B * N + 1) on. Scaled: times the
// scales (B, N) of both ends, of which `list` has the far one.
template <class T, class Out, int GROUP, int WARPS, bool LISTED>
DRSEG_KERNEL(WARPS * LANES, 2)
gather_rows(
    Global<const T> x, Global<const int> index, Global<const float> coefficient, Global<const Term> list,
    Global<const int> begin, Global<const float> scale, Parameter bias, Global<Out> y, Layer how) {
  using Sizes = LayerSizes<GROUP, WARPS>;
  constexpr int PER = Piece<T>::SIZE, CHANNELS = GROUP * PER, ROOM = Sizes::ROOM;
  const int lane = lane_index(), part = lane % GROUP, group = lane / GROUP;
  const int slices = (how.channels + CHANNELS - 1) / CHANNELS;
  const int slice = int(block_index().y) % slices, first = int(block_index().y) / slices * how.rows;
  const int64_t sample = int64_t(block_index().x) * how.nodes;
  const int channel = slice * CHANNELS + part * PER;
  const Shared<T> tile(0, (how.nodes + 1) * CHANNELS);
  const Shared<Term> terms((how.nodes + 1) * Sizes::NODE_BYTES, WARPS * ROOM);

  const auto image = x.from(sample * how.channels);
  for (int row = thread_index() / GROUP; row <= how.nodes; row += Sizes::THREADS / GROUP)
    copy_async(tile, row * CHANNELS + part * PER, image, row * how.channels + channel, row < how.nodes && channel < how.channels);
  copies_end_group();
  copies_wait<0>();
  sync_block();

  const auto rows_begin = begin.from(LISTED ? sample : 0);
  const int64_t edges = LISTED ? rows_begin.get(0) : sample * how.slots;
  const auto far_end = index.from(LISTED ? 0 : edges);
  const auto how_often = coefficient.from(LISTED ? 0 : edges);
  const auto listed = list.from(LISTED ? edges : 0);
  const auto scales = scale.from(how.scaled ? sample : 0);
  const auto out = y.from(sample * how.channels + channel);
  float shift[PER] = {};
  if (how.shifted && channel < how.channels) {
    DRSEG_UNROLL
    for (int c = 0; c < PER; ++c) shift[c] = bias.get(channel + c);
  }
  const Shared<T> mine = tile.from(part * PER);
  const Shared<Term> own = terms.from(warp_index() * ROOM), pairs = own.from(2 * group);
  for (int row = first + warp_index(); row < first + how.rows && row < how.nodes; row += WARPS) {
    const int start = LISTED ? rows_begin.get(row) - int(edges) : row * how.slots;
    const int end = LISTED ? rows_begin.get(row + 1) - int(edges) : start + how.slots;
    float total[PER] = {};
    for (int done = start; done < end; done += ROOM) {
      // what was there has been read
      sync_warp();
      DRSEG_UNROLL
      for (int n = 0; n < ROOM; n += LANES) {
        const int edge = done + n + lane;
        Term term{how.nodes, 0.0f};
        if (edge < end) {
          if constexpr (LISTED) {
            term = listed.get(edge);
          } else {
            term.place = clamped(far_end.get(edge), how.nodes);
            term.factor = how_often.get(edge);
            if (how.scaled) term.factor *= scales.get(term.place);
          }
        }
        term.place *= CHANNELS;
        own.set(n + lane, term);
      }
      sync_warp();
      const int steps = ((end - done < ROOM ? end - done : ROOM) + Sizes::STEP - 1) / Sizes::STEP;
      DRSEG_UNROLL_BY(2)
      for (int step = 0; step < steps; ++step) {
        const TwoTerms two = pairs.template get_as<TwoTerms>(step * Sizes::STEP);
        DRSEG_UNROLL
        for (int n = 0; n < 2; ++n) {
          float far[PER];
          widen_piece(mine.template get_as<Piece<T>>(two.term[n].place), far);
          DRSEG_UNROLL
          for (int c = 0; c < PER; ++c) total[c] = fma(two.term[n].factor, far[c], total[c]);
        }
      }
    }
    DRSEG_UNROLL
    for (int c = 0; c < PER; ++c) {
      DRSEG_UNROLL
      for (int mask = GROUP; mask < LANES; mask *= 2) total[c] += shuffle_xor(total[c], mask);
    }
    if (group != 0 || channel >= how.channels) continue;
    const float times = how.scaled ? scales.get(row) : 1.0f;
    DRSEG_UNROLL
    for (int c = 0; c < PER; c += Piece<Out>::SIZE) {
      Piece<Out> made;
      DRSEG_UNROLL
      for (int n = 0; n < Piece<Out>::SIZE; ++n) {
        const float value = fma(total[c + n], times, shift[c + n]);
        made.value[n] = narrow<Out>(how.relu ? positive(value) : value);
      }
      out.set_as(row * how.channels + c, made);
    }
  }
}

// The terms of every node's columns: the edges that end in it as `perm` (E) lists them, each from the node where it
// begins, times that node's scale.
DRSEG_KERNEL(256, 4)
list_terms(
    Global<const float> coefficient, Global<const float> scale, Global<const int> perm, Global<Term> list,
    int64_t edges, int nodes, int slots, bool scaled) {
  const int64_t at = int64_t(block_index().x) * 256 + thread_index();
  if (at >= edges) return;
  const int edge = perm.get(at), node = edge / slots;
  Term term{node % nodes, coefficient.get(edge)};
  if (scaled) term.factor *= scale.get(node);
  list.set(at, term);
}

// LayerNorm of the rows (rows, C) of `given`, a warp each; mean and rstd (rows).
template <class T>
DRSEG_KERNEL(256, 1)
normalize_rows(
    Global<const float> given, Parameter weight, Parameter bias, Global<T> y, Global<float> mean, Global<float> rstd,
    int64_t rows, int channels, float eps) {
  const int64_t row = int64_t(block_index().x) * 8 + warp_index(), start = row * channels;
  if (row >= rows) return;
  constexpr int PER = Piece<T>::SIZE;
  const float share = 1.0f / float(channels);
  const auto over = [&](auto what) {
    float total = 0;
    for (int c = lane_index() * 4; c < channels; c += LANES * 4) {
      const Piece<float> piece = given.get_as<Piece<float>>(start + c);
      DRSEG_UNROLL
      for (int n = 0; n < 4; ++n) total += what(piece.value[n]);
    }
    return warp_total(total) * share;
  };
  const float middle = over([](float value) { return value; });
  const float variance = over([&](float value) { return (value - middle) * (value - middle); });
  const float factor = reciprocal_root(variance + eps);
  if (lane_index() == 0) {
    mean.set(row, middle);
    rstd.set(row, factor);
  }
  for (int c = lane_index() * PER; c < channels; c += LANES * PER) {
    Piece<T> made;
    DRSEG_UNROLL
    for (int n = 0; n < PER; ++n)
      made.value[n] = narrow<T>((given.get(start + c + n) - middle) * factor * weight.get(c + n) + bias.get(c + n));
    y.set_as(start + c, made);
  }
}

// gradient (B, N, K) to the coefficients: the products of the rows of `grad` with those of x at the far ends, times
// the scales of both; and what was there before, if there is.
template <class T, int GROUP, int WARPS, int ROWS, int SLOTS>
DRSEG_KERNEL(WARPS * LANES, 1)
edge_products(
    Global<const T> grad, Global<const T> x, Global<const int> index, Global<const float> scale,
    Global<const float> added, Global<float> gradient, EdgeRows how, bool scaled, bool adds) {
  using Sizes = EdgeSizes<GROUP, WARPS, ROWS, SLOTS>;
  constexpr int PER = Piece<T>::SIZE;
  const int64_t sample = int64_t(block_index().x) * how.nodes;
  const int first = int(block_index().y) * Sizes::BLOCK_ROWS + warp_index() * ROWS;
  const Shared<float> products = sum_edges<T, GROUP, WARPS, ROWS, SLOTS>(
      x, index, how, sample, first, [](int64_t) { return 0.0f; }, [](int) {},
      [&](int64_t row, int channel, float (&mine)[PER]) {
        widen_piece(grad.template get_as<Piece<T>>(row * how.stride + channel), mine);
      },
      [](int, float mine, float far, float, float total) { return fma(mine, far, total); });
  for (int r = 0; r < ROWS && first + r < how.nodes; ++r) {
    const int64_t node = sample + first + r;
    for (int slot = lane_index(); slot < how.slots; slot += LANES) {
      const int64_t edge = node * how.slots + slot;
      float value = products.get((warp_index() * ROWS + r) * Sizes::ROOM + slot);
      if (scaled) value *= scale.get(node) * scale.get(sample + clamped(index.get(edge), how.nodes));
      gradient.set(edge, adds ? value + added.get(edge) : value);
    }
  }
}

}  // namespace drseg::cuda
