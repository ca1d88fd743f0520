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

// multiprocessors: of the kernel for 9.0; 0 asks for the portable kernel of `pass`.
extern "C" void conv3d_plan_of(const Conv3dParams* p, int32_t pass, int32_t multiprocessors, int64_t* out) {
  const Conv3dPlan plan =
      multiprocessors > 0 ? conv3d_sm90_plan(*p, multiprocessors) : conv3d_plan(*p, static_cast<Conv3dPass>(pass));
  const int64_t values[] = {plan.tile_rows,    plan.tile_columns, plan.tile_depth,
                            plan.shared_bytes, plan.blocks,       plan.steps};
  for (int i = 0; i < 6; ++i) out[i] = values[i];
}
