// SPDX-License-Identifier: Apache-2.0
// Weights of the edges of a small graph and the degrees of their rows (arXiv 2604.02010, Eq. 8 and 9).
//
// Order of a degree: a lane takes every 32nd edge in ascending order, then a tree over the lanes. That of a weight:
// edge_sums.cuh.
#pragma once

#include "cuda/edge_sums.cuh"

namespace drseg::cuda {

// exp(-a) for a >= 0 in float32, within two units in the last place down to 2^-126; NaN passes.
DRSEG_DEVICE float exp_negative(float a) { return exp(a > 104.0f ? -104.0f : -a); }

// log(1 + exp(x)) in float32, accurate relative to its value at both ends; NaN passes.
DRSEG_DEVICE float softplus(float x) {
  const float e = exp_negative(magnitude(x));
  return (x < 0 ? 0.0f : x) + log1p(e);
}

enum class Norm { sym_row, row, sym_count };
struct Edges {
  EdgeRows rows;
  bool normed, shifted, masked;
  Norm norm;
  float eps;
};

// Shared memory of a block: behind the edges the vector and the bias of the first layer.
template <class Sizes, class T>
size_t edge_bytes(const EdgeRows& rows, int stages) {
  const int channels = Sizes::template CHANNELS<T>, whole = (rows.width + channels - 1) / channels * channels;
  return Sizes::bytes(rows.nodes, stages) + 2 * sizeof(float) * whole;
}

// weight (B, N, K); start (B, N): the scale of a row, of sym_row and row; coefficient (B, N, K) of sym_count.
template <class T, int GROUP, int WARPS, int ROWS, int SLOTS>
DRSEG_KERNEL(WARPS * LANES, 1)
weigh_edges(
    Global<const T> source, Global<const T> target, Global<const float> inverse_norm, Parameter shift,
    Global<const int> index, Parameter vector, Parameter bias, Global<const float> scores, Global<float> weight, Global<float> start, Global<float> coefficient, Edges how) {
  using Sizes = EdgeSizes<GROUP, WARPS, ROWS, SLOTS>;
  constexpr int PER = Piece<T>::SIZE, CHANNELS = GROUP * PER;
  const EdgeRows& rows = how.rows;
  const int64_t sample = int64_t(block_index().x) * rows.nodes;
  const int first = int(block_index().y) * Sizes::BLOCK_ROWS + warp_index() * ROWS;
  // the vector, then the bias of the first layer, with zeros up to a whole part
  const int whole = (rows.width + CHANNELS - 1) / CHANNELS * CHANNELS;
  const Shared<float> parameters(Sizes::end(rows), 2 * whole);
  for (int c = thread_index(); c < whole; c += Sizes::THREADS) {
    parameters.set(c, c < rows.width ? vector.get(c) : 0.0f);
    parameters.set(whole + c, c < rows.width && how.shifted ? shift.get(c) : 0.0f);
  }
  float factor[PER], more[PER];
  const Shared<float> logits = sum_edges<T, GROUP, WARPS, ROWS, SLOTS>(
      target, index, rows, sample, first,
      [&](int64_t node) { return how.normed ? inverse_norm.get(node) : 1.0f; },
      [&](int channel) {
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
      },
      [&](int64_t row, int channel, float (&mine)[PER]) {
        widen_piece(source.template get_as<Piece<T>>(row * rows.stride + channel), mine);
        const float norm = how.normed ? inverse_norm.get(row) : 1.0f;
        DRSEG_UNROLL
        for (int c = 0; c < PER; ++c) mine[c] = fma(mine[c], norm, more[c]);
      },
      [&](int c, float mine, float far, float norm, float total) {
        return fma(factor[c], positive(fma(far, norm, mine)), total);
      });

  const float constant = bias.get(0);
  for (int r = 0; r < ROWS; ++r) {
    const int64_t node = sample + first + r;
    if (first + r >= rows.nodes) break;
    float degree = 0;
    for (int slot = lane_index(); slot < rows.slots; slot += LANES) {
      const int64_t edge = node * rows.slots + slot;
      float value = softplus(logits.get((warp_index() * ROWS + r) * Sizes::ROOM + slot) + constant);
      // a product, not a choice: a row that is not finite must not look healthy because its slots are padding
      if (how.masked) value *= scores.get(edge) == -INFINITE ? 0.0f : 1.0f;
      weight.set(edge, value);
      if (how.norm == Norm::sym_count) coefficient.set(edge, value / float(rows.slots));
      degree += value;
    }
    degree = warp_total(degree) + how.eps;
    if (lane_index() == 0 && how.norm == Norm::sym_row) start.set(node, reciprocal_root(degree));
    if (lane_index() == 0 && how.norm == Norm::row) start.set(node, 1.0f / degree);
  }
}

// coefficient (B, N, K) from weights and the scales of their rows: of sym_row those of both ends, of row that of its own.
DRSEG_KERNEL(256, 4)
scale_edges(
    Global<const float> weight, Global<const int> index, Global<const float> scale, Global<float> coefficient,
    int nodes, int slots, Norm norm) {
  const int64_t sample = int64_t(block_index().x) * nodes, node = sample + block_index().y;
  const float own = scale.get(node);
  for (int slot = thread_index(); slot < slots; slot += 256) {
    const int64_t edge = node * slots + slot;
    float value = weight.get(edge) * own;
    if (norm == Norm::sym_row) {
      value *= scale.get(sample + clamped(index.get(edge), nodes));
    }
    coefficient.set(edge, value);
  }
}

}  // namespace drseg::cuda
