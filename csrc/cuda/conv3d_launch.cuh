// Definitions of conv3d_launch.h; conv3d_<type>.cu instantiate them, so that the types compile side by side.
#pragma once

#include "conv3d_launch.h"

namespace fastvdiff::cuda {

template <class T, int COLUMNS, Load LOAD>
void launch_product_kernel(const ProductArgs& args, unsigned blocks, void* stream) {
  allow_shared(conv3d_product_kernel<T, COLUMNS, LOAD>, kProductBytes<T, COLUMNS>);
  FASTVDIFF_LAUNCH((conv3d_product_kernel<T, COLUMNS, LOAD>), blocks, kConvThreads, (kProductBytes<T, COLUMNS>), stream,
                   args);
}

template <class T, int COLUMNS>
void launch_product_columns(const ProductArgs& args, Load load, unsigned blocks, void* stream) {
  switch (load) {
    case Load::affine: return launch_product_kernel<T, COLUMNS, Load::affine>(args, blocks, stream);
    case Load::clamped: return launch_product_kernel<T, COLUMNS, Load::clamped>(args, blocks, stream);
    case Load::prologue: return launch_product_kernel<T, COLUMNS, Load::prologue>(args, blocks, stream);
    case Load::element: return launch_product_kernel<T, COLUMNS, Load::element>(args, blocks, stream);
  }
}

template <class T>
void launch_product(const ProductArgs& args, Load load, int columns, unsigned blocks, void* stream) {
  if (columns == 128) return launch_product_columns<T, 128>(args, load, blocks, stream);
  launch_product_columns<T, 64>(args, load, blocks, stream);
}

template <class T, bool ELEMENT>
void launch_weight_gradient_kernel(const WeightGradientArgs& args, unsigned blocks, void* stream) {
  constexpr int kBytes = kConvStages * kGradientStage<T>;
  allow_shared(conv3d_weight_gradient_kernel<T, ELEMENT>, kBytes);
  FASTVDIFF_LAUNCH((conv3d_weight_gradient_kernel<T, ELEMENT>), blocks, kConvThreads, kBytes, stream, args);
}

template <class T>
void launch_weight_gradient(const WeightGradientArgs& args, bool element, unsigned blocks, void* stream) {
  if (element) return launch_weight_gradient_kernel<T, true>(args, blocks, stream);
  launch_weight_gradient_kernel<T, false>(args, blocks, stream);
}

}  // namespace fastvdiff::cuda
