// SPDX-License-Identifier: Apache-2.0
// Weights of the edges of a small graph and the degrees of their rows (arXiv 2604.02010, Eq. 8 and 9).
//
// A warp has ROWS rows and keeps a sum for each of their edges in registers, while the targets of the whole image pass
// through shared memory, so many channels at a time that GROUP lanes read them at once. Global memory is read once a
// block, and not once an edge.
//
// Order of sums: a lane takes every so many'th channel in ascending order, then a tree over the GROUP lanes. A degree:
// a lane takes every 32nd edge in ascending order, then a tree over the lanes.
#pragma once

#include "cuda/warp.cuh"

namespace drseg::cuda {

// exp(-a) for a >= 0 in float32, within two units in the last place down to 2^-126; NaN passes.
DRSEG_DEVICE float exp_negative(float a) { return exp(a > 104.0f ? -104.0f : -a); }

// log(1 + exp(x)) in float32, accurate relative to its value at both ends; NaN passes.
DRSEG_DEVICE float softplus(float x) {
  const float e = exp_negative(magnitude(x));
  return (x < 0 ? 0.0f : x) + log1p(e);
}

// 16 bytes of a row, widened.
template <class T>
struct alignas(16) Piece {
  static constexpr int SIZE = 16 / sizeof(T);
  T value[SIZE];
};

// An edge: where its end lies in a part of the targets, and the inverse norm there.
struct alignas(8) Edge {
  int place;
  float inverse_norm;
};

enum class Norm { sym_row, row, sym_count };
// Numbers of a layer, which may be wider than the rows.
struct Parameter {
  Global<const float> single;
  Global<const bfloat16> half;
  bool is_half;
  DRSEG_DEVICE float get(int64_t i) const { return is_half ? widen(half.get(i)) : single.get(i); }
};

struct Edges {
  int nodes, slots, width;
  // of source and of target, from one row to the next
  int64_t stride;
  bool normed, shifted, masked;
  Norm norm;
  float eps;
  // parts of the targets that are in shared memory at a time, 1 or 2
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
  static size_t bytes(int nodes, int width, int stages) {
    const int channels = GROUP * Piece<T>::SIZE, whole = (width + channels - 1) / channels * channels;
    return stages * nodes * NODE_BYTES + EDGE_BYTES + 2 * sizeof(float) * whole;
  }
};

// weight (B, N, K); start (B, N): the scale of a row, of sym_row and row; coefficient (B, N, K) of sym_count.
template <class T, int GROUP, int WARPS, int ROWS, int SLOTS>
DRSEG_KERNEL(WARPS * LANES, 1)
weigh_edges(
    Global<const T> source, Global<const T> target, Global<const float> inverse_norm, Parameter shift,
    Global<const int> index, Parameter vector, Parameter bias, Global<const float> scores, Global<float> weight, Global<float> start, Global<float> coefficient, Edges how) {
  using Sizes = EdgeSizes<GROUP, WARPS, ROWS, SLOTS>;
  constexpr int PER = Piece<T>::SIZE, CHANNELS = GROUP * PER;
  const int lane = lane_index(), part = lane % GROUP, group = lane / GROUP;
  const int64_t sample = int64_t(block_index().y) * how.nodes;
  const int first = int(block_index().x) * Sizes::BLOCK_ROWS + warp_index() * ROWS;
  const int tile_size = how.nodes * CHANNELS;
  const Shared<T> tile(0, int64_t(how.stages) * tile_size);
  const Shared<Edge> edges(how.stages * how.nodes * Sizes::NODE_BYTES, Sizes::BLOCK_ROWS * Sizes::ROOM);
  const Shared<float> logits(how.stages * how.nodes * Sizes::NODE_BYTES, 2 * Sizes::BLOCK_ROWS * Sizes::ROOM);
  // the vector, then the bias of the first layer, with zeros up to a whole part
  const int slices = (how.width + CHANNELS - 1) / CHANNELS, whole = slices * CHANNELS;
  const Shared<float> parameters(how.stages * how.nodes * Sizes::NODE_BYTES + Sizes::EDGE_BYTES, 2 * whole);

  const auto load = [&](int slice) {
    if (slice * CHANNELS < how.width)
      for (int n = thread_index(); n < how.nodes * GROUP; n += Sizes::THREADS) {
        const int row = n / GROUP, channel = slice * CHANNELS + n % GROUP * PER;
        copy_async(tile, slice % how.stages * tile_size + n * PER, target, (sample + row) * how.stride + channel,
                   channel < how.width);
      }
    copies_end_group();
  };
  load(0);
  for (int c = thread_index(); c < whole; c += Sizes::THREADS) {
    parameters.set(c, c < how.width ? vector.get(c) : 0.0f);
    parameters.set(whole + c, c < how.width && how.shifted ? shift.get(c) : 0.0f);
  }

  const int own_edges = warp_index() * ROWS * Sizes::ROOM;
  for (int n = lane; n < ROWS * Sizes::ROOM; n += LANES) {
    const int row = first + n / Sizes::ROOM, slot = n % Sizes::ROOM;
    Edge edge{0, 0.0f};
    if (row < how.nodes && slot < how.slots) {
      const int near = index.get((sample + row) * how.slots + slot);
      const int node = near < 0 ? 0 : near >= how.nodes ? how.nodes - 1 : near;
      edge.place = node * CHANNELS;
      edge.inverse_norm = how.normed ? inverse_norm.get(sample + node) : 1.0f;
    }
    edges.set(own_edges + n, edge);
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
    const int channel = slice * CHANNELS + part * PER, at = slice % how.stages * tile_size + part * PER;
    // beyond the last channel everything is zero, and no lane stays behind
    const bool inside = channel < how.width;
    float factor[PER], more[PER];
    DRSEG_UNROLL
    for (int c = 0; c < PER; c += 4) {
      const Piece<float> a = parameters.get_as<Piece<float>>(channel + c);
      const Piece<float> b = parameters.get_as<Piece<float>>(whole + channel + c);
      DRSEG_UNROLL
      for (int n = 0; n < 4; ++n) {
        factor[c + n] = a.value[n];
        more[c + n] = b.value[n];
      }
    }
    DRSEG_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      float own[PER] = {};
      const int64_t row = sample + (first + r < how.nodes ? first + r : how.nodes - 1);
      if (inside) {
        const Piece<T> given = source.template get_as<Piece<T>>(row * how.stride + channel);
        const float norm = how.normed ? inverse_norm.get(row) : 1.0f;
        DRSEG_UNROLL
        for (int c = 0; c < PER; ++c)
          own[c] = fma(widen(given.value[c]), norm, more[c]);
      }
      DRSEG_UNROLL
      for (int s = 0; s < SLOTS; ++s) {
        // keeps the compiler from reading so many targets ahead that the sums lose their registers
        if (s % 4 == 0) sync_warp();
        const Edge edge = edges.get(own_edges + r * Sizes::ROOM + s * Sizes::EDGES + group);
        const Piece<T> other = tile.template get_as<Piece<T>>(at + edge.place);
        DRSEG_UNROLL
        for (int c = 0; c < PER; ++c)
          total[r][s] = fma(factor[c], positive(fma(widen(other.value[c]), edge.inverse_norm, own[c])), total[r][s]);
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
  // where the edges lay, all of which have been read, their logits follow
  DRSEG_UNROLL
  for (int r = 0; r < ROWS; ++r)
    DRSEG_UNROLL
    for (int s = 0; s < SLOTS; ++s)
      if (part == 0) logits.set(own_edges + r * Sizes::ROOM + s * Sizes::EDGES + group, total[r][s]);
  sync_warp();

  const float constant = bias.get(0);
  for (int r = 0; r < ROWS; ++r) {
    const int64_t node = sample + first + r;
    if (first + r >= how.nodes) break;
    float degree = 0;
    for (int slot = lane; slot < how.slots; slot += LANES) {
      const int64_t edge = node * how.slots + slot;
      float value = softplus(logits.get(own_edges + r * Sizes::ROOM + slot) + constant);
      // a product, not a choice: a row that is not finite must not look healthy because its slots are padding
      if (how.masked) value *= scores.get(edge) == -INFINITE ? 0.0f : 1.0f;
      weight.set(edge, value);
      if (how.norm == Norm::sym_count) coefficient.set(edge, value / float(how.slots));
      degree += value;
    }
    degree = warp_total(degree) + how.eps;
    if (lane == 0 && how.norm == Norm::sym_row) start.set(node, reciprocal_root(degree));
    if (lane == 0 && how.norm == Norm::row) start.set(node, 1.0f / degree);
  }
}

// coefficient (B, N, K) from weights and the scales of their rows: of sym_row those of both ends, of row that of its own.
DRSEG_KERNEL(256, 4)
scale_edges(
    Global<const float> weight, Global<const int> index, Global<const float> scale, Global<float> coefficient,
    int nodes, int slots, Norm norm) {
  const int64_t node = int64_t(block_index().y) * nodes + block_index().x;
  const int64_t sample = int64_t(block_index().y) * nodes;
  const float own = scale.get(node);
  for (int slot = thread_index(); slot < slots; slot += 256) {
    const int64_t edge = node * slots + slot;
    float value = weight.get(edge) * own;
    if (norm == Norm::sym_row) {
      const int near = index.get(edge);
      value *= scale.get(sample + (near < 0 ? 0 : near >= nodes ? nodes - 1 : near));
    }
    coefficient.set(edge, value);
  }
}

}  // namespace drseg::cuda
