// How group_norm_silu's passes are cut into blocks, and what one thread of a block owns.
#pragma once

#include <algorithm>

#include "device.h"
#include "fastvdiff/group_norm_silu_cuda.h"

namespace fastvdiff::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;          // 16-byte accesses that a thread has under way in the forward
constexpr int kUnrollBackward = 2;  // of x and of grad each
constexpr int kResident = 3;        // blocks of a pass on one multiprocessor, as their registers allow
constexpr int kResidentBackward = 2;

// A pass over (work, index): work is a sample or a frame of one, index counts rows (channels_last) or accesses within a
// row (contiguous). A block has `across` threads along the dense dimension and `down` along the other.
struct Cut {
  int across, down;
  int64_t columns;  // blocks of channels
  int64_t work;     // samples, or samples * frames
  int64_t limit;    // indices of one piece of work
  int64_t chunks;   // of step * unroll indices each, dealt to `parts` blocks in turn
  int64_t parts;
  int64_t step;     // indices between a thread's accesses

  __host__ __device__ int64_t blocks() const { return columns * parts * work; }
};

// Blocks for the chunks of each of `work` pieces, so that the last ends soonest on `slots` places. A block that starts
// costs about two chunks; more than four rounds of blocks only cost starts.
inline int64_t parts_of(int64_t work, int64_t chunks, int64_t slots) {
  int64_t best = 1, least = -1;
  for (int64_t rounds = 0; rounds <= 4; ++rounds) {
    const int64_t parts = std::clamp<int64_t>(rounds * slots / work, 1, chunks);
    const int64_t cost = ceil_div(work * parts, slots) * (ceil_div(chunks, parts) + 2);
    if (least < 0 || cost < least) best = parts, least = cost;
  }
  return best;
}

// channels_last: as few columns as keep nine tenths of the threads busy, each of whole 128-byte lines where there are
// any, so that every row is read from end to end by blocks that run together.
inline int64_t columns_of(int64_t accesses) {
  int64_t best = 1;
  double most = 0;
  for (int64_t columns = ceil_div(accesses, kThreads); columns <= std::max<int64_t>(1, accesses / 8); ++columns) {
    const int64_t across = ceil_div(accesses, columns);
    const double busy = static_cast<double>(accesses * (kThreads / across)) / static_cast<double>(columns * kThreads);
    if (busy > most + 1e-9) best = columns, most = busy;
    if (busy >= 0.9) break;
  }
  return most > 0 ? best : ceil_div(accesses, kThreads);
}

inline Cut cut_of(const GroupNormSiluParams& p, int vector, bool by_frame, int unroll, int resident) {
  Cut cut{};
  cut.work = by_frame ? p.batch * p.frames : p.batch;
  const int64_t positions = by_frame ? p.positions / p.frames : p.positions;
  if (p.channels_last) {
    const int64_t accesses = p.channels / vector;
    cut.columns = columns_of(accesses);
    cut.across = static_cast<int>(ceil_div(accesses, cut.columns));
    cut.down = kThreads / cut.across;
    cut.limit = positions;
    cut.step = cut.down;
  } else {
    cut.limit = positions / vector;
    cut.across = 1;
    while (cut.across < 32 && cut.across < cut.limit) cut.across *= 2;
    cut.down = kThreads / cut.across;
    cut.columns = ceil_div(p.channels, cut.down);
    cut.step = cut.across;
  }
  cut.chunks = ceil_div(cut.limit, cut.step * unroll);
  cut.parts = parts_of(cut.work * cut.columns, cut.chunks, int64_t{p.multiprocessors} * resident);
  return cut;
}

// Elements of one access: 16 bytes where every row of every tensor allows it, else one.
inline int vector_of(const GroupNormSiluParams& p, bool backward) {
  const int vector = p.dtype == DType::f32 ? 4 : 8;
  auto whole = [&](const void* data, int64_t batch, int64_t row) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row % vector == 0 && (p.batch == 1 || batch % vector == 0);
  };
  const int64_t dense = p.channels_last ? p.channels : p.positions / p.frames;
  if (dense % vector || !whole(p.x, p.stride_xb, p.stride_xr)) return 1;
  if (!backward) return whole(p.y, p.stride_yb, p.stride_yr) ? vector : 1;
  return whole(p.dx, p.stride_yb, p.stride_yr) && whole(p.grad, p.stride_gb, p.stride_gr) ? vector : 1;
}

// channels_last: the most columns that meet one group; its partial moments stand column by column.
__host__ __device__ inline int64_t shares_of(int64_t column, int64_t width) {
  if (column % width == 0) return 1;
  return width % column == 0 ? width / column : (width - 2) / column + 2;
}

// What one thread owns of a pass.
template <int V, bool CHANNELS_LAST>
struct Place {
  int64_t column, part, sample, frame;
  int64_t channel;  // its first of V (channels_last), or its only one
  int64_t first;    // index within the work
  bool active;

  // `block` counts columns fastest, then parts, then work.
  __device__ __forceinline__ Place(const GroupNormSiluParams& p, const Cut& cut, int64_t block, bool by_frame) {
    column = block % cut.columns;
    part = block / cut.columns % cut.parts;
    const int64_t work = block / cut.columns / cut.parts;
    sample = by_frame ? work / p.frames : work;
    frame = by_frame ? work % p.frames : 0;
    const int along = static_cast<int>(threadIdx.x) % cut.across, other = static_cast<int>(threadIdx.x) / cut.across;
    if constexpr (CHANNELS_LAST) {
      channel = (column * cut.across + along) * V;
      first = other;
      active = other < cut.down && channel < p.channels;
    } else {
      channel = column * cut.down + other;
      first = along;
      active = channel < p.channels;
    }
  }

  // The element at index 0 of this thread's work.
  __device__ __forceinline__ int64_t start(const Cut& cut, int64_t stride_b, int64_t stride_r) const {
    const int64_t from = sample * stride_b + channel * (CHANNELS_LAST ? 1 : stride_r);
    return from + frame * cut.limit * pitch(stride_r);
  }
  // Elements between indices.
  static __device__ __forceinline__ int64_t pitch(int64_t stride_r) { return CHANNELS_LAST ? stride_r : V; }
};

}  // namespace fastvdiff::cuda
