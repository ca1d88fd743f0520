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
extern "C" bool group_norm_silu_resident_takes(const GroupNormSiluParams* p) {
  return fastvdiff::cuda::group_norm_silu_resident_takes(*p);
}
struct ResidentParams {
  GroupNormSiluParams params;
  int32_t groups, ranks;
};
SIMT_ENTRY(group_norm_silu_resident_forward, ResidentParams, [](const ResidentParams& p, void* stream) {
  fastvdiff::cuda::group_norm_silu_resident_forward(p.params, p.groups, p.ranks, stream);
})
