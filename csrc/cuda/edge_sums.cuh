// SPDX-License-Identifier: Apache-2.0
// Sums over the channels of both ends of an edge, for all edges of the rows of a small graph.
//
// A warp has ROWS rows and keeps a sum for each of their edges in registers. Meanwhile the far rows of the whole image
// pass through shared memory, as many channels at a time as GROUP lanes read at once. Global memory is read once a
// block, and not once an edge.
//
// Order of a sum: a lane takes every so many'th channel in ascending order, then a tree over the GROUP lanes.
#pragma once

#include "cuda/warp.cuh"

namespace drseg::cuda {

// An edge: where its far end lies in a part of the rows, and a number of that node.
struct alignas(8) Edge {
  int place;
  float number;
};

struct EdgeRows {
  int nodes, slots, width;
  // of near and far rows, from one to the next
  int stride;
  // parts of the rows that are in shared memory at a time, 1 or 2
  int stages;
};

template <int GROUP, int WARPS, int ROWS, int SLOTS>
struct EdgeSizes {
  static constexpr int THREADS = WARPS * LANES;
  static constexpr int BLOCK_ROWS = WARPS * ROWS;
  // edges that a warp looks at in one step, and room for those of a row
  static constexpr int EDGES = LANES / GROUP, ROOM = EDGES * SLOTS;
  // shared memory: of the edges of a block, and of a node's part of a row
  static constexpr size_t EDGE_BYTES = BLOCK_ROWS * ROOM * sizeof(Edge), NODE_BYTES = GROUP * 16;
  template <class T>
  static constexpr int CHANNELS = GROUP * Piece<T>::SIZE;
  // where shared memory goes on, for whatever else a kernel keeps there
  static size_t bytes(int nodes, int stages) { return stages * nodes * NODE_BYTES + EDGE_BYTES; }
  DRSEG_DEVICE static int end(const EdgeRows& rows) { return rows.stages * rows.nodes * int(NODE_BYTES) + int(EDGE_BYTES); }
};

// The sums of this warp's edges, in shared memory: that of row r of the warp and a slot at r * ROOM + slot.
// `number(node)` is the number of an edge by its far node in the batch. `begin(channel)` starts a lane's part of the
// channels. `own(row, channel, values)` is its part of a near row. `add(c, own, far, number, total)` adds a channel.
template <class T, int GROUP, int WARPS, int ROWS, int SLOTS, class Number, class Begin, class Own, class Add>
DRSEG_DEVICE Shared<float> sum_edges(
    const Global<const T>& far, const Global<const int>& index, const EdgeRows& how, int64_t sample, int first,
    Number number, Begin begin, Own own, Add add) {
  using Sizes = EdgeSizes<GROUP, WARPS, ROWS, SLOTS>;
  constexpr int PER = Piece<T>::SIZE, CHANNELS = GROUP * PER;
  const int lane = lane_index(), part = lane % GROUP, group = lane / GROUP;
  const int tile_size = how.nodes * CHANNELS, slices = (how.width + CHANNELS - 1) / CHANNELS;
  const Shared<T> tile(0, how.stages * tile_size);
  const size_t behind = size_t(how.stages) * how.nodes * Sizes::NODE_BYTES;
  const int first_edge = warp_index() * ROWS * Sizes::ROOM;
  const Shared<Edge> edges(behind, Sizes::BLOCK_ROWS * Sizes::ROOM), own_edges = edges.from(first_edge + group);
  const Shared<float> sums(behind, 2 * Sizes::BLOCK_ROWS * Sizes::ROOM);

  const auto rows = far.from(sample * how.stride);
  const auto load = [&](int slice) {
    const int channel = slice * CHANNELS + thread_index() % GROUP * PER, to = slice % how.stages * tile_size;
    if (slice * CHANNELS < how.width)
      for (int row = thread_index() / GROUP; row < how.nodes; row += Sizes::THREADS / GROUP)
        copy_async(tile, to + row * CHANNELS + thread_index() % GROUP * PER, rows, row * how.stride + channel, channel < how.width);
    copies_end_group();
  };
  load(0);
  for (int n = lane; n < ROWS * Sizes::ROOM; n += LANES) {
    const int row = first + n / Sizes::ROOM, slot = n % Sizes::ROOM;
    Edge edge{0, 0.0f};
    if (row < how.nodes && slot < how.slots) {
      const int node = clamped(index.get((sample + row) * how.slots + slot), how.nodes);
      edge.place = node * CHANNELS;
      edge.number = number(sample + node);
    }
    edges.set(first_edge + n, edge);
  }

  float total[ROWS][SLOTS] = {};
  for (int slice = 0; slice < slices; ++slice) {
    if (how.stages == 2) {
      load(slice + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    sync_block();
    const int channel = slice * CHANNELS + part * PER;
    const Shared<T> here = tile.from(slice % how.stages * tile_size + part * PER);
    // beyond the last channel everything is zero, and no lane stays behind
    const bool inside = channel < how.width;
    begin(channel);
    DRSEG_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float mine[PER] = {};
      if (inside) own(sample + (first + r < how.nodes ? first + r : how.nodes - 1), channel, mine);
      DRSEG_UNROLL
      for (int s = 0; s < SLOTS; ++s) {
        // keeps the compiler from reading so many rows ahead that the sums lose their registers
        if (s % 10 == 0) sync_warp();
        const Edge edge = own_edges.get(r * Sizes::ROOM + s * Sizes::EDGES);
        float other[PER];
        widen_piece(here.template get_as<Piece<T>>(edge.place), other);
        DRSEG_UNROLL
        for (int c = 0; c < PER; ++c) total[r][s] = add(c, mine[c], other[c], edge.number, total[r][s]);
      }
    }
    // the next part takes the place of this one, or of the one before
    sync_block();
    if (how.stages == 1) load(slice + 1);
  }
  copies_wait<0>();

  DRSEG_UNROLL
  for (int r = 0; r < ROWS; ++r)
    DRSEG_UNROLL
    for (int s = 0; s < SLOTS; ++s) {
      DRSEG_UNROLL
      for (int mask = GROUP / 2; mask > 0; mask /= 2) total[r][s] += shuffle_xor(total[r][s], mask);
    }
  // where the edges lay, all of which have been read, their sums follow
  DRSEG_UNROLL
  for (int r = 0; r < ROWS; ++r)
    DRSEG_UNROLL
    for (int s = 0; s < SLOTS; ++s)
      if (part == 0) sums.set(first_edge + r * Sizes::ROOM + s * Sizes::EDGES + group, total[r][s]);
  sync_warp();
  return sums;
}

}  // namespace drseg::cuda
