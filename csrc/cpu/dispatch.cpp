#include "dispatch.h"

#include <atomic>

#include "fastvdiff/conv3d_cpu.h"
#include "fastvdiff/ddim_step.h"
#include "fastvdiff/geglu.h"
#include "fastvdiff/group_norm_silu.h"
#include "fastvdiff/temporal_attention.h"
#include "fastvdiff/temporal_attention_block.h"

namespace fastvdiff {
namespace cpu {

Isa best_isa() {
#if defined(FASTVDIFF_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  // Every CPU with AVX2 and FMA has F16C too; gcc 10 and older cannot ask for it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

namespace {
std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}
}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }
void set_current_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

}  // namespace cpu
}  // namespace fastvdiff

// Defines fastvdiff::name, which calls the copy of cpu::<isa>::name that this CPU runs.
#if defined(FASTVDIFF_X86)
#define FASTVDIFF_DISPATCH(result, name, Params)                             \
  namespace fastvdiff {                                                      \
  namespace cpu {                                                            \
  namespace generic { result name(const Params&); }                          \
  namespace avx2 { result name(const Params&); }                             \
  namespace avx512 { result name(const Params&); }                           \
  }                                                                          \
  result name(const Params& p) {                                             \
    switch (cpu::current_isa()) {                                            \
      case cpu::Isa::avx512: return cpu::avx512::name(p);                    \
      case cpu::Isa::avx2: return cpu::avx2::name(p);                        \
      default: return cpu::generic::name(p);                                 \
    }                                                                        \
  }                                                                          \
  }
#else
#define FASTVDIFF_DISPATCH(result, name, Params)                             \
  namespace fastvdiff {                                                      \
  namespace cpu {                                                            \
  namespace generic { result name(const Params&); }                          \
  }                                                                          \
  result name(const Params& p) { return cpu::generic::name(p); }             \
  }
#endif

FASTVDIFF_DISPATCH(int64_t, group_norm_silu_workspace, GroupNormSiluParams)
FASTVDIFF_DISPATCH(void, group_norm_silu_forward, GroupNormSiluParams)
FASTVDIFF_DISPATCH(void, group_norm_silu_backward, GroupNormSiluParams)
FASTVDIFF_DISPATCH(int64_t, conv3d_workspace, Conv3dCpuParams)
FASTVDIFF_DISPATCH(int64_t, conv3d_weight_gradient_workspace, Conv3dCpuParams)
FASTVDIFF_DISPATCH(void, conv3d_forward, Conv3dCpuParams)
FASTVDIFF_DISPATCH(void, conv3d_weight_gradient, Conv3dCpuParams)
FASTVDIFF_DISPATCH(void, geglu_forward, GegluParams)
FASTVDIFF_DISPATCH(void, geglu_backward, GegluParams)
FASTVDIFF_DISPATCH(int64_t, ddim_step_workspace, DdimStepParams)
FASTVDIFF_DISPATCH(void, ddim_step_forward, DdimStepParams)
FASTVDIFF_DISPATCH(void, ddim_step_backward, DdimStepParams)
FASTVDIFF_DISPATCH(int64_t, temporal_attention_workspace, TemporalAttentionParams)
FASTVDIFF_DISPATCH(void, temporal_attention_forward, TemporalAttentionParams)
FASTVDIFF_DISPATCH(void, temporal_attention_backward, TemporalAttentionParams)
FASTVDIFF_DISPATCH(int64_t, temporal_attention_block_forward_workspace, TemporalAttentionBlockParams)
FASTVDIFF_DISPATCH(int64_t, temporal_attention_block_backward_workspace, TemporalAttentionBlockParams)
FASTVDIFF_DISPATCH(void, temporal_attention_block_forward, TemporalAttentionBlockParams)
FASTVDIFF_DISPATCH(void, temporal_attention_block_backward, TemporalAttentionBlockParams)
