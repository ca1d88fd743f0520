// Tiles of operands in shared memory and their products on tensor cores, for bf16, f16 and float as tf32.
#pragma once

#include "ptx.h"

namespace fastvdiff::cuda {

constexpr int kConvThreads = 256;  // 8 warps
constexpr int kConvRows = 128;     // of a block's tile
constexpr int kConvStages = 3;     // 3 of 32 KiB: two blocks on an H100's SM, and it fits where a block gets 99 KiB

// Elements of 16 bytes, and of the 128 bytes that one step takes from each row.
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kDepth = 128 / static_cast<int>(sizeof(T));

// A row of 128 bytes is 8 chunks, permuted so that 8 consecutive rows of one column of chunks lie in 8 bank groups.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// d (16x8) += a b over 32 bytes of the sum.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<T>(d, a, b);
}
template <>
__device__ __forceinline__ void multiply_add<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k8_tf32(d, a, b);
}

// The tensor core would cut a float's low bits off, always towards zero.
template <class T, int N>
__device__ __forceinline__ void round_fragment(uint32_t (&r)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] = to_tf32(float_from_bits(r[i]));
  }
}

// The product of a block's tile (kConvRows x COLUMNS) by 8 warps, WARP_ROWS x WARP_COLUMNS each.
template <class T, int COLUMNS>
struct WarpTile {
  static constexpr int kWarpsDown = COLUMNS == 128 ? 2 : 4;
  static constexpr int kWarpRows = kConvRows / kWarpsDown, kWarpColumns = COLUMNS / (8 / kWarpsDown);
  static constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;

  float sum[kM][kN][4];
  int row, column, lane;  // of the warp's part of the tile

  __device__ __forceinline__ WarpTile() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    row = warp % kWarpsDown * kWarpRows, column = warp / kWarpsDown * kWarpColumns;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] = 0.0f;
  }

  // a: kConvRows rows of 128 bytes of the sum; b: COLUMNS rows of the same.
  __device__ __forceinline__ void add(const unsigned char* a, const unsigned char* b) {
    const int a_row = row + (lane & 15), a_chunk = lane >> 4;
    const int b_row = column + (lane & 7) + ((lane >> 4) << 3), b_chunk = (lane >> 3) & 1;
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      uint32_t a_part[kM][4], b_part[kN][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ldmatrix(a_part[m], a + chunk_at(a_row + m * 16, k + a_chunk));
        round_fragment<T>(a_part[m]);
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) load_pair(b_part[n], b_part[n + 1], b + chunk_at(b_row + n * 8, k + b_chunk));
      multiply(a_part, b_part);
    }
  }

  // The same with the sum along the rows of both tiles: `positions` rows of kConvRows and of COLUMNS elements.
  __device__ __forceinline__ void add_transposed(const unsigned char* a, const unsigned char* b) {
    static_assert(COLUMNS == kConvRows, "both tiles have the same rows");
    if constexpr (sizeof(T) == 2) {
      const int a_row = (lane & 7) + ((lane >> 4) << 3), a_chunk = row / 8 + ((lane >> 3) & 1);
      const int b_row = (lane & 7) + (((lane >> 3) & 1) << 3), b_chunk = column / 8 + (lane >> 4);
#pragma unroll
      for (int k = 0; k < 64; k += 16) {
        uint32_t a_part[kM][4], b_part[kN][2];
#pragma unroll
        for (int m = 0; m < kM; ++m) ldmatrix_transposed(a_part[m], a + wide_chunk_at(k + a_row, a_chunk + m * 2));
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          uint32_t both[4];
          ldmatrix_transposed(both, b + wide_chunk_at(k + b_row, b_chunk + n));
          split(b_part[n], b_part[n + 1], both);
        }
        multiply(a_part, b_part);
      }
    } else {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int k = 0; k < 32; k += 8) {
        uint32_t a_part[kM][4], b_part[kN][2];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a_part[m][i] = word_at(a, k + t + (i / 2) * 4, row + m * 16 + g + (i % 2) * 8);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) b_part[n][i] = word_at(b, k + t + i * 4, column + n * 8 + g);
        multiply(a_part, b_part);
      }
    }
  }

  // Byte offset of a chunk in a tile whose rows are positions: permuted for transposed matrix loads of 16-bit elements,
  // and for words of 4 rows x 8 columns of floats.
  static __device__ __forceinline__ int wide_chunk_at(int position, int chunk) {
    constexpr int kRowBytes = kConvRows * static_cast<int>(sizeof(T));
    const int permuted = sizeof(T) == 2 ? chunk ^ (position & 7) : chunk ^ ((position & 3) << 1);
    return position * kRowBytes + (permuted << 4);
  }

  // visit(row, column, first, second) for each pair of neighbouring columns.
  template <class Visit>
  __device__ __forceinline__ void for_each_pair(Visit visit) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          visit(row + m * 16 + g + i * 8, column + n * 8 + 2 * t, sum[m][n][2 * i], sum[m][n][2 * i + 1]);
  }

 private:
  static __device__ __forceinline__ void split(uint32_t (&first)[2], uint32_t (&second)[2], const uint32_t (&both)[4]) {
    first[0] = both[0], first[1] = both[1], second[0] = both[2], second[1] = both[3];
  }

  static __device__ __forceinline__ void load_pair(uint32_t (&first)[2], uint32_t (&second)[2],
                                                   const unsigned char* address) {
    uint32_t both[4];
    ldmatrix(both, address);
    round_fragment<T>(both);
    split(first, second, both);
  }

  static __device__ __forceinline__ uint32_t word_at(const unsigned char* tile, int position, int element) {
    const unsigned char* chunk = tile + wide_chunk_at(position, element / 4);
    return to_tf32(reinterpret_cast<const float*>(chunk)[element % 4]);
  }

  __device__ __forceinline__ void multiply(const uint32_t (&a)[kM][4], const uint32_t (&b)[kN][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) multiply_add<T>(sum[m][n], a[m], b[n]);
  }
};

}  // namespace fastvdiff::cuda
