// conv3d as an implicit matrix product for capability 9.0: tensor copies feed warpgroup products, blocks stay resident.
//
// Computes    as conv3d_product.cuh: out[m, n] = sum over taps and channels of in[m, tap, channel] * weight[n, tap, channel],
//             plus bias, channel bias and residual.
// Layout      NDHWC in and out, channels whole 16 bytes; (n, kT, kH, kW, channels) weights.
// Work split  A block takes tiles of 128 positions x 64 to 256 columns one after another, columns first, so that neighbours
//             find their positions in L2. One thread copies steps of 64 channels of one tap: the copy engine walks the
//             output positions itself (im2col mode), pads with zeros at the edges and past the channels, and swizzles.
//             Two warpgroups of 64 rows multiply; the next tile's copies run under a tile's epilogue.
// Waves       One block a multiprocessor: of 132, the standard shapes' last wave leaves 0.5 to 3 % idle, at 9x16 positions
//             and 1280 channels 14 % (benchmarks.conv3d_tiles). Less would take a split of the sums, and a workspace.
// Traffic     in + weight + residual + out once where L2 holds the positions that neighbouring taps and columns share.
// Precision   float32 sums; one rounding, after the epilogue. The order of a sum depends on nothing.
// Refuses     float32, repeated edges, a prefix, statistics, a prologue, channels that are no multiple of 8, boxes and taps
//             beyond what a tensor map can say (conv3d_sm90_takes).
#include <algorithm>

#include "conv3d_launch.h"
#include "conv3d_sm90_tiles.h"
#include "fastvdiff/conv3d.h"
#include "ptx_sm90.h"

namespace fastvdiff::cuda {
namespace {

using namespace conv3d_sm90;

constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;  // one copies, two multiply

template <int COLUMNS>
constexpr int kStep = step_bytes(COLUMNS);
template <int COLUMNS>
constexpr int kStages = stages_of(COLUMNS);

struct Args {
  const float* bias;
  const float* channel_bias;  // (batch, columns, bias_frames)
  const void* residual;
  void* out;
  int64_t out_stride[4], residual_stride[4];  // batch, t, h, w
  uint32_t rows, tiles, column_tiles;
  int32_t columns, bias_frames, chunks;  // chunks: steps of a tap
  int32_t out_size[3], kernel[3], stride[3], dilation[3], before[3];
};

struct Position {
  int n, t, h, w;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

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

template <class T, int COLUMNS>
__device__ __forceinline__ void finish(const Args& a, const float (&sums)[COLUMNS / 2], uint32_t row, int first_column) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    const bool inside = row < a.rows;
    const Position at = position_of(a, inside ? row : 0);
    T* const out = static_cast<T*>(a.out) + at.n * a.out_stride[0] + at.t * a.out_stride[1] + at.h * a.out_stride[2] +
                   at.w * a.out_stride[3];
    const T* const residual = static_cast<const T*>(a.residual) + at.n * a.residual_stride[0] +
                              at.t * a.residual_stride[1] + at.h * a.residual_stride[2] + at.w * a.residual_stride[3];
    const float* const channel_bias = a.channel_bias + static_cast<int64_t>(at.n) * a.columns * a.bias_frames +
                                      (a.bias_frames > 1 ? at.t : 0);
#pragma unroll
    for (int block = 0; block < COLUMNS / 32; ++block) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first_column + block * 32 + i * 8 + quad * 2;
        float low = sums[(block * 4 + i) * 4 + half * 2], high = sums[(block * 4 + i) * 4 + half * 2 + 1];
        if (inside && column < a.columns) {
          if (a.bias != nullptr) low += a.bias[column], high += a.bias[column + 1];
          if (a.channel_bias != nullptr) {
            low += channel_bias[static_cast<int64_t>(column) * a.bias_frames];
            high += channel_bias[static_cast<int64_t>(column + 1) * a.bias_frames];
          }
          if (a.residual != nullptr) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(residual + column);
            low += Pair<T>::low(pair), high += Pair<T>::high(pair);
          }
        }
        words[i] = Pair<T>::of(low, high);
      }
      transpose_of_four(words, quad);
      const int column = first_column + block * 32 + quad * 8;
      if (inside && column < a.columns) store_128(out + column, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

#endif

template <class T, int COLUMNS>
__global__ void __launch_bounds__(kThreads, 1)
    conv3d_sm90_kernel(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap weight,
                       const __grid_constant__ Args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  FASTVDIFF_DYNAMIC_SHARED(memory);
  FASTVDIFF_SHARED(uint64_t, barriers, 2 * kStages<COLUMNS>);
  const uint32_t arena = (shared_address(memory) + kAligned - 1) & ~static_cast<uint32_t>(kAligned - 1);
  const uint32_t full = shared_address(barriers), empty = full + 8 * kStages<COLUMNS>;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages<COLUMNS>; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 2 * kWarpgroup / 32);
    }
    barrier_init_done();
  }
  sync_threads();

  const uint32_t warpgroup = threadIdx.x / kWarpgroup;
  uint32_t stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == kStages<COLUMNS>) stage = 0, phase ^= 1;
  };
  if (warpgroup == 0) {
    give_registers_back<40>();
    if (threadIdx.x != 0) return;
    prefetch_map(in), prefetch_map(weight);
    for (uint32_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
      const Position at = position_of(a, tile / a.column_tiles * kTileRows);
      const int first_column = static_cast<int>(tile % a.column_tiles) * COLUMNS;
      const int d = at.t * a.stride[0] - a.before[0], h = at.h * a.stride[1] - a.before[1];
      const int w = at.w * a.stride[2] - a.before[2];
      int tap = 0;
      for (int kt = 0; kt < a.kernel[0]; ++kt) {
        for (int kh = 0; kh < a.kernel[1]; ++kh) {
          for (int kw = 0; kw < a.kernel[2]; ++kw, ++tap) {
            for (int chunk = 0; chunk < a.chunks; ++chunk) {
              const uint32_t rows = arena + stage * kStep<COLUMNS>, arrived = full + 8 * stage;
              barrier_wait(empty + 8 * stage, phase ^ 1);
              barrier_expect(arrived, kStep<COLUMNS>);
              copy_pixels(rows, in, arrived, chunk * kStepDepth, w, h, d, at.n, static_cast<uint16_t>(kw * a.dilation[2]),
                          static_cast<uint16_t>(kh * a.dilation[1]), static_cast<uint16_t>(kt * a.dilation[0]));
              copy_box(rows + kTileRows * kRowBytes, weight, arrived, chunk * kStepDepth, tap, first_column);
              advance();
            }
          }
        }
      }
    }
    return;
  }
  take_registers<232>();
  const uint32_t own_rows = (warpgroup - 1) * (kTileRows / 2);
  const bool signals = threadIdx.x % 32 == 0;
  const int steps = a.kernel[0] * a.kernel[1] * a.kernel[2] * a.chunks;
  for (uint32_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    float sums[COLUMNS / 2];
    uint32_t before = 0;  // the stage of the step before
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + 8 * stage, phase);
      const uint32_t rows = arena + stage * kStep<COLUMNS>;
      const uint64_t left = rows_of_128_bytes(rows + own_rows * kRowBytes);
      const uint64_t right = rows_of_128_bytes(rows + kTileRows * kRowBytes);
      settle(sums);
      products_begin();
#pragma unroll
      for (int k = 0; k < kStepDepth / 16; ++k) {
        multiply_rows<T>(sums, left + 2 * k, right + 2 * k, step > 0 || k > 0);
      }
      products_commit();
      products_wait<1>();
      if (step > 0 && signals) barrier_arrive(empty + 8 * before);
      before = stage;
      advance();
    }
    products_wait<0>();
    settle(sums);
    if (signals) barrier_arrive(empty + 8 * before);
    const uint32_t row = tile / a.column_tiles * kTileRows + own_rows + threadIdx.x % kWarpgroup / 32 * 16 +
                         threadIdx.x % 32 / 4;
    finish<T, COLUMNS>(a, sums, row, static_cast<int>(tile % a.column_tiles) * COLUMNS);
  }
#else
  __trap();
#endif
}

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

void check_map(const char* name, CUresult status) {
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("conv3d: ") + name + " returned " + std::to_string(static_cast<int>(status)));
  }
}

CUtensorMapDataType type_of(DType dtype) {
  return dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// What of the last input coordinate of a dimension the first tap still meets, counted from the end.
int upper_corner(const Conv3dParams& p, int d) {
  return (p.out_size[d] - 1) * p.stride[d] + 1 - p.size[d] - p.before[d];
}

CUtensorMap map_of_input(const Conv3dParams& p) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(p.channels), static_cast<cuuint64_t>(p.size[2]),
                               static_cast<cuuint64_t>(p.size[1]), static_cast<cuuint64_t>(p.size[0]),
                               static_cast<cuuint64_t>(p.batch)};
  cuuint64_t strides[4];  // bytes; a dimension of one index comes with a stride of 0, and gets a dense one
  cuuint64_t dense = sizes[0] * 2;
  for (int i = 0; i < 4; ++i) {
    strides[i] = sizes[i + 1] > 1 ? static_cast<cuuint64_t>(p.stride_x[3 - i]) * 2 : dense;
    dense = strides[i] * sizes[i + 1];
  }
  const int lower[3] = {-p.before[2], -p.before[1], -p.before[0]};
  const int upper[3] = {upper_corner(p, 2), upper_corner(p, 1), upper_corner(p, 0)};
  const cuuint32_t steps[5] = {1, static_cast<cuuint32_t>(p.stride[2]), static_cast<cuuint32_t>(p.stride[1]),
                               static_cast<cuuint32_t>(p.stride[0]), 1};
  CUtensorMap map;
  check_map("cuTensorMapEncodeIm2col",
            encode(&map, type_of(p.dtype), 5, const_cast<void*>(p.x), sizes, strides, lower, upper, kStepDepth, kTileRows, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

CUtensorMap map_of_weight(const Conv3dParams& p, int columns) {
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

template <class T, int COLUMNS>
void launch(const Conv3dParams& p, Args& a, int multiprocessors, void* stream) {
  constexpr int kBytes = bytes_of(COLUMNS);
  static_assert(kBytes + 16 * kStages<COLUMNS> <= 227 * 1024, "a block's shared memory");
  const int64_t column_tiles = ceil_div(a.columns, COLUMNS), tiles = ceil_div(int64_t{a.rows}, kTileRows) * column_tiles;
  if (tiles >= int64_t{1} << 31) throw std::invalid_argument("conv3d: more tiles than a grid has blocks");
  a.column_tiles = static_cast<uint32_t>(column_tiles), a.tiles = static_cast<uint32_t>(tiles);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors));
  allow_shared(conv3d_sm90_kernel<T, COLUMNS>, kBytes);
  FASTVDIFF_LAUNCH((conv3d_sm90_kernel<T, COLUMNS>), blocks, kThreads, kBytes, stream, map_of_input(p),
                   map_of_weight(p, COLUMNS), a);
}

template <class T>
void launch_for(const Conv3dParams& p, Args& a, int multiprocessors, void* stream) {
  switch (columns_of(ceil_div(int64_t{a.rows}, kTileRows), a.columns, multiprocessors)) {
    case 256: return launch<T, 256>(p, a, multiprocessors, stream);
    case 160: return launch<T, 160>(p, a, multiprocessors, stream);
    case 128: return launch<T, 128>(p, a, multiprocessors, stream);
    default: return launch<T, 64>(p, a, multiprocessors, stream);
  }
}

bool whole_rows(const void* base, const int64_t (&strides)[5]) {
  const bool inner = strides[1] == 1 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  return inner && strides[0] % 8 == 0 && strides[2] % 8 == 0 && strides[3] % 8 == 0 && strides[4] % 8 == 0;
}

}  // namespace

bool conv3d_sm90_takes(const Conv3dParams& p) {
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

void conv3d_sm90_forward(const Conv3dParams& p, int multiprocessors, void* stream) {
  const int64_t rows = p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2];
  if (rows == 0) return;
  if (!conv3d_sm90_takes(p) || rows >= int64_t{1} << 31 || multiprocessors < 1) {
    throw std::invalid_argument("conv3d: not a convolution that the kernel for capability 9.0 takes");
  }
  Args a{};
  a.bias = p.bias, a.channel_bias = p.channel_bias, a.residual = p.residual, a.out = p.y;
  a.rows = static_cast<uint32_t>(rows), a.columns = p.out_channels, a.bias_frames = p.bias_frames;
  a.chunks = static_cast<int32_t>(ceil_div(p.channels, kStepDepth));
  a.out_stride[0] = p.stride_y[0], a.residual_stride[0] = p.stride_r[0];
  for (int d = 0; d < 3; ++d) {
    a.out_stride[d + 1] = p.stride_y[d + 2], a.residual_stride[d + 1] = p.stride_r[d + 2];
    a.out_size[d] = p.out_size[d], a.kernel[d] = p.kernel[d], a.stride[d] = p.stride[d];
    a.dilation[d] = p.dilation[d], a.before[d] = p.before[d];
  }
  if (p.dtype == DType::bf16) return launch_for<bf16>(p, a, multiprocessors, stream);
  launch_for<f16>(p, a, multiprocessors, stream);
}

}  // namespace fastvdiff::cuda
