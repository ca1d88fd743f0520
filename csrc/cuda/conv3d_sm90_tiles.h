// How conv3d_sm90.cu cuts a convolution: plain C++, so that it can be asked where the kernel does not run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.h"

namespace fastvdiff::cuda::conv3d_sm90 {

constexpr int kTileRows = 128, kStepDepth = 64;  // of a tile; channels of a step: 128 bytes
constexpr int kRowBytes = 128, kAligned = 1024;
constexpr int kArena = 221184;  // of the 227 KiB that a block may have: as many stages as fit

constexpr int step_bytes(int columns) { return (kTileRows + columns) * kRowBytes; }
constexpr int stages_of(int columns) { return kArena / step_bytes(columns) < 8 ? kArena / step_bytes(columns) : 8; }
constexpr int bytes_of(int columns) { return stages_of(columns) * step_bytes(columns) + kAligned; }

// The width that takes the fewest columns, one wave of tiles after another. 64 are as many bytes of shared memory as the
// tensor cores can wait for; a tile's beginning costs as much as 8.
inline int columns_of(int64_t row_tiles, int columns, int multiprocessors) {
  int best = 0;
  int64_t least = 0;
  for (const int width : {256, 160, 128, 64}) {
    const int64_t waves = ceil_div(row_tiles * ceil_div(columns, width), multiprocessors);
    const int64_t cost = waves * (width == 64 ? 88 : width + 8);
    if (best == 0 || cost < least) best = width, least = cost;
  }
  return best;
}

namespace cluster {

constexpr int kBlocks = 2;  // of a cluster: they share a tile's columns, and so the weights that one of them copies

// A tile of 128 * height positions: two warpgroups of `height` products of 64 rows.
struct Tile {
  int height, columns;
};
constexpr Tile kTiles[] = {{1, 256}, {2, 160}, {1, 160}, {2, 128}, {1, 128}, {2, 64}, {1, 64}};

__host__ __device__ constexpr int rows_of(int height) { return 128 * height; }
__host__ __device__ constexpr int step_bytes(int height, int columns) { return (rows_of(height) + columns) * kRowBytes; }
__host__ __device__ constexpr int stages_of(int height, int columns) {
  return kArena / step_bytes(height, columns) < 8 ? kArena / step_bytes(height, columns) : 8;
}
__host__ __device__ constexpr int bytes_of(int height, int columns) {
  return stages_of(height, columns) * step_bytes(height, columns) + kAligned;
}

// Tiles of a launch; each cluster takes two that follow each other along the positions.
inline int64_t tiles_of(Tile tile, int64_t rows, int columns) {
  return ceil_div(ceil_div(rows, rows_of(tile.height)), kBlocks) * kBlocks * ceil_div(columns, tile.columns);
}

// The tile of least time, in cycles: a step's products on the tensor cores, or its bytes from L2 (36 a cycle and
// multiprocessor; of the weights a block copies half), and what a tile takes besides.
inline Tile tile_of(int64_t rows, int columns, int steps, int multiprocessors) {
  Tile best{};
  int64_t least = 0;
  for (const Tile tile : kTiles) {
    const int64_t waves = ceil_div(tiles_of(tile, rows, columns), multiprocessors / kBlocks * kBlocks);
    const int area = tile.height * tile.columns;
    const int64_t step = std::max(4 * area, (rows_of(tile.height) + tile.columns / kBlocks) * kRowBytes / 36);
    const int64_t cost = waves * (steps * step + 6 * area + 1000);
    if (best.height == 0 || cost < least) best = tile, least = cost;
  }
  return best;
}

}  // namespace cluster
}  // namespace fastvdiff::cuda::conv3d_sm90
