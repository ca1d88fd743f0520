// 3-D convolution on CUDA as an implicit matrix product in NDHWC: y = conv(act(x), weight) + bias + channel_bias +
// residual, act the identity or silu(x * factor + term).
#pragma once

#include "fastvdiff/dtype.h"

namespace fastvdiff::cuda {

// Sizes are (T, H, W). Strides count elements. x, prefix and grad have channel stride 1; y, dx and residual any strides.
// bias, channel_bias and the prologue's table are contiguous float32. Null where absent.
// Pointers, strides and numbers each stand together: fastvdiff/native/conv3d_cuda.py fills them in this order.
struct Conv3dParams {
  const void* x;              // forward, weight gradient: (batch, channels, T, H, W)
  const void* prefix;         // the before[0] frames that precede x, in place of temporal padding; never activated
  const void* weight;         // forward: (out_channels, kT, kH, kW, channels); data gradient: (channels, kT, kH, kW,
                              // out_channels); contiguous
  const float* bias;          // (out_channels)
  const float* channel_bias;  // (batch, out_channels, bias_frames)
  const float* prologue;      // (batch, prologue_frames, channels, 2): factor and term
  const void* residual;       // (batch, out_channels, To, Ho, Wo)
  void* y;                    // forward: the same shape
  float* stats;               // forward, optional: (batch, groups, 2) mean and centred sum of squares of y
  const void* grad;           // gradients: dL/dy
  void* dx;                   // data gradient: (batch, channels, T, H, W)
  float* dweight;             // weight gradient: (out_channels, kT, kH, kW, channels), contiguous float32
  float* workspace;           // conv3d_workspace() floats
  int64_t stride_x[4];        // batch, t, h, w
  int64_t stride_p[4];        // of prefix
  int64_t stride_g[4];        // of grad
  int64_t stride_y[5];        // of y or dx: batch, channel, t, h, w
  int64_t stride_r[5];        // of residual
  int64_t batch;
  int32_t channels, out_channels;
  int32_t size[3], out_size[3], kernel[3], stride[3], dilation[3];
  int32_t before[3];          // padding in front of each dimension; what lies behind follows from the sizes
  int32_t replicate[3];       // per dimension: pad with the edge's values, else with zeros; not in the data gradient
  int32_t groups;             // of stats
  int32_t bias_frames;        // To, or 1 where the channel bias is (batch, out_channels)
  int32_t prologue_frames;    // T, or 1
  int32_t silu;               // of the prologue
  DType dtype;                // of x, prefix, weight, residual, y, grad and dx; f32 is multiplied as tf32
};

enum class Conv3dPass : int32_t { forward = 0, data_gradient = 1, weight_gradient = 2 };

// What a pass launches, from the sizes alone: blocks of tile_rows x tile_columns results, and the steps of all of them
// together, each tile_rows x tile_columns x tile_depth products. A strided data gradient is one launch for each residue
// class; the tile is the last one's.
struct Conv3dPlan {
  int32_t tile_rows, tile_columns, tile_depth, shared_bytes;
  int64_t blocks, steps;
};
Conv3dPlan conv3d_plan(const Conv3dParams& p, Conv3dPass pass);

// Floats of workspace; from the sizes alone, so the order of every sum is the same on every device.
int64_t conv3d_workspace(const Conv3dParams& p, Conv3dPass pass);
// `stream` is a cudaStream_t.
void conv3d_forward(const Conv3dParams& p, void* stream);
// The transposed convolution, zero padding only: where the forward repeats the edge or has a prefix, ask for the padded
// clip's gradient (before = 0 in that dimension) and fold it.
void conv3d_data_gradient(const Conv3dParams& p, void* stream);
void conv3d_weight_gradient(const Conv3dParams& p, void* stream);
// The forward pass on capability 9.0, persistent over `multiprocessors`; takes(): whether it runs this call. In code for
// another architecture the kernel stops the program.
bool conv3d_sm90_takes(const Conv3dParams& p);
void conv3d_sm90_forward(const Conv3dParams& p, int multiprocessors, void* stream);
// The same on clusters of two blocks, of at least two multiprocessors.
bool conv3d_sm90_cluster_takes(const Conv3dParams& p);
void conv3d_sm90_cluster_forward(const Conv3dParams& p, int multiprocessors, void* stream);
// What they launch: `blocks` counts tiles, of which one block a multiprocessor takes one after another.
Conv3dPlan conv3d_sm90_plan(const Conv3dParams& p, int multiprocessors);
Conv3dPlan conv3d_sm90_cluster_plan(const Conv3dParams& p, int multiprocessors);

// The prologue's table for GroupNorm of known statistics, an affine map and a modulation per sample or frame: (batch,
// frames, channels, 2). Parameters are contiguous float32, null where absent.
struct Conv3dPrologueParams {
  const float* stats;   // (batch, groups, 2) mean and centred sum of squares
  const float* weight;  // (channels)
  const float* bias;    // (channels)
  const float* scale;   // (batch, channels, scale_frames)
  const float* shift;   // (batch, channels, shift_frames)
  float* table;
  int64_t batch, channels, groups;
  int64_t frames;       // T where scale or shift is per frame, else 1
  int64_t scale_frames, shift_frames;  // frames, or 1
  int64_t values;       // of a group in one sample
  double eps;
};
void conv3d_prologue(const Conv3dPrologueParams& p, void* stream);

}  // namespace fastvdiff::cuda
