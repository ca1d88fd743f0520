#include "conv3d_launch.cuh"

namespace fastvdiff::cuda {

template void launch_product<float>(const ProductArgs&, Load, int, unsigned, void*);
template void launch_weight_gradient<float>(const WeightGradientArgs&, bool, unsigned, void*);

}  // namespace fastvdiff::cuda
