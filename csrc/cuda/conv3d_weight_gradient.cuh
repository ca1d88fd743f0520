// Computes    dweight[k, tap, c] = sum over output positions of dy[position, k] * x[position, tap, c].
// Layout      dy and x NDHWC; (k, kT, kH, kW, c) float32 out.
// Work split  A block owns 128 output channels x 128 (tap, channel) columns of one share of the positions, which it walks
//             in steps of 64 (16-bit) or 32 (float) through three stages. The shares' sums go to the workspace and are
//             added in their order by a second kernel: no atomics. With one share the block writes the result itself.
// Traffic     dy once per 128 columns and x once per 128 output channels, from L2 where neighbours read them together;
//             shares * dweight written and read.
// Precision   float32 sums (float inputs rounded to tf32, nearest).
// Refuses     nothing that the launchers let through: 2^31 output positions, groups, a prologue.
#pragma once

#include "conv3d_gather.cuh"
#include "conv3d_tile.cuh"

namespace fastvdiff::cuda {

struct WeightGradientArgs {
  Gather gather;       // of x, with the forward pass's axes
  const void* grad;
  float* out;          // (shares, out_channels, columns)
  int64_t grad_stride[4];
  int64_t positions;   // output positions of the whole batch
  int64_t share;       // positions of a share, a multiple of a step's
  int32_t out_channels, columns;  // columns = taps * channels
  int32_t row_tiles, column_tiles;
};

template <class T>
constexpr int kPositions = 128 / static_cast<int>(sizeof(T));  // of a step

template <class T>
constexpr int kGradientStage = 2 * kPositions<T> * kConvRows * static_cast<int>(sizeof(T));

__device__ __forceinline__ int64_t grad_offset(const WeightGradientArgs& args, const Row& row) {
  return row.batch * args.grad_stride[0] + row.t * args.grad_stride[1] + row.h * args.grad_stride[2] +
         row.w * args.grad_stride[3];
}

// A thread's share of every stage: one chunk of both tiles in positions row, row + kEvery, ...
template <class T, bool ELEMENT>
struct GradientLoader {
  static constexpr int kPerRow = kConvRows / kChunk<T>, kEvery = kConvThreads / kPerRow;

  const WeightGradientArgs& args;
  int row, chunk, first_channel, column;
  Term term;  // of the chunk's first column

  __device__ __forceinline__ GradientLoader(const WeightGradientArgs& args, int first_channel, int first_column)
      : args(args), row(threadIdx.x / kPerRow), chunk(threadIdx.x % kPerRow),
        first_channel(first_channel + chunk * kChunk<T>), column(first_column + chunk * kChunk<T>), term{} {
    advance(args.gather, term, column);
  }

  __device__ __forceinline__ void fetch(const Row* rows, unsigned char* stage) const {
    using Tile = WarpTile<T, kConvRows>;
    unsigned char* const x_tile = stage + kGradientStage<T> / 2;
    const T* const grad = static_cast<const T*>(args.grad);
    for (int i = row; i < kPositions<T>; i += kEvery) {
      const Row& at = rows[i];
      unsigned char* const a = stage + Tile::wide_chunk_at(i, chunk);
      unsigned char* const b = x_tile + Tile::wide_chunk_at(i, chunk);
      if constexpr (ELEMENT) {
        Term inner = term;
        for (int e = 0; e < kChunk<T>; ++e, advance(args.gather, inner, 1)) {
          const bool inside = at.batch >= 0 && first_channel + e < args.out_channels;
          reinterpret_cast<T*>(a)[e] = inside ? grad[grad_offset(args, at) + first_channel + e] : from_float<T>(0.0f);
          reinterpret_cast<T*>(b)[e] = element_at<T>(args.gather, at, inner);
        }
      } else {
        const bool inside = at.batch >= 0 && first_channel < args.out_channels;
        cp_async<16>(a, inside ? grad + grad_offset(args, at) + first_channel : grad, inside ? 16 : 0);
        const void* element = locate<T>(args.gather, at, term).element;
        cp_async<16>(b, element != nullptr ? element : args.gather.in, element != nullptr ? 16 : 0);
      }
    }
  }
};

template <class T, bool ELEMENT>
__global__ void __launch_bounds__(kConvThreads, ELEMENT || sizeof(T) == 4 ? 1 : 2)
    conv3d_weight_gradient_kernel(const WeightGradientArgs args) {
  FASTVDIFF_DYNAMIC_SHARED(arena);
  // One table of positions more than stages in flight: a step's table is written one iteration before its loads.
  FASTVDIFF_SHARED(Row, tables, kConvStages * kPositions<T>);
  const int tiles = args.row_tiles * args.column_tiles;
  const int64_t share = blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int first_channel = tile % args.row_tiles * kConvRows, first_column = tile / args.row_tiles * kConvRows;
  const int64_t begin = share * args.share, end = min(begin + args.share, args.positions);
  const int steps = static_cast<int>(ceil_div(end - begin, kPositions<T>));

  const auto stage_of = [&](int step) { return arena + step % kConvStages * kGradientStage<T>; };
  const auto table_of = [&](int step) { return tables + step % kConvStages * kPositions<T>; };
  const auto tabulate = [&](int step, int i) {
    table_of(step)[i] = row_of(args.gather, begin + static_cast<int64_t>(step) * kPositions<T> + i, end, 0);
  };
  if (threadIdx.x < kConvStages * kPositions<T>) tabulate(threadIdx.x / kPositions<T>, threadIdx.x % kPositions<T>);
  sync_threads();

  WarpTile<T, kConvRows> product;
  const GradientLoader<T, ELEMENT> loader(args, first_channel, first_column);
  for (int step = 0; step < kConvStages - 1; ++step) {
    if (step < steps) loader.fetch(table_of(step), stage_of(step));
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kConvStages - 2>();
    sync_threads();
    const int next = step + kConvStages - 1;
    if (next < steps) loader.fetch(table_of(next), stage_of(next));
    cp_async_commit();
    if (threadIdx.x < kPositions<T>) tabulate(next + 1, threadIdx.x);
    product.add_transposed(stage_of(step), stage_of(step) + kGradientStage<T> / 2);
  }
  cp_async_wait<0>();

  float* const out = args.out + share * args.out_channels * args.columns;
  product.for_each_pair([&](int row, int column, float first, float second) {
    const int channel = first_channel + row, at = first_column + column;
    if (channel >= args.out_channels) return;
    float* const pair = out + static_cast<int64_t>(channel) * args.columns + at;
    if (at < args.columns) pair[0] = first;
    if (at + 1 < args.columns) pair[1] = second;
  });
}

}  // namespace fastvdiff::cuda
