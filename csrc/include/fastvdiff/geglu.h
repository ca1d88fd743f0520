// h * gelu(gate) of the halves of a projection.
#pragma once

#include "fastvdiff/dtype.h"

namespace fastvdiff {

// Rows of 2 * width elements, the h's before the gates; strides count elements. y and dx are contiguous.
struct GegluParams {
  const void* x;
  const void* grad;  // backward: dL/dy
  void* y;           // forward: (rows, width)
  void* dx;          // backward: (rows, 2 * width)
  int64_t rows, width, stride_x, stride_grad;
  DType dtype;       // of x, grad, y and dx
  int threads;
};

void geglu_forward(const GegluParams& p);
void geglu_backward(const GegluParams& p);

}  // namespace fastvdiff
