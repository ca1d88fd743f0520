// What both kernels of capability 9.0 are made of: positions, the epilogue's exchange between lanes, tensor maps.
#pragma once

#include <stdexcept>
#include <string>

#include "conv3d_launch.h"
#include "conv3d_sm90_tiles.h"
#include "fastvdiff/conv3d.h"
#include "ptx_sm90.h"

namespace fastvdiff::cuda::conv3d_sm90 {

constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;  // one copies, two multiply

struct Position {
  int n, t, h, w;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The coordinates of an output position, `row` counted through all samples.
template <class Args>
__device__ __forceinline__ Position position_of(const Args& a, uint32_t row) {
  const uint32_t line = row / a.out_size[2], plane = line / a.out_size[1], sample = plane / a.out_size[0];
  return {static_cast<int>(sample), static_cast<int>(plane - sample * a.out_size[0]),
          static_cast<int>(line - plane * a.out_size[1]), static_cast<int>(row - line * a.out_size[2])};
}

// Four lanes' words, lane i's word j at lane j's word i.
__device__ __forceinline__ void transpose_of_four(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = shuffle_xor(upper ? words[i] : words[i + bit], bit);
      (upper ? words[i] : words[i + bit]) = other;
    }
  }
}

#endif

// A function of the driver, which is not linked: the package loads where there is none.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
  check(name, cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status));
#else
  check(name, cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status));
#endif
  if (found == nullptr || status != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("conv3d: the driver has no ") + name + "; it needs CUDA 12.0 or newer");
  }
  return reinterpret_cast<Function>(found);
}

inline void check_map(const char* name, CUresult status) {
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("conv3d: ") + name + " returned " + std::to_string(static_cast<int>(status)));
  }
}

inline CUtensorMapDataType type_of(DType dtype) {
  return dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// What of the last input coordinate of a dimension the first tap still meets, counted from the end.
inline int upper_corner(const Conv3dParams& p, int d) {
  return (p.out_size[d] - 1) * p.stride[d] + 1 - p.size[d] - p.before[d];
}

// Rows of `rows` pixels, 64 channels of each, of an NDHWC tensor; a dimension of one index comes with a stride of 0, and
// gets a dense one. Corners and steps in the order of (w, h, d).
inline CUtensorMap map_of_pixels(DType dtype, const void* base, int64_t batch, int channels, const int32_t (&size)[3],
                          const int64_t (&stride)[4], const int (&lower)[3], const int (&upper)[3], const int32_t (&step)[3],
                          int rows) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(size[2]),
                               static_cast<cuuint64_t>(size[1]), static_cast<cuuint64_t>(size[0]),
                               static_cast<cuuint64_t>(batch)};
  cuuint64_t strides[4];  // bytes
  cuuint64_t dense = sizes[0] * 2;
  for (int i = 0; i < 4; ++i) {
    strides[i] = sizes[i + 1] > 1 ? static_cast<cuuint64_t>(stride[3 - i]) * 2 : dense;
    dense = strides[i] * sizes[i + 1];
  }
  const cuuint32_t steps[5] = {1, static_cast<cuuint32_t>(step[2]), static_cast<cuuint32_t>(step[1]),
                               static_cast<cuuint32_t>(step[0]), 1};
  CUtensorMap map;
  check_map("cuTensorMapEncodeIm2col",
            encode(&map, type_of(dtype), 5, const_cast<void*>(base), sizes, strides, lower, upper, kStepDepth,
                   static_cast<cuuint32_t>(rows), steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

inline CUtensorMap map_of_input(const Conv3dParams& p, int rows) {
  const int lower[3] = {-p.before[2], -p.before[1], -p.before[0]};
  const int upper[3] = {upper_corner(p, 2), upper_corner(p, 1), upper_corner(p, 0)};
  return map_of_pixels(p.dtype, p.x, p.batch, p.channels, p.size, p.stride_x, lower, upper, p.stride, rows);
}

// 64 channels of one tap, of `columns` rows of the weight.
inline CUtensorMap map_of_weight(const Conv3dParams& p, int columns) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint64_t taps = static_cast<cuuint64_t>(p.kernel[0]) * p.kernel[1] * p.kernel[2];
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(p.channels), taps, static_cast<cuuint64_t>(p.out_channels)};
  const cuuint64_t strides[2] = {sizes[0] * 2, sizes[0] * taps * 2};
  const cuuint32_t box[3] = {kStepDepth, 1, static_cast<cuuint32_t>(columns)}, steps[3] = {1, 1, 1};
  CUtensorMap map;
  check_map("cuTensorMapEncodeTiled",
            encode(&map, type_of(p.dtype), 3, const_cast<void*>(p.weight), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

// Channels side by side, in whole 16 bytes.
inline bool whole_rows(const void* base, const int64_t (&strides)[5]) {
  const bool inner = strides[1] == 1 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  return inner && strides[0] % 8 == 0 && strides[2] % 8 == 0 && strides[3] % 8 == 0 && strides[4] % 8 == 0;
}

// The calls that both kernels run.
inline bool takes(const Conv3dParams& p) {
  if (p.dtype == DType::f32 || p.prefix != nullptr || p.prologue != nullptr || p.groups > 0) return false;
  if (p.channels % 8 != 0 || p.out_channels % 8 != 0) return false;
  for (int d = 0; d < 3; ++d) {
    const int upper = upper_corner(p, d), reach = (p.kernel[d] - 1) * p.dilation[d];
    const bool says = p.before[d] <= 16 && upper >= -16 && upper <= 15 && reach <= 31 && p.stride[d] <= 8;
    if (p.replicate[d] != 0 || !says) return false;
  }
  bool input = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  const int64_t sizes[4] = {p.batch, p.size[0], p.size[1], p.size[2]};
  for (int i = 0; i < 4; ++i) {
    const int64_t stride = p.stride_x[i];  // an expanded tensor's 0 is none that a map takes
    input = input && stride % 8 == 0 && (sizes[i] == 1 || (stride > 0 && stride < int64_t{1} << 39));
  }
  return input && whole_rows(p.y, p.stride_y) && (p.residual == nullptr || whole_rows(p.residual, p.stride_r));
}

// What the kernels' arguments have in common.
template <class Args>
Args arguments_of(const Conv3dParams& p, int64_t rows) {
  if (rows >= int64_t{1} << 31) throw std::invalid_argument("conv3d: more output positions than 32 bits count");
  Args a{};
  a.bias = p.bias, a.channel_bias = p.channel_bias, a.out = p.y;
  a.rows = static_cast<uint32_t>(rows), a.columns = p.out_channels, a.bias_frames = p.bias_frames;
  a.chunks = static_cast<int32_t>(ceil_div(p.channels, kStepDepth));
  a.out_stride[0] = p.stride_y[0];
  for (int d = 0; d < 3; ++d) {
    a.out_stride[d + 1] = p.stride_y[d + 2];
    a.out_size[d] = p.out_size[d], a.kernel[d] = p.kernel[d], a.stride[d] = p.stride[d];
    a.dilation[d] = p.dilation[d], a.before[d] = p.before[d];
  }
  return a;
}

}  // namespace fastvdiff::cuda::conv3d_sm90
