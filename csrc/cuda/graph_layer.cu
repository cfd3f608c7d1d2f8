// SPDX-License-Identifier: Apache-2.0
// Launches of graph_layer.cuh.
#include "cuda/graph_layer.cuh"

#include "cuda/library.h"

namespace drseg::cuda {
namespace {

// Index, coefficients and scales of a graph, and the terms of its columns where a gradient goes along them.
struct Terms {
  const Tensor& index;
  const Tensor& coefficient;
  const std::optional<Tensor>& scale;
  const Tensor* list;
  const Tensor* begin;
};

template <class T>
device::Global<const T> read_or(const std::optional<Tensor>& tensor, const Tensor& other) {
  return read<T>(tensor ? *tensor : other);
}

template <class T, class Out, int GROUP, bool LISTED>
void gather(const Tensor& x, const Terms& terms, const std::optional<Tensor>& bias, Tensor& y, bool relu) {
  constexpr int WARPS = 16;
  using Sizes = LayerSizes<GROUP, WARPS>;
  const OnDevice here(x);
  const int64_t batch = x.size(0), nodes = x.size(1), channels = x.size(2), piece = GROUP * Piece<T>::SIZE;
  const int64_t slices = (channels + piece - 1) / piece;
  const int rows = rows_of_block(nodes, batch * slices, device::blocks_at_once(Sizes::bytes(int(nodes)), Sizes::THREADS));
  const Layer how{int(nodes), int(terms.index.size(2)), int(channels), terms.scale.has_value(), bias.has_value(), relu, rows};
  device::launch(
      gather_rows<T, Out, GROUP, WARPS, LISTED>,
      device::Launch{unsigned(batch), blocks(nodes, rows) * unsigned(slices), Sizes::THREADS, Sizes::bytes(int(nodes)), here.stream()},
      read<T>(x), read<int>(terms.index), read<float>(terms.coefficient),
      read<Term>(LISTED ? *terms.list : terms.coefficient), read<int>(LISTED ? *terms.begin : terms.index),
      read_or<float>(terms.scale, terms.coefficient), parameter(bias ? *bias : terms.coefficient), write<Out>(y), how);
}

// Narrow parts of the rows where an image of wide ones is too large.
template <class T, class Out, bool LISTED>
void gather(const Tensor& x, const Terms& terms, const std::optional<Tensor>& bias, Tensor& y, bool relu) {
  if (LayerSizes<8, 16>::bytes(int(x.size(1))) <= LEAST_SHARED)
    gather<T, Out, 8, LISTED>(x, terms, bias, y, relu);
  else
    gather<T, Out, 4, LISTED>(x, terms, bias, y, relu);
}

template <class T>
void products(const Tensor& grad, const Tensor& x, const Terms& terms, const std::optional<Tensor>& added, Tensor& gradient) {
  const OnDevice here(x);
  const int nodes = int(x.size(1)), slots = int(terms.index.size(2));
  EdgeRows how{nodes, slots, int(x.size(2)), int(x.size(2)), 1};
  const auto run = [&](auto group, auto warps, auto rows, auto most) {
    constexpr int GROUP = decltype(group)::value, WARPS = decltype(warps)::value, ROWS = decltype(rows)::value;
    constexpr int SLOTS = decltype(most)::value;
    using Sizes = EdgeSizes<GROUP, WARPS, ROWS, SLOTS>;
    if (slots > Sizes::ROOM || Sizes::bytes(nodes, 1) > LEAST_SHARED) return false;
    how.stages = Sizes::bytes(nodes, 2) <= device::most_shared_bytes() ? 2 : 1;
    device::launch(
        edge_products<T, GROUP, WARPS, ROWS, SLOTS>,
        device::Launch{unsigned(x.size(0)), blocks(nodes, Sizes::BLOCK_ROWS), Sizes::THREADS, Sizes::bytes(nodes, how.stages), here.stream()},
        read<T>(grad), read<T>(x), read<int>(terms.index), read_or<float>(terms.scale, terms.coefficient),
        read_or<float>(added, terms.coefficient), write<float>(gradient), how, terms.scale.has_value(), added.has_value());
    return true;
  };
  // as the weights of edges
  const bool done = run(Size<8>(), Size<12>(), Size<3>(), Size<19>()) || run(Size<8>(), Size<8>(), Size<2>(), Size<32>()) ||
                    run(Size<4>(), Size<8>(), Size<2>(), Size<16>());
  STD_TORCH_CHECK(done, "drseg_native_cuda::graph_layer_backward: more than 1024 nodes or 128 slots, got ", nodes, " and ", slots);
}

void check_graph(
    const char* op, const Tensor& x, const Tensor& index, const Tensor& coefficient, const std::optional<Tensor>& scale) {
  const bool is_half = x.scalar_type() == ScalarType::BFloat16;
  check_operand(op, "x", x, 3, is_half ? ScalarType::BFloat16 : ScalarType::Float);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_leading(op, "index", index, x);
  check_operand(op, "coefficient", coefficient, 3, ScalarType::Float);
  STD_TORCH_CHECK(coefficient.numel() == index.numel(), op, ": coefficient does not match");
  STD_TORCH_CHECK(x.size(1) <= 1024, op, ": more than 1024 nodes, got ", x.size(1));
  STD_TORCH_CHECK(x.size(2) % (is_half ? 8 : 4) == 0, op, ": rows are no multiple of 16 bytes");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, op, ": rows are not aligned to 16 bytes");
  if (scale) {
    check_operand(op, "scale", *scale, 2, ScalarType::Float);
    check_leading(op, "scale", *scale, x);
  }
}

void check_parameter(const char* op, const char* name, const std::optional<Tensor>& value, const Tensor& x) {
  if (!value) return;
  check_operand(op, name, *value, 1, value->scalar_type());
  STD_TORCH_CHECK(value->numel() == x.size(2), op, ": ", name, " does not match");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> graph_layer(
    const Tensor& x, const Tensor& index, const Tensor& coefficient, std::optional<Tensor> scale,
    std::optional<Tensor> bias, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t activation,
    double eps) {
  constexpr const char* op = "drseg_native_cuda::graph_layer";
  check_graph(op, x, index, coefficient, scale);
  check_parameter(op, "bias", bias, x);
  check_parameter(op, "norm_weight", norm_weight, x);
  check_parameter(op, "norm_bias", norm_bias, x);
  STD_TORCH_CHECK(activation >= 0 && activation < 3, op, ": activation is unknown");
  const bool normalizes = Activation(activation) == Activation::layer_norm, is_half = x.scalar_type() != ScalarType::Float;
  STD_TORCH_CHECK(!normalizes || (norm_weight && norm_bias), op, ": LayerNorm without its parameters");
  const int64_t batch = x.size(0), nodes = x.size(1), channels = x.size(2);
  Tensor y = allocate(x, {batch, nodes, channels});
  Tensor given = allocate(x, {normalizes ? batch : 0, nodes, channels}, ScalarType::Float);
  Tensor mean = allocate(x, {normalizes ? batch : 0, nodes}, ScalarType::Float);
  Tensor rstd = allocate(x, {normalizes ? batch : 0, nodes}, ScalarType::Float);
  const Terms terms{index, coefficient, scale, nullptr, nullptr};
  const bool relu = Activation(activation) == Activation::relu;
  if (y.numel() == 0) return {y, given, mean, rstd};
  if (!is_half)
    gather<float, float, false>(x, terms, bias, normalizes ? given : y, relu);
  else if (normalizes)
    gather<device::bfloat16, float, false>(x, terms, bias, given, false);
  else
    gather<device::bfloat16, device::bfloat16, false>(x, terms, bias, y, relu);
  if (normalizes) {
    const OnDevice here(x);
    const auto normalize = [&](auto kernel, auto out) {
      device::launch(
          kernel, device::Launch{blocks(batch * nodes, 8), 1, 256, 0, here.stream()}, read<float>(given),
          parameter(*norm_weight), parameter(*norm_bias), out, write<float>(mean), write<float>(rstd), batch * nodes,
          int(channels), float(eps));
    };
    if (is_half)
      normalize(normalize_rows<device::bfloat16>, write<device::bfloat16>(y));
    else
      normalize(normalize_rows<float>, write<float>(y));
  }
  return {y, given, mean, rstd};
}

std::tuple<Tensor, Tensor> graph_layer_backward(
    const Tensor& grad, const Tensor& x, const Tensor& index, const Tensor& coefficient, std::optional<Tensor> scale,
    std::optional<Tensor> indptr, std::optional<Tensor> perm, std::optional<Tensor> added, bool need_coefficient) {
  constexpr const char* op = "drseg_native_cuda::graph_layer_backward";
  check_graph(op, x, index, coefficient, scale);
  check_graph(op, grad, index, coefficient, scale);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.size(2) == x.size(2), op, ": grad does not match x");
  const int64_t batch = x.size(0), nodes = x.size(1), edges = index.numel();
  const bool is_half = x.scalar_type() != ScalarType::Float;
  Tensor to_x = allocate(x, {indptr ? batch : 0, nodes, x.size(2)});
  Tensor to_coefficient = allocate(x, {need_coefficient ? batch : 0, nodes, index.size(2)}, ScalarType::Float);
  if (indptr && to_x.numel() > 0) {
    STD_TORCH_CHECK(perm.has_value(), op, ": indptr without perm");
    check_operand(op, "indptr", *indptr, 1, ScalarType::Int);
    check_operand(op, "perm", *perm, 1, ScalarType::Int);
    STD_TORCH_CHECK(indptr->numel() == batch * nodes + 1 && perm->numel() == edges, op, ": columns do not match");
    // a term is as large as two numbers
    Tensor list = allocate(x, {edges, 2}, ScalarType::Float);
    const Terms terms{index, coefficient, scale, &list, &*indptr};
    if (edges > 0) {
      const OnDevice here(x);
      device::launch(
          list_terms, device::Launch{blocks(edges, 256), 1, 256, 0, here.stream()}, read<float>(coefficient),
          read_or<float>(scale, coefficient), read<int>(*perm),
          device::Global<Term>(static_cast<Term*>(list.data_ptr()), edges), edges, int(nodes), int(index.size(2)),
          scale.has_value());
    }
    if (is_half)
      gather<device::bfloat16, device::bfloat16, true>(grad, terms, std::nullopt, to_x, false);
    else
      gather<float, float, true>(grad, terms, std::nullopt, to_x, false);
  }
  if (to_coefficient.numel() > 0) {
    const Terms terms{index, coefficient, scale, nullptr, nullptr};
    if (is_half)
      products<device::bfloat16>(grad, x, terms, added, to_coefficient);
    else
      products<float>(grad, x, terms, added, to_coefficient);
  }
  return {to_x, to_coefficient};
}

}  // namespace drseg::cuda
