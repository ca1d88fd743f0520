// What group_norm_silu's passes compute with: accesses, moments, the affine map of a channel, SiLU.
#pragma once

#include "fastvdiff/group_norm_silu_cuda.h"
#include "ptx.h"

namespace fastvdiff::cuda {

// V elements of T that are read or written at once: 16 bytes, or one element.
template <class T, int V>
struct Access {
  static_assert(V * sizeof(T) == 16);
  using Raw = uint4;
  static __device__ __forceinline__ Raw load(const T* p) { return load_128(p); }
  static __device__ __forceinline__ Raw load_last(const T* p) { return load_128_last(p); }
  static __device__ __forceinline__ void widen(const Raw& raw, float (&x)[V]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = float_from_bits(words[i]);
      } else {
        x[2 * i] = Pair<T>::low(words[i]), x[2 * i + 1] = Pair<T>::high(words[i]);
      }
    }
  }
  static __device__ __forceinline__ void store(T* p, const float (&x)[V]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = float_bits(x[i]);
      } else {
        words[i] = Pair<T>::of(x[2 * i], x[2 * i + 1]);
      }
    }
    store_128(p, make_uint4(words[0], words[1], words[2], words[3]));
  }
};

template <class T>
struct Access<T, 1> {
  using Raw = T;
  static __device__ __forceinline__ Raw load(const T* p) { return *p; }
  static __device__ __forceinline__ Raw load_last(const T* p) { return *p; }
  static __device__ __forceinline__ void widen(const Raw& raw, float (&x)[1]) { x[0] = to_float(raw); }
  static __device__ __forceinline__ void store(T* p, const float (&x)[1]) { *p = from_float<T>(x[0]); }
};

// Mean and centred sum of squares of n values.
struct Moments {
  float mean, m2, n;

  // Both together (Chan, Golub & LeVeque 1983); nothing cancels at any mean.
  __device__ __forceinline__ Moments with(const Moments& other) const {
    const float total = n + other.n, apart = other.mean - mean;
    const float share = fast_divide(other.n, max(total, 1.0f));
    return {mean + apart * share, m2 + other.m2 + apart * apart * share * n, total};
  }
};

// near + apart as a float and what its rounding left. Means are kept so, or as differences from a value nearby: at a
// mean of 10^4 the rounding of a float32 mean is what one sees in the result.
struct Sum {
  float high, low;
  __device__ __forceinline__ Sum(float near, float apart) : high(near + apart), low(apart - (high - near)) {}
};

__device__ __forceinline__ void store_moments(float* to, const Sum& mean, float m2, float n) {
  to[0] = mean.high, to[1] = mean.low, to[2] = m2, to[3] = n;
}

// What one thread has seen of V accumulators: means as differences from each one's first value.
template <int V>
struct Seen {
  float pivot[V] = {}, mean[V] = {}, m2[V] = {}, n = 0;

  // Welford's update: no common shift, so no outlier to choose it wrong.
  __device__ __forceinline__ void add(const float (&value)[V]) {
    n += 1.0f;
    const float share = fast_divide(1.0f, n);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (n == 1.0f) pivot[i] = value[i];
      const float off = value[i] - pivot[i], apart = off - mean[i];
      mean[i] += apart * share;
      m2[i] += apart * (off - mean[i]);
    }
  }
};

__device__ __forceinline__ float load_parameter(const NormParameter& p, int64_t sample, int64_t channel, int64_t frame) {
  const int64_t at = sample * p.stride_b + channel * p.stride_c + frame * p.stride_t;
  if (p.dtype == DType::f32) return static_cast<const float*>(p.data)[at];
  if (p.dtype == DType::bf16) return to_float(static_cast<const bf16*>(p.data)[at]);
  return to_float(static_cast<const f16*>(p.data)[at]);
}

__device__ __forceinline__ void store_gradient(const NormGradient& g, int64_t at, float value) {
  if (g.dtype == DType::f32) {
    static_cast<float*>(g.data)[at] = value;
  } else if (g.dtype == DType::bf16) {
    static_cast<bf16*>(g.data)[at] = from_float<bf16>(value);
  } else {
    static_cast<f16*>(g.data)[at] = from_float<f16>(value);
  }
}

// z = xhat gain + offset: weight, bias, scale and shift of one channel of one frame together.
struct Affine {
  float gain, offset;

  __device__ __forceinline__ Affine(const GroupNormSiluParams& p, int64_t sample, int64_t channel, int64_t frame) {
    gain = p.weight.data ? load_parameter(p.weight, 0, channel, 0) : 1.0f;
    offset = p.bias.data ? load_parameter(p.bias, 0, channel, 0) : 0.0f;
    if (p.scale.data) {
      const float factor = 1.0f + load_parameter(p.scale, sample, channel, frame);
      gain *= factor, offset *= factor;
    }
    if (p.shift.data) offset += load_parameter(p.shift, sample, channel, frame);
  }
};

// 1 / (1 + exp(-z)); where exp overflows it is 0, which is right to float's smallest normal.
__device__ __forceinline__ float sigmoid(float z) { return fast_divide(1.0f, 1.0f + fast_exp(-z)); }

// The K channels of a thread: z = (x - centre) slope + offset, slope = gain / std.
template <int K>
struct Line {
  float centre[K], slope[K], offset[K];

  template <int V, bool CHANNELS_LAST, template <int, bool> class Place>
  __device__ __forceinline__ void load(const GroupNormSiluParams& p, const Place<V, CHANNELS_LAST>& place) {
    const int64_t width = p.channels / p.groups;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t channel = place.channel + k;
      const float* of_group = p.moments + (place.sample * p.groups + channel / width) * 2;
      const Affine affine(p, place.sample, channel, place.frame);
      centre[k] = of_group[0], slope[k] = of_group[1] * affine.gain, offset[k] = affine.offset;
    }
  }
  __device__ __forceinline__ float result(int k, float x, bool silu) const {
    const float z = (x - centre[k]) * slope[k] + offset[k];
    return silu ? z * sigmoid(z) : z;
  }
};

// dy times silu's derivative at z.
__device__ __forceinline__ float through_silu(float dy, float z) {
  const float s = sigmoid(z);
  return dy * s * (1.0f + z * (1.0f - s));
}

// The sum over the block's `warps` warps, the same in every thread; `scratch` is `warps` floats of shared memory.
__device__ __forceinline__ float block_sum(float value, float* scratch, int warps) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  sync_threads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  sync_threads();
  float total = 0;
  for (int i = 0; i < warps; ++i) total += scratch[i];
  return total;
}

}  // namespace fastvdiff::cuda
