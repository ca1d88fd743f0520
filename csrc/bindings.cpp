// The Python module fastvdiff._C: addresses and sizes in, kernels run with the GIL released. fastvdiff/native checks
// the tensors, owns every buffer and is the only caller.

#include "bindings.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "fastvdiff/conv3d_cpu.h"
#include "fastvdiff/ddim_step.h"
#include "fastvdiff/geglu.h"
#include "fastvdiff/group_norm_silu.h"
#include "fastvdiff/temporal_attention.h"
#include "fastvdiff/temporal_attention_block.h"

using namespace fastvdiff;

namespace {

using Strides3 = std::array<int64_t, 3>;

template <class Params>
void run(void (*kernel)(const Params&), const Params& p) {
  py::gil_scoped_release release;
  kernel(p);
}

void bind_isa(py::module_& m) {
  using cpu::Isa;
  m.def("best_isa", [] { return static_cast<int>(cpu::best_isa()); });
  m.def("current_isa", [] { return static_cast<int>(cpu::current_isa()); });
  m.def("set_current_isa", [](int isa) {
    if (isa < 0 || isa > static_cast<int>(cpu::best_isa())) throw std::invalid_argument("this CPU lacks that set");
    cpu::set_current_isa(static_cast<Isa>(isa));
  });
}

// sizes: batch, channels, positions, groups, frames
GroupNormSiluParams group_norm_silu_params(const std::array<int64_t, 5>& sizes, Address x, Strides3 xs, Address weight,
                                           Address bias, Address scale, Address shift, Address moments,
                                           Address workspace, bool silu, int dtype, int threads) {
  GroupNormSiluParams p{};
  p.batch = sizes[0], p.channels = sizes[1], p.positions = sizes[2], p.groups = sizes[3], p.frames = sizes[4];
  p.x = at<const void>(x), p.stride_xb = xs[0], p.stride_xc = xs[1], p.stride_xs = xs[2];
  p.weight = at<const float>(weight), p.bias = at<const float>(bias);
  p.scale = at<const float>(scale), p.shift = at<const float>(shift);
  p.moments = at<float>(moments), p.workspace = at<float>(workspace);
  p.silu = silu, p.dtype = static_cast<DType>(dtype), p.threads = threads;
  return p;
}

void bind_group_norm_silu(py::module_& m) {
  m.def("group_norm_silu_workspace", [](const std::array<int64_t, 5>& sizes, Strides3 xs) {
    return group_norm_silu_workspace(group_norm_silu_params(sizes, 0, xs, 0, 0, 0, 0, 0, 0, false, 0, 1));
  });
  m.def("group_norm_silu_forward",
        [](const std::array<int64_t, 5>& sizes, Address x, Strides3 xs, Address weight, Address bias, Address scale,
           Address shift, Address moments, Address workspace, bool silu, int dtype, int threads, Address y, Strides3 ys,
           Address stats, float eps) {
          GroupNormSiluParams p = group_norm_silu_params(sizes, x, xs, weight, bias, scale, shift, moments, workspace,
                                                         silu, dtype, threads);
          p.y = at<void>(y), p.stride_yb = ys[0], p.stride_yc = ys[1], p.stride_ys = ys[2];
          p.stats = at<const float>(stats), p.eps = eps;
          run(group_norm_silu_forward, p);
        });
  m.def("group_norm_silu_backward",
        [](const std::array<int64_t, 5>& sizes, Address x, Strides3 xs, Address weight, Address bias, Address scale,
           Address shift, Address moments, Address workspace, bool silu, int dtype, int threads, Address grad,
           Strides3 gs, Address dx, Strides3 ds, Address dweight, Address dbias, Address dscale, Address dshift) {
          GroupNormSiluParams p = group_norm_silu_params(sizes, x, xs, weight, bias, scale, shift, moments, workspace,
                                                         silu, dtype, threads);
          p.grad = at<const void>(grad), p.stride_gb = gs[0], p.stride_gc = gs[1], p.stride_gs = gs[2];
          p.dx = at<void>(dx), p.stride_yb = ds[0], p.stride_yc = ds[1], p.stride_ys = ds[2];
          p.dweight = at<float>(dweight), p.dbias = at<float>(dbias);
          p.dscale = at<float>(dscale), p.dshift = at<float>(dshift);
          run(group_norm_silu_backward, p);
        });
}

// sizes: batch, elements, run, frames, guidance strides (b, t); memory_sizes and logical_strides: see the header
// numbers: alpha_t, alpha_prev, eta, threshold ratio and maximum, clip, guidance scale, guidance rescale
// inputs: sample, model_output, uncond_output, noise, noise_seed, alpha_t, alpha_prev, guidance
DdimStepParams ddim_step_params(const std::array<int64_t, 6>& sizes, const std::vector<int64_t>& memory_sizes,
                                const std::vector<int64_t>& logical_strides, const std::array<double, 8>& numbers,
                                const std::array<Address, 8>& inputs, bool use_clipped, int prediction, int dtype,
                                int threads) {
  if (memory_sizes.size() > kDdimMaxRank || memory_sizes.size() != logical_strides.size())
    throw std::invalid_argument("ddim_step: too many dimensions");
  DdimStepParams p{};
  p.batch = sizes[0], p.elements = sizes[1], p.run = sizes[2], p.frames = sizes[3];
  p.guidance_stride_b = sizes[4], p.guidance_stride_t = sizes[5];
  p.rank = static_cast<int32_t>(memory_sizes.size());
  for (int32_t d = 0; d < p.rank; ++d)
    p.memory_sizes[d] = memory_sizes[d], p.logical_strides[d] = logical_strides[d];
  p.alpha_t_value = numbers[0], p.alpha_prev_value = numbers[1], p.eta = numbers[2];
  p.threshold_ratio = numbers[3], p.threshold_max = static_cast<float>(numbers[4]);
  p.clip = static_cast<float>(numbers[5]), p.guidance_value = static_cast<float>(numbers[6]);
  p.guidance_rescale = static_cast<float>(numbers[7]);
  p.sample = at<const void>(inputs[0]), p.model_output = at<const void>(inputs[1]);
  p.uncond_output = at<const void>(inputs[2]), p.noise = at<const void>(inputs[3]);
  p.noise_seed = at<const int64_t>(inputs[4]);
  p.alpha_t = at<const double>(inputs[5]), p.alpha_prev = at<const double>(inputs[6]);
  p.guidance = at<const float>(inputs[7]);
  p.use_clipped_model_output = use_clipped;
  p.prediction = static_cast<Prediction>(prediction), p.dtype = static_cast<DType>(dtype), p.threads = threads;
  return p;
}

void bind_ddim_step(py::module_& m) {
  py::class_<DdimStepParams>(m, "DdimStepParams").def(py::init(&ddim_step_params));
  m.def("ddim_step_workspace", &ddim_step_workspace);
  m.def("ddim_step_forward", [](DdimStepParams p, Address workspace, Address prev, Address original) {
    p.workspace = at<void>(workspace), p.prev = at<void>(prev), p.original = at<void>(original);
    run(ddim_step_forward, p);
  });
  m.def("ddim_step_backward", [](DdimStepParams p, Address grad_prev, Address grad_original, Address d_sample,
                                 Address d_model_output, Address d_uncond_output, Address d_noise) {
    p.grad_prev = at<const void>(grad_prev), p.grad_original = at<const void>(grad_original);
    p.d_sample = at<void>(d_sample), p.d_model_output = at<void>(d_model_output);
    p.d_uncond_output = at<void>(d_uncond_output), p.d_noise = at<void>(d_noise);
    run(ddim_step_backward, p);
  });
}

// sizes: rows, width, stride of x's rows, stride of the gradient's rows
void bind_geglu(py::module_& m) {
  const auto params = [](const std::array<int64_t, 4>& sizes, Address x, int dtype, int threads) {
    GegluParams p{};
    p.x = at<const void>(x);
    p.rows = sizes[0], p.width = sizes[1], p.stride_x = sizes[2], p.stride_grad = sizes[3];
    p.dtype = static_cast<DType>(dtype), p.threads = threads;
    return p;
  };
  m.def("geglu_forward", [params](const std::array<int64_t, 4>& sizes, Address x, int dtype, int threads, Address y) {
    GegluParams p = params(sizes, x, dtype, threads);
    p.y = at<void>(y);
    run(geglu_forward, p);
  });
  m.def("geglu_backward", [params](const std::array<int64_t, 4>& sizes, Address x, int dtype, int threads, Address grad,
                                   Address dx) {
    GegluParams p = params(sizes, x, dtype, threads);
    p.grad = at<const void>(grad), p.dx = at<void>(dx);
    run(geglu_backward, p);
  });
}

using Strides5 = std::array<int64_t, 5>;

FrameView frame_view(Address data, const Strides5& s) { return {at<void>(data), s[0], s[1], s[2], s[3], s[4]}; }

// sizes: batch, frames, keys, positions, heads, dim, mask rows, rotary pairs, k_offset; flags: interleaved, causal;
// tables: bias, mask, cos, sin; views: q, k, v
TemporalAttentionParams temporal_attention_params(const std::array<int64_t, 9>& sizes, const std::array<bool, 2>& flags,
                                                  float scale, int dtype, int threads,
                                                  const std::array<Address, 4>& tables,
                                                  const std::array<Address, 3>& views,
                                                  const std::array<Strides5, 3>& strides) {
  TemporalAttentionParams p{};
  p.batch = sizes[0], p.frames = sizes[1], p.keys = sizes[2], p.positions = sizes[3], p.heads = sizes[4];
  p.dim = sizes[5], p.mask_rows = sizes[6], p.rotary_pairs = sizes[7], p.k_offset = sizes[8];
  p.rotary_interleaved = flags[0], p.causal = flags[1];
  p.scale = scale, p.dtype = static_cast<DType>(dtype), p.threads = threads;
  p.bias = at<const float>(tables[0]), p.mask = at<const uint8_t>(tables[1]);
  p.cos = at<const float>(tables[2]), p.sin = at<const float>(tables[3]);
  p.q = frame_view(views[0], strides[0]), p.k = frame_view(views[1], strides[1]), p.v = frame_view(views[2], strides[2]);
  return p;
}

void bind_temporal_attention(py::module_& m) {
  using Params = TemporalAttentionParams;
  py::class_<Params>(m, "TemporalAttentionParams")
      .def(py::init(&temporal_attention_params))
      .def("set_result", [](Params& p, Address y, const Strides5& ys) { p.y = frame_view(y, ys); })
      .def("set_gradients",  // of y; then where those of q, k, v and the bias go
           [](Params& p, const std::array<Address, 4>& views, const std::array<Strides5, 4>& strides, Address dbias) {
             p.grad = frame_view(views[0], strides[0]), p.dq = frame_view(views[1], strides[1]);
             p.dk = frame_view(views[2], strides[2]), p.dv = frame_view(views[3], strides[3]);
             p.dbias = at<float>(dbias);
           });
  m.def("temporal_attention_workspace", &temporal_attention_workspace);
  m.def("temporal_attention_forward", [](Params p, Address workspace) {
    p.workspace = at<float>(workspace);
    run(temporal_attention_forward, p);
  });
  m.def("temporal_attention_backward", [](Params p, Address workspace) {
    p.workspace = at<float>(workspace);
    run(temporal_attention_backward, p);
  });
}

using Strides4 = std::array<int64_t, 4>;

// strides: batch, frame, position, channel
FrameView channel_view(Address data, const Strides4& s) { return {at<void>(data), s[0], s[1], s[2], 0, s[3]}; }

// sizes: batch, channels, frames, positions, heads, dim, mask rows, rotary pairs; flags: interleaved, causal, residual;
// parameters: weights of q, k, v, their biases, output weight and bias, norm weight and bias, frame embedding, attention
// bias, mask, cos, sin
TemporalAttentionBlockParams temporal_attention_block_params(const std::array<int64_t, 8>& sizes,
                                                             const std::array<bool, 3>& flags, float eps, float scale,
                                                             int norm, int dtype, int threads,
                                                             const std::array<Address, 15>& parameters, Address x,
                                                             const Strides4& xs) {
  TemporalAttentionBlockParams p{};
  TemporalAttentionParams& a = p.attention;
  a.batch = sizes[0], p.channels = sizes[1], a.frames = a.keys = sizes[2], a.positions = sizes[3];
  a.heads = sizes[4], a.dim = sizes[5], a.mask_rows = sizes[6], a.rotary_pairs = sizes[7];
  a.rotary_interleaved = flags[0], a.causal = flags[1], p.residual = flags[2];
  p.eps = eps, a.scale = scale, p.norm = static_cast<BlockNorm>(norm);
  a.dtype = static_cast<DType>(dtype), a.threads = threads;
  for (int i = 0; i < 3; ++i) {
    p.in_weight[i] = at<const float>(parameters[i]), p.in_bias[i] = at<const float>(parameters[3 + i]);
  }
  p.out_weight = at<const float>(parameters[6]), p.out_bias = at<const float>(parameters[7]);
  p.norm_weight = at<const float>(parameters[8]), p.norm_bias = at<const float>(parameters[9]);
  p.frame_embedding = at<const float>(parameters[10]), a.bias = at<const float>(parameters[11]);
  a.mask = at<const uint8_t>(parameters[12]);
  a.cos = at<const float>(parameters[13]), a.sin = at<const float>(parameters[14]);
  p.x = channel_view(x, xs);
  return p;
}

// In the order of the first twelve parameters; 0 where a gradient is not wanted.
void set_gradients(TemporalAttentionBlockParams& p, const std::array<Address, 12>& gradients) {
  for (int i = 0; i < 3; ++i) {
    p.din_weight[i] = at<float>(gradients[i]), p.din_bias[i] = at<float>(gradients[3 + i]);
  }
  p.dout_weight = at<float>(gradients[6]), p.dout_bias = at<float>(gradients[7]);
  p.dnorm_weight = at<float>(gradients[8]), p.dnorm_bias = at<float>(gradients[9]);
  p.dframe_embedding = at<float>(gradients[10]), p.attention.dbias = at<float>(gradients[11]);
}

// numbers: batch, channels, out_channels, size, out_size, kernel, before, replicate, bias_frames, flipped, dtype, threads
Conv3dCpuParams conv3d_params(const std::array<int64_t, 22>& numbers) {
  Conv3dCpuParams p{};
  const int64_t* next = numbers.data();
  p.batch = *next++, p.channels = *next++, p.out_channels = *next++;
  for (int64_t(*to)[3] : {&p.size, &p.out_size, &p.kernel, &p.before})
    for (int64_t& n : *to) n = *next++;
  for (bool& repeats : p.replicate) repeats = *next++ != 0;
  p.bias_frames = *next++, p.flipped = *next++ != 0, p.dtype = static_cast<DType>(*next++);
  p.threads = static_cast<int>(*next);
  return p;
}

void bind_conv3d(py::module_& m) {
  using Numbers = std::array<int64_t, 22>;
  using Strides5 = std::array<int64_t, 5>;
  m.def("conv3d_workspace", [](const Numbers& numbers) { return conv3d_workspace(conv3d_params(numbers)); });
  m.def("conv3d_weight_gradient_workspace",
        [](const Numbers& numbers) { return conv3d_weight_gradient_workspace(conv3d_params(numbers)); });
  // addresses: x, weight, bias, channel_bias, residual, y, workspace; strides: of x, weight, y, residual
  m.def("conv3d_forward", [](const Numbers& numbers, const std::array<Address, 7>& addresses,
                             const std::array<Strides5, 4>& strides) {
    Conv3dCpuParams p = conv3d_params(numbers);
    p.x = at<const void>(addresses[0]), p.weight = at<const float>(addresses[1]), p.bias = at<const float>(addresses[2]);
    p.channel_bias = at<const float>(addresses[3]), p.residual = at<const void>(addresses[4]);
    p.y = at<void>(addresses[5]), p.workspace = at<float>(addresses[6]);
    std::copy_n(strides[0].data(), 5, p.stride_x), std::copy_n(strides[1].data(), 5, p.stride_w);
    std::copy_n(strides[2].data(), 5, p.stride_y), std::copy_n(strides[3].data(), 5, p.stride_r);
    run(conv3d_forward, p);
  });
  // addresses: x, grad, dweight, workspace; strides: of x, grad
  m.def("conv3d_weight_gradient", [](const Numbers& numbers, const std::array<Address, 4>& addresses,
                                     const std::array<Strides5, 2>& strides) {
    Conv3dCpuParams p = conv3d_params(numbers);
    p.x = at<const void>(addresses[0]), p.grad = at<const void>(addresses[1]);
    p.dweight = at<float>(addresses[2]), p.workspace = at<float>(addresses[3]);
    std::copy_n(strides[0].data(), 5, p.stride_x), std::copy_n(strides[1].data(), 5, p.stride_y);
    run(conv3d_weight_gradient, p);
  });
}

void bind_temporal_attention_block(py::module_& m) {
  using Params = TemporalAttentionBlockParams;
  py::class_<Params>(m, "TemporalAttentionBlockParams").def(py::init(&temporal_attention_block_params));
  m.def("temporal_attention_block_forward_workspace", &temporal_attention_block_forward_workspace);
  m.def("temporal_attention_block_backward_workspace", [](Params p, const std::array<Address, 12>& gradients) {
    set_gradients(p, gradients);
    return temporal_attention_block_backward_workspace(p);
  });
  m.def("temporal_attention_block_forward", [](Params p, Address workspace, Address y, const Strides4& ys) {
    p.attention.workspace = at<float>(workspace), p.y = channel_view(y, ys);
    run(temporal_attention_block_forward, p);
  });
  m.def("temporal_attention_block_backward",
        [](Params p, Address workspace, const std::array<Address, 12>& gradients, Address grad, const Strides4& gs,
           Address dx, const Strides4& ds) {
          set_gradients(p, gradients);
          p.attention.workspace = at<float>(workspace), p.grad = channel_view(grad, gs), p.dx = channel_view(dx, ds);
          run(temporal_attention_block_backward, p);
        });
}

// "80-real;90a-real" as CMake names them; empty where the CUDA kernels were not built.
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
#ifdef FASTVDIFF_CUDA
  std::stringstream all(FASTVDIFF_CUDA);
  for (std::string name; std::getline(all, name, ',');) names.push_back(name);
#endif
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastvdiff; call them through fastvdiff.ops.";
  m.attr("boundary_hash") = FASTVDIFF_BOUNDARY_HASH;
  bind_isa(m);
  bind_group_norm_silu(m);
  bind_ddim_step(m);
  bind_geglu(m);
  bind_temporal_attention(m);
  bind_temporal_attention_block(m);
  bind_conv3d(m);
  m.attr("cuda_architectures") = cuda_architectures();
#ifdef FASTVDIFF_CUDA
  bind_cuda(m);
#endif
}
