// The CUDA kernels' part of the Python module fastvdiff._C: launches only, so the GIL is kept.

#include "bindings.h"

#include <array>
#include <cstdint>
#include <stdexcept>

#include "fastvdiff/conv3d.h"
#include "fastvdiff/group_norm_silu_cuda.h"

using namespace fastvdiff;

namespace {

using View3 = std::array<int64_t, 3>;  // address, batch stride, stride of rows

const char* address_of(int64_t value) { return at<const char>(static_cast<Address>(value)); }

// sizes: batch, channels, positions, groups, frames; flags: silu, channels_last
cuda::GroupNormSiluParams cuda_group_norm_silu_params(const std::array<int64_t, 5>& sizes,
                                                      const std::array<bool, 2>& flags, int dtype, int multiprocessors) {
  cuda::GroupNormSiluParams p{};
  p.batch = sizes[0], p.channels = sizes[1], p.positions = sizes[2], p.groups = sizes[3], p.frames = sizes[4];
  p.silu = flags[0], p.channels_last = flags[1], p.dtype = static_cast<DType>(dtype);
  p.multiprocessors = multiprocessors;
  return p;
}

// view: of x; parameters: weight, bias, scale, shift as address, strides over samples, channels and frames, dtype
void set_inputs(cuda::GroupNormSiluParams& p, const View3& view, const std::array<std::array<int64_t, 5>, 4>& parameters,
                Address moments, Address workspace) {
  p.x = address_of(view[0]), p.stride_xb = view[1], p.stride_xr = view[2];
  cuda::NormParameter* const to[] = {&p.weight, &p.bias, &p.scale, &p.shift};
  for (int i = 0; i < 4; ++i) {
    const auto& from = parameters[i];
    *to[i] = {address_of(from[0]), from[1], from[2], from[3], static_cast<DType>(from[4])};
  }
  p.moments = at<float>(moments), p.workspace = at<float>(workspace);
}

void bind_cuda_group_norm_silu(py::module_& m) {
  using Sizes = std::array<int64_t, 5>;
  using Flags = std::array<bool, 2>;
  using Parameters = std::array<std::array<int64_t, 5>, 4>;
  m.def("cuda_group_norm_silu_workspace",
        [](const Sizes& sizes, const Flags& flags, int dtype, int multiprocessors, bool backward) {
          return cuda::group_norm_silu_workspace(cuda_group_norm_silu_params(sizes, flags, dtype, multiprocessors),
                                                 backward);
        });
  m.def("cuda_group_norm_silu_forward",
        [](const Sizes& sizes, const Flags& flags, int dtype, int multiprocessors, Address stream, const View3& x,
           const Parameters& parameters, Address moments, Address workspace, const View3& y, Address stats, float eps) {
          cuda::GroupNormSiluParams p = cuda_group_norm_silu_params(sizes, flags, dtype, multiprocessors);
          set_inputs(p, x, parameters, moments, workspace);
          p.y = at<void>(static_cast<Address>(y[0])), p.stride_yb = y[1], p.stride_yr = y[2];
          p.stats = at<const float>(stats), p.eps = eps;
          cuda::group_norm_silu_forward(p, at<void>(stream));
        });
  // False where the addresses or strides are not the clusters': nothing has run then.
  m.def("cuda_group_norm_silu_resident_forward",
        [](const Sizes& sizes, const Flags& flags, int dtype, int multiprocessors, Address stream, const View3& x,
           const Parameters& parameters, Address moments, const View3& y, float eps, int groups, int ranks) {
          cuda::GroupNormSiluParams p = cuda_group_norm_silu_params(sizes, flags, dtype, multiprocessors);
          set_inputs(p, x, parameters, moments, 0);
          p.y = at<void>(static_cast<Address>(y[0])), p.stride_yb = y[1], p.stride_yr = y[2], p.eps = eps;
          if (!cuda::group_norm_silu_resident_takes(p)) return false;
          cuda::group_norm_silu_resident_forward(p, groups, ranks, at<void>(stream));
          return true;
        });
  m.def("cuda_group_norm_silu_backward",
        [](const Sizes& sizes, const Flags& flags, int dtype, int multiprocessors, Address stream, const View3& x,
           const Parameters& parameters, Address moments, Address workspace, const View3& grad, const View3& dx,
           const std::array<std::array<int64_t, 3>, 4>& gradients) {
          cuda::GroupNormSiluParams p = cuda_group_norm_silu_params(sizes, flags, dtype, multiprocessors);
          set_inputs(p, x, parameters, moments, workspace);
          p.grad = address_of(grad[0]), p.stride_gb = grad[1], p.stride_gr = grad[2];
          p.dx = at<void>(static_cast<Address>(dx[0])), p.stride_yb = dx[1], p.stride_yr = dx[2];
          cuda::NormGradient* const to[] = {&p.dweight, &p.dbias, &p.dscale, &p.dshift};
          for (int i = 0; i < 4; ++i) {  // address, whether it has frames, dtype
            const auto& from = gradients[i];
            *to[i] = {at<void>(static_cast<Address>(from[0])), from[1] != 0, static_cast<DType>(from[2])};
          }
          cuda::group_norm_silu_backward(p, at<void>(stream));
        });
}

// numbers: from Conv3dParams' batch on, in its order
cuda::Conv3dParams cuda_conv3d_params(const std::array<int64_t, 29>& numbers) {
  cuda::Conv3dParams p{};
  p.batch = numbers[0];
  auto next = numbers.begin() + 1;
  const auto take = [&next] { return static_cast<int32_t>(*next++); };
  p.channels = take(), p.out_channels = take();
  for (auto* triple : {&p.size, &p.out_size, &p.kernel, &p.stride, &p.dilation, &p.before, &p.replicate})
    for (int32_t& value : *triple) value = take();
  p.groups = take(), p.bias_frames = take(), p.prologue_frames = take(), p.silu = take();
  p.dtype = static_cast<DType>(take());
  return p;
}

// addresses and strides: all of Conv3dParams', in its order
void set_tensors(cuda::Conv3dParams& p, const std::array<Address, 13>& addresses,
                 const std::array<int64_t, 22>& strides) {
  p.x = at<const void>(addresses[0]), p.prefix = at<const void>(addresses[1]);
  p.weight = at<const void>(addresses[2]), p.bias = at<const float>(addresses[3]);
  p.channel_bias = at<const float>(addresses[4]), p.prologue = at<const float>(addresses[5]);
  p.residual = at<const void>(addresses[6]), p.y = at<void>(addresses[7]), p.stats = at<float>(addresses[8]);
  p.grad = at<const void>(addresses[9]), p.dx = at<void>(addresses[10]), p.dweight = at<float>(addresses[11]);
  p.workspace = at<float>(addresses[12]);
  auto next = strides.begin();
  for (auto* outer : {&p.stride_x, &p.stride_p, &p.stride_g})
    for (int64_t& stride : *outer) stride = *next++;
  for (auto* whole : {&p.stride_y, &p.stride_r})
    for (int64_t& stride : *whole) stride = *next++;
}

void bind_cuda_conv3d(py::module_& m) {
  m.def("cuda_conv3d_workspace", [](int pass, const std::array<int64_t, 29>& numbers) {
    return cuda::conv3d_workspace(cuda_conv3d_params(numbers), static_cast<cuda::Conv3dPass>(pass));
  });
  static const auto fields = [](const cuda::Conv3dPlan& plan) {
    return std::array<int64_t, 6>{plan.tile_rows, plan.tile_columns, plan.tile_depth,
                                  plan.shared_bytes, plan.blocks, plan.steps};
  };
  m.def("cuda_conv3d_plan", [](int pass, const std::array<int64_t, 29>& numbers) {
    return fields(cuda::conv3d_plan(cuda_conv3d_params(numbers), static_cast<cuda::Conv3dPass>(pass)));
  });
  m.def("cuda_conv3d_sm90_plan", [](const std::array<int64_t, 29>& numbers, int multiprocessors) {
    return fields(cuda::conv3d_sm90_plan(cuda_conv3d_params(numbers), multiprocessors));
  });
  m.def("cuda_conv3d_sm90_cluster_plan", [](const std::array<int64_t, 29>& numbers, int multiprocessors) {
    return fields(cuda::conv3d_sm90_cluster_plan(cuda_conv3d_params(numbers), multiprocessors));
  });
  m.def("cuda_conv3d", [](int pass, const std::array<Address, 13>& addresses, const std::array<int64_t, 22>& strides,
                          const std::array<int64_t, 29>& numbers, Address stream) {
    cuda::Conv3dParams p = cuda_conv3d_params(numbers);
    set_tensors(p, addresses, strides);
    switch (static_cast<cuda::Conv3dPass>(pass)) {
      case cuda::Conv3dPass::forward: return cuda::conv3d_forward(p, at<void>(stream));
      case cuda::Conv3dPass::data_gradient: return cuda::conv3d_data_gradient(p, at<void>(stream));
      case cuda::Conv3dPass::weight_gradient: return cuda::conv3d_weight_gradient(p, at<void>(stream));
    }
    throw std::invalid_argument("conv3d: unknown pass");
  });
  // The forward pass on capability 9.0; whether it takes the call.
  const auto where_taken = [](auto takes, auto forward) {
    return [takes, forward](const std::array<Address, 13>& addresses, const std::array<int64_t, 22>& strides,
                            const std::array<int64_t, 29>& numbers, int multiprocessors, Address stream) {
      cuda::Conv3dParams p = cuda_conv3d_params(numbers);
      set_tensors(p, addresses, strides);
      if (!takes(p)) return false;
      forward(p, multiprocessors, at<void>(stream));
      return true;
    };
  };
  m.def("cuda_conv3d_sm90_forward", where_taken(cuda::conv3d_sm90_takes, cuda::conv3d_sm90_forward));
  m.def("cuda_conv3d_sm90_cluster_forward",
        where_taken(cuda::conv3d_sm90_cluster_takes, cuda::conv3d_sm90_cluster_forward));
  // addresses: stats, weight, bias, scale, shift, table; numbers: batch, channels, groups, frames, scale_frames,
  // shift_frames, values
  m.def("cuda_conv3d_prologue", [](const std::array<Address, 6>& addresses, const std::array<int64_t, 7>& numbers,
                                   double eps, Address stream) {
    const cuda::Conv3dPrologueParams p{
        at<const float>(addresses[0]), at<const float>(addresses[1]), at<const float>(addresses[2]),
        at<const float>(addresses[3]), at<const float>(addresses[4]), at<float>(addresses[5]),
        numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], eps};
    cuda::conv3d_prologue(p, at<void>(stream));
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_cuda_group_norm_silu(m);
  bind_cuda_conv3d(m);
}
