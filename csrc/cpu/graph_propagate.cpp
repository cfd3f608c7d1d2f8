// SPDX-License-Identifier: Apache-2.0
// Aggregation over a fixed number of neighbours, along the edges and against them, and the dot product of every edge.
//
// All three give the same bits for any number of threads: work is cut by output element, and each output element
// adds its edges in ascending order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "check.h"
#include "cpu/level.h"
#include "ops.h"

namespace drseg {
namespace {

// Channels summed at once: four AVX-512 registers of float, so that the sums of a row stay in registers.
constexpr int64_t kTile = 64;

template <class T>
struct Graph {
  const int32_t* index;
  const T* coefficient;
  int64_t nodes, slots, channels;
};

template <class T>
DRSEG_INLINE void gather_rows(Graph<T> graph, const T* x, T* y, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* sample = x + row / graph.nodes * graph.nodes * graph.channels;
    const int32_t* index = graph.index + row * graph.slots;
    const T* coefficient = graph.coefficient + row * graph.slots;
    for (int64_t start = 0; start < graph.channels; start += kTile) {
      const int64_t width = std::min(kTile, graph.channels - start);
      T sum[kTile] = {};
      for (int64_t k = 0; k < graph.slots; ++k) {
        const T* source = sample + clamp_index(index[k], graph.nodes) * graph.channels + start;
        const T share = coefficient[k];
        if (width == kTile) {
          for (int64_t c = 0; c < kTile; ++c) sum[c] += share * source[c];
        } else {
          for (int64_t c = 0; c < width; ++c) sum[c] += share * source[c];
        }
      }
      std::copy(sum, sum + width, y + row * graph.channels + start);
    }
  }
}

// One tile of channels of one sample: no other task writes them.
template <class T>
DRSEG_INLINE void scatter_tiles(Graph<T> graph, const T* x, T* y, int64_t first, int64_t last) {
  const int64_t tiles = (graph.channels + kTile - 1) / kTile;
  for (int64_t task = first; task < last; ++task) {
    const int64_t sample = task / tiles * graph.nodes;
    const int64_t start = task % tiles * kTile;
    const int64_t width = std::min(kTile, graph.channels - start);
    T* out = y + sample * graph.channels + start;
    for (int64_t i = 0; i < graph.nodes; ++i) std::fill_n(out + i * graph.channels, width, T(0));
    for (int64_t i = 0; i < graph.nodes; ++i) {
      const T* source = x + (sample + i) * graph.channels + start;
      for (int64_t k = 0; k < graph.slots; ++k) {
        const int64_t edge = (sample + i) * graph.slots + k;
        T* target = out + clamp_index(graph.index[edge], graph.nodes) * graph.channels;
        const T share = graph.coefficient[edge];
        for (int64_t c = 0; c < width; ++c) target[c] += share * source[c];
      }
    }
  }
}

template <class T>
DRSEG_INLINE void dot_rows(Graph<T> graph, const T* start, const T* end, T* dot, int64_t first, int64_t last) {
  constexpr int64_t kLanes = 32;
  for (int64_t row = first; row < last; ++row) {
    const T* left = start + row * graph.channels;
    const T* sample = end + row / graph.nodes * graph.nodes * graph.channels;
    for (int64_t k = 0; k < graph.slots; ++k) {
      const int64_t edge = row * graph.slots + k;
      const T* right = sample + clamp_index(graph.index[edge], graph.nodes) * graph.channels;
      T lane[kLanes] = {};
      int64_t c = 0;
      for (; c + kLanes <= graph.channels; c += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lane[l] += left[c + l] * right[c + l];
      for (int64_t l = 0; c < graph.channels; ++c, ++l) lane[l] += left[c] * right[c];
      for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
      dot[edge] = lane[0];
    }
  }
}

DRSEG_LEVELS(gather, gather_rows)
DRSEG_LEVELS(scatter, scatter_tiles)
DRSEG_LEVELS(edge_dot, dot_rows)

// Rows per task, so that a task is worth the hand-over to a thread.
int64_t grain(int64_t slots, int64_t channels) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, slots * channels)); }

template <class T>
void propagate(const Tensor& x, const Tensor& index, const Tensor& coefficient, bool transpose, Tensor& y) {
  const int64_t batch = x.size(0), nodes = x.size(1), channels = x.size(2), slots = index.size(2);
  const Graph<T> graph{index.const_data_ptr<int32_t>(), coefficient.const_data_ptr<T>(), nodes, slots, channels};
  const T* in = x.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  if (transpose) {
    const int64_t tasks = batch * ((channels + kTile - 1) / kTile);
    torch::stable::parallel_for(
        0, tasks, 1, [&](int64_t first, int64_t last) { DRSEG_CALL(scatter, T, graph, in, out, first, last); });
  } else {
    torch::stable::parallel_for(0, batch * nodes, grain(slots, channels), [&](int64_t first, int64_t last) {
      DRSEG_CALL(gather, T, graph, in, out, first, last);
    });
  }
}

}  // namespace

Tensor graph_propagate(const Tensor& x, const Tensor& index, const Tensor& coefficient, bool transpose) {
  constexpr const char* op = "drseg_native::graph_propagate";
  const ScalarType dtype = check_floating(op, x);
  check_operand(op, "x", x, dtype);
  check_operand(op, "index", index, ScalarType::Int);
  check_operand(op, "coefficient", coefficient, dtype);
  check_leading(op, "index", index, x);
  check_leading(op, "coefficient", coefficient, x);
  STD_TORCH_CHECK(coefficient.size(2) == index.size(2), op, ": coefficient and index differ in K");
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;
  if (dtype == ScalarType::Double) {
    propagate<double>(x, index, coefficient, transpose, y);
  } else {
    propagate<float>(x, index, coefficient, transpose, y);
  }
  return y;
}

template <class T>
static void all_dots(const Tensor& start, const Tensor& end, const Tensor& index, Tensor& dot) {
  const int64_t nodes = start.size(1), channels = start.size(2), slots = index.size(2);
  const Graph<T> graph{index.const_data_ptr<int32_t>(), nullptr, nodes, slots, channels};
  const T *left = start.const_data_ptr<T>(), *right = end.const_data_ptr<T>();
  T* out = dot.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, start.size(0) * nodes, grain(slots, channels), [&](int64_t first, int64_t last) {
    DRSEG_CALL(edge_dot, T, graph, left, right, out, first, last);
  });
}

Tensor graph_edge_dot(const Tensor& start, const Tensor& end, const Tensor& index) {
  constexpr const char* op = "drseg_native::graph_edge_dot";
  const ScalarType dtype = check_floating(op, start);
  check_operand(op, "start", start, dtype);
  check_operand(op, "end", end, dtype);
  check_operand(op, "index", index, ScalarType::Int);
  check_leading(op, "end", end, start);
  check_leading(op, "index", index, start);
  STD_TORCH_CHECK(end.size(2) == start.size(2), op, ": start and end differ in C");
  Tensor dot = torch::stable::new_empty(start, {index.size(0), index.size(1), index.size(2)});
  if (dot.numel() == 0) return dot;
  if (dtype == ScalarType::Double) {
    all_dots<double>(start, end, index, dot);
  } else {
    all_dots<float>(start, end, index, dot);
  }
  return dot;
}

}  // namespace drseg
