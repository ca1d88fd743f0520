// group_norm_silu's launchers as host.py calls them.
#include "device.h"
#include "entry.h"
#include "fastvdiff/group_norm_silu_cuda.h"

using fastvdiff::cuda::GroupNormSiluParams;
SIMT_ENTRY(group_norm_silu_forward, GroupNormSiluParams, fastvdiff::cuda::group_norm_silu_forward)
SIMT_ENTRY(group_norm_silu_backward, GroupNormSiluParams, fastvdiff::cuda::group_norm_silu_backward)
extern "C" int64_t group_norm_silu_workspace(const GroupNormSiluParams* p, bool backward) {
  return fastvdiff::cuda::group_norm_silu_workspace(*p, backward);
}
