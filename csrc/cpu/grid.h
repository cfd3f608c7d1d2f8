// SPDX-License-Identifier: Apache-2.0
// The nodes of a grid in blocks of at most 64, each a rectangle of cells or a stretch of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "cpu/level.h"

namespace drseg {

constexpr int64_t kBlock = 64;

// Cells side by side in one row of the grid, at consecutive positions of a block.
struct Run {
  int32_t offset, length, y, x;
};

struct Block {
  int64_t first, count;  // positions
  int64_t top, left;     // which block it is, counted in blocks (zero where blocks are no rectangles)
  std::vector<Run> runs = {};

  bool holds(int64_t position) const { return first <= position && position < first + count; }
};

struct Grid {
  int64_t height, width;
  int64_t block_height = 0, block_width = 0;  // cells of a whole block; zero where blocks are no rectangles
  std::vector<Block> blocks = {};
  std::vector<int32_t> node = {};  // of each position

  int64_t nodes() const { return height * width; }
};

inline void add_cell(Grid& grid, Block& block, int64_t y, int64_t x) {
  if (block.runs.empty() || block.runs.back().y != y || block.runs.back().x + block.runs.back().length != x)
    block.runs.push_back({static_cast<int32_t>(block.count), 0, static_cast<int32_t>(y), static_cast<int32_t>(x)});
  block.runs.back().length += 1;
  block.count += 1;
  grid.node.push_back(static_cast<int32_t>(y * grid.width + x));
}

// Positions are nodes: blocks of 64 consecutive ones.
inline Grid raster_grid(int64_t height, int64_t width) {
  Grid grid{height, width};
  for (int64_t n = 0; n < height * width; ++n) {
    if (n % kBlock == 0) grid.blocks.push_back({n, 0, 0, 0});
    add_cell(grid, grid.blocks.back(), n / width, n % width);
  }
  return grid;
}

// Blocks are rectangles as near to 8 x 8 as the grid allows: the cells of a block see the others at like distances.
inline Grid patch_grid(int64_t height, int64_t width) {
  Grid grid{height, width};
  grid.block_height = std::min(height, kBlock / std::min<int64_t>(width, 8));
  grid.block_width = std::min(width, kBlock / grid.block_height);
  for (int64_t y = 0; y < height; y += grid.block_height)
    for (int64_t x = 0; x < width; x += grid.block_width) {
      grid.blocks.push_back({static_cast<int64_t>(grid.node.size()), 0, y / grid.block_height, x / grid.block_width});
      for (int64_t v = y; v < std::min(y + grid.block_height, height); ++v)
        for (int64_t u = x; u < std::min(x + grid.block_width, width); ++u) add_cell(grid, grid.blocks.back(), v, u);
    }
  return grid;
}

// The decay table with its columns mirrored, so that what a cell sees of a run is one stretch of it.
template <class T>
struct Decay {
  int64_t width;
  std::vector<T> mirrored;  // (h, 2 w - 1)

  Decay(const T* table, int64_t h, int64_t w) : width(w), mirrored(h * (2 * w - 1)) {
    for (int64_t y = 0; y < h; ++y)
      for (int64_t x = 1 - w; x < w; ++x) mirrored[y * (2 * w - 1) + x + w - 1] = table[y * w + std::abs(x)];
  }

  // of a cell with itself
  T own() const { return mirrored[width - 1]; }
};

// What the cell (y, x) sees of a block: one entry per position.
template <class T>
DRSEG_INLINE void decay_of_block(const Decay<T>& decay, const Block& block, int64_t y, int64_t x, T* out) {
  for (const Run& run : block.runs) {
    const T* from = decay.mirrored.data() + std::abs(y - run.y) * (2 * decay.width - 1) + decay.width - 1 - x + run.x;
    for (int64_t l = 0; l < run.length; ++l) out[run.offset + l] = from[l];
  }
}

}  // namespace drseg
