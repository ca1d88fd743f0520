// DDIM step on CPUs.
//
// Computes    o = u + w (c - u);  x0 = clamp(x0(x, o));  prev = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps + sigma z
// Layout      any dense layout that all tensors share, the batch outermost; w may change from frame to frame
// Work split  blocks of 16384 elements of one sample
// Traffic     3N read and 1N written with guidance, 1N more each for x0 and a noise tensor; a dynamic threshold reads
//             3N more and sweeps N floats of workspace six times, the rescale reads 2N more; large results bypass
//             the caches, so that a write is not a read as well
// Precision   fp32, coefficients in fp64, one rounding; noise from a seed as in reference/philox.py
// Refuses     gradients through the rescale and the dynamic threshold (the reference runs)

#include "fastvdiff/ddim_step.h"

#include "ddim_step_statistics.h"
#include "ddim_step_terms.h"
#include "philox.h"
#include "simd.h"

FASTVDIFF_BEGIN_ISA

namespace {

// ---- workspace: factors and limits (a float a sample each), then what the statistics need ---------------------------

int64_t statistics_offset(const DdimStepParams& p) { return p.batch * 8; }

int64_t moments_bytes(const DdimStepParams& p) {
  const int64_t blocks = p.batch * ((p.elements + kDdimBlock - 1) / kDdimBlock);
  return p.guidance_rescale > 0 ? 2 * blocks * static_cast<int64_t>(sizeof(Moments)) : 0;
}

int64_t quantile_bytes(const DdimStepParams& p) {
  return p.threshold_max > 0 ? p.threads * kBins * 8 + p.elements * 4 : 0;
}

// ---- noise from a seed ----------------------------------------------------------------------------------------------

constexpr int64_t kNoisePiece = 1024;

// Normals of the elements at memory positions first .. first + n - 1, n <= kNoisePiece.
void draw_normals(const DdimStepParams& p, int64_t first, int64_t n, float* out) {
  const uint64_t seed = static_cast<uint64_t>(*p.noise_seed);
  if (p.rank == 0) return normals_in_order(out, first, n, seed);
  int64_t index[kDdimMaxRank], rest = first, logical = 0;
  for (int d = p.rank - 1; d >= 0; --d) {
    index[d] = rest % p.memory_sizes[d], rest /= p.memory_sizes[d];
    logical += index[d] * p.logical_strides[d];
  }
  int64_t elements[kWidth];
  for (int64_t i = 0; i < n; i += kWidth) {
    for (int lane = 0; lane < kWidth; ++lane) {
      elements[lane] = logical;
      for (int d = p.rank - 1; d >= 0; --d) {
        logical += p.logical_strides[d];
        if (++index[d] < p.memory_sizes[d] || d == 0) break;
        logical -= index[d] * p.logical_strides[d], index[d] = 0;
      }
    }
    store(out + i, normals_at(elements, seed));
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Results of calls that touch this much or more bypass the caches: a plain store would first read a line that nobody
// wants, 2 of 7 transfers with guidance and both results. Measured with an L3 of 32 MB: below 16 MB plain stores are up
// to 1.3x faster; from 24 MB on streaming is 1.1x to 1.5x faster, and 1.2x to 1.3x with the results read next.
constexpr int64_t kStreamedBytes = int64_t{24} << 20;

template <class T>
bool streams(const DdimStepParams& p) {
  constexpr uintptr_t vector_bytes = kWidth * sizeof(T);
  const auto prev = reinterpret_cast<uintptr_t>(p.prev), original = reinterpret_cast<uintptr_t>(p.original);
  const int64_t tensors = 3 + (p.uncond_output ? 1 : 0) + (p.noise ? 1 : 0) + (p.original ? 1 : 0);
  return tensors * p.batch * p.elements * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes &&
         (!p.original || (original - prev) % vector_bytes == 0);
}

// How many elements lie before the first address from p on that a whole vector can be streamed to.
template <class T>
int64_t elements_to_alignment(const T* p) {
  constexpr uintptr_t vector_bytes = kWidth * sizeof(T);
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % vector_bytes / sizeof(T));
}

template <class T, Prediction kind>
void step_run(const DdimStepParams& p, DdimTerms t, float scale, int64_t begin, int64_t end, const float* drawn) {
  const DdimInputs<T> in(p);
  const T* noise = static_cast<const T*>(p.noise);
  T* prev = static_cast<T*>(p.prev);
  T* original = static_cast<T*>(p.original);
  const bool clipped = p.use_clipped_model_output, streamed = streams<T>(p);
  const auto put = [=](T* to, vf v, int64_t n) FASTVDIFF_INLINE {
    if (streamed && n == kWidth)
      stream(to, v);
    else
      store_some(to, v, n);
  };
  const auto step = [=](int64_t i, int64_t n) FASTVDIFF_INLINE {
    const vf x = load_some(in.sample + i, n), output = in.guided(scale, i, n) * t.rescale;
    const vf x0 = clamp(original_of<kind>(t, x, output), t.limit) * t.per_limit;
    const vf epsilon = clipped ? (x - t.signal * x0) * t.per_spread : epsilon_of<kind>(t, x, output);
    vf y = t.of_original * x0 + t.of_epsilon * epsilon;
    if (noise)
      y += t.sigma * load_some(noise + i, n);
    else if (drawn)
      y += t.sigma * load_some(drawn + (i - begin), n);
    put(prev + i, y, n);
    if (original) put(original + i, x0, n);
  };
  int64_t aligned = begin;
  if (streamed) {
    const int64_t first = begin + elements_to_alignment(prev + begin);
    aligned = first < end ? first : end;
    if (begin < aligned) step(begin, aligned - begin);
  }
  for_vectors(aligned, end, step);
}

template <class T, Prediction kind>
void forward(const DdimStepParams& p) {
  float* factors = static_cast<float*>(p.workspace);
  float* limits = factors + p.batch;
  char* statistics = static_cast<char*>(p.workspace) + statistics_offset(p);
  const bool rescaled = p.guidance_rescale > 0, thresholded = p.threshold_max > 0;
  if (rescaled) rescale_factors<T>(p, factors, reinterpret_cast<Moments*>(statistics));
  if (thresholded) {
    int64_t* counts = reinterpret_cast<int64_t*>(statistics + moments_bytes(p));
    uint32_t* magnitudes = reinterpret_cast<uint32_t*>(counts + p.threads * kBins);
    dynamic_limits<T, kind>(p, rescaled ? factors : nullptr, limits, magnitudes, counts);
  }
  for_blocks(p, [&](int64_t b, int64_t first, int64_t last) {
    DdimTerms t = ddim_terms(p, b);
    if (rescaled) t.rescale = factors[b];
    if (thresholded) t.limit = limits[b], t.per_limit = 1 / limits[b];
    float drawn[kNoisePiece + 8 * kWidth];
    for_runs(p, b, first, last, [&](int64_t begin, int64_t end, float scale) {
      begin += b * p.elements, end += b * p.elements;
      if (!p.noise_seed) return step_run<T, kind>(p, t, scale, begin, end, nullptr);
      for (int64_t i = begin; i < end; i += kNoisePiece) {
        const int64_t n = end - i < kNoisePiece ? end - i : kNoisePiece;
        draw_normals(p, i, n, drawn);
        step_run<T, kind>(p, t, scale, i, i + n, drawn);
      }
    });
    if (streams<T>(p)) fence();
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The step is linear but for the clip, so gradients are fixed multiples of grad_prev and grad_original, and where x0
// was clipped nothing flows through it.
template <class T, Prediction kind>
void backward_run(const DdimStepParams& p, DdimTerms t, float scale, int64_t begin, int64_t end) {
  const DdimInputs<T> in(p);
  const T* grad_prev = static_cast<const T*>(p.grad_prev);
  const T* grad_original = static_cast<const T*>(p.grad_original);
  T* d_sample = static_cast<T*>(p.d_sample);
  T* d_output = static_cast<T*>(p.d_model_output);
  T* d_uncond = static_cast<T*>(p.d_uncond_output);
  T* d_noise = static_cast<T*>(p.d_noise);
  const bool masked = t.limit < __builtin_inff(), clipped = p.use_clipped_model_output;
  for_vectors(begin, end, [=](int64_t i, int64_t n) FASTVDIFF_INLINE {
    const vf g = grad_prev ? load_some(grad_prev + i, n) : vf{};
    const vf g_epsilon = t.of_epsilon * g;
    vf g_x0 = t.of_original * g, dx{}, doutput{};
    if (grad_original) g_x0 += load_some(grad_original + i, n);
    if (clipped) {
      g_x0 -= t.signal * t.per_spread * g_epsilon;
      dx = t.per_spread * g_epsilon;
    } else if (kind == Prediction::epsilon) {
      doutput = g_epsilon;
    } else if (kind == Prediction::sample) {
      dx = t.per_spread * g_epsilon, doutput = -t.signal * t.per_spread * g_epsilon;
    } else {
      dx = t.spread * g_epsilon, doutput = t.signal * g_epsilon;
    }
    if (masked) {
      const vf x0 = original_of<kind>(t, load_some(in.sample + i, n), in.guided(scale, i, n));
      g_x0 = ((x0 <= t.limit) & (x0 >= -t.limit)) ? g_x0 : vf{};
    }
    if (kind == Prediction::epsilon) {
      dx += t.per_signal * g_x0, doutput -= t.spread * t.per_signal * g_x0;
    } else if (kind == Prediction::sample) {
      doutput += g_x0;
    } else {
      dx += t.signal * g_x0, doutput -= t.spread * g_x0;
    }
    if (d_sample) store_some(d_sample + i, dx, n);
    if (d_output) store_some(d_output + i, scale * doutput, n);
    if (d_uncond) store_some(d_uncond + i, (1.0f - scale) * doutput, n);
    if (d_noise) store_some(d_noise + i, t.sigma * g, n);
  });
}

template <class T, Prediction kind>
void backward(const DdimStepParams& p) {
  for_blocks(p, [&](int64_t b, int64_t first, int64_t last) {
    const DdimTerms t = ddim_terms(p, b);
    for_runs(p, b, first, last, [&](int64_t begin, int64_t end, float scale) {
      backward_run<T, kind>(p, t, scale, b * p.elements + begin, b * p.elements + end);
    });
  });
}

template <class T>
void forward(const DdimStepParams& p) {
  switch (p.prediction) {
    case Prediction::epsilon: return forward<T, Prediction::epsilon>(p);
    case Prediction::sample: return forward<T, Prediction::sample>(p);
    case Prediction::v_prediction: return forward<T, Prediction::v_prediction>(p);
  }
}

template <class T>
void backward(const DdimStepParams& p) {
  switch (p.prediction) {
    case Prediction::epsilon: return backward<T, Prediction::epsilon>(p);
    case Prediction::sample: return backward<T, Prediction::sample>(p);
    case Prediction::v_prediction: return backward<T, Prediction::v_prediction>(p);
  }
}

}  // namespace

int64_t ddim_step_workspace(const DdimStepParams& p) {
  return statistics_offset(p) + moments_bytes(p) + quantile_bytes(p);
}

void ddim_step_forward(const DdimStepParams& p) {
  switch (p.dtype) {
    case DType::f32: return forward<float>(p);
    case DType::bf16: return forward<bf16>(p);
    case DType::f16: return forward<f16>(p);
  }
}

void ddim_step_backward(const DdimStepParams& p) {
  switch (p.dtype) {
    case DType::f32: return backward<float>(p);
    case DType::bf16: return backward<bf16>(p);
    case DType::f16: return backward<f16>(p);
  }
}

FASTVDIFF_END_ISA
