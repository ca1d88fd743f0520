// The temporal attention block: y = x + out(attention over the frames of q, k, v projected from norm(x) + embedding).
#pragma once

#include "fastvdiff/temporal_attention.h"

namespace fastvdiff {

enum class BlockNorm : int32_t { none = 0, layer = 1, rms = 2 };

// Parameters and their gradients are contiguous float32; null where absent, or where no gradient is wanted.
struct TemporalAttentionBlockParams {
  TemporalAttentionParams attention;  // sizes (keys = frames), bias, mask, rotary, scale, causal, dbias, dtype of the
                                      // four views below, threads, workspace; its own views are not read
  int64_t channels;
  FrameView x;                        // (batch, frames, positions, 1, channels): read
  FrameView y;                        // forward: the result
  FrameView grad;                     // backward: dL/dy
  FrameView dx;                       // backward: dL/dx
  const float* in_weight[3];          // of q, k, v: (heads * dim, channels)
  const float* in_bias[3];            // (heads * dim)
  const float* out_weight;            // (channels, heads * dim)
  const float* out_bias;              // (channels)
  const float* norm_weight;           // (channels)
  const float* norm_bias;             // (channels)
  const float* frame_embedding;       // (frames, channels), added after the norm
  float* din_weight[3];
  float* din_bias[3];
  float* dout_weight;
  float* dout_bias;
  float* dnorm_weight;
  float* dnorm_bias;
  float* dframe_embedding;
  BlockNorm norm;
  float eps;
  bool residual;
};

// Floats of workspace for a call of these sizes and threads. Results depend on neither the threads nor the machine's
// number of cores: parameter gradients are summed over a partition that follows from the sizes.
int64_t temporal_attention_block_forward_workspace(const TemporalAttentionBlockParams& p);
int64_t temporal_attention_block_backward_workspace(const TemporalAttentionBlockParams& p);
void temporal_attention_block_forward(const TemporalAttentionBlockParams& p);
void temporal_attention_block_backward(const TemporalAttentionBlockParams& p);

}  // namespace fastvdiff
