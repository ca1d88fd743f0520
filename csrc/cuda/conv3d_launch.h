// The kernels' launches, one object per element type.
#pragma once

#include "conv3d_product.cuh"
#include "conv3d_weight_gradient.cuh"

namespace fastvdiff::cuda {

// `columns` of a tile: 64 or 128.
template <class T>
void launch_product(const ProductArgs& args, Load load, int columns, unsigned blocks, void* stream);
template <class T>
void launch_weight_gradient(const WeightGradientArgs& args, bool element, unsigned blocks, void* stream);

}  // namespace fastvdiff::cuda
