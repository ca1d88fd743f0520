// Attention over the frames at each position: y = softmax(scale * rot(q) rot(k)^T + bias) v.
#pragma once

#include "fastvdiff/dtype.h"

namespace fastvdiff {

// A (batch, frames, positions, heads, dim) tensor with any element strides.
struct FrameView {
  void* data;
  int64_t stride_b, stride_t, stride_s, stride_h, stride_d;
};

// q, y, grad and dq hold `frames` frames; k, v, dk and dv hold `keys`. Tables are contiguous; null where absent.
struct TemporalAttentionParams {
  FrameView q, k, v;          // read
  FrameView y;                // forward: the result
  FrameView grad;             // backward: dL/dy
  FrameView dq, dk, dv;       // backward: dL/dq, dL/dk, dL/dv
  const float* bias;          // (heads, frames, keys), added to the scores
  const uint8_t* mask;        // (batch, mask_rows, keys), 0 where a key is forbidden
  const float* cos;           // (rows, rotary_pairs): queries start at row 0, keys at row k_offset
  const float* sin;
  float* dbias;               // backward, optional: (heads, frames, keys)
  float* workspace;           // temporal_attention_workspace() floats
  int64_t batch, frames, keys, positions, heads, dim;
  int64_t mask_rows;          // 1 or frames
  int64_t rotary_pairs;       // pairs of dimensions turned; 0 without rotary positions
  int64_t k_offset;
  bool rotary_interleaved;    // dimension 2i turns with 2i + 1, else i with i + rotary_pairs
  bool causal;                // query t sees keys 0 .. t
  float scale;
  DType dtype;                // of the eight views
  int32_t threads;
};

// Floats of workspace for a call of these sizes and threads. Results depend on neither the threads nor the machine's
// number of cores: the bias gradient is summed over a partition that follows from the sizes.
int64_t temporal_attention_workspace(const TemporalAttentionParams& p);
void temporal_attention_forward(const TemporalAttentionParams& p);
void temporal_attention_backward(const TemporalAttentionParams& p);

}  // namespace fastvdiff
