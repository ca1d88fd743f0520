// The instruction set in use, chosen once from what the CPU has.
#pragma once

namespace fastvdiff {
namespace cpu {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();               // the widest set that this build has and this CPU runs
Isa current_isa();
void set_current_isa(Isa);    // for tests: at most best_isa()

}  // namespace cpu
}  // namespace fastvdiff
