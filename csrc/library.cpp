// SPDX-License-Identifier: Apache-2.0
// Operators of the CPU library, registered through PyTorch's stable ABI: one build serves every later torch.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(drseg_native, m) {
  m.def("graph_propagate(Tensor x, Tensor index, Tensor coefficient, bool transpose) -> Tensor");
  m.def("graph_edge_dot(Tensor start, Tensor end, Tensor index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(drseg_native, CPU, m) {
  m.impl("graph_propagate", TORCH_BOX(&drseg::graph_propagate));
  m.impl("graph_edge_dot", TORCH_BOX(&drseg::graph_edge_dot));
}
