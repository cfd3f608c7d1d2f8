// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels beside a restatement in float64, on small graphs that lie awkwardly: sizes that fill no block, ties,
// nodes that are not finite, channels that fill no piece. Exits with 1 and one line where something is wrong. With
// DRSEG_SELECTION, DRSEG_EDGES, DRSEG_GRADIENTS or DRSEG_LAYER there is that part alone, which compiles in less time.
#include <cstdio>

#if !defined(DRSEG_SELECTION) && !defined(DRSEG_EDGES) && !defined(DRSEG_GRADIENTS) && !defined(DRSEG_LAYER)
#define DRSEG_SELECTION
#define DRSEG_EDGES
#define DRSEG_GRADIENTS
#define DRSEG_LAYER
#endif
#ifdef DRSEG_EDGES
#include "cuda/edge_coefficient.cuh"
#endif
#ifdef DRSEG_GRADIENTS
#include "cuda/edge_gradients.cuh"
#endif
#ifdef DRSEG_LAYER
#include "cuda/graph_layer.cuh"
#endif
#ifdef DRSEG_SELECTION
#include "cuda/knn_graph.cuh"
#include "cuda/prepare_prior.cuh"
#endif

using namespace drseg::cuda;

namespace {

template <class T>
Global<T> view(std::vector<T>& values) {
  return {values.data(), int64_t(values.size())};
}
template <class T>
Global<const T> constant(const std::vector<T>& values, int64_t from = 0) {
  return {values.data() + from, int64_t(values.size()) - from};
}

void expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error("wrong: " + what);
}

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

#ifdef DRSEG_SELECTION
// ------------------------------------------------------------------ selection

enum class Data { random, integers, close };

// Features (images, N, D): close ones lie so near to each other that rounding to float16 changes their order.
std::vector<float> features(Data data, int count, int channels, std::minstd_rand& random) {
  std::normal_distribution<float> normal;
  std::vector<float> made(size_t(count) * channels), base(channels);
  for (float& value : base) value = normal(random);
  for (size_t n = 0; n < made.size(); ++n)
    made[n] = data == Data::integers ? float(int(random() % 3) - 1)
              : data == Data::close  ? base[n % channels] + 0.03f * normal(random)
                                     : normal(random);
  return made;
}

void check_selection(Data data, bool include_self, int k) {
  constexpr int IMAGES = 2, HEIGHT = 5, WIDTH = 9, NODES = HEIGHT * WIDTH, CHANNELS = 40;
  std::minstd_rand random(11);
  const bool rounds = data != Data::integers;
  std::vector<float> prior = features(data, IMAGES * NODES, CHANNELS, random);
  for (int c = 0; c < CHANNELS; ++c) prior[(NODES + 3) * CHANNELS + c] = 0;
  prior[7 * CHANNELS + 1] = NOT_A_NUMBER;
  std::vector<float> scaled(prior.size()), inverse(IMAGES * NODES), residual(IMAGES * NODES);
  std::vector<half> rounded(prior.size());
  launch(prepare_rows<float, true, true>, {(IMAGES * NODES + 3) / 4, 1, 128, 0}, constant(prior), view(scaled),
         view(inverse), view(rounded), view(residual), IMAGES * NODES, CHANNELS);
  if (!rounds) {
    // scores that are exact in any order
    scaled = prior;
    for (int i = 0; i < IMAGES * NODES; ++i) inverse[i] = i == 7 ? NOT_A_NUMBER : i == NODES + 3 ? 0.0f : 1.0f;
  }
  for (int i = 0; i < IMAGES * NODES && rounds; ++i) {
    double total = 0, lost = 0, largest = 0;
    for (int c = 0; c < CHANNELS; ++c) {
      largest = std::max(largest, std::abs(double(scaled[i * CHANNELS + c])));
      const double value = scaled[i * CHANNELS + c], left = value - double(rounded[i * CHANNELS + c]);
      expect(i == 7 || std::ldexp(prior[i * CHANNELS + c], std::ilogb(value) - std::ilogb(prior[i * CHANNELS + c])) ==
                           value || value == 0, "a row is not scaled by a power of two");
      total += value * value;
      lost += left * left;
    }
    expect(i == 7 || total == 0 || (largest >= 0.5 && largest < 1), "a row is not scaled to one");
    if (i == 7) {
      expect(inverse[i] != inverse[i] && residual[i] == 0, "a row that is not finite");
    } else if (total == 0) {
      expect(inverse[i] == 0 && residual[i] == 0, "a row of zeros");
    } else {
      expect(std::abs(inverse[i] * std::sqrt(total) - 1) < 1e-6, "an inverse norm");
      const double bound = std::sqrt(lost / total);
      expect(residual[i] >= bound && residual[i] <= bound * 1.01, "a residual");
    }
  }
  std::vector<float> table(NODES), product(IMAGES * NODES * NODES);
  for (int n = 0; n < NODES; ++n)
    table[n] = data == Data::close && std::hypot(n / WIDTH, n % WIDTH) > 6 ? NOT_A_NUMBER  // beyond a radius
               : rounds ? float(std::hypot(n / WIDTH, n % WIDTH) / 40)
                        : float(random() % 2);
  for (int b = 0; b < IMAGES; ++b)
    for (int i = 0; i < NODES; ++i)
      for (int j = 0; j < NODES; ++j) {
        double sum = 0;
        for (int c = 0; c < CHANNELS; ++c) {
          const size_t one = size_t(b * NODES + i) * CHANNELS + c, other = size_t(b * NODES + j) * CHANNELS + c;
          sum += rounds ? double(rounded[one]) * double(rounded[other]) : double(scaled[one]) * double(scaled[other]);
        }
        product[(b * NODES + i) * NODES + j] = float(sum);
      }
  std::vector<int> index(IMAGES * NODES * k, -1), count(IMAGES * NODES, -1);
  std::vector<float> score(index.size(), 7);
  const Selection how{NODES, CHANNELS, WIDTH, k, Join::subtract, include_self, rounds, (CHANNELS + 8) * 0x1p-22f, true};
  // the second image first: a launch may begin at any
  for (int b = IMAGES - 1; b >= 0; --b)
    launch(select_rows<8>, {1, (NODES + 3) / 4, 128, 0}, constant(product, int64_t(b) * NODES * NODES), constant(scaled),
           constant(inverse), constant(residual), constant(table), view(index), view(score), view(count), how, b);
  double again = 0;
  for (int b = 0; b < IMAGES; ++b)
    for (int i = 0; i < NODES; ++i) {
      std::vector<std::pair<double, int>> best;
      for (int j = 0; j < NODES; ++j) {
        if (b == 0 && (i == 7 || j == 7)) continue;
        if (i == j && !include_self) continue;
        double sum = 0;
        for (int c = 0; c < CHANNELS; ++c)
          sum += double(scaled[(b * NODES + i) * CHANNELS + c]) * scaled[(b * NODES + j) * CHANNELS + c];
        sum *= double(inverse[b * NODES + i]) * inverse[b * NODES + j];
        sum -= table[std::abs(i / WIDTH - j / WIDTH) * WIDTH + std::abs(i % WIDTH - j % WIDTH)];
        if (sum != sum) continue;
        best.push_back({i == j ? -1e9 : -sum, j});
      }
      std::sort(best.begin(), best.end());
      std::vector<int> right;
      for (int n = 0; n < std::min(k, int(best.size())); ++n) right.push_back(best[n].second);
      std::sort(right.begin(), right.end());
      right.resize(k, i);
      for (int n = 0; n < k; ++n)
        expect(index[(b * NODES + i) * k + n] == right[n], "neighbours of row " + std::to_string(i));
      again += count[b * NODES + i];
    }
  // what is computed again hides a bound that is too large, and products that are wrong
  expect(again / (IMAGES * NODES) < (data == Data::close ? 12 : 4), "too much is computed again");
}

#endif
#ifdef DRSEG_EDGES
// ------------------------------------------------------------------ edges

template <class T, int GROUP>
void check_edges(int nodes, int slots, int width, int stages) {
  constexpr int IMAGES = 2;
  std::minstd_rand random(nodes + slots);
  std::normal_distribution<float> normal;
  const int stride = 2 * width;
  std::vector<T> rows(size_t(IMAGES) * nodes * stride);
  for (T& value : rows) value = narrow<T>(normal(random));
  std::vector<float> inverse(IMAGES * nodes), shift(width), vector(width), bias{0.3f};
  for (float& value : inverse) value = 0.5f + std::abs(normal(random));
  for (auto* values : {&shift, &vector})
    for (float& value : *values) value = normal(random);
  std::vector<int> index(IMAGES * nodes * slots);
  std::vector<float> scores(index.size());
  for (size_t n = 0; n < index.size(); ++n) {
    index[n] = int(random() % nodes);
    scores[n] = random() % 5 == 0 ? -INFINITE : 0.0f;
  }
  index[3] = -2;
  index[4] = nodes + 5;
  std::vector<float> weight(index.size(), NOT_A_NUMBER), start(IMAGES * nodes, NOT_A_NUMBER), coefficient(weight);
  using Sizes = EdgeSizes<GROUP, 2, 2, 6>;
  const Edges how{{nodes, slots, width, stride, stages}, true, true, true, Norm::sym_row, 1e-6f};
  const auto parameter = [](const std::vector<float>& values) {
    return Parameter{constant(values), Global<const bfloat16>(nullptr, 0), false};
  };
  const unsigned blocks = unsigned((nodes + Sizes::BLOCK_ROWS - 1) / Sizes::BLOCK_ROWS);
  launch(weigh_edges<T, GROUP, 2, 2, 6>,
         {IMAGES, blocks, Sizes::THREADS, edge_bytes<Sizes, T>(how.rows, stages)}, constant(rows),
         constant(rows, width), constant(inverse), parameter(shift), constant(index), parameter(vector),
         parameter(bias), constant(scores), view(weight), view(start), view(coefficient), how);
  launch(scale_edges, {IMAGES, unsigned(nodes), 256, 0}, constant(weight), constant(index), constant(start),
         view(coefficient), nodes, slots, Norm::sym_row);
  const auto near = [&](size_t edge) { return std::clamp(index[edge], 0, nodes - 1); };
  std::vector<double> right(index.size()), scale(IMAGES * nodes);
  for (int i = 0; i < IMAGES * nodes; ++i) {
    double degree = 0;
    for (int k = 0; k < slots; ++k) {
      const size_t edge = size_t(i) * slots + k, j = size_t(i / nodes) * nodes + near(edge);
      double logit = bias[0];
      for (int c = 0; c < width; ++c)
        logit += vector[c] * std::max(0.0, double(widen(rows[i * stride + c])) * inverse[i] + shift[c] +
                                               double(widen(rows[j * stride + width + c])) * inverse[j]);
      right[edge] = scores[edge] < 0 ? 0 : std::max(logit, 0.0) + std::log1p(std::exp(-std::abs(logit)));
      degree += right[edge];
    }
    scale[i] = 1 / std::sqrt(degree + 1e-6);
  }
  for (size_t edge = 0; edge < right.size(); ++edge) {
    const size_t i = edge / slots, j = i / nodes * nodes + near(edge);
    expect(std::abs(weight[edge] - right[edge]) <= 3e-6 * (1 + right[edge]), "a weight");
    expect(std::abs(start[i] - scale[i]) <= 3e-6 * scale[i], "a scale");
    expect(std::abs(coefficient[edge] - right[edge] * scale[i] * scale[j]) <= 1e-5 * right[edge] * scale[i] * scale[j] + 1e-6, "a coefficient");
  }
}

#endif
#ifdef DRSEG_GRADIENTS
// ------------------------------------------------------------------ gradients of edges

// Rows of integers and halves, of which every sum is exact, so that no unit is on here and off there.
template <class T, int GROUP>
void check_gradients(int nodes, int slots, int width, int rows) {
  constexpr int IMAGES = 2, WARPS = 2;
  std::minstd_rand random(nodes + slots);
  const auto draw = [&] { return (int(random() % 17) - 8) * 0.25f; };
  const int all = IMAGES * nodes, edges = all * slots, stride = 2 * width;
  std::vector<T> halves(size_t(all) * stride);
  for (T& value : halves) value = narrow<T>(draw());
  std::vector<float> inverse(all), shift(width), vector(width), slope(edges);
  for (float& value : inverse) value = random() % 2 ? 1.0f : 0.5f;
  for (auto* values : {&shift, &vector, &slope})
    for (float& value : *values) value = draw();
  std::vector<int> index(edges), begin(all + 1), perm;
  for (int& value : index) value = int(random() % nodes);
  for (int e = 0; e < edges; e += slots) index[e] = 1;
  index[3] = -2;
  index[4] = nodes + 5;
  const auto far = [&](int edge) { return edge / slots / nodes * nodes + std::clamp(index[edge], 0, nodes - 1); };
  for (int node = 0; node < all; ++node) {
    for (int e = 0; e < edges; ++e)
      if (far(e) == node) perm.push_back(e);
    begin[node + 1] = int(perm.size());
  }
  // what is infinite stays with its row, and makes no NaN of slots that are none
  halves[0] = narrow<T>(INFINITE);
  for (int e = 0; e < slots; ++e) slope[e] = 0.25f + std::abs(slope[e]);
  const auto parameter = [](const std::vector<float>& values) {
    return Parameter{constant(values), Global<const bfloat16>(nullptr, 0), false};
  };
  using Sizes = SlopeSizes<GROUP, WARPS>;
  constexpr int CHANNELS = GROUP * Piece<T>::SIZE;
  const int groups = (nodes + rows - 1) / rows, columns = 2 * width + 1;
  const Launch launched{IMAGES, unsigned((width + CHANNELS - 1) / CHANNELS * groups), Sizes::THREADS, Sizes::bytes(nodes)};
  const Slopes how{nodes, slots, width, stride, true, true, rows};
  std::vector<T> gradient(halves.size(), narrow<T>(NOT_A_NUMBER));
  std::vector<float> part(size_t(IMAGES) * groups * columns, NOT_A_NUMBER), sums(columns, NOT_A_NUMBER);
  std::vector<Link> list(edges);
  launch(slopes_to_rows<T, GROUP, WARPS, true>, launched, constant(halves), constant(halves, width), constant(inverse),
         parameter(shift), parameter(vector), constant(index), constant(slope), constant(list), constant(begin),
         view(gradient), view(part), how);
  launch(add_parts, {unsigned(columns + 127) / 128, 1, 128, 0}, constant(part), view(sums), int64_t(IMAGES) * groups, columns);
  launch(list_links, {unsigned(edges + 255) / 256, 1, 256, 0}, constant(slope), constant(inverse), constant(perm),
         view(list), int64_t(edges), nodes, slots, true);
  launch(slopes_to_rows<T, GROUP, WARPS, false>, launched, constant(halves, width), constant(halves), constant(inverse),
         parameter(shift), parameter(vector), constant(index), constant(slope), constant(list), constant(begin),
         Global<T>(gradient.data() + width, int64_t(gradient.size()) - width), view(part), how);
  std::vector<double> right(halves.size()), total(columns);
  for (int e = 0; e < edges; ++e) {
    const int i = e / slots, j = far(e);
    total[2 * width] += slope[e];
    for (int c = 0; c < width; ++c) {
      const double hidden = double(widen(halves[i * stride + c])) * inverse[i] + shift[c] +
                            double(widen(halves[j * stride + width + c])) * inverse[j];
      if (hidden <= 0) continue;
      const double value = double(slope[e]) * vector[c];
      right[i * stride + c] += value * inverse[i];
      right[j * stride + width + c] += value * inverse[j];
      total[c] += slope[e] * hidden;
      total[width + c] += value;
    }
  }
  const auto same = [](double got, double wanted, double unit) {
    return got == wanted || std::abs(got - wanted) <= unit * (1 + std::abs(wanted));
  };
  for (size_t n = 0; n < right.size(); ++n)
    expect(same(widen(gradient[n]), right[n], sizeof(T) == 4 ? 1e-5 : 0x1p-8), "a gradient of a row");
  for (int n = 0; n < columns; ++n) expect(same(sums[n], total[n], 1e-5), "a gradient of a parameter");
}

#endif
#ifdef DRSEG_LAYER
// ------------------------------------------------------------------ layers

// Sums of neighbours, LayerNorm of them, and the gradients of the sums, with more edges than a warp has room for and
// one node that everybody chooses.
template <class T, int GROUP>
void check_layer(int nodes, int slots, int channels, int rows, bool relu) {
  constexpr int IMAGES = 2, WARPS = 2;
  std::minstd_rand random(nodes + slots);
  std::normal_distribution<float> normal;
  const int all = IMAGES * nodes, edges = all * slots;
  const auto draw = [&](auto& values) {
    for (auto& value : values) value = narrow<std::decay_t<decltype(value)>>(normal(random));
  };
  std::vector<T> x(size_t(all) * channels), grad(x.size());
  std::vector<float> coefficient(edges), scale(all), bias(channels), weight(channels), shift(channels), added(edges);
  draw(x), draw(grad), draw(coefficient), draw(scale), draw(bias), draw(weight), draw(shift), draw(added);
  std::vector<int> index(edges), begin(all + 1), perm;
  for (int& value : index) value = int(random() % nodes);
  for (int e = 0; e < edges; e += slots) index[e] = 1;
  index[3] = -2;
  index[4] = nodes + 5;
  const auto far = [&](int edge) { return edge / slots / nodes * nodes + std::clamp(index[edge], 0, nodes - 1); };
  // node 0 has no number, and no edge but those of which it is the border
  for (int e = 0; e < edges; ++e)
    if (index[e] == 0) index[e] = 2;
  for (int c = 0; c < channels; ++c) x[c] = narrow<T>(NOT_A_NUMBER);
  for (int node = 0; node < all; ++node) {
    for (int e = 0; e < edges; ++e)
      if (far(e) == node) perm.push_back(e);
    begin[node + 1] = int(perm.size());
  }
  const auto parameter = [](const std::vector<float>& values) {
    return Parameter{constant(values), Global<const bfloat16>(nullptr, 0), false};
  };
  const std::vector<Term> none(1);
  using Sizes = LayerSizes<GROUP, WARPS>;
  constexpr int CHANNELS = GROUP * Piece<T>::SIZE;
  const unsigned blocks = unsigned((channels + CHANNELS - 1) / CHANNELS * ((nodes + rows - 1) / rows));
  const Launch how{IMAGES, blocks, Sizes::THREADS, Sizes::bytes(nodes)};
  std::vector<float> y(x.size(), 7), mean(all, 7), rstd(all, 7), gradient(edges, 7);
  launch(gather_rows<T, float, GROUP, WARPS, false>, how, constant(x), constant(index), constant(coefficient),
         constant(none), constant(begin), constant(scale), parameter(bias), view(y), Layer{nodes, slots, channels, true, true, relu, rows});
  std::vector<double> right(x.size());
  for (int i = 0; i < all; ++i)
    for (int c = 0; c < channels; ++c) {
      double total = bias[c], size = std::abs(total);
      for (int e = i * slots; e < (i + 1) * slots; ++e) {
        const double value = double(coefficient[e]) * scale[i] * scale[far(e)] * widen(x[far(e) * channels + c]);
        total += value;
        size += std::abs(value);
      }
      const double made = relu && total < 0 ? 0 : total;
      right[i * channels + c] = made;
      if (made != made)
        expect(y[i * channels + c] != y[i * channels + c], "a sum that is no number");
      else
        expect(std::abs(y[i * channels + c] - made) <= 3e-6 * size, "a sum");
    }
  std::vector<float> normed(x.size(), 7);
  launch(normalize_rows<float>, {unsigned(all + 7) / 8, 1, 256, 0}, constant(y), parameter(weight), parameter(shift),
         view(normed), view(mean), view(rstd), int64_t(all), channels, 0.1f);
  for (int i = 0; i < all; ++i) {
    double middle = 0, square = 0;
    for (int c = 0; c < channels; ++c) middle += right[i * channels + c] / channels;
    for (int c = 0; c < channels; ++c) square += std::pow(right[i * channels + c] - middle, 2) / channels;
    if (middle != middle) continue;
    const double factor = 1 / std::sqrt(square + 0.1);
    expect(std::abs(mean[i] - middle) <= 1e-5 && std::abs(rstd[i] / factor - 1) <= 1e-4, "a mean or rstd");
    for (int c = 0; c < channels; ++c)
      expect(std::abs(normed[i * channels + c] - ((right[i * channels + c] - middle) * factor * weight[c] + shift[c])) <= 2e-4, "a normed row");
  }
  std::vector<Term> list(edges);
  launch(list_terms, {unsigned(edges + 255) / 256, 1, 256, 0}, constant(coefficient), constant(scale), constant(perm),
         view(list), int64_t(edges), nodes, slots, true);
  std::vector<T> back(x.size(), narrow<T>(7));
  launch(gather_rows<T, T, GROUP, WARPS, true>, how, constant(grad), constant(index), constant(coefficient),
         constant(list), constant(begin), constant(scale), parameter(bias), view(back), Layer{nodes, slots, channels, true, false, false, rows});
  std::vector<double> to_x(x.size()), size(x.size());
  for (int e = 0; e < edges; ++e)
    for (int c = 0; c < channels; ++c) {
      const double value = double(coefficient[e]) * scale[e / slots] * scale[far(e)] * widen(grad[e / slots * channels + c]);
      to_x[far(e) * channels + c] += value;
      size[far(e) * channels + c] += std::abs(value);
    }
  for (size_t n = 0; n < to_x.size(); ++n)
    expect(std::abs(widen(back[n]) - to_x[n]) <= (sizeof(T) == 4 ? 3e-6 : 0x1p-8) * size[n], "a gradient of a row");
  using Edges = EdgeSizes<GROUP, WARPS, 2, 28>;
  const EdgeRows edge_rows{nodes, slots, channels, channels, 2};
  launch(edge_products<T, GROUP, WARPS, 2, 28>, {IMAGES, unsigned(nodes + Edges::BLOCK_ROWS - 1) / Edges::BLOCK_ROWS, Edges::THREADS, Edges::bytes(nodes, 2)},
         constant(grad), constant(x), constant(index), constant(scale), constant(added), view(gradient), edge_rows, true, true);
  for (int e = 0; e < edges; ++e) {
    double total = 0, most = std::abs(added[e]);
    const double ends = double(scale[e / slots]) * scale[far(e)];
    for (int c = 0; c < channels; ++c) {
      const double value = ends * widen(grad[e / slots * channels + c]) * widen(x[far(e) * channels + c]);
      total += value;
      most += std::abs(value);
    }
    if (total != total)
      expect(gradient[e] != gradient[e], "a gradient that is no number");
    else
      expect(std::abs(gradient[e] - total - added[e]) <= 3e-6 * most, "a gradient of a coefficient");
  }
}

#endif

}  // namespace

int main() {
  try {
#ifdef DRSEG_SELECTION
    for (const bool include_self : {true, false})
      for (const int k : {1, 9}) {
        check_selection(Data::random, include_self, k);
        check_selection(Data::integers, include_self, k);
        check_selection(Data::close, include_self, k);
      }
    check_selection(Data::random, true, 50);
#endif
#ifdef DRSEG_EDGES
    for (const int stages : {1, 2}) {
      check_edges<float, 8>(21, 11, 76, stages);
      check_edges<bfloat16, 8>(21, 11, 136, stages);
      check_edges<float, 4>(9, 24, 4, stages);
    }
#endif
#ifdef DRSEG_GRADIENTS
    check_gradients<float, 8>(17, 11, 44, 5);
    check_gradients<bfloat16, 8>(9, 101, 72, 9);
    check_gradients<float, 4>(23, 7, 12, 23);
#endif
#ifdef DRSEG_LAYER
    check_layer<float, 8>(17, 11, 44, 5, true);
    check_layer<bfloat16, 8>(9, 101, 72, 9, false);
    check_layer<float, 4>(23, 7, 12, 23, false);
#endif
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("right\n");
  return 0;
}
