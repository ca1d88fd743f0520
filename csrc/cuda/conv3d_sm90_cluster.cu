// conv3d_sm90.cu's convolution on clusters of two blocks, larger tiles, and residuals that come as the positions do.
//
// conv3d_sm90.cu waits for L2: on an H100 it reads 31 bytes a cycle and multiprocessor, 72 % of what L2 gives, and 160
// columns need 58 at the full rate of the tensor cores. Here 160 columns need 34, 256 need 32.
//
// Computes    as conv3d_sm90.cu.
// Layout      NDHWC in and out, channels whole 16 bytes; (n, kT, kH, kW, channels) weights.
// Work split  A cluster of two blocks takes pairs of tiles of 128 or 256 positions x 64 to 256 columns one after another,
//             columns first, so that neighbours find their positions in L2. One thread of each copies steps of 64 channels
//             of one tap: the copy engine walks the output positions itself (im2col mode), pads with zeros at the edges and
//             past the channels, and swizzles. The weights of a step are the same in both blocks: each copies half of them
//             for both. A residual comes through the same ring. Two warpgroups multiply; the next tile's copies run under a
//             tile's epilogue.
// Traffic     in + weight + residual + out once where L2 holds the positions that neighbouring taps and columns share.
// Precision   float32 sums; one rounding, after the epilogue. The order of a sum depends on nothing.
// Refuses     float32, repeated edges, a prefix, statistics, a prologue, channels that are no multiple of 8, boxes and taps
//             beyond what a tensor map can say (conv3d_sm90_cluster_takes).
#include <algorithm>

#include "conv3d_sm90.cuh"

namespace fastvdiff::cuda {
namespace {

using namespace conv3d_sm90;
using namespace conv3d_sm90::cluster;

struct Args {
  const float* bias;
  const float* channel_bias;  // (batch, columns, bias_frames)
  void* out;
  int64_t out_stride[4];  // batch, t, h, w
  uint32_t rows, tiles, column_tiles;
  int32_t columns, bias_frames, chunks, residual_chunks;  // chunks: steps of a tap, or of the residual
  int32_t out_size[3], kernel[3], stride[3], dilation[3], before[3];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ float2 pair_of(const float* floats) { return *reinterpret_cast<const float2*>(floats); }

// sums += the residual's 64 columns from `block` * 8 on, whose rows stand at `shared` as the copies swizzle them.
template <class T, int HEIGHT, int COLUMNS>
__device__ __forceinline__ void add_rows(float (&sums)[HEIGHT][COLUMNS / 2], const unsigned char* shared, int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4;
#pragma unroll
  for (int block = 0; block < COLUMNS / 8; ++block) {
    if (block / 8 != chunk) continue;
    const unsigned char* const from = shared + row * kRowBytes + ((block % 8) ^ row) * 16 + lane % 4 * 4;
#pragma unroll
    for (int m = 0; m < HEIGHT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(from + (m * 64 + half * 8) * kRowBytes);
        sums[m][block * 4 + half * 2] += Pair<T>::low(pair), sums[m][block * 4 + half * 2 + 1] += Pair<T>::high(pair);
      }
    }
  }
}

enum class Terms { bias, of_sample, of_frame };  // what a column's sum gets besides the residual

// Bias, channel bias and the stores of a warp's HEIGHT times 16 rows, `row` being the first of the lane's.
template <class T, int HEIGHT, int COLUMNS, Terms TERMS>
__device__ __forceinline__ void finish(const Args& a, float (&sums)[HEIGHT][COLUMNS / 2], uint32_t row, int first_column) {
  const int quad = static_cast<int>(threadIdx.x) % 4, left = a.columns - first_column;
  const float* const bias = a.bias + first_column + quad * 2;
  T* out[HEIGHT][2];
  const float* terms[HEIGHT][2];
#pragma unroll
  for (int m = 0; m < HEIGHT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t own = row + m * 64 + half * 8;
      const Position at = position_of(a, own < a.rows ? own : 0);
      out[m][half] = static_cast<T*>(a.out) + at.n * a.out_stride[0] + at.t * a.out_stride[1] + at.h * a.out_stride[2] +
                     at.w * a.out_stride[3] + first_column + quad * 8;
      if (own >= a.rows) out[m][half] = nullptr;
      terms[m][half] = a.channel_bias + (static_cast<int64_t>(at.n) * a.columns + first_column + quad * 2) * a.bias_frames;
      if (TERMS == Terms::of_frame) terms[m][half] += at.t;
    }
  }
#pragma unroll
  for (int block = 0; block < COLUMNS / 32; ++block) {
    float2 shared[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = block * 32 + i * 8;
      if (a.bias != nullptr && column < left) shared[i] = pair_of(bias + column);
    }
#pragma unroll
    for (int m = 0; m < HEIGHT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = block * 32 + i * 8;
          float2 term = shared[i];
          if (TERMS == Terms::of_sample && column < left) {
            const float2 more = pair_of(terms[m][half] + column);
            term.x += more.x, term.y += more.y;
          }
          if (TERMS == Terms::of_frame && column < left) {
            const float* const own = terms[m][half] + static_cast<int64_t>(column) * a.bias_frames;
            term.x += own[0], term.y += own[a.bias_frames];
          }
          const float* const sum = sums[m] + (block * 4 + i) * 4 + half * 2;
          words[i] = Pair<T>::of(sum[0] + term.x, sum[1] + term.y);
        }
        transpose_of_four(words, quad);
        if (out[m][half] != nullptr && block * 32 + quad * 8 < left) {
          store_128(out[m][half] + block * 32, make_uint4(words[0], words[1], words[2], words[3]));
        }
      }
    }
  }
}

#endif

template <class T, int HEIGHT, int COLUMNS>
__global__ void __launch_bounds__(kThreads, 1)
    conv3d_sm90_cluster_kernel(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap weight,
                       const __grid_constant__ CUtensorMap residual, const __grid_constant__ Args a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kRows = rows_of(HEIGHT), kStages = stages_of(HEIGHT, COLUMNS), kStep = step_bytes(HEIGHT, COLUMNS);
  FASTVDIFF_DYNAMIC_SHARED(memory);
  FASTVDIFF_SHARED(uint64_t, barriers, 2 * kStages);
  const uint32_t arena = (shared_address(memory) + kAligned - 1) & ~static_cast<uint32_t>(kAligned - 1);
  const uint32_t full = shared_address(barriers), empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, kBlocks * 2 * kWarpgroup / 32);
    }
    barrier_init_done();
  }
  sync_cluster();

  const uint32_t warpgroup = threadIdx.x / kWarpgroup, rank = rank_in_cluster();
  uint32_t stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, phase ^= 1;
  };
  // The row tile and the first column of a cluster's pair of tiles.
  const auto row_tile = [&](uint32_t pair) { return pair / a.column_tiles * kBlocks + rank; };
  const auto first_column = [&](uint32_t pair) { return static_cast<int>(pair % a.column_tiles) * COLUMNS; };
  const uint32_t pairs = a.tiles / kBlocks, clusters = gridDim.x / kBlocks;
  if (warpgroup == 0) {
    give_registers_back<40>();
    if (threadIdx.x == 0) {
      prefetch_map(in), prefetch_map(weight);
      for (uint32_t pair = blockIdx.x / kBlocks; pair < pairs; pair += clusters) {
        const Position at = position_of(a, row_tile(pair) * kRows);
        const int column = first_column(pair);
        const int d = at.t * a.stride[0] - a.before[0], h = at.h * a.stride[1] - a.before[1];
        const int w = at.w * a.stride[2] - a.before[2];
        int tap = 0;
#pragma unroll 1
        for (int kt = 0; kt < a.kernel[0]; ++kt) {
#pragma unroll 1
          for (int kh = 0; kh < a.kernel[1]; ++kh) {
#pragma unroll 1
            for (int kw = 0; kw < a.kernel[2]; ++kw, ++tap) {
#pragma unroll 1
              for (int chunk = 0; chunk < a.chunks; ++chunk) {
                const uint32_t rows = arena + stage * kStep, arrived = full + 8 * stage;
                barrier_wait_for_cluster(empty + 8 * stage, phase ^ 1);
                barrier_expect(arrived, kStep);
                copy_pixels(rows, in, arrived, chunk * kStepDepth, w, h, d, at.n,
                            static_cast<uint16_t>(kw * a.dilation[2]), static_cast<uint16_t>(kh * a.dilation[1]),
                            static_cast<uint16_t>(kt * a.dilation[0]));
                const int part = static_cast<int>(rank) * (COLUMNS / kBlocks);
                copy_box_to_both(rows + (kRows + part) * kRowBytes, weight, arrived, chunk * kStepDepth, tap,
                                 column + part);
                advance();
              }
            }
          }
        }
#pragma unroll 1
        for (int chunk = 0; chunk < a.residual_chunks; ++chunk) {
          const uint32_t arrived = full + 8 * stage;
          barrier_wait_for_cluster(empty + 8 * stage, phase ^ 1);
          barrier_expect(arrived, kRows * kRowBytes);
          copy_pixels(arena + stage * kStep, residual, arrived, column + chunk * kStepDepth, at.w, at.h, at.t, at.n, 0, 0,
                      0);
          advance();
        }
      }
    }
    __syncwarp();
    sync_cluster();  // no block ends before the other has signalled it for the last time
    return;
  }
  take_registers<232>();
  const uint32_t own_rows = (warpgroup - 1) * (kRows / 2);
  const uint32_t lane = threadIdx.x % 32;
  const auto release = [&](uint32_t which) {
    if (lane < kBlocks) barrier_arrive(empty + 8 * which, lane);
  };
  const int steps = a.kernel[0] * a.kernel[1] * a.kernel[2] * a.chunks;
  for (uint32_t pair = blockIdx.x / kBlocks; pair < pairs; pair += clusters) {
    float sums[HEIGHT][COLUMNS / 2];
    uint32_t before = 0;  // the stage of the step before
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + 8 * stage, phase);
      const uint32_t rows = arena + stage * kStep;
      const uint64_t left = rows_of_128_bytes(rows + own_rows * kRowBytes);
      const uint64_t right = rows_of_128_bytes(rows + kRows * kRowBytes);
#pragma unroll
      for (int m = 0; m < HEIGHT; ++m) settle(sums[m]);
      products_begin();
#pragma unroll
      for (int k = 0; k < kStepDepth / 16; ++k) {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m) {
          multiply_rows<T>(sums[m], left + 2 * k + m * (64 * kRowBytes / 16), right + 2 * k, step > 0 || k > 0);
        }
      }
      products_commit();
      products_wait<1>();
      if (step > 0) release(before);
      before = stage;
      advance();
    }
    products_wait<0>();
#pragma unroll
    for (int m = 0; m < HEIGHT; ++m) settle(sums[m]);
    release(before);
    const uint32_t warp_rows = own_rows + threadIdx.x % kWarpgroup / 32 * 16;
    for (int chunk = 0; chunk < a.residual_chunks; ++chunk) {
      barrier_wait(full + 8 * stage, phase);
      const uint32_t from = arena - shared_address(memory) + stage * kStep + warp_rows * kRowBytes;
      add_rows<T, HEIGHT, COLUMNS>(sums, memory + from, chunk);
      __syncwarp();
      release(stage);
      advance();
    }
    const uint32_t row = row_tile(pair) * kRows + warp_rows + lane / 4;
    if (a.channel_bias == nullptr) {
      finish<T, HEIGHT, COLUMNS, Terms::bias>(a, sums, row, first_column(pair));
    } else if (a.bias_frames == 1) {
      finish<T, HEIGHT, COLUMNS, Terms::of_sample>(a, sums, row, first_column(pair));
    } else {
      finish<T, HEIGHT, COLUMNS, Terms::of_frame>(a, sums, row, first_column(pair));
    }
  }
  sync_cluster();
#else
  __trap();
#endif
}

CUtensorMap map_of_residual(const Conv3dParams& p, int rows) {
  const int corner[3] = {0, 0, 0};
  const int32_t step[3] = {1, 1, 1};
  const int64_t stride[4] = {p.stride_r[0], p.stride_r[2], p.stride_r[3], p.stride_r[4]};
  return map_of_pixels(p.dtype, p.residual, p.batch, p.out_channels, p.out_size, stride, corner, corner, step, rows);
}

template <class T, int HEIGHT, int COLUMNS>
void launch(const Conv3dParams& p, Args& a, int multiprocessors, void* stream) {
  constexpr int kBytes = bytes_of(HEIGHT, COLUMNS), kRows = rows_of(HEIGHT);
  static_assert(kBytes + 16 * stages_of(HEIGHT, COLUMNS) <= 227 * 1024, "a block's shared memory");
  const int64_t tiles = tiles_of({HEIGHT, COLUMNS}, a.rows, a.columns);
  if (tiles * kRows >= int64_t{1} << 31) throw std::invalid_argument("conv3d: more tiles than a grid has blocks");
  a.column_tiles = static_cast<uint32_t>(ceil_div(a.columns, COLUMNS)), a.tiles = static_cast<uint32_t>(tiles);
  a.residual_chunks = p.residual == nullptr ? 0 : static_cast<int>(ceil_div(COLUMNS, kStepDepth));
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors / kBlocks * kBlocks));
  allow_shared(conv3d_sm90_cluster_kernel<T, HEIGHT, COLUMNS>, kBytes);
  const CUtensorMap in = map_of_input(p, kRows);
  FASTVDIFF_LAUNCH_CLUSTERS((conv3d_sm90_cluster_kernel<T, HEIGHT, COLUMNS>), dim3(blocks), dim3(kThreads),
                            unsigned{kBlocks}, kBytes, stream, in, map_of_weight(p, COLUMNS / kBlocks),
                            p.residual == nullptr ? in : map_of_residual(p, kRows), a);
}

template <class T>
void launch_for(const Conv3dParams& p, Args& a, int multiprocessors, void* stream) {
  const int steps = a.kernel[0] * a.kernel[1] * a.kernel[2] * a.chunks;
  const Tile tile = tile_of(a.rows, a.columns, steps, multiprocessors);
  switch (tile.height * 1000 + tile.columns) {
    case 1256: return launch<T, 1, 256>(p, a, multiprocessors, stream);
    case 2160: return launch<T, 2, 160>(p, a, multiprocessors, stream);
    case 1160: return launch<T, 1, 160>(p, a, multiprocessors, stream);
    case 2128: return launch<T, 2, 128>(p, a, multiprocessors, stream);
    case 1128: return launch<T, 1, 128>(p, a, multiprocessors, stream);
    case 2064: return launch<T, 2, 64>(p, a, multiprocessors, stream);
    default: return launch<T, 1, 64>(p, a, multiprocessors, stream);
  }
}

// Whether a map takes the residual: an expanded tensor's stride of 0 is none.
bool whole_pixels(const Conv3dParams& p) {
  const int64_t sizes[4] = {p.batch, p.out_size[0], p.out_size[1], p.out_size[2]};
  const int64_t strides[4] = {p.stride_r[0], p.stride_r[2], p.stride_r[3], p.stride_r[4]};
  bool whole = whole_rows(p.residual, p.stride_r);
  for (int i = 0; i < 4; ++i) whole = whole && (sizes[i] == 1 || (strides[i] > 0 && strides[i] < int64_t{1} << 39));
  return whole;
}

}  // namespace

bool conv3d_sm90_cluster_takes(const Conv3dParams& p) {
  const bool pairs = (reinterpret_cast<uintptr_t>(p.bias) | reinterpret_cast<uintptr_t>(p.channel_bias)) % 8 == 0;
  return takes(p) && pairs && (p.residual == nullptr || whole_pixels(p));
}

void conv3d_sm90_cluster_forward(const Conv3dParams& p, int multiprocessors, void* stream) {
  const int64_t rows = p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2];
  if (rows == 0) return;
  if (!conv3d_sm90_cluster_takes(p) || multiprocessors < kBlocks) {
    throw std::invalid_argument("conv3d: not a convolution that the kernel of clusters takes");
  }
  Args a = arguments_of<Args>(p, rows);
  if (p.dtype == DType::bf16) return launch_for<bf16>(p, a, multiprocessors, stream);
  launch_for<f16>(p, a, multiprocessors, stream);
}

}  // namespace fastvdiff::cuda
