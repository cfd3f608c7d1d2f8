// SPDX-License-Identifier: Apache-2.0
// Launches of edge_coefficient.cuh.
#include "cuda/edge_coefficient.cuh"

#include "cuda/library.h"

namespace drseg::cuda {
namespace {

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
                                    : device::Global<const T>(static_cast<const T*>(rows.data_ptr()) + how.rows.width,
                                                              rows.numel() - how.rows.width);
  how.rows.stages = edge_bytes<Sizes, T>(how.rows, 2) <= device::most_shared_bytes() ? 2 : 1;
  device::launch(
      kernel,
      device::Launch{unsigned(index.size(0)), blocks(how.rows.nodes, Sizes::BLOCK_ROWS), Sizes::THREADS,
                     edge_bytes<Sizes, T>(how.rows, how.rows.stages), here.stream()},
      source, target, read<float>(inverse_norm ? *inverse_norm : weight), parameter(shift ? *shift : vector),
      read<int>(index), parameter(vector), parameter(bias), read<float>(scores ? *scores : weight),
      write<float>(weight), write<float>(start), write<float>(coefficient), how);
}

}  // namespace

bool check_halves(
    const char* op, const Tensor& source, const std::optional<Tensor>& target, const std::optional<Tensor>& inverse_norm,
    const std::optional<Tensor>& shift, const Tensor& index, const Tensor& vector) {
  const ScalarType dtype = source.scalar_type();
  const bool is_half = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_half || dtype == ScalarType::Float, op, ": source has an unexpected dtype");
  check_operand(op, "source", source, 3, dtype);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_leading(op, "index", index, source);
  const int64_t stride = source.size(2);
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
  return is_half;
}

std::tuple<Tensor, Tensor, Tensor> edge_coefficient(
    const Tensor& source, std::optional<Tensor> target, std::optional<Tensor> inverse_norm, std::optional<Tensor> shift,
    const Tensor& index, const Tensor& vector, const Tensor& bias, std::optional<Tensor> scores, int64_t norm,
    double eps, bool apart) {
  constexpr const char* op = "drseg_native_cuda::edge_coefficient";
  const ScalarType dtype = source.scalar_type();
  check_halves(op, source, target, inverse_norm, shift, index, vector);
  const int64_t batch = index.size(0), nodes = index.size(1), slots = index.size(2), stride = source.size(2);
  const int64_t width = target ? stride : stride / 2;
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
  Edges how{{int(nodes), int(slots), int(width), int(stride), 1},
            inverse_norm.has_value(), shift.has_value(), scores.has_value(), Norm(norm), float(eps)};
  const Halves halves{source, target};
  const auto run = [&](auto type, auto group, auto warps, auto rows, auto most) {
    using T = decltype(type);
    constexpr int GROUP = decltype(group)::value, WARPS = decltype(warps)::value, ROWS = decltype(rows)::value;
    constexpr int SLOTS = decltype(most)::value;
    using Sizes = EdgeSizes<GROUP, WARPS, ROWS, SLOTS>;
    if (dtype != dtype_of<T>() || slots > Sizes::ROOM || edge_bytes<Sizes, T>(how.rows, 1) > LEAST_SHARED) return false;
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
        scale_edges, device::Launch{unsigned(batch), unsigned(nodes), 256, 0, here.stream()}, read<float>(weight),
        read<int>(index), read<float>(start), write<float>(coefficient), int(nodes), int(slots), Norm(norm));
  }
  return {weight, coefficient, is_row ? start : allocate(index, {0, batch, nodes}, ScalarType::Float)};
}

}  // namespace drseg::cuda
