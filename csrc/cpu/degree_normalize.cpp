// SPDX-License-Identifier: Apache-2.0
// Propagation coefficients from edge weights and degrees, and the gradient through the degrees of both ends.
//
// One sample is one task of sums in ascending edge order. So the bits do not depend on the number of threads, and the
// work is small beside that of the other ops.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "cpu/grain.h"
#include "cpu/level.h"
#include "ops.h"

namespace drseg {
namespace {

enum Norm : int64_t { kSymRow, kSymCount, kSymInout, kRow, kSymUndirected };

template <class T>
struct Sample {
  const T* weight;
  const int32_t* index;
  int64_t nodes, slots;
};

template <class T>
DRSEG_INLINE T row_sum(const T* value, int64_t count) {
  constexpr int64_t lanes = 16;
  T sum[lanes] = {};
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes)
    for (int64_t l = 0; l < lanes; ++l) sum[l] += value[k + l];
  for (int64_t l = 0; k < count; ++k, ++l) sum[l] += value[k];
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) sum[l] += sum[l + half];
  return sum[0];
}

template <class T>
DRSEG_INLINE T inverse_root(T degree) { return 1 / std::sqrt(degree); }

// Factors of the two ends of an edge: inverse square roots of their degrees.
template <class T>
struct Scales {
  std::vector<T> start, other;
  const T* end;

  Scales(Sample<T> sample, int64_t norm, T eps) : start(sample.nodes) {
    const int64_t nodes = sample.nodes, slots = sample.slots;
    for (int64_t i = 0; i < nodes; ++i) start[i] = row_sum(sample.weight + i * slots, slots);
    if (norm != kSymRow) {
      other.assign(nodes, T(0));
      for (int64_t e = 0; e < nodes * slots; ++e) other[clamp_index(sample.index[e], nodes)] += sample.weight[e];
    }
    if (norm == kSymUndirected)
      for (int64_t i = 0; i < nodes; ++i) start[i] = (start[i] + other[i]) / 2;
    for (int64_t i = 0; i < nodes; ++i) start[i] = inverse_root(start[i] + eps);
    if (norm == kSymInout)
      for (int64_t i = 0; i < nodes; ++i) other[i] = inverse_root(other[i] + eps);
    end = norm == kSymInout ? other.data() : start.data();
  }
};

template <class T>
void normalize_sample(Sample<T> sample, int64_t norm, T eps, T* out) {
  const int64_t nodes = sample.nodes, slots = sample.slots;
  if (norm == kSymCount) {
    for (int64_t e = 0; e < nodes * slots; ++e) out[e] = sample.weight[e] / T(slots);
    return;
  }
  if (norm == kRow) {
    for (int64_t i = 0; i < nodes; ++i) {
      const T degree = row_sum(sample.weight + i * slots, slots) + eps;
      for (int64_t e = i * slots; e < (i + 1) * slots; ++e) out[e] = sample.weight[e] / degree;
    }
    return;
  }
  const Scales<T> scales(sample, norm, eps);
  const T half = norm == kSymUndirected ? T(0.5) : T(1);
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t e = i * slots; e < (i + 1) * slots; ++e)
      out[e] = half * sample.weight[e] * scales.start[i] * scales.end[clamp_index(sample.index[e], nodes)];
}

template <class T>
void gradient_of_sample(Sample<T> sample, const T* grad, int64_t norm, T eps, T* out) {
  const int64_t nodes = sample.nodes, slots = sample.slots;
  if (norm == kSymCount) {
    for (int64_t e = 0; e < nodes * slots; ++e) out[e] = grad[e] / T(slots);
    return;
  }
  std::vector<T> term(slots);
  // a weight meets its degree before a gradient, as forward: the product of the two may be too large for a number
  if (norm == kRow) {
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t first = i * slots;
      const T inverse = 1 / (row_sum(sample.weight + first, slots) + eps);
      for (int64_t k = 0; k < slots; ++k) term[k] = grad[first + k] * (sample.weight[first + k] * inverse);
      const T through = row_sum(term.data(), slots);
      for (int64_t k = 0; k < slots; ++k) out[first + k] = inverse * (grad[first + k] - through);
    }
    return;
  }
  const Scales<T> scales(sample, norm, eps);
  const T half = norm == kSymUndirected ? T(0.5) : T(1);
  // to the degrees, by d(degree ** -1/2) = -1/2 degree ** -3/2, factor by factor: the cube of a scale may be too small
  std::vector<T> to_start(nodes), to_end(nodes, T(0));
  for (int64_t i = 0; i < nodes; ++i) {
    for (int64_t k = 0; k < slots; ++k) {
      const int64_t e = i * slots + k, j = clamp_index(sample.index[e], nodes);
      const T weight = sample.weight[e], share = half * grad[e];
      term[k] = share * (weight * scales.end[j]);
      to_end[j] += share * (weight * scales.start[i]);
    }
    to_start[i] = row_sum(term.data(), slots);
  }
  for (int64_t i = 0; i < nodes; ++i) {
    const T start = scales.start[i], end = scales.end[i];
    to_start[i] = start * (start * (T(-0.5) * start * to_start[i]));
    to_end[i] = end * (end * (T(-0.5) * end * to_end[i]));
    if (norm == kSymRow) to_start[i] += to_end[i];
    if (norm == kSymUndirected) to_start[i] = to_end[i] = (to_start[i] + to_end[i]) / 2;
  }
  const bool columns = norm != kSymRow;
  for (int64_t i = 0; i < nodes; ++i)
    for (int64_t e = i * slots; e < (i + 1) * slots; ++e) {
      const int64_t j = clamp_index(sample.index[e], nodes);
      out[e] = half * grad[e] * scales.start[i] * scales.end[j] + to_start[i] + (columns ? to_end[j] : T(0));
    }
}

template <class T>
void run(const Tensor* grad, const Tensor& weight, const Tensor& index, int64_t norm, double eps, Tensor& out) {
  const int64_t nodes = weight.size(1), slots = weight.size(2), edges = nodes * slots;
  const T *given = grad != nullptr ? grad->const_data_ptr<T>() : nullptr, *value = weight.const_data_ptr<T>();
  const int32_t* ends = index.const_data_ptr<int32_t>();
  T* result = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, weight.size(0), grain(4 * edges), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Sample<T> sample{value + b * edges, ends + b * edges, nodes, slots};
      if (given == nullptr) {
        normalize_sample<T>(sample, norm, T(eps), result + b * edges);
      } else {
        gradient_of_sample<T>(sample, given + b * edges, norm, T(eps), result + b * edges);
      }
    }
  });
}

Tensor checked_run(
    const char* op, const Tensor* grad, const Tensor& weight, const Tensor& index, int64_t norm, double eps) {
  const ScalarType dtype = check_floating(op, weight);
  check_operand(op, "weight", weight, 3, dtype);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_leading(op, "index", index, weight);
  STD_TORCH_CHECK(index.size(2) == weight.size(2), op, ": index and weight differ in K");
  STD_TORCH_CHECK(norm >= kSymRow && norm <= kSymUndirected, op, ": norm is out of range");
  if (grad != nullptr) {
    check_operand(op, "grad", *grad, 3, dtype);
    check_leading(op, "grad", *grad, weight);
    STD_TORCH_CHECK(grad->size(2) == weight.size(2), op, ": grad and weight differ in K");
  }
  Tensor out = drseg::allocate_like(weight);
  if (out.numel() == 0) return out;
  if (dtype == ScalarType::Double) {
    run<double>(grad, weight, index, norm, eps, out);
  } else {
    run<float>(grad, weight, index, norm, eps, out);
  }
  return out;
}

}  // namespace

Tensor degree_normalize(const Tensor& weight, const Tensor& index, int64_t norm, double eps) {
  return checked_run("drseg_native::degree_normalize", nullptr, weight, index, norm, eps);
}

Tensor degree_normalize_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& index, int64_t norm, double eps) {
  return checked_run("drseg_native::degree_normalize_backward", &grad, weight, index, norm, eps);
}

}  // namespace drseg
