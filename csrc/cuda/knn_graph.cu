// SPDX-License-Identifier: Apache-2.0
// Launches of prepare_prior.cuh and knn_graph.cuh.
#include "cuda/knn_graph.cuh"

#include "cuda/library.h"
#include "cuda/prepare_prior.cuh"

namespace drseg::cuda {
namespace {

using device::Launch;

template <class T, bool SCALES, bool ROUNDS>
void prepare(const Tensor& prior, Tensor& scaled, Tensor& inverse, Tensor& rounded, Tensor& residual) {
  const OnDevice here(prior);
  const int64_t channels = prior.size(2), rows = prior.size(0) * prior.size(1);
  device::launch(
      prepare_rows<T, SCALES, ROUNDS>, Launch{blocks(rows, 4), 1, 128, 0, here.stream()}, read<T>(prior),
      write<T>(scaled), write<float>(inverse), write<half>(rounded), write<float>(residual), int(rows), int(channels));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> prepare_prior(const Tensor& prior, bool rounds) {
  constexpr const char* op = "drseg_native_cuda::prepare_prior";
  const ScalarType dtype = prior.scalar_type();
  check_operand(op, "prior", prior, 3, dtype);
  const int64_t batch = prior.size(0), nodes = prior.size(1), channels = prior.size(2);
  Tensor scaled = allocate(prior, {batch, nodes, channels});
  Tensor inverse = allocate(prior, {batch, nodes}, ScalarType::Float);
  Tensor rounded = rounds ? allocate(prior, {batch, nodes, channels}, ScalarType::Half) : allocate(prior, {0}, ScalarType::Half);
  Tensor residual = rounds ? allocate(prior, {batch, nodes}, ScalarType::Float) : allocate(prior, {0}, ScalarType::Float);
  if (batch * nodes > 0) {
    if (dtype == ScalarType::Float && rounds)
      prepare<float, true, true>(prior, scaled, inverse, rounded, residual);
    else if (dtype == ScalarType::Float)
      prepare<float, true, false>(prior, scaled, inverse, rounded, residual);
    else if (dtype == ScalarType::BFloat16)
      prepare<device::bfloat16, true, false>(prior, scaled, inverse, rounded, residual);
    else if (dtype == ScalarType::Half)
      // squares of float16 values are within the range of float32
      prepare<half, false, false>(prior, scaled, inverse, rounded, residual);
    else
      STD_TORCH_CHECK(false, op, ": prior has an unexpected dtype");
  }
  return {scaled, inverse, rounded, residual};
}

void select(
    const Tensor& product, const Tensor& prior, const Tensor& inverse_norm, std::optional<Tensor> residual,
    const Tensor& table, int64_t join, bool include_self, double slack, int64_t first, Tensor index, Tensor score,
    std::optional<Tensor> count) {
  constexpr const char* op = "drseg_native_cuda::select";
  check_operand(op, "product", product, 3, ScalarType::Float);
  check_operand(op, "inverse_norm", inverse_norm, 2, ScalarType::Float);
  check_operand(op, "table", table, 2, ScalarType::Float);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_operand(op, "score", score, 3, ScalarType::Float);
  const int64_t nodes = inverse_norm.size(1), images = product.size(0);
  STD_TORCH_CHECK(nodes <= 1024, op, ": more than 1024 nodes, got ", nodes);
  STD_TORCH_CHECK(product.size(1) == nodes && product.size(2) == nodes, op, ": product is not (images, N, N)");
  STD_TORCH_CHECK(first >= 0 && first + images <= inverse_norm.size(0), op, ": images out of range");
  STD_TORCH_CHECK(table.size(0) * table.size(1) == nodes, op, ": table does not match");
  check_leading(op, "index", index, inverse_norm);
  check_leading(op, "score", score, inverse_norm);
  STD_TORCH_CHECK(score.size(2) == index.size(2), op, ": index and score differ");
  STD_TORCH_CHECK(join >= 0 && join < 3, op, ": join is unknown");
  if (residual) {
    check_operand(op, "residual", *residual, 2, ScalarType::Float);
    check_leading(op, "residual", *residual, inverse_norm);
    check_operand(op, "prior", prior, 3, ScalarType::Float);
    check_leading(op, "prior", prior, inverse_norm);
  }
  if (count) {
    check_operand(op, "count", *count, 2, ScalarType::Int);
    check_leading(op, "count", *count, inverse_norm);
  }
  if (index.numel() == 0 || images == 0) return;
  const Selection how{int(nodes), int(prior.size(2)), int(table.size(1)), int(index.size(2)), Join(join), include_self,
                      residual.has_value(), float(slack), count.has_value()};
  const OnDevice here(product);
  const Launch launch{unsigned(images), blocks(nodes, 4), 128, 0, here.stream()};
  const auto run = [&](auto kernel) {
    device::launch(
        kernel, launch, read<float>(product), read<float>(residual ? prior : product), read<float>(inverse_norm),
        read<float>(residual ? *residual : inverse_norm), read<float>(table), write<int>(index), write<float>(score),
        write<int>(count ? *count : index), how, int(first));
  };
  // columns of a lane: what a row has, in few steps, for each is code of its own
  if (nodes <= 8 * 32)
    run(select_rows<8>);
  else if (nodes <= 18 * 32)
    run(select_rows<18>);
  else
    run(select_rows<32>);
}

}  // namespace drseg::cuda
