// SPDX-License-Identifier: Apache-2.0
// Operators of the CPU library, registered through PyTorch's stable ABI: one build serves every later torch.

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(drseg_native, m) {
  m.def("prepare_prior(Tensor prior, bool scale=True) -> (Tensor, Tensor)");
  m.def(
      "knn_graph(Tensor prior, Tensor inverse_norm, Tensor table, int k, int form, bool include_self, "
      "int first=0, int? last=None) -> (Tensor, Tensor)");
  m.def("csc(Tensor index) -> (Tensor, Tensor)");
  m.def(
      "edge_weight(Tensor source, Tensor target, Tensor index, Tensor vector, Tensor bias, Tensor? mask, "
      "Tensor? exponent=None) -> Tensor");
  m.def(
      "edge_weight_backward(Tensor grad, Tensor weight, Tensor source, Tensor target, Tensor index, Tensor vector, "
      "Tensor? indptr, Tensor? perm, Tensor? exponent=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("degree_normalize(Tensor weight, Tensor index, int norm, float eps) -> Tensor");
  m.def("degree_normalize_backward(Tensor grad, Tensor weight, Tensor index, int norm, float eps) -> Tensor");
  m.def(
      "graph_propagate(Tensor x, Tensor index, Tensor coefficient, bool transpose, Tensor? indptr, Tensor? perm) "
      "-> Tensor");
  m.def("graph_propagate_listed(Tensor x, Tensor indptr, Tensor start, Tensor coefficient) -> Tensor");
  m.def("graph_edge_dot(Tensor start, Tensor end, Tensor index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(drseg_native, CPU, m) {
  m.impl("prepare_prior", TORCH_BOX(&drseg::prepare_prior));
  m.impl("knn_graph", TORCH_BOX(&drseg::knn_graph));
  m.impl("csc", TORCH_BOX(&drseg::csc));
  m.impl("edge_weight", TORCH_BOX(&drseg::edge_weight));
  m.impl("edge_weight_backward", TORCH_BOX(&drseg::edge_weight_backward));
  m.impl("degree_normalize", TORCH_BOX(&drseg::degree_normalize));
  m.impl("degree_normalize_backward", TORCH_BOX(&drseg::degree_normalize_backward));
  m.impl("graph_propagate", TORCH_BOX(&drseg::graph_propagate));
  m.impl("graph_propagate_listed", TORCH_BOX(&drseg::graph_propagate_listed));
  m.impl("graph_edge_dot", TORCH_BOX(&drseg::graph_edge_dot));
}
