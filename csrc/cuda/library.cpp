// SPDX-License-Identifier: Apache-2.0
// Operators of the CUDA library, registered through PyTorch's stable ABI: one build serves every later torch.
// It is C++: nvcc would read torch's headers once for every architecture.
#include <torch/csrc/stable/library.h>

#include "cuda/operators.h"
#ifdef DRSEG_EMULATE
#include "cuda/device.h"
#else
#include <cuda_runtime_api.h>
#endif

// What this was built for, as drseg_core/ops/_cuda.py reads it: `cpu`, or architectures, + behind one that has PTX.
extern "C" __attribute__((visibility("default"))) const char* drseg_native_cuda_built_for() {
#ifdef DRSEG_EMULATE
  return "cpu";
#else
  return DRSEG_BUILT_FOR;
#endif
}

// The CUDA of this library's own runtime and the newest that the driver knows, as 13020; zeros where it is emulated.
extern "C" __attribute__((visibility("default"))) void drseg_native_cuda_versions(int* own, int* driver) {
  *own = *driver = 0;
#ifndef DRSEG_EMULATE
  *own = CUDART_VERSION;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
#endif
}

#ifdef DRSEG_EMULATE
extern "C" __attribute__((visibility("default"))) int64_t drseg_native_cuda_launches() { return drseg::device::launches(); }
#endif

STABLE_TORCH_LIBRARY(drseg_native_cuda, m) {
  m.def("prepare_prior(Tensor prior, bool rounds) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "select(Tensor product, Tensor prior, Tensor inverse_norm, Tensor? residual, Tensor table, int join, "
      "bool include_self, float slack, int first, Tensor(a!) index, Tensor(b!) score, Tensor(c!)? count) -> ()");
  m.def(
      "edge_coefficient(Tensor source, Tensor? target, Tensor? inverse_norm, Tensor? shift, Tensor index, "
      "Tensor vector, Tensor bias, Tensor? scores, int norm, float eps, bool apart) -> (Tensor, Tensor, Tensor)");
  m.def(
      "edge_gradients(Tensor slope, Tensor source, Tensor? target, Tensor? inverse_norm, Tensor? shift, Tensor index, "
      "Tensor vector, Tensor? indptr, Tensor? perm, bool need_rows) -> (Tensor, Tensor, Tensor)");
  m.def(
      "graph_layer(Tensor x, Tensor index, Tensor coefficient, Tensor? scale, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, int activation, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "graph_layer_backward(Tensor grad, Tensor x, Tensor index, Tensor coefficient, Tensor? scale, Tensor? indptr, "
      "Tensor? perm, Tensor? added, bool need_coefficient) -> (Tensor, Tensor)");
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
  m.impl("edge_gradients", TORCH_BOX(&drseg::cuda::edge_gradients));
  m.impl("graph_layer", TORCH_BOX(&drseg::cuda::graph_layer));
  m.impl("graph_layer_backward", TORCH_BOX(&drseg::cuda::graph_layer_backward));
}
