// SPDX-License-Identifier: Apache-2.0
// Launches of edge_gradients.cuh.
#include "cuda/edge_gradients.cuh"

#include "cuda/library.h"

namespace drseg::cuda {
namespace {

// What both directions take.
struct Given {
  const Tensor& slope;
  const std::optional<Tensor>& inverse_norm;
  const std::optional<Tensor>& shift;
  const Tensor& index;
  const Tensor& vector;
  const Tensor* list;
  const Tensor* begin;
};

// A half of the rows: its first element in the tensor that has it.
struct Half {
  const Tensor& rows;
  int64_t from;
  template <class T>
  device::Global<const T> get() const {
    return {static_cast<const T*>(rows.data_ptr()) + from, rows.numel() - from};
  }
};

template <class T, int GROUP, bool ROWS>
void run(const Half& near, const Half& far, const Given& given, Tensor& gradient, int64_t from, Tensor* part, Slopes how) {
  constexpr int WARPS = 16;
  using Sizes = SlopeSizes<GROUP, WARPS>;
  const OnDevice here(given.index);
  const int64_t batch = given.index.size(0), piece = GROUP * Piece<T>::SIZE, slices = (how.width + piece - 1) / piece;
  how.rows = rows_of_block(how.nodes, batch * slices, device::blocks_at_once(Sizes::bytes(how.nodes), Sizes::THREADS));
  const unsigned groups = blocks(how.nodes, how.rows);
  if (ROWS) *part = allocate(given.slope, {batch * groups, 2 * how.width + 1}, ScalarType::Float);
  device::launch(
      slopes_to_rows<T, GROUP, WARPS, ROWS>,
      device::Launch{unsigned(batch), groups * unsigned(slices), Sizes::THREADS, Sizes::bytes(how.nodes), here.stream()},
      near.get<T>(), far.get<T>(), read<float>(given.inverse_norm ? *given.inverse_norm : given.slope),
      parameter(given.shift ? *given.shift : given.vector), parameter(given.vector), read<int>(given.index),
      read<float>(given.slope), read<Link>(ROWS ? given.slope : *given.list),
      read<int>(ROWS ? given.index : *given.begin),
      device::Global<T>(static_cast<T*>(gradient.data_ptr()) + from, gradient.numel() - from),
      device::Global<float>(ROWS ? static_cast<float*>(part->data_ptr()) : nullptr, ROWS ? part->numel() : 0), how);
}

// Narrow parts of the rows where an image of wide ones is too large.
template <class T, bool ROWS>
void run(const Half& near, const Half& far, const Given& given, Tensor& gradient, int64_t from, Tensor* part, Slopes how) {
  if (SlopeSizes<8, 16>::bytes(how.nodes) <= LEAST_SHARED)
    run<T, 8, ROWS>(near, far, given, gradient, from, part, how);
  else
    run<T, 4, ROWS>(near, far, given, gradient, from, part, how);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> edge_gradients(
    const Tensor& slope, const Tensor& source, std::optional<Tensor> target, std::optional<Tensor> inverse_norm,
    std::optional<Tensor> shift, const Tensor& index, const Tensor& vector, std::optional<Tensor> indptr,
    std::optional<Tensor> perm, bool need_rows) {
  constexpr const char* op = "drseg_native_cuda::edge_gradients";
  const bool is_half = check_halves(op, source, target, inverse_norm, shift, index, vector);
  check_operand(op, "slope", slope, 3, ScalarType::Float);
  STD_TORCH_CHECK(slope.numel() == index.numel(), op, ": slope does not match");
  const int64_t batch = index.size(0), nodes = index.size(1), slots = index.size(2), edges = index.numel();
  STD_TORCH_CHECK(nodes <= 1024, op, ": more than 1024 nodes, got ", nodes);
  const int64_t stride = source.size(2), width = target ? stride : stride / 2;
  const bool columns = indptr.has_value();
  Tensor to_source = allocate(source, {need_rows || (columns && !target) ? batch : 0, nodes, stride});
  Tensor to_target = allocate(source, {columns && target ? batch : 0, nodes, stride});
  Tensor to_parameters = allocate(slope, {need_rows ? 2 * width + 1 : 0}, ScalarType::Float);
  const Slopes how{int(nodes), int(slots), int(width), int(stride), inverse_norm.has_value(), shift.has_value(), 0};
  const Half near{source, 0}, far{target ? *target : source, target ? 0 : width};
  if (need_rows) {
    Tensor part = to_parameters;
    const Given given{slope, inverse_norm, shift, index, vector, nullptr, nullptr};
    if (is_half)
      run<device::bfloat16, true>(near, far, given, to_source, 0, &part, how);
    else
      run<float, true>(near, far, given, to_source, 0, &part, how);
    const OnDevice here(index);
    device::launch(
        add_parts, device::Launch{blocks(2 * width + 1, 128), 1, 128, 0, here.stream()}, read<float>(part),
        write<float>(to_parameters), part.size(0), int(2 * width + 1));
  }
  if (columns) {
    STD_TORCH_CHECK(perm.has_value(), op, ": indptr without perm");
    check_operand(op, "indptr", *indptr, 1, ScalarType::Int);
    check_operand(op, "perm", *perm, 1, ScalarType::Int);
    STD_TORCH_CHECK(indptr->numel() == batch * nodes + 1 && perm->numel() == edges, op, ": columns do not match");
    // a link is as large as four numbers
    Tensor list = allocate(slope, {edges, 4}, ScalarType::Float);
    const OnDevice here(index);
    device::launch(
        list_links, device::Launch{blocks(edges, 256), 1, 256, 0, here.stream()}, read<float>(slope),
        read<float>(inverse_norm ? *inverse_norm : slope), read<int>(*perm),
        device::Global<Link>(static_cast<Link*>(list.data_ptr()), edges), edges, int(nodes), int(slots),
        inverse_norm.has_value());
    const Given given{slope, inverse_norm, shift, index, vector, &list, &*indptr};
    Tensor& gradient = target ? to_target : to_source;
    if (is_half)
      run<device::bfloat16, false>(far, near, given, gradient, far.from, nullptr, how);
    else
      run<float, false>(far, near, given, gradient, far.from, nullptr, how);
  }
  return {to_source, to_target, to_parameters};
}

}  // namespace drseg::cuda
