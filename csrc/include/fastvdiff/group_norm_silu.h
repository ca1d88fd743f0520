// GroupNorm, per-sample modulation and SiLU: y = silu(norm(x) * (1 + scale) + shift).
#pragma once

#include "fastvdiff/dtype.h"

namespace fastvdiff {

// x, y, grad and dx are (batch, channels, positions) views with element strides in which either the channel stride or
// the position stride is 1. Parameters and their gradients are contiguous float32; null where absent.
struct GroupNormSiluParams {
  const void* x;
  void* y;               // forward: the result
  const void* grad;      // backward: dL/dy
  void* dx;              // backward: dL/dx
  const float* weight;   // (channels)
  const float* bias;     // (channels)
  const float* scale;    // (batch, channels, frames)
  const float* shift;    // (batch, channels, frames)
  const float* stats;    // forward, optional: (batch, groups, 2) mean and centred sum of squares of x
  float* moments;        // (batch, groups, 2) mean and 1/std: written by the forward, read by the backward
  float* dweight;        // (channels)
  float* dbias;          // (channels)
  float* dscale;         // (batch, channels, frames)
  float* dshift;         // (batch, channels, frames)
  float* workspace;      // group_norm_silu_workspace() floats
  int64_t batch, channels, positions, groups;
  int64_t frames;        // positions = frames * positions per frame; 1 where scale and shift are (B, C)
  int64_t stride_xb, stride_xc, stride_xs;
  int64_t stride_yb, stride_yc, stride_ys;      // y and dx
  int64_t stride_gb, stride_gc, stride_gs;      // grad
  float eps;
  bool silu;
  DType dtype;           // of x, y, grad and dx
  int32_t threads;
};

// Floats of workspace for a call of these sizes; it does not depend on the thread count, so neither do results.
int64_t group_norm_silu_workspace(const GroupNormSiluParams& p);
void group_norm_silu_forward(const GroupNormSiluParams& p);
void group_norm_silu_backward(const GroupNormSiluParams& p);

}  // namespace fastvdiff
