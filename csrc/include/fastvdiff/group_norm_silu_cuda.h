// GroupNorm, per-sample modulation and SiLU on a CUDA device (csrc/cuda/group_norm_silu.cu).
#pragma once

#include "fastvdiff/dtype.h"

namespace fastvdiff::cuda {

// A (C), (B, C) or (B, C, frames) parameter as it is; strides in elements, 0 where it does not vary. Null: absent.
struct NormParameter {
  const void* data;
  int64_t stride_b, stride_c, stride_t;
  DType dtype;
};

// Where a parameter's gradient goes: contiguous, of the parameter's shape. Null: not wanted.
struct NormGradient {
  void* data;
  bool per_frame;  // (B, C, frames), else (B, C) or (C)
  DType dtype;
};

// x, y, grad and dx are (batch, channels, positions) views of one dtype, dense in channels (`channels_last`) or in
// positions, with any batch stride and stride of rows (of positions, or of channels), in elements.
struct GroupNormSiluParams {
  const void* x;
  void* y;               // forward: the result
  const void* grad;      // backward: dL/dy
  void* dx;              // backward: dL/dx
  const float* stats;    // forward, optional: (batch, groups, 2) mean and centred sum of squares of x
  float* moments;        // (batch, groups, 2) mean and 1/std: written by the forward, read by the backward
  float* workspace;      // group_norm_silu_workspace() floats
  NormParameter weight, bias, scale, shift;
  NormGradient dweight, dbias, dscale, dshift;
  int64_t batch, channels, positions, groups;
  int64_t frames;        // positions = frames * positions of a frame; 1 where scale and shift are (B, C)
  int64_t stride_xb, stride_xr;
  int64_t stride_yb, stride_yr;  // y and dx
  int64_t stride_gb, stride_gr;  // grad
  float eps;
  bool silu, channels_last;
  DType dtype;
  int32_t multiprocessors;  // of the device: what the work is split over
};

// Floats of workspace for a forward or a backward call of these sizes.
int64_t group_norm_silu_workspace(const GroupNormSiluParams& p, bool backward);
// On `stream` (a cudaStream_t) of the current device. Throw std::runtime_error with the kernel's name if a launch fails.
void group_norm_silu_forward(const GroupNormSiluParams& p, void* stream);
void group_norm_silu_backward(const GroupNormSiluParams& p, void* stream);

// The forward on clusters of `ranks` (1 to 8) blocks that hold a column of `groups` groups in their shared memory: from
// capability 9.0 on, channels_last, for addresses and strides that are whole 16-byte accesses, no workspace, no `stats`.
bool group_norm_silu_resident_takes(const GroupNormSiluParams& p);
void group_norm_silu_resident_forward(const GroupNormSiluParams& p, int groups, int ranks, void* stream);

}  // namespace fastvdiff::cuda
