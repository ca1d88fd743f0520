// The launchers of fastvdiff/conv3d.h, and the small kernels that put partial results together in a fixed order.

#include "fastvdiff/conv3d.h"

#include <algorithm>
#include <numeric>

#include "conv3d_launch.h"
#include "conv3d_sm90_tiles.h"

namespace fastvdiff::cuda {
namespace {

constexpr int64_t kMaxPositions = int64_t{1} << 31;

int64_t product_of(const int32_t (&sizes)[3]) { return static_cast<int64_t>(sizes[0]) * sizes[1] * sizes[2]; }

int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

bool in_chunks(const void* base, const int64_t* strides, int count, int bytes) {
  bool whole = reinterpret_cast<uintptr_t>(base) % 16 == 0;
  for (int i = 0; i < count; ++i) whole = whole && strides[i] * bytes % 16 == 0;
  return whole;
}

bool result_in_chunks(const void* base, const int64_t (&strides)[5], int bytes) {
  const int64_t outer[4] = {strides[0], strides[2], strides[3], strides[4]};
  return strides[1] == 1 && in_chunks(base, outer, 4, bytes);
}

unsigned grid_of(int64_t blocks) {
  if (blocks >= kMaxPositions) throw std::invalid_argument("conv3d: more tiles than a grid has blocks");
  return static_cast<unsigned>(blocks);
}

void check_positions(int64_t positions) {
  if (positions >= kMaxPositions) throw std::invalid_argument("conv3d: expected fewer than 2^31 output positions");
}

Axis forward_axis(const Conv3dParams& p, int d) {
  return {p.size[d], p.out_size[d], p.stride[d], -p.before[d], p.dilation[d], p.kernel[d], 0, 1, 0, 1, p.replicate[d] != 0};
}

// The coordinates first, first + stride, ... of dx: those that meet the same taps. An input coordinate i meets tap r in
// output (i + before - r * dilation) / stride where that is whole.
Axis gradient_axis(const Conv3dParams& p, int d, int first) {
  const int stride = p.stride[d], dilation = p.dilation[d];
  Axis axis{p.out_size[d], 0, 1, 0, 0, 0, 0, 1, first, stride, false};
  axis.outputs = first < p.size[d] ? (p.size[d] - first + stride - 1) / stride : 0;
  axis.tap_step = stride / std::gcd(stride, dilation);
  for (int tap = 0; tap < std::min(axis.tap_step, p.kernel[d]); ++tap) {
    const int place = first + p.before[d] - tap * dilation;
    if (place % stride != 0) continue;
    axis.first_tap = tap, axis.taps = (p.kernel[d] - tap + axis.tap_step - 1) / axis.tap_step;
    axis.offset = place / stride, axis.reach = -(axis.tap_step * dilation / stride);
    break;
  }
  return axis;
}

// Blocks that a large device runs at once: tiles and shares are counted in such waves. A constant, not the device's own
// number, so that the order of every sum is the same everywhere.
constexpr int64_t kWave = 264;

// Columns of a tile: the fewest waves' worth of columns. The smaller tile loads a tenth more bytes for a product, and pads
// 320 columns to 320, not 384.
int tile_columns(int64_t row_tiles, int columns) {
  const auto cost = [&](int64_t width) { return ceil_div(row_tiles * ceil_div(columns, width), kWave) * width; };
  return cost(128) * 10 <= cost(64) * 11 ? 128 : 64;
}

Gather forward_gather(const Conv3dParams& p) {
  Gather g{};
  g.in = p.x, g.prefix = p.prefix, g.prologue = p.prologue;
  std::copy_n(p.stride_x, 4, g.stride), std::copy_n(p.stride_p, 4, g.prefix_stride);
  for (int d = 0; d < 3; ++d) g.axis[d] = forward_axis(p, d);
  g.channels = p.channels, g.prefix_frames = p.before[0], g.prologue_frames = p.prologue_frames;
  g.kernel_h = p.kernel[1], g.kernel_w = p.kernel[2], g.silu = p.silu != 0;
  return g;
}

bool gathered_in_chunks(const Gather& g, int bytes) {
  return g.channels * bytes % 16 == 0 && in_chunks(g.in, g.stride, 4, bytes) &&
         (g.prefix == nullptr || in_chunks(g.prefix, g.prefix_stride, 4, bytes));
}

Load load_of(const Gather& g, const void* weight, int bytes) {
  if (!gathered_in_chunks(g, bytes) || reinterpret_cast<uintptr_t>(weight) % 16 != 0) return Load::element;
  if (g.prologue != nullptr) return Load::prologue;
  const bool replicate = g.axis[0].replicate || g.axis[1].replicate || g.axis[2].replicate;
  const int taps = g.axis[0].taps + g.axis[1].taps + g.axis[2].taps;
  return replicate || g.prefix != nullptr || taps > kMaxAffineTaps ? Load::clamped : Load::affine;
}

int64_t outputs_of(const Gather& g) {
  return static_cast<int64_t>(g.axis[0].outputs) * g.axis[1].outputs * g.axis[2].outputs;
}

int64_t steps_of(const Gather& g, int depth) {
  return ceil_div(static_cast<int64_t>(g.axis[0].taps) * g.axis[1].taps * g.axis[2].taps * g.channels, depth);
}

// The data gradient's residue class `phase` of stride[0] * stride[1] * stride[2].
Gather gradient_gather(const Conv3dParams& p, int phase) {
  const int first[3] = {phase / (p.stride[1] * p.stride[2]), phase / p.stride[2] % p.stride[1], phase % p.stride[2]};
  Gather g{};
  g.in = p.grad, g.channels = p.out_channels, g.kernel_h = p.kernel[1], g.kernel_w = p.kernel[2];
  std::copy_n(p.stride_g, 4, g.stride);
  for (int d = 0; d < 3; ++d) g.axis[d] = gradient_axis(p, d, first[d]);
  return g;
}

int phases_of(const Conv3dParams& p) { return p.stride[0] * p.stride[1] * p.stride[2]; }

void run_product(const Conv3dParams& p, ProductArgs& args, int64_t segments, void* stream) {
  const int bytes = element_bytes(p.dtype);
  Epilogue& e = args.epilogue;
  e.row_tiles = ceil_div(e.rows, kConvRows);
  const int columns = tile_columns(segments * e.row_tiles, e.columns);
  e.column_tiles = static_cast<int32_t>(ceil_div(e.columns, columns));
  e.chunks = e.columns * bytes % 16 == 0 && result_in_chunks(e.out, e.out_stride, bytes) &&
             (e.residual == nullptr || result_in_chunks(e.residual, e.residual_stride, bytes));
  args.weight_row = static_cast<int64_t>(product_of(p.kernel)) * args.gather.channels;
  const unsigned blocks = grid_of(segments * e.row_tiles * e.column_tiles);
  const Load load = load_of(args.gather, args.weight, bytes);
  with_dtype(p.dtype, [&](auto type) { launch_product<decltype(type)>(args, load, columns, blocks, stream); });
}

__device__ __forceinline__ void merge_block(Moments* parts) {
  for (unsigned half = kConvThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (threadIdx.x < half) parts[threadIdx.x] = merged(parts[threadIdx.x], parts[threadIdx.x + half]);
  }
}

// One block per (sample, group): the partial statistics of its channels in every tile of the sample.
__global__ void __launch_bounds__(kConvThreads)
    conv3d_stats_kernel(const float* partials, float* stats, int64_t rows, int64_t row_tiles, int columns, int groups) {
  FASTVDIFF_SHARED(Moments, parts, kConvThreads);
  const int64_t sample = blockIdx.x / groups;
  const int width = columns / groups, first = static_cast<int>(blockIdx.x % groups) * width;
  Moments own{0.0f, 0.0f, 0.0f};
  for (int64_t i = threadIdx.x; i < row_tiles * width; i += kConvThreads) {
    const int64_t tile = i / width, column = first + i % width;
    const float* pair = partials + ((sample * row_tiles + tile) * columns + column) * 2;
    const int64_t count = min(rows - tile * kConvRows, static_cast<int64_t>(kConvRows));
    own = merged(own, {static_cast<float>(count), pair[0], pair[1]});
  }
  parts[threadIdx.x] = own;
  merge_block(parts);
  if (threadIdx.x == 0) stats[2 * blockIdx.x] = parts[0].mean, stats[2 * blockIdx.x + 1] = parts[0].squares;
}

__global__ void __launch_bounds__(kConvThreads)
    conv3d_sum_shares_kernel(const float* partials, float* out, int64_t elements, int shares) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kConvThreads) + threadIdx.x;
  if (i >= elements) return;
  float sum = partials[i];
  for (int share = 1; share < shares; ++share) sum += partials[share * elements + i];
  out[i] = sum;
}

__global__ void __launch_bounds__(kConvThreads) conv3d_prologue_kernel(Conv3dPrologueParams p) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kConvThreads) + threadIdx.x;
  if (i >= p.batch * p.frames * p.channels) return;
  const int64_t channel = i % p.channels, row = i / p.channels, sample = row / p.frames, frame = row % p.frames;
  const float* stats = p.stats + (sample * p.groups + channel / (p.channels / p.groups)) * 2;
  const float variance = stats[1] / static_cast<float>(p.values);
  float factor = 1.0f / square_root(variance + static_cast<float>(p.eps));
  if (p.weight != nullptr) factor *= p.weight[channel];
  float term = (p.bias != nullptr ? p.bias[channel] : 0.0f) - stats[0] * factor;
  const int64_t vector = sample * p.channels + channel;
  if (p.scale != nullptr) {
    const float scale = 1.0f + p.scale[vector * p.scale_frames + (p.scale_frames > 1 ? frame : 0)];
    factor *= scale, term *= scale;
  }
  if (p.shift != nullptr) term += p.shift[vector * p.shift_frames + (p.shift_frames > 1 ? frame : 0)];
  p.table[2 * i] = factor, p.table[2 * i + 1] = term;
}

// How the weight gradient is split: into the number of shares that takes the fewest steps one after another, each wave's
// beginning and end counted as four. A share walks at least 16 steps.
struct Shares {
  int64_t positions, share;
  int32_t row_tiles, column_tiles, count;
};

Shares shares_of(const Conv3dParams& p) {
  constexpr int64_t kMostBlocks = 4 * kWave, kLeastSteps = 16, kOverhead = 4;
  Shares s{};
  const int64_t depth = 128 / element_bytes(p.dtype);
  s.positions = p.batch * product_of(p.out_size);
  s.row_tiles = static_cast<int32_t>(ceil_div(p.out_channels, kConvRows));
  s.column_tiles = static_cast<int32_t>(ceil_div(product_of(p.kernel) * p.channels, kConvRows));
  const int64_t tiles = static_cast<int64_t>(s.row_tiles) * s.column_tiles;
  const int64_t steps = std::max<int64_t>(1, ceil_div(s.positions, depth));
  const auto cost = [&](int64_t count) {
    return ceil_div(tiles * count, kWave) * (ceil_div(steps, count) + kOverhead);
  };
  int64_t best = 1;
  for (int64_t count = 2; count <= std::min(kMostBlocks / tiles, steps / kLeastSteps); ++count)
    if (cost(count) < cost(best)) best = count;
  s.share = ceil_div(steps, best) * depth;
  s.count = static_cast<int32_t>(std::max<int64_t>(1, ceil_div(s.positions, s.share)));
  return s;
}

int64_t weight_elements(const Conv3dParams& p) {
  return product_of(p.kernel) * p.channels * p.out_channels;
}

}  // namespace

Conv3dPlan conv3d_plan(const Conv3dParams& p, Conv3dPass pass) {
  const int depth = 128 / element_bytes(p.dtype);
  if (pass == Conv3dPass::weight_gradient) {
    const Shares s = shares_of(p);
    const int64_t tiles = static_cast<int64_t>(s.row_tiles) * s.column_tiles;
    const int64_t steps = ceil_div(s.positions, depth);  // a share is whole steps
    return {kConvRows, kConvRows, depth, kConvStages * 2 * kConvRows * 128, tiles * s.count, tiles * steps};
  }
  Conv3dPlan plan{kConvRows, 0, depth, 0, 0, 0};
  const auto add = [&](const Gather& g, int64_t segments, int results) {
    const int64_t row_tiles = segments * ceil_div(p.batch * outputs_of(g) / segments, kConvRows);
    const int columns = tile_columns(row_tiles, results);
    const int64_t blocks = row_tiles * ceil_div(results, columns);
    plan.tile_columns = columns, plan.shared_bytes = kConvStages * (kConvRows + columns) * 128;
    plan.blocks += blocks, plan.steps += blocks * steps_of(g, depth);
  };
  if (pass == Conv3dPass::forward) {
    add(forward_gather(p), p.groups > 0 && p.batch > 0 ? p.batch : 1, p.out_channels);
  } else {
    for (int phase = 0; phase < phases_of(p); ++phase) add(gradient_gather(p, phase), 1, p.channels);
  }
  return plan;
}

Conv3dPlan conv3d_sm90_plan(const Conv3dParams& p, int multiprocessors) {
  using namespace conv3d_sm90;
  const int64_t row_tiles = ceil_div(p.batch * product_of(p.out_size), kTileRows);
  const int columns = columns_of(row_tiles, p.out_channels, multiprocessors);
  const int64_t tiles = row_tiles * ceil_div(p.out_channels, columns);
  const int64_t steps = product_of(p.kernel) * ceil_div(p.channels, kStepDepth);
  return {kTileRows, columns, kStepDepth, bytes_of(columns), tiles, tiles * steps};
}

Conv3dPlan conv3d_sm90_cluster_plan(const Conv3dParams& p, int multiprocessors) {
  using namespace conv3d_sm90;
  const int64_t rows = p.batch * product_of(p.out_size);
  const auto steps = static_cast<int>(product_of(p.kernel) * ceil_div(p.channels, kStepDepth));
  const cluster::Tile tile = cluster::tile_of(rows, p.out_channels, steps, multiprocessors);
  const int64_t tiles = cluster::tiles_of(tile, rows, p.out_channels);
  return {cluster::rows_of(tile.height),
          tile.columns,
          kStepDepth,
          cluster::bytes_of(tile.height, tile.columns),
          tiles,
          tiles * steps};
}

int64_t conv3d_workspace(const Conv3dParams& p, Conv3dPass pass) {
  switch (pass) {
    case Conv3dPass::forward: {
      const int64_t row_tiles = ceil_div(product_of(p.out_size), kConvRows);
      return p.groups > 0 ? p.batch * row_tiles * p.out_channels * 2 : 0;
    }
    case Conv3dPass::data_gradient: return 0;
    case Conv3dPass::weight_gradient: {
      const int count = shares_of(p).count;
      return count > 1 ? count * weight_elements(p) : 0;
    }
  }
  throw std::invalid_argument("conv3d: unknown pass");
}

void conv3d_prologue(const Conv3dPrologueParams& p, void* stream) {
  const int64_t entries = p.batch * p.frames * p.channels;
  if (entries == 0) return;
  FASTVDIFF_LAUNCH(conv3d_prologue_kernel, grid_of(ceil_div(entries, kConvThreads)), kConvThreads, 0, stream, p);
}

void conv3d_forward(const Conv3dParams& p, void* stream) {
  const int64_t rows = product_of(p.out_size);
  if (p.batch * rows == 0) return;
  check_positions(p.batch * rows);
  ProductArgs args{};
  args.gather = forward_gather(p), args.weight = p.weight;
  Epilogue& e = args.epilogue;
  e.bias = p.bias, e.channel_bias = p.channel_bias, e.residual = p.residual, e.out = p.y;
  e.columns = p.out_channels, e.bias_frames = p.bias_frames;
  e.partials = p.stats != nullptr ? p.workspace : nullptr;
  std::copy_n(p.stride_y, 5, e.out_stride), std::copy_n(p.stride_r, 5, e.residual_stride);
  const int64_t segments = p.stats != nullptr ? p.batch : 1;
  e.rows = p.batch * rows / segments;
  run_product(p, args, segments, stream);
  if (p.stats != nullptr) {
    FASTVDIFF_LAUNCH(conv3d_stats_kernel, grid_of(p.batch * p.groups), kConvThreads, 0, stream, p.workspace, p.stats,
                     e.rows, e.row_tiles, p.out_channels, p.groups);
  }
}

void conv3d_data_gradient(const Conv3dParams& p, void* stream) {
  check_positions(p.batch * std::max(product_of(p.size), product_of(p.out_size)));
  for (int phase = 0; phase < phases_of(p); ++phase) {
    ProductArgs args{};
    args.gather = gradient_gather(p, phase);
    args.weight = p.weight;
    Epilogue& e = args.epilogue;
    e.out = p.dx, e.columns = p.channels;
    std::copy_n(p.stride_y, 5, e.out_stride);
    e.rows = p.batch * outputs_of(args.gather);
    if (e.rows > 0) run_product(p, args, 1, stream);
  }
}

void conv3d_weight_gradient(const Conv3dParams& p, void* stream) {
  const Shares s = shares_of(p);
  check_positions(s.positions);
  const int bytes = element_bytes(p.dtype);
  WeightGradientArgs args{};
  args.gather = forward_gather(p), args.grad = p.grad;
  args.out = s.count > 1 ? p.workspace : p.dweight;
  std::copy_n(p.stride_g, 4, args.grad_stride);
  args.positions = s.positions, args.share = s.share;
  args.out_channels = p.out_channels, args.columns = static_cast<int32_t>(product_of(p.kernel) * p.channels);
  args.row_tiles = s.row_tiles, args.column_tiles = s.column_tiles;
  const bool element = !gathered_in_chunks(args.gather, bytes) || p.out_channels * bytes % 16 != 0 ||
                       !in_chunks(p.grad, p.stride_g, 4, bytes) || p.prologue != nullptr;
  const unsigned blocks = grid_of(static_cast<int64_t>(s.count) * s.row_tiles * s.column_tiles);
  with_dtype(p.dtype,
             [&](auto type) { launch_weight_gradient<decltype(type)>(args, element, blocks, stream); });
  if (s.count > 1) {
    const int64_t elements = weight_elements(p);
    FASTVDIFF_LAUNCH(conv3d_sum_shares_kernel, grid_of(ceil_div(elements, kConvThreads)), kConvThreads, 0, stream,
                     p.workspace, p.dweight, elements, s.count);
  }
}

}  // namespace fastvdiff::cuda
