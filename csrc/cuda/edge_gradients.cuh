// SPDX-License-Identifier: Apache-2.0
// Gradients of the weights of edges in a small graph, from those of their logits, the slopes (arXiv 2604.02010, Eq. 8).
//
// As in graph_layer.cuh a block keeps GROUP x 16 bytes of every row of an image in shared memory. These are targets for
// the gradient to the sources, along the rows of the graph, and sources for that to the targets, along its columns.
//
// Order of a sum over edges: a group of lanes takes every so many'th edge in ascending order, then a tree over the
// groups. Of a parameter: a group of lanes takes such edges of every 16th row of a block, then a tree over the groups,
// the warps and the blocks in ascending order.
#pragma once

#include "cuda/warp.cuh"

namespace drseg::cuda {

// An edge of a sum: the node at its far end, or where its row lies, the slope, and the inverse norm of that node.
struct alignas(16) Link {
  int place;
  float slope, inverse_norm;
  int spare;
};

struct Slopes {
  int nodes, slots, width;
  // of rows of both halves, from one to the next, and of their gradients
  int stride;
  bool normed, shifted;
  // rows of a block
  int rows;
};

template <int GROUP, int WARPS>
struct SlopeSizes {
  static constexpr int THREADS = WARPS * LANES;
  static constexpr int EDGES = LANES / GROUP, ROOM = 96;
  static constexpr size_t NODE_BYTES = GROUP * 16;
  // a row of zeros follows the image's, for what is no edge
  static constexpr size_t LINK_BYTES = WARPS * ROOM * sizeof(Link);
  // then the bias and the vector of the channels of a block
  static size_t bytes(int nodes) { return (nodes + 1) * NODE_BYTES + LINK_BYTES + 2 * GROUP * 8 * sizeof(float); }
};

// The gradient to the near rows. Along ROWS also the parts (blocks, 2 E + 1) of each block in the gradients to the
// vector, the bias of the first layer and that of the second. `far` are the rows at the other ends. Along columns,
// `list` (E) has the links from `begin` (B * N + 1) on.
template <class T, int GROUP, int WARPS, bool ROWS>
DRSEG_KERNEL(WARPS * LANES, 2)
slopes_to_rows(
    Global<const T> near, Global<const T> far, Global<const float> inverse_norm, Parameter shift, Parameter vector,
    Global<const int> index, Global<const float> slope, Global<const Link> list, Global<const int> begin,
    Global<T> gradient, Global<float> part, Slopes how) {
  using Sizes = SlopeSizes<GROUP, WARPS>;
  constexpr int PER = Piece<T>::SIZE, CHANNELS = GROUP * PER, ROOM = Sizes::ROOM;
  const int lane = lane_index(), lane_part = lane % GROUP, group = lane / GROUP;
  const int slices = (how.width + CHANNELS - 1) / CHANNELS;
  const int slice = int(block_index().y) % slices, first = int(block_index().y) / slices * how.rows;
  const int64_t sample = int64_t(block_index().x) * how.nodes;
  const int channel = slice * CHANNELS + lane_part * PER;
  const bool inside = channel < how.width;
  const size_t behind = (how.nodes + 1) * Sizes::NODE_BYTES;
  const Shared<T> tile(0, (how.nodes + 1) * CHANNELS), mine = tile.from(lane_part * PER);
  const Shared<Link> links = Shared<Link>(behind, WARPS * ROOM).from(warp_index() * ROOM), own_links = links.from(group);

  const auto image = far.from(sample * how.stride);
  for (int row = thread_index() / GROUP; row <= how.nodes; row += Sizes::THREADS / GROUP)
    copy_async(tile, row * CHANNELS + lane_part * PER, image, row * how.stride + channel, row < how.nodes && inside);
  copies_end_group();

  const auto rows_begin = begin.from(ROWS ? 0 : sample);
  const int64_t edges = ROWS ? sample * how.slots : rows_begin.get(0);
  const auto far_end = index.from(ROWS ? edges : 0);
  const auto slopes = slope.from(ROWS ? edges : 0);
  const auto listed = list.from(ROWS ? 0 : edges);
  const auto norms = inverse_norm.from(how.normed ? sample : 0);
  const auto given = near.from(sample * how.stride);
  const auto out = gradient.from(sample * how.stride);
  const Shared<float> parameters(behind + Sizes::LINK_BYTES, 2 * CHANNELS);
  for (int n = thread_index(); n < 2 * CHANNELS; n += Sizes::THREADS) {
    const int c = slice * CHANNELS + n % CHANNELS;
    const bool is_shift = n < CHANNELS;
    parameters.set(n, c >= how.width || (is_shift && !how.shifted) ? 0.0f : is_shift ? shift.get(c) : vector.get(c));
  }
  const Shared<float> more = parameters.from(lane_part * PER), factor = more.from(CHANNELS);
  copies_wait<0>();
  sync_block();

  float to_vector[PER] = {}, to_shift[PER] = {}, to_bias = 0;
  for (int row = first + warp_index(); row < first + how.rows && row < how.nodes; row += WARPS) {
    const int start = ROWS ? row * how.slots : rows_begin.get(row) - int(edges);
    const int end = ROWS ? start + how.slots : rows_begin.get(row + 1) - int(edges);
    const float norm = how.normed ? norms.get(row) : 1.0f;
    float own[PER] = {}, active[PER] = {};
    if (inside) widen_piece(given.template get_as<Piece<T>>(row * how.stride + channel), own);
    DRSEG_UNROLL
    for (int c = 0; c < PER; ++c) own[c] = fma(own[c], norm, more.get(c));
    for (int done = start; done < end; done += ROOM) {
      // what was there has been read
      sync_warp();
      DRSEG_UNROLL
      for (int n = 0; n < ROOM; n += LANES) {
        const int edge = done + n + lane;
        Link link{how.nodes, 0.0f, 0.0f, 0};
        if (edge < end) {
          if constexpr (ROWS) {
            link.place = clamped(far_end.get(edge), how.nodes);
            link.slope = slopes.get(edge);
            link.inverse_norm = how.normed ? norms.get(link.place) : 1.0f;
            to_bias += link.slope;
          } else {
            link = listed.get(edge);
          }
        }
        link.place *= CHANNELS;
        links.set(n + lane, link);
      }
      sync_warp();
      const int here = end - done < ROOM ? end - done : ROOM;
      // what fits into the registers of two blocks on a multiprocessor
      constexpr int AT_ONCE = ROWS && PER == 8 ? 1 : 2;
      DRSEG_UNROLL_BY(AT_ONCE)
      for (int at = 0; at < here; at += Sizes::EDGES) {
        const Link link = own_links.get(at);
        // a slot that is none has no hidden unit, which could be infinite
        const bool is_edge = at + group < here;
        float other[PER];
        widen_piece(mine.template get_as<Piece<T>>(link.place), other);
        DRSEG_UNROLL
        for (int c = 0; c < PER; ++c) {
          const float hidden = fma(other[c], link.inverse_norm, own[c]);
          // NaN is not off
          if (!(hidden <= 0)) active[c] += link.slope;
          if (ROWS && is_edge) to_vector[c] = fma(link.slope, positive(hidden), to_vector[c]);
        }
      }
    }
    Piece<T> made;
    DRSEG_UNROLL
    for (int c = 0; c < PER; ++c) {
      DRSEG_UNROLL
      for (int mask = GROUP; mask < LANES; mask *= 2) active[c] += shuffle_xor(active[c], mask);
      const float value = active[c] * factor.get(c);
      if (ROWS) to_shift[c] += value;
      made.value[c] = narrow<T>(value * norm);
    }
    if (group == 0 && inside) out.set_as(row * how.stride + channel, made);
  }
  if constexpr (ROWS) {
    DRSEG_UNROLL
    for (int c = 0; c < PER; ++c) {
      DRSEG_UNROLL
      for (int mask = GROUP; mask < LANES; mask *= 2) to_vector[c] += shuffle_xor(to_vector[c], mask);
    }
    to_bias = warp_total(to_bias);
    // where the links lay, all of which have been read: of each warp its channels of both, and the bias
    sync_block();
    constexpr int EACH = 2 * CHANNELS + 1;
    const Shared<float> sums(behind, WARPS * EACH);
    if (group == 0) {
      DRSEG_UNROLL
      for (int c = 0; c < PER; ++c) {
        sums.set(warp_index() * EACH + lane_part * PER + c, to_vector[c]);
        sums.set(warp_index() * EACH + CHANNELS + lane_part * PER + c, to_shift[c]);
      }
    }
    if (lane == 0) sums.set(warp_index() * EACH + 2 * CHANNELS, to_bias);
    sync_block();
    const int64_t block = int64_t(block_index().x) * ((how.nodes + how.rows - 1) / how.rows) + block_index().y / slices;
    for (int n = thread_index(); n < EACH; n += Sizes::THREADS) {
      const int c = slice * CHANNELS + n % CHANNELS;
      const bool is_bias = n == 2 * CHANNELS;
      if (is_bias ? slice > 0 : c >= how.width) continue;
      float total = 0;
      for (int warp = 0; warp < WARPS; ++warp) total += sums.get(warp * EACH + n);
      part.set(block * (2 * how.width + 1) + (is_bias ? 2 * how.width : n < CHANNELS ? c : how.width + c), total);
    }
  }
}

// The links of every node's columns: the edges that end in it as `perm` (E) lists them, each from the node where it
// begins.
DRSEG_KERNEL(256, 4)
list_links(
    Global<const float> slope, Global<const float> inverse_norm, Global<const int> perm, Global<Link> list,
    int64_t edges, int nodes, int slots, bool normed) {
  const int64_t at = int64_t(block_index().x) * 256 + thread_index();
  if (at >= edges) return;
  const int edge = perm.get(at), node = edge / slots;
  list.set(at, Link{node % nodes, slope.get(edge), normed ? inverse_norm.get(node) : 1.0f, 0});
}

// total (columns) of part (parts, columns), a thread for each column.
DRSEG_KERNEL(128, 1)
add_parts(Global<const float> part, Global<float> total, int64_t parts, int columns) {
  const int64_t column = int64_t(block_index().x) * 128 + thread_index();
  if (column >= columns) return;
  float sum = 0;
  for (int64_t n = 0; n < parts; ++n) sum += part.get(n * columns + column);
  total.set(column, sum);
}

}  // namespace drseg::cuda
