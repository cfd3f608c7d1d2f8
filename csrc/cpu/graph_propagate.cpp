// SPDX-License-Identifier: Apache-2.0
// Aggregation over a fixed number of neighbours, along the edges and against them, and the dot product of every edge.
//
// All three give the same bits for any number of threads: work is cut by output element, and each output element
// adds its edges in ascending order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "check.h"
#include "cpu/grain.h"
#include "cpu/level.h"
#include "cpu/csc.h"
#include "cpu/vector.h"
#include "ops.h"

namespace drseg {
namespace {

// Nodes whose neighbours are much the same: a tile of channels of all of them stays in the cache.
constexpr int64_t kNodes = 64;

template <class T>
struct Graph {
  const int32_t* index;
  const T* coefficient;
  int64_t nodes, slots, channels;
};

// What the nodes [first, last) of one sample receive: `from` and `share` of node n are in [begin_n, begin_n+1).
template <class T>
struct Received {
  const int32_t* from;
  const T* share;
  const int32_t* begin;  // nullptr: `slots` for each
  int64_t slots, nodes, channels;
  int64_t offset = 0;  // the first edge that `from` and `share` hold

  DRSEG_INLINE int64_t start_of(int64_t node) const {
    return (begin != nullptr ? begin[node] : node * slots) - offset;
  }
};

// The first `width` channels, in kCount registers; they overlap where that is not so many, and write the same bits.
template <class T, int kBytes, int kCount>
DRSEG_INLINE void gather_tile(
    const Received<T>& received, const T* x, T* y, int64_t width, int64_t first, int64_t last) {
  typedef Register<T, kBytes> R;
  int64_t at[kCount];
  for (int n = 0; n < kCount; ++n) at[n] = std::min<int64_t>(n * R::lanes, width - R::lanes);
  for (int64_t node = first; node < last; ++node) {
    typename R::type sum[kCount] = {};
    const int64_t end = received.start_of(node + 1);
    for (int64_t e = received.start_of(node); e < end; ++e) {
      const T* source = x + clamp_index(received.from[e], received.nodes) * received.channels;
      const T share = received.share[e];
      for (int n = 0; n < kCount; ++n) sum[n] += share * R::load(source + at[n]);
    }
    for (int n = 0; n < kCount; ++n) R::store(y + node * received.channels + at[n], sum[n]);
  }
}

template <class T>
DRSEG_INLINE void gather_channel(const Received<T>& received, const T* x, T* y, int64_t first, int64_t last) {
  for (int64_t node = first; node < last; ++node) {
    T sum = 0;
    for (int64_t e = received.start_of(node); e < received.start_of(node + 1); ++e)
      sum += received.share[e] * x[clamp_index(received.from[e], received.nodes) * received.channels];
    y[node * received.channels] = sum;
  }
}

// All channels in tiles of kCount registers, in as few as hold them where one tile does; the last tile overlaps the one
// before and writes the same bits again.
template <class T, int kBytes, int kCount>
DRSEG_INLINE void gather_nodes(const Received<T>& received, const T* x, T* y, int64_t first, int64_t last) {
  constexpr int64_t lanes = Register<T, kBytes>::lanes;
  if constexpr (kCount > 1) {
    if (received.channels <= kCount / 2 * lanes)
      return gather_nodes<T, kBytes, kCount / 2>(received, x, y, first, last);
  } else if (received.channels < lanes) {
    for (int64_t c = 0; c < received.channels; ++c) gather_channel(received, x + c, y + c, first, last);
    return;
  }
  const int64_t width = std::min(received.channels, kCount * lanes);
  for (int64_t node = first; node < last; node += kNodes) {
    for (int64_t c = 0; c < received.channels; c += width) {
      const int64_t start = std::min(c, received.channels - width);
      gather_tile<T, kBytes, kCount>(received, x + start, y + start, width, node, std::min(last, node + kNodes));
    }
  }
}

template <class T, int kBytes>
DRSEG_INLINE void gather_along(Graph<T> graph, const T* x, T* y, int64_t first, int64_t last) {
  while (first < last) {
    const int64_t sample = first / graph.nodes, begin = sample * graph.nodes;
    const int64_t end = std::min(last, begin + graph.nodes);
    const Received<T> received{
        graph.index + begin * graph.slots, graph.coefficient + begin * graph.slots, nullptr,
        graph.slots, graph.nodes, graph.channels};
    const int64_t offset = begin * graph.channels;
    gather_nodes<T, kBytes, 8>(received, x + offset, y + offset, first - begin, end - begin);
    first = end;
  }
}

// `start` and `coefficient` in the order of `indptr`, which counts through the batch.
template <class T>
struct Lists {
  const int32_t *indptr, *start;
  const T* coefficient;
  int64_t nodes, channels;
};

template <class T, int kBytes>
DRSEG_INLINE void gather_listed(const Lists<T>* lists, const T* x, T* y, int64_t first, int64_t last) {
  while (first < last) {
    const int64_t begin = first / lists->nodes * lists->nodes, end = std::min(last, begin + lists->nodes);
    const Received<T> received{
        lists->start, lists->coefficient, lists->indptr + begin, 0, lists->nodes, lists->channels};
    const int64_t offset = begin * lists->channels;
    gather_nodes<T, kBytes, 8>(received, x + offset, y + offset, first - begin, end - begin);
    first = end;
  }
}

// `x`, `y` and `coefficient` of one sample.
template <class T, int kBytes>
DRSEG_INLINE void gather_against(
    Graph<T> graph, const Csc* csc, const T* coefficient, const T* x, T* y, int64_t first, int64_t last) {
  const int64_t begin = csc->indptr[first], count = csc->indptr[last] - begin;
  std::vector<T> share(count);
  std::vector<int32_t> from(count);
  // edges that end in one node lie rows apart, each in a line of the cache of its own
  constexpr int64_t kAhead = 32;
  for (int64_t n = 0; n < count; ++n) {
    __builtin_prefetch(coefficient + csc->edge(begin + std::min(n + kAhead, count - 1)));
    const int64_t edge = csc->edge(begin + n);
    share[n] = coefficient[edge];
    from[n] = csc->start(edge);
  }
  const Received<T> received{
      from.data(), share.data(), csc->indptr, graph.slots, graph.nodes, graph.channels, begin};
  gather_nodes<T, kBytes, 8>(received, x, y, first, last);
}

template <class T, int kBytes, int kCount>
DRSEG_INLINE void dots_of(const T* left, const T* const* right, int64_t channels, T* dot) {
  typedef Register<T, kBytes> R;
  typename R::type sum[kCount] = {};
  int64_t c = 0;
  for (; c + R::lanes <= channels; c += R::lanes) {
    const auto value = R::load(left + c);
    for (int n = 0; n < kCount; ++n) sum[n] += value * R::load(right[n] + c);
  }
  for (int n = 0; n < kCount; ++n) {
    T rest = 0;
    for (int64_t d = c; d < channels; ++d) rest += left[d] * right[n][d];
    dot[n] = R::sum(sum[n]) + rest;
  }
}

template <class T, int kBytes>
DRSEG_INLINE void dot_rows(Graph<T> graph, const T* start, const T* end, T* dot, int64_t first, int64_t last) {
  constexpr int kCount = 8;
  for (int64_t row = first; row < last; ++row) {
    const T* left = start + row * graph.channels;
    const T* sample = end + row / graph.nodes * graph.nodes * graph.channels;
    const int32_t* index = graph.index + row * graph.slots;
    T* out = dot + row * graph.slots;
    int64_t k = 0;
    for (; k + kCount <= graph.slots; k += kCount) {
      const T* right[kCount];
      for (int n = 0; n < kCount; ++n) right[n] = sample + clamp_index(index[k + n], graph.nodes) * graph.channels;
      dots_of<T, kBytes, kCount>(left, right, graph.channels, out + k);
    }
    for (; k < graph.slots; ++k) {
      const T* right = sample + clamp_index(index[k], graph.nodes) * graph.channels;
      dots_of<T, kBytes, 1>(left, &right, graph.channels, out + k);
    }
  }
}

DRSEG_LEVELS(gather, gather_along)
DRSEG_LEVELS(gather_transposed, gather_against)
DRSEG_LEVELS(gather_lists, gather_listed)
DRSEG_LEVELS(edge_dot, dot_rows)

template <class T>
void propagate(
    const Tensor& x, const Tensor& index, const Tensor& coefficient, bool transpose, const Columns& columns,
    Tensor& y) {
  const int64_t batch = x.size(0), nodes = x.size(1), channels = x.size(2), slots = index.size(2);
  const Graph<T> graph{index.const_data_ptr<int32_t>(), coefficient.const_data_ptr<T>(), nodes, slots, channels};
  const T* in = x.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  if (!transpose) {
    torch::stable::parallel_for(0, batch * nodes, grain(slots * channels), [&](int64_t first, int64_t last) {
      DRSEG_CALL(gather, T, graph, in, out, first, last);
    });
    return;
  }
  for_ends(
      graph.index, columns, batch, nodes, slots, grain(slots * channels),
      [&](int64_t b, const Csc& csc, int64_t first, int64_t last) {
        const int64_t offset = b * nodes * channels;
        const T* shares = graph.coefficient + b * nodes * slots;
        DRSEG_CALL(gather_transposed, T, graph, &csc, shares, in + offset, out + offset, first, last);
      });
}

}  // namespace

Tensor graph_propagate(
    const Tensor& x, const Tensor& index, const Tensor& coefficient, bool transpose, std::optional<Tensor> indptr,
    std::optional<Tensor> perm) {
  constexpr const char* op = "drseg_native::graph_propagate";
  const ScalarType dtype = check_floating(op, x);
  check_operand(op, "x", x, 3, dtype);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_operand(op, "coefficient", coefficient, 3, dtype);
  check_leading(op, "index", index, x);
  check_leading(op, "coefficient", coefficient, x);
  STD_TORCH_CHECK(coefficient.size(2) == index.size(2), op, ": coefficient and index differ in K");
  const Columns columns = check_columns(op, indptr, perm, index);
  Tensor y = drseg::allocate_like(x);
  if (y.numel() == 0) return y;
  if (dtype == ScalarType::Double) {
    propagate<double>(x, index, coefficient, transpose, columns, y);
  } else {
    propagate<float>(x, index, coefficient, transpose, columns, y);
  }
  return y;
}

template <class T>
static void propagate_listed(
    const Tensor& x, const int32_t* indptr, const Tensor& start, const Tensor& coefficient, Tensor& y) {
  const int64_t rows = x.size(0) * x.size(1), channels = x.size(2);
  const Lists<T> lists{
      indptr, start.const_data_ptr<int32_t>(), coefficient.const_data_ptr<T>(), x.size(1), channels};
  const T* in = x.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, rows, grain((start.numel() / rows + 1) * channels), [&](int64_t first, int64_t last) {
    DRSEG_CALL(gather_lists, T, &lists, in, out, first, last);
  });
}

Tensor graph_propagate_listed(
    const Tensor& x, const Tensor& indptr, const Tensor& start, const Tensor& coefficient) {
  constexpr const char* op = "drseg_native::graph_propagate_listed";
  const ScalarType dtype = check_floating(op, x);
  check_operand(op, "x", x, 3, dtype);
  check_operand(op, "start", start, 1, ScalarType::Int);
  check_operand(op, "coefficient", coefficient, 1, dtype);
  STD_TORCH_CHECK(coefficient.numel() == start.numel(), op, ": coefficient and start differ in length");
  const int32_t* begin = check_counts(op, indptr, x.size(0) * x.size(1), start.numel());
  Tensor y = drseg::allocate_like(x);
  if (y.numel() == 0) return y;
  if (dtype == ScalarType::Double) {
    propagate_listed<double>(x, begin, start, coefficient, y);
  } else {
    propagate_listed<float>(x, begin, start, coefficient, y);
  }
  return y;
}

template <class T>
static void all_dots(const Tensor& start, const Tensor& end, const Tensor& index, Tensor& dot) {
  const int64_t nodes = start.size(1), channels = start.size(2), slots = index.size(2);
  const Graph<T> graph{index.const_data_ptr<int32_t>(), nullptr, nodes, slots, channels};
  const T *left = start.const_data_ptr<T>(), *right = end.const_data_ptr<T>();
  T* out = dot.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, start.size(0) * nodes, grain(slots * channels), [&](int64_t first, int64_t last) {
    DRSEG_CALL(edge_dot, T, graph, left, right, out, first, last);
  });
}

Tensor graph_edge_dot(const Tensor& start, const Tensor& end, const Tensor& index) {
  constexpr const char* op = "drseg_native::graph_edge_dot";
  const ScalarType dtype = check_floating(op, start);
  check_operand(op, "start", start, 3, dtype);
  check_operand(op, "end", end, 3, dtype);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_leading(op, "end", end, start);
  check_leading(op, "index", index, start);
  STD_TORCH_CHECK(end.size(2) == start.size(2), op, ": start and end differ in C");
  Tensor dot = drseg::allocate(start, {index.size(0), index.size(1), index.size(2)});
  if (dot.numel() == 0) return dot;
  if (dtype == ScalarType::Double) {
    all_dots<double>(start, end, index, dot);
  } else {
    all_dots<float>(start, end, index, dot);
  }
  return dot;
}

}  // namespace drseg
