// GroupNorm, per-sample modulation and SiLU on the CPU, in one pass over memory where a group fits in cache.
//
// Computes     m, r = mean, 1/sqrt(var + eps) over a group; a = r w (1 + scale); b = bias (1 + scale) + shift
//              z = (x - m) a + b; y = silu(z)
//              dz = dy silu'(z); dx = dz a - r/N sum(dz w (1 + scale)) - (x - m) r^2/N sum(dz w (1 + scale) (x - m) r)
// Layout       rows: position stride 1, a row of `positions` values per channel;
//              channels_last: channel stride 1, a row of `channels` values per position.
// Work split   rows: one (batch, group) per thread at a time, normalised while it is still in cache, or single rows
//              when there are too few groups; channels_last: blocks of whole channel rows inside one frame, statistics
//              of all of them first. How sums are split depends on sizes and strides alone, never on the threads.
// Traffic      forward: x read once from memory and once from cache (twice past cache size), y written once;
//              backward: x twice, dy once and dx written, read and written again (float32 with silu: the first pass
//              leaves dz in dx, so that there is one sigmoid per value), else x and dy twice and dx written once.
// Precision    float32 inside; statistics from sums around a nearby mean, combined in float64; x - m is taken before
//              the scaling, so that a large mean does not cancel. No atomics.
// Refuses      nothing that the header allows.

#include "group_norm_silu_channels_last.h"
#include "group_norm_silu_rows.h"

FASTVDIFF_BEGIN_ISA
namespace {

// f(Kernel<T, silu>{p, plan}) for the call's layout, element type and activation.
template <class T, bool kSilu, class F>
void with_layout(const Params& p, const Plan& plan, F f) {
  if (plan.channels_last)
    f(ChannelsLast<T, kSilu>{p, plan});
  else
    f(Rows<T, kSilu>{p, plan});
}

template <class T, class F>
void with_activation(const Params& p, const Plan& plan, F f) {
  if (p.silu)
    with_layout<T, true>(p, plan, f);
  else
    with_layout<T, false>(p, plan, f);
}

template <class F>
void with_kernel(const Params& p, F f) {
  if (p.batch == 0 || p.channels == 0 || p.positions == 0) return;
  const Plan plan(p);
  switch (p.dtype) {
    case DType::f32: return with_activation<float>(p, plan, f);
    case DType::bf16: return with_activation<bf16>(p, plan, f);
    case DType::f16: return with_activation<f16>(p, plan, f);
  }
}

}  // namespace

int64_t group_norm_silu_workspace(const Params& p) {
  int64_t floats = 0;
  with_kernel(p, [&](auto kernel) { floats = kernel.workspace(); });
  return floats;
}

void group_norm_silu_forward(const Params& p) {
  with_kernel(p, [](auto kernel) { kernel.forward(); });
}

void group_norm_silu_backward(const Params& p) {
  with_kernel(p, [](auto kernel) { kernel.backward(); });
}

FASTVDIFF_END_ISA
