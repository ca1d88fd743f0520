#include "fastvdiff/conv3d.h"

#include "entry.h"

using namespace fastvdiff::cuda;

SIMT_ENTRY(forward, Conv3dParams, conv3d_forward)
SIMT_ENTRY(data_gradient, Conv3dParams, conv3d_data_gradient)
SIMT_ENTRY(weight_gradient, Conv3dParams, conv3d_weight_gradient)
SIMT_ENTRY(prologue, Conv3dPrologueParams, conv3d_prologue)

extern "C" int64_t conv3d_workspace_floats(const Conv3dParams* p, int32_t pass) {
  return conv3d_workspace(*p, static_cast<Conv3dPass>(pass));
}

// multiprocessors: of the kernels for 9.0, the one of clusters where `pass` is not 0; 0: the portable kernel of `pass`.
extern "C" void conv3d_plan_of(const Conv3dParams* p, int32_t pass, int32_t multiprocessors, int64_t* out) {
  const auto for_sm90 = pass == 0 ? conv3d_sm90_plan : conv3d_sm90_cluster_plan;
  const Conv3dPlan plan =
      multiprocessors > 0 ? for_sm90(*p, multiprocessors) : conv3d_plan(*p, static_cast<Conv3dPass>(pass));
  const int64_t values[] = {plan.tile_rows,    plan.tile_columns, plan.tile_depth,
                            plan.shared_bytes, plan.blocks,       plan.steps};
  for (int i = 0; i < 6; ++i) out[i] = values[i];
}
