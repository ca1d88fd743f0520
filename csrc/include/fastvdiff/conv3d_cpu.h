// 3-D convolution on a CPU by Winograd's minimal filtering: y = conv(x, weight) + bias + channel_bias + residual, with
// kernels of (k, 3, 3) or (3, 1, 1), stride and dilation 1.
#pragma once

#include "fastvdiff/dtype.h"

namespace fastvdiff {

// Sizes are (T, H, W). Strides count elements, in the order of batch, channel, t, h, w. Null where absent.
struct Conv3dCpuParams {
  const void* x;              // forward and weight gradient: (batch, channels, T, H, W)
  const float* weight;        // forward: (out_channels, channels, kT, kH, kW)
  const float* bias;          // (out_channels)
  const float* channel_bias;  // (batch, bias_frames, out_channels), contiguous
  const void* residual;       // like y
  void* y;                    // forward: (batch, out_channels, To, Ho, Wo)
  const void* grad;           // weight gradient: dL/dy, like y, with stride_y
  float* dweight;             // (out_channels, channels, kT, kH, kW), contiguous
  float* workspace;           // conv3d_workspace() floats
  int64_t stride_x[5], stride_w[5], stride_y[5], stride_r[5];
  int64_t batch, channels, out_channels;
  int64_t size[3], out_size[3], kernel[3];
  int64_t before[3];          // padding in front of each dimension; what lies behind follows from the sizes
  bool replicate[3];          // per dimension: pad with the edge's values, else with zeros
  int64_t bias_frames;        // To, or 1
  bool flipped;               // the weight is read from its last tap to its first: the gradient of x
  DType dtype;                // of x, residual, y and grad
  int threads;
};

// Floats of workspace for a call of these sizes and threads; results do not depend on the threads.
int64_t conv3d_workspace(const Conv3dCpuParams& p);
int64_t conv3d_weight_gradient_workspace(const Conv3dCpuParams& p);
void conv3d_forward(const Conv3dCpuParams& p);
void conv3d_weight_gradient(const Conv3dCpuParams& p);

}  // namespace fastvdiff
