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
// Measured    H100, bf16, TFLOP/s, of cuDNN with its bias beside it: 320 channels 1x3x3 487 (1.24x), 3x1x1 323 (1.02x); 1280
//             channels 526 (0.92x) and 450 (0.77x); 64 channels 240 (1.48x) and 107 (1.68x). L2 is at 72 % with 160 columns,
//             31 bytes a cycle and multiprocessor; with 256 columns 660. A residual and a channel bias take 0.9 ms of 2.7
//             at 320 channels, one dependent read after another: conv3d_sm90_cluster.cu mends both.
// Refuses     float32, repeated edges, a prefix, statistics, a prologue, channels that are no multiple of 8, boxes and taps
//             beyond what a tensor map can say (conv3d_sm90_takes).
#include <algorithm>

#include "conv3d_sm90.cuh"

namespace fastvdiff::cuda {
namespace {

using namespace conv3d_sm90;

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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

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

template <class T, int COLUMNS>
void launch(const Conv3dParams& p, Args& a, int multiprocessors, void* stream) {
  constexpr int kBytes = bytes_of(COLUMNS);
  static_assert(kBytes + 16 * kStages<COLUMNS> <= 227 * 1024, "a block's shared memory");
  const int64_t column_tiles = ceil_div(a.columns, COLUMNS), tiles = ceil_div(int64_t{a.rows}, kTileRows) * column_tiles;
  if (tiles >= int64_t{1} << 31) throw std::invalid_argument("conv3d: more tiles than a grid has blocks");
  a.column_tiles = static_cast<uint32_t>(column_tiles), a.tiles = static_cast<uint32_t>(tiles);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors));
  allow_shared(conv3d_sm90_kernel<T, COLUMNS>, kBytes);
  FASTVDIFF_LAUNCH((conv3d_sm90_kernel<T, COLUMNS>), blocks, kThreads, kBytes, stream,
                   map_of_input(p, kTileRows), map_of_weight(p, COLUMNS), a);
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

}  // namespace

bool conv3d_sm90_takes(const Conv3dParams& p) { return takes(p); }

void conv3d_sm90_forward(const Conv3dParams& p, int multiprocessors, void* stream) {
  const int64_t rows = p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2];
  if (rows == 0) return;
  if (!takes(p) || multiprocessors < 1) {
    throw std::invalid_argument("conv3d: not a convolution that the kernel for capability 9.0 takes");
  }
  Args a = arguments_of<Args>(p, rows);
  a.residual = p.residual, a.residual_stride[0] = p.stride_r[0];
  for (int d = 0; d < 3; ++d) a.residual_stride[d + 1] = p.stride_r[d + 2];
  if (p.dtype == DType::bf16) return launch_for<bf16>(p, a, multiprocessors, stream);
  launch_for<f16>(p, a, multiprocessors, stream);
}

}  // namespace fastvdiff::cuda
