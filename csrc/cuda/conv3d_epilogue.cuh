// What a convolution does with its tile of sums: bias, channel bias, residual, rounding, the result's statistics.
#pragma once

#include "conv3d_gather.cuh"
#include "conv3d_tile.cuh"

namespace fastvdiff::cuda {

struct Epilogue {
  const float* bias;
  const float* channel_bias;  // (batch, columns, bias_frames)
  const void* residual;
  void* out;
  float* partials;  // (segments, row_tiles, columns, 2): mean and centred sum of squares
  int64_t out_stride[5], residual_stride[5];
  int64_t rows;       // output positions of a segment: a sample where statistics are asked for, else the whole batch
  int64_t row_tiles;  // of a segment
  int32_t column_tiles, columns, bias_frames;
  bool chunks;  // out and residual in whole, aligned 16-byte chunks
};

// Mean and centred sum of squares of `count` values, and their union (Chan, Golub & LeVeque 1983).
struct Moments {
  float count, mean, squares;
};

__device__ __forceinline__ Moments merged(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  const float count = a.count + b.count, share = b.count / count, apart = b.mean - a.mean;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

// Where a row of the tile lies in a tensor of the result's shape, channel 0.
__device__ __forceinline__ int64_t result_offset(const Gather& g, const Row& row, const int64_t (&stride)[5]) {
  return row.batch * stride[0] + (g.axis[0].out_first + static_cast<int64_t>(row.t) * g.axis[0].out_step) * stride[2] +
         (g.axis[1].out_first + static_cast<int64_t>(row.h) * g.axis[1].out_step) * stride[3] +
         (g.axis[2].out_first + static_cast<int64_t>(row.w) * g.axis[2].out_step) * stride[4];
}

// Bias and channel bias of one column at one row; the forward pass walks every output, so row.t is the output's frame.
__device__ __forceinline__ float biases(const Epilogue& e, const Row& row, int column) {
  float sum = e.bias != nullptr ? e.bias[column] : 0.0f;
  if (e.channel_bias != nullptr) {
    const int64_t vector = static_cast<int64_t>(row.batch) * e.columns + column;
    sum += e.channel_bias[vector * e.bias_frames + (e.bias_frames > 1 ? row.t : 0)];
  }
  return sum;
}

template <class T, int COLUMNS>
constexpr int kTileStride = COLUMNS + 8;  // floats: pairs of 4 rows x 8 columns lie in 32 banks

template <class T, int COLUMNS>
__device__ __forceinline__ void write_chunks(const Gather& g, const Epilogue& e, const Row* rows, float* tile,
                                             int first_column) {
  constexpr int kPerRow = COLUMNS / kChunk<T>;
  for (int i = threadIdx.x; i < kConvRows * kPerRow; i += kConvThreads) {
    const Row& row = rows[i / kPerRow];
    const int inner = i % kPerRow * kChunk<T>, column = first_column + inner;
    if (row.batch < 0 || column >= e.columns) continue;
    float4* const sums = reinterpret_cast<float4*>(tile + i / kPerRow * kTileStride<T, COLUMNS> + inner);
    alignas(16) float values[kChunk<T>];
#pragma unroll
    for (int c = 0; c < kChunk<T>; c += 4) {
      const float4 four = sums[c / 4];
      values[c] = four.x, values[c + 1] = four.y, values[c + 2] = four.z, values[c + 3] = four.w;
    }
#pragma unroll
    for (int c = 0; c < kChunk<T>; ++c) values[c] += biases(e, row, column + c);
    alignas(16) T rounded[kChunk<T>];
    if (e.residual != nullptr) {
      const T* residual = static_cast<const T*>(e.residual) + result_offset(g, row, e.residual_stride) + column;
      *reinterpret_cast<uint4*>(rounded) = load_128(residual);
#pragma unroll
      for (int c = 0; c < kChunk<T>; ++c) values[c] += to_float(rounded[c]);
    }
#pragma unroll
    for (int c = 0; c < kChunk<T>; ++c) rounded[c] = from_float<T>(values[c]);
    store_128(static_cast<T*>(e.out) + result_offset(g, row, e.out_stride) + column, load_128(rounded));
    if (e.partials == nullptr) continue;
#pragma unroll
    for (int c = 0; c < kChunk<T>; c += 4)
      sums[c / 4] = make_float4(to_float(rounded[c]), to_float(rounded[c + 1]), to_float(rounded[c + 2]),
                                to_float(rounded[c + 3]));
  }
}

// Positions first, as the innermost dimension of a contiguous result.
template <class T, int COLUMNS>
__device__ __forceinline__ void write_elements(const Gather& g, const Epilogue& e, const Row* rows, float* tile,
                                               int first_column) {
  for (int i = threadIdx.x; i < kConvRows * COLUMNS; i += kConvThreads) {
    const Row& row = rows[i % kConvRows];
    const int inner = i / kConvRows, column = first_column + inner;
    if (row.batch < 0 || column >= e.columns) continue;
    float* const sum = tile + i % kConvRows * kTileStride<T, COLUMNS> + inner;
    float value = *sum + biases(e, row, column);
    if (e.residual != nullptr)
      value += to_float(static_cast<const T*>(
          e.residual)[result_offset(g, row, e.residual_stride) + column * e.residual_stride[1]]);
    const T rounded = from_float<T>(value);
    static_cast<T*>(e.out)[result_offset(g, row, e.out_stride) + column * e.out_stride[1]] = rounded;
    *sum = to_float(rounded);
  }
}

// The tile's columns, each by kConvThreads / COLUMNS threads.
template <class T, int COLUMNS>
__device__ __forceinline__ void write_moments(const Epilogue& e, const float* tile, Moments* parts, int64_t index,
                                              int first_column) {
  constexpr int kParts = kConvThreads / COLUMNS, kPartRows = kConvRows / kParts;
  const int inner = threadIdx.x % COLUMNS, part = threadIdx.x / COLUMNS;
  const int64_t left = e.rows - index % e.row_tiles * kConvRows - part * kPartRows;
  const int count = static_cast<int>(max(min(left, static_cast<int64_t>(kPartRows)), static_cast<int64_t>(0)));
  const bool present = first_column + inner < e.columns;
  Moments own{present ? static_cast<float>(count) : 0.0f, 0.0f, 0.0f};
  if (own.count > 0.0f) {
    const float* column = tile + part * kPartRows * kTileStride<T, COLUMNS> + inner;
    for (int row = 0; row < count; ++row) own.mean += column[row * kTileStride<T, COLUMNS>];
    own.mean /= own.count;
    for (int row = 0; row < count; ++row) {
      const float apart = column[row * kTileStride<T, COLUMNS>] - own.mean;
      own.squares += apart * apart;
    }
  }
  parts[threadIdx.x] = own;
  sync_threads();
  if (part == 0 && present) {
    for (int other = 1; other < kParts; ++other) own = merged(own, parts[other * COLUMNS + inner]);
    float* const out = e.partials + (index * e.columns + first_column + inner) * 2;
    out[0] = own.mean, out[1] = own.squares;
  }
}

// Every thread of the block comes here with its part of the sums; the arena is free.
template <class T, int COLUMNS>
__device__ __forceinline__ void finish(const Gather& g, const Epilogue& e, const WarpTile<T, COLUMNS>& product,
                                       const Row* rows, float* arena, int64_t index, int first_column) {
  product.for_each_pair([&](int row, int column, float first, float second) {
    *reinterpret_cast<float2*>(arena + row * kTileStride<T, COLUMNS> + column) = make_float2(first, second);
  });
  sync_threads();
  if (e.chunks) {
    write_chunks<T, COLUMNS>(g, e, rows, arena, first_column);
  } else {
    write_elements<T, COLUMNS>(g, e, rows, arena, first_column);
  }
  if (e.partials != nullptr) {
    sync_threads();
    Moments* const parts = reinterpret_cast<Moments*>(arena + kConvRows * kTileStride<T, COLUMNS>);
    write_moments<T, COLUMNS>(e, arena, parts, index, first_column);
  }
}

}  // namespace fastvdiff::cuda
