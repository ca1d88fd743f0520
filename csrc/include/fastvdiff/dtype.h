// Element types as the launchers know them; the codes are shared with fastvdiff/native/__init__.py.
#pragma once

#include <cstdint>

namespace fastvdiff {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace fastvdiff
