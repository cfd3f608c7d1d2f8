// SPDX-License-Identifier: Apache-2.0
// Operators of the CUDA library, registered through PyTorch's stable ABI: one build serves every later torch.
#include "cuda/edge_coefficient.cuh"
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

// (B, N, D) -> scaled, inverse norms (B, N), and if `rounds` the scaled rows in float16 and a bound (B, N) on the length
// of their rounding errors over their own; otherwise both are empty
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

// Fills index (B, N, k) int32 and score (B, N, k) of the images from `first` on whose products (images, N, N) these are.
// `join` counts subtract, clamped, product. Without `residual` the products are those of the rows themselves.
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
  const Launch launch{blocks(nodes, 4), unsigned(images), 128, 0, here.stream()};
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

namespace {

Parameter parameter(const Tensor& tensor) {
  const bool is_half = tensor.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_half || tensor.scalar_type() == ScalarType::Float, "drseg_native_cuda: a parameter has an unexpected dtype");
  return {read<float>(tensor), read<device::bfloat16>(tensor), is_half};
}

template <int N>
using Size = std::integral_constant<int, N>;

// Both halves of the rows, one behind the other, or of two tensors.
struct Halves {
  const Tensor& source;
  const std::optional<Tensor>& target;
};

template <class T, class Sizes, class Kernel>
void weigh(Kernel kernel, const Halves& halves, const std::optional<Tensor>& inverse_norm,
           const std::optional<Tensor>& shift, const Tensor& index, const Tensor& vector, const Tensor& bias,
           const std::optional<Tensor>& scores, Tensor& weight, Tensor& start, Tensor& coefficient, Edges how) {
  const OnDevice here(index);
  const Tensor& rows = halves.source;
  const auto source = read<T>(rows);
  const auto target = halves.target ? read<T>(*halves.target)
                                    : device::Global<const T>(static_cast<const T*>(rows.data_ptr()) + how.width,
                                                              rows.numel() - how.width);
  how.stages = Sizes::template bytes<T>(how.nodes, how.width, 2) <= device::most_shared_bytes() ? 2 : 1;
  device::launch(
      kernel,
      Launch{blocks(how.nodes, Sizes::BLOCK_ROWS), unsigned(index.size(0)), Sizes::THREADS,
             Sizes::template bytes<T>(how.nodes, how.width, how.stages), here.stream()},
      source, target, read<float>(inverse_norm ? *inverse_norm : weight), parameter(shift ? *shift : vector),
      read<int>(index), parameter(vector), parameter(bias), read<float>(scores ? *scores : weight),
      write<float>(weight), write<float>(start), write<float>(coefficient), how);
}

}  // namespace

// Weights of edges, their coefficients unless they stay `apart`, and of sym_row the scales (1, B, N). Rows of source
// (B, N, E), or of both halves (B, N, 2 E), are multiples of 16 bytes. `norm` counts sym_row, row, sym_count.
std::tuple<Tensor, Tensor, Tensor> edge_coefficient(
    const Tensor& source, std::optional<Tensor> target, std::optional<Tensor> inverse_norm, std::optional<Tensor> shift,
    const Tensor& index, const Tensor& vector, const Tensor& bias, std::optional<Tensor> scores, int64_t norm,
    double eps, bool apart) {
  constexpr const char* op = "drseg_native_cuda::edge_coefficient";
  const ScalarType dtype = source.scalar_type();
  const bool is_half = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_half || dtype == ScalarType::Float, op, ": source has an unexpected dtype");
  check_operand(op, "source", source, 3, dtype);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_leading(op, "index", index, source);
  const int64_t batch = index.size(0), nodes = index.size(1), slots = index.size(2), stride = source.size(2);
  const int64_t width = target ? stride : stride / 2, piece = is_half ? 8 : 4;
  if (target) {
    check_operand(op, "target", *target, 3, dtype);
    check_leading(op, "target", *target, source);
    STD_TORCH_CHECK(target->size(2) == stride, op, ": source and target differ");
  }
  STD_TORCH_CHECK(width % piece == 0 && width > 0, op, ": rows are no multiple of 16 bytes");
  for (const Tensor* rows : {&source, target ? &*target : &source})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(rows->data_ptr()) % 16 == 0, op, ": rows are not aligned to 16 bytes");
  if (inverse_norm) {
    check_operand(op, "inverse_norm", *inverse_norm, 2, ScalarType::Float);
    check_leading(op, "inverse_norm", *inverse_norm, source);
  }
  for (const Tensor* values : {&vector, shift ? &*shift : &vector}) {
    check_operand(op, "vector or bias of the first layer", *values, 1, values->scalar_type());
    STD_TORCH_CHECK(values->numel() == width, op, ": a vector has another width than the rows");
  }
  STD_TORCH_CHECK(bias.numel() == 1, op, ": bias is not one number");
  if (scores) {
    check_operand(op, "scores", *scores, 3, ScalarType::Float);
    STD_TORCH_CHECK(scores->numel() == index.numel(), op, ": scores do not match");
  }
  STD_TORCH_CHECK(norm >= 0 && norm < 3, op, ": norm is unknown");
  const bool is_row = Norm(norm) == Norm::sym_row;
  Tensor weight = allocate(index, {batch, nodes, slots}, ScalarType::Float);
  Tensor coefficient = allocate(index, {apart ? 0 : batch, nodes, slots}, ScalarType::Float);
  Tensor start = allocate(index, {1, batch, nodes}, ScalarType::Float);
  Edges how{int(nodes), int(slots), int(width), stride, inverse_norm.has_value(), shift.has_value(),
            scores.has_value(), Norm(norm), float(eps), 1};
  const Halves halves{source, target};
  const auto run = [&](auto type, auto group, auto warps, auto rows, auto most) {
    using T = decltype(type);
    constexpr int GROUP = decltype(group)::value, WARPS = decltype(warps)::value, ROWS = decltype(rows)::value;
    constexpr int SLOTS = decltype(most)::value;
    using Sizes = EdgeSizes<GROUP, WARPS, ROWS, SLOTS>;
    if (dtype != dtype_of<T>() || slots > Sizes::ROOM || Sizes::template bytes<T>(nodes, width, 1) > (99 << 10)) return false;
    weigh<T, Sizes>(
        weigh_edges<T, GROUP, WARPS, ROWS, SLOTS>, halves, inverse_norm, shift, index, vector, bias, scores, weight,
        start, coefficient, how);
    return true;
  };
  const float single = 0;
  const device::bfloat16 half_wide{};
  // 36 rows of 24 x 24 nodes, so that eight images fill the multiprocessors once; then what has room for more
  const bool done = run(single, Size<8>(), Size<12>(), Size<3>(), Size<19>()) ||
                    run(half_wide, Size<8>(), Size<12>(), Size<3>(), Size<19>()) ||
                    run(single, Size<8>(), Size<8>(), Size<2>(), Size<32>()) ||
                    run(half_wide, Size<8>(), Size<8>(), Size<2>(), Size<32>()) ||
                    run(single, Size<4>(), Size<8>(), Size<2>(), Size<16>()) ||
                    run(half_wide, Size<4>(), Size<8>(), Size<2>(), Size<16>());
  STD_TORCH_CHECK(done, op, ": more than 1024 nodes, 128 slots or 2048 channels, got ", nodes, ", ", slots, " and ", width);
  if (!apart && Norm(norm) != Norm::sym_count) {
    const OnDevice here(index);
    device::launch(
        scale_edges, Launch{unsigned(nodes), unsigned(batch), 256, 0, here.stream()}, read<float>(weight),
        read<int>(index), read<float>(start), write<float>(coefficient), int(nodes), int(slots), Norm(norm));
  }
  return {weight, coefficient, is_row ? start : allocate(index, {0, batch, nodes}, ScalarType::Float)};
}

}  // namespace drseg::cuda

// What this was built for, as drseg_core/ops/_cuda.py reads it: `cpu`, or architectures, + behind one that has PTX.
extern "C" __attribute__((visibility("default"))) const char* drseg_native_cuda_built_for() {
#ifdef DRSEG_EMULATE
  return "cpu";
#else
  return DRSEG_BUILT_FOR;
#endif
}

STABLE_TORCH_LIBRARY(drseg_native_cuda, m) {
  m.def("prepare_prior(Tensor prior, bool rounds) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "select(Tensor product, Tensor prior, Tensor inverse_norm, Tensor? residual, Tensor table, int join, "
      "bool include_self, float slack, int first, Tensor(a!) index, Tensor(b!) score, Tensor(c!)? count) -> ()");
  m.def(
      "edge_coefficient(Tensor source, Tensor? target, Tensor? inverse_norm, Tensor? shift, Tensor index, "
      "Tensor vector, Tensor bias, Tensor? scores, int norm, float eps, bool apart) -> (Tensor, Tensor, Tensor)");
}

#ifdef DRSEG_EMULATE
#define DRSEG_WHERE CPU
#else
#define DRSEG_WHERE CUDA
#endif
STABLE_TORCH_LIBRARY_IMPL(drseg_native_cuda, DRSEG_WHERE, m) {
  m.impl("prepare_prior", TORCH_BOX(&drseg::cuda::prepare_prior));
  m.impl("select", TORCH_BOX(&drseg::cuda::select));
  m.impl("edge_coefficient", TORCH_BOX(&drseg::cuda::edge_coefficient));
}
