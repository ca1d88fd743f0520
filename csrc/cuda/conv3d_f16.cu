#include "conv3d_launch.cuh"

namespace fastvdiff::cuda {

template void launch_product<f16>(const ProductArgs&, Load, int, unsigned, void*);
template void launch_weight_gradient<f16>(const WeightGradientArgs&, bool, unsigned, void*);

}  // namespace fastvdiff::cuda
