// csrc/cpu/simd.h with a C interface, for test_simd.py: arrays in, arrays out.
#include "simd.h"

using namespace fastvdiff::cpu::FASTVDIFF_ISA;

namespace {

template <class From, class To, class F>
void map(const From* in, To* out, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, f(load(in + i)));
  if (i < n) store_n(out + i, f(load_n(in + i, n - i)), n - i);
}

template <class T>
void scalar(const float* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(in[i]);
}

vf same(vf v) { return v; }

}  // namespace

extern "C" {
void exp_all(const float* in, float* out, int64_t n) { map(in, out, n, exp); }
void sigmoid_all(const float* in, float* out, int64_t n) { map(in, out, n, sigmoid); }
void silu_all(const float* in, float* out, int64_t n) { map(in, out, n, silu); }
void from_bf16(const bf16* in, float* out, int64_t n) { map(in, out, n, same); }
void from_f16(const f16* in, float* out, int64_t n) { map(in, out, n, same); }
void to_bf16(const float* in, bf16* out, int64_t n) { map(in, out, n, same); }
void to_f16(const float* in, f16* out, int64_t n) { map(in, out, n, same); }
void scalar_to_bf16(const float* in, bf16* out, int64_t n) { scalar(in, out, n); }
void scalar_to_f16(const float* in, f16* out, int64_t n) { scalar(in, out, n); }
void scalar_from_f16(const f16* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
float sum_first(const float* in, int64_t n) { return sum_lanes(keep_n(load(in), n)); }
int64_t width() { return kWidth; }
}
