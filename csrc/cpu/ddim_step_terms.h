// The arithmetic of a DDIM step on vectors, and the coefficients of one sample in it.
#pragma once

#include "fastvdiff/ddim_step.h"
#include "parallel.h"
#include "simd.h"

FASTVDIFF_BEGIN_ISA

constexpr int64_t kDdimBlock = 16384;  // elements a worker takes at once; fixed, so that sums do not depend on threads

// Written in double from alpha, where 1 - alpha_prev - sigma^2 cancels, and rounded once.
struct DdimTerms {
  float signal, spread;          // sqrt(a), sqrt(1 - a)
  float per_signal, per_spread;  // their reciprocals
  float of_original, of_epsilon, sigma;
  float rescale;                 // of the guided output
  float limit, per_limit;        // x0 <- clamp(x0, +-limit) * per_limit
};

inline double at_least_zero(double a) { return a < 0 ? 0 : a; }  // NaN stays NaN

inline DdimTerms ddim_terms(const DdimStepParams& p, int64_t b) {
  const double a = p.alpha_t ? p.alpha_t[b] : p.alpha_t_value;
  const double next = p.alpha_prev ? p.alpha_prev[b] : p.alpha_prev_value;
  const double variance = p.eta > 0 ? p.eta * p.eta * at_least_zero((1 - next) / (1 - a) * (1 - a / next)) : 0;
  DdimTerms t;
  t.signal = static_cast<float>(__builtin_sqrt(a));
  t.spread = static_cast<float>(__builtin_sqrt(1 - a));
  t.per_signal = static_cast<float>(1 / __builtin_sqrt(a));
  t.per_spread = static_cast<float>(1 / __builtin_sqrt(1 - a));
  t.of_original = static_cast<float>(__builtin_sqrt(next));
  t.of_epsilon = static_cast<float>(__builtin_sqrt(at_least_zero(1 - next - variance)));
  t.sigma = static_cast<float>(__builtin_sqrt(variance));
  t.rescale = 1;
  t.limit = p.clip;
  t.per_limit = 1;
  return t;
}

inline vf clamp(vf x, float limit) {  // NaN passes
  const vf high = splat(limit);
  return x > high ? high : (x < -high ? -high : x);
}

template <Prediction kind>
inline vf original_of(const DdimTerms& t, vf x, vf output) {
  if constexpr (kind == Prediction::epsilon)
    return (x - t.spread * output) * t.per_signal;
  else if constexpr (kind == Prediction::sample)
    return output;
  else
    return t.signal * x - t.spread * output;
}

template <Prediction kind>
inline vf epsilon_of(const DdimTerms& t, vf x, vf output) {
  if constexpr (kind == Prediction::epsilon)
    return output;
  else if constexpr (kind == Prediction::sample)
    return (x - t.signal * output) * t.per_spread;
  else
    return t.signal * output + t.spread * x;
}

inline float guidance_at(const DdimStepParams& p, int64_t b, int64_t frame) {
  return p.guidance ? p.guidance[b * p.guidance_stride_b + frame * p.guidance_stride_t] : p.guidance_value;
}

// f(b, first, last) over blocks of each sample, `first` and `last` counted within the sample.
template <class F>
inline void for_blocks(const DdimStepParams& p, F&& f) {
  const int64_t blocks = (p.elements + kDdimBlock - 1) / kDdimBlock;
  parallel_for(p.threads, p.batch * blocks, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, first = i % blocks * kDdimBlock;
      f(b, first, first + kDdimBlock < p.elements ? first + kDdimBlock : p.elements);
    }
  });
}

// f(begin, end, guidance scale) over the pieces of [first, last) that lie in one frame.
template <class F>
inline void for_runs(const DdimStepParams& p, int64_t b, int64_t first, int64_t last, F&& f) {
  while (first < last) {
    const int64_t row = first / p.run, row_end = (row + 1) * p.run;
    const int64_t end = row_end < last ? row_end : last;
    f(first, end, guidance_at(p, b, row % p.frames));
    first = end;
  }
}

// What every pass reads, held by value: the compiler must assume that a store changes what a reference leads to.
template <class T>
struct DdimInputs {
  const T* sample;
  const T* output;
  const T* uncond;

  explicit DdimInputs(const DdimStepParams& p)
      : sample(static_cast<const T*>(p.sample)),
        output(static_cast<const T*>(p.model_output)),
        uncond(static_cast<const T*>(p.uncond_output)) {}

  vf guided(float scale, int64_t i, int64_t n) const {
    const vf conditional = load_some(output + i, n);
    if (!uncond) return conditional;
    const vf plain = load_some(uncond + i, n);
    return plain + scale * (conditional - plain);
  }
};

FASTVDIFF_END_ISA
