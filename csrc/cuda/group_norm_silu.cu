// GroupNorm, modulation and SiLU on a CUDA device, forward and backward.
//
// **Computes** y = silu((x - mean) rstd w (1 + scale) + b (1 + scale) + shift), mean and rstd of each sample's groups.
// **Layout** NDHWC (rows of C) or contiguous (rows of positions), any batch and row strides, in and out alike; scale
// and shift any strides and dtype, frame by frame or not.
// **Work split** every pass: a block owns a column of channels, in NDHWC whole rows where 256 threads hold one, and
// every parts-th chunk of them, so that the whole device is busy at batch 1 too. Forward: partial moments, a small launch
// that pools them, then the result in reverse order. Backward: sums of each channel, a small launch that turns them into
// means of each group and gradients of scale and shift, then dx in reverse order; its last blocks give dweight and dbias.
// **Traffic** T bytes of x: forward 3T (2T with `stats`), backward 5T, less what the second pass finds in the caches.
// Partial moments 16 bytes for each block and group, sums 8 for each block and channel.
// **Precision** float32; Welford's update from each thread's first value, then merges of centred moments whose means keep
// what their rounding left; one fixed order, no atomics.
// **Refuses** float64 (fastvdiff/ops/group_norm_silu.py).
//
// Found with ptxas (sm_90a, bf16, NDHWC, 256 threads): 78 registers in the statistics and 76 in the result, three blocks
// a multiprocessor; 103 and 104 in the backward's two passes, two blocks; 17 to 26 kB of shared memory where a pass
// reduces, no spills. A thread has four 16-byte reads under way (backward: two of x, two of dy), so a multiprocessor 48
// and 32 kB, of the 20 to 30 that its share of 4.3 TB/s takes at some 700 ns.
#include "group_norm_silu_backward.h"
#include "group_norm_silu_forward.h"

namespace fastvdiff::cuda {
namespace {

dim3 grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::invalid_argument("group_norm_silu: more blocks than a CUDA grid has");
  return dim3(static_cast<unsigned>(blocks));
}

Cut forward_cut(const GroupNormSiluParams& p, int vector, bool by_frame) {
  return cut_of(p, vector, by_frame, kUnroll, kResident);
}
Cut backward_cut(const GroupNormSiluParams& p, int vector) {
  return cut_of(p, vector, true, kUnrollBackward, kResidentBackward);
}

int64_t partial_items(const GroupNormSiluParams& p, const Cut& cut, int vector) {
  const int64_t width = p.channels / p.groups;
  return cut.parts * (p.channels_last ? shares_of(int64_t{cut.across} * vector, width) : width);
}

int64_t sums_size(const GroupNormSiluParams& p, const Cut& cut) { return p.batch * p.frames * cut.parts * p.channels * 2; }

int64_t workspace_of(const GroupNormSiluParams& p, bool backward, int vector) {
  if (backward) return sums_size(p, backward_cut(p, vector)) + 2 * p.batch * (p.groups + p.channels);
  return p.batch * p.groups * partial_items(p, forward_cut(p, vector, false), vector) * 4;
}

// call(T(), vector as a constant, channels_last as a constant) for what p asks for.
template <class Call>
void with_kernel(const GroupNormSiluParams& p, int vector, Call&& call) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = 16 / sizeof(T);
    auto with_format = [&](auto format) {
      vector == 1 ? call(zero, std::integral_constant<int, 1>(), format)
                  : call(zero, std::integral_constant<int, kVector>(), format);
    };
    p.channels_last ? with_format(std::true_type()) : with_format(std::false_type());
  });
}

}  // namespace

int64_t group_norm_silu_workspace(const GroupNormSiluParams& p, bool backward) {
  // Which accesses a call makes depends on its addresses, which this one does not know.
  const int64_t vector = p.dtype == DType::f32 ? 4 : 8;
  const int64_t dense = p.channels_last ? p.channels : p.positions / p.frames;
  const int64_t single = workspace_of(p, backward, 1);
  return dense % vector ? single : std::max(single, workspace_of(p, backward, static_cast<int>(vector)));
}

void group_norm_silu_forward(const GroupNormSiluParams& p, void* stream) {
  const int vector = vector_of(p, false);
  const Cut read = forward_cut(p, vector, false), written = forward_cut(p, vector, true);
  const Partials partials{p.workspace, partial_items(p, read, vector), vector};
  with_kernel(p, vector, [&](auto zero, auto v, auto format) {
    using T = decltype(zero);
    constexpr int V = decltype(v)::value;
    constexpr bool CHANNELS_LAST = decltype(format)::value;
    if (!p.stats) {
      FASTVDIFF_LAUNCH((group_norm_silu_stats<T, V, CHANNELS_LAST>), grid_of(read.blocks()), dim3(kThreads), 0, stream, p,
                       read, partials);
    }
    FASTVDIFF_LAUNCH(group_norm_silu_moments, grid_of(p.batch * p.groups), dim3(kPoolThreads), 0, stream, p, read,
                     partials);
    FASTVDIFF_LAUNCH((group_norm_silu_apply<T, V, CHANNELS_LAST>), grid_of(written.blocks()), dim3(kThreads), 0, stream,
                     p, written);
  });
}

void group_norm_silu_backward(const GroupNormSiluParams& p, void* stream) {
  const int vector = vector_of(p, true);
  const Cut cut = backward_cut(p, vector);
  float* const means = p.workspace + sums_size(p, cut);
  const Sums sums{p.workspace, means, means + 2 * p.batch * p.groups, cut.parts};
  with_kernel(p, vector, [&](auto zero, auto v, auto format) {
    using T = decltype(zero);
    constexpr int V = decltype(v)::value;
    constexpr bool CHANNELS_LAST = decltype(format)::value;
    FASTVDIFF_LAUNCH((group_norm_silu_backward_sums<T, V, CHANNELS_LAST>), grid_of(cut.blocks()), dim3(kThreads), 0,
                     stream, p, cut, sums);
    FASTVDIFF_LAUNCH(group_norm_silu_backward_groups, grid_of(p.batch * p.groups), dim3(32 * kGroupRows), 0, stream, p,
                     sums);
    FASTVDIFF_LAUNCH((group_norm_silu_backward_dx<T, V, CHANNELS_LAST>),
                     grid_of(cut.blocks() + ceil_div(p.channels, kThreads)), dim3(kThreads), 0, stream, p, cut, sums);
  });
}

}  // namespace fastvdiff::cuda
