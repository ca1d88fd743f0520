// One DDIM step: guidance, x0, threshold or clip, the update and its noise in one pass.
#pragma once

#include "fastvdiff/dtype.h"

namespace fastvdiff {

enum class Prediction : int32_t { epsilon = 0, sample = 1, v_prediction = 2 };

constexpr int kDdimMaxRank = 8;

// All tensors of the sample's shape share one dense layout whose outermost dimension is the batch, so that a sample is
// `elements` consecutive values. With a guidance scale per frame they come in runs of `run` values of one frame, and
// frames follow one another cyclically; otherwise frames = 1 and run = elements.
struct DdimStepParams {
  const void* sample;
  const void* model_output;
  const void* uncond_output;    // null: no guidance
  const void* noise;            // null: none, or from noise_seed
  const int64_t* noise_seed;    // null: none
  void* prev;                   // forward: the results
  void* original;               // forward: null where it is not wanted
  const void* grad_prev;        // backward: null counts as 0
  const void* grad_original;    // backward: null counts as 0
  void* d_sample;               // backward: each null where it is not wanted
  void* d_model_output;
  void* d_uncond_output;
  void* d_noise;
  const double* alpha_t;        // (batch), or null: alpha_t_value
  const double* alpha_prev;     // (batch), or null: alpha_prev_value
  const float* guidance;        // null: guidance_value
  void* workspace;              // ddim_step_workspace() bytes, aligned to 8
  int64_t batch, elements, run, frames;
  int64_t guidance_stride_b, guidance_stride_t;
  // The sample's dimensions from the outermost in memory inward, with their strides in the logical (row-major) order:
  // noise from a seed belongs to logical indices. rank = 0: memory order is the logical order.
  int32_t rank;
  int64_t memory_sizes[kDdimMaxRank], logical_strides[kDdimMaxRank];
  double alpha_t_value, alpha_prev_value, eta;
  double threshold_ratio;       // dynamic threshold where threshold_max > 0
  float threshold_max;
  float clip;                   // clamp of x0; infinity: none
  float guidance_value;         // 1 without guidance
  float guidance_rescale;
  bool use_clipped_model_output;
  Prediction prediction;
  DType dtype;
  int32_t threads;
};

int64_t ddim_step_workspace(const DdimStepParams& p);
void ddim_step_forward(const DdimStepParams& p);
// Gradients of the step without guidance_rescale and dynamic threshold. sample, model_output and uncond_output are read
// only where there is a clip.
void ddim_step_backward(const DdimStepParams& p);

}  // namespace fastvdiff
