// How conv3d_sm90.cu cuts a convolution: plain C++, so that it can be asked where the kernel does not run.
#pragma once

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

}  // namespace fastvdiff::cuda::conv3d_sm90
