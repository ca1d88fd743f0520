// Transposes in registers, and of rows in memory: what lies side by side in a tensor comes into one lane of as many vectors.
#pragma once

#include <algorithm>

#include "simd.h"

FASTVDIFF_BEGIN_ISA

// In each 128-bit lane of four vectors, the 4 x 4 transpose; it is its own inverse.
inline void transpose_4x4(vf x[4]) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_maskz_unpacklo_ps(kAllLanes, (__m512)x[0], (__m512)x[1]);
  const __m512 b = _mm512_maskz_unpackhi_ps(kAllLanes, (__m512)x[0], (__m512)x[1]);
  const __m512 c = _mm512_maskz_unpacklo_ps(kAllLanes, (__m512)x[2], (__m512)x[3]);
  const __m512 d = _mm512_maskz_unpackhi_ps(kAllLanes, (__m512)x[2], (__m512)x[3]);
  x[0] = (vf)_mm512_maskz_unpacklo_pd(0xFF, (__m512d)a, (__m512d)c);
  x[1] = (vf)_mm512_maskz_unpackhi_pd(0xFF, (__m512d)a, (__m512d)c);
  x[2] = (vf)_mm512_maskz_unpacklo_pd(0xFF, (__m512d)b, (__m512d)d);
  x[3] = (vf)_mm512_maskz_unpackhi_pd(0xFF, (__m512d)b, (__m512d)d);
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]), b = _mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)x[2], (__m256)x[3]), d = _mm256_unpackhi_ps((__m256)x[2], (__m256)x[3]);
  x[0] = (vf)_mm256_unpacklo_pd((__m256d)a, (__m256d)c), x[1] = (vf)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
  x[2] = (vf)_mm256_unpacklo_pd((__m256d)b, (__m256d)d), x[3] = (vf)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = x[i][j];
      x[i][j] = x[j][i], x[j][i] = t;
    }
#endif
}

// The kWidth x kWidth transpose.
inline void transpose(vf x[kWidth]) {
  for (int i = 0; i < kWidth; i += 4) transpose_4x4(x + i);
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)x[i], b = (__m512)x[4 + i], c = (__m512)x[8 + i], d = (__m512)x[12 + i];
    const __m512 ab = _mm512_maskz_shuffle_f32x4(kAllLanes, a, b, 0x44), cd = _mm512_maskz_shuffle_f32x4(kAllLanes, c, d, 0x44);
    const __m512 ba = _mm512_maskz_shuffle_f32x4(kAllLanes, a, b, 0xEE), dc = _mm512_maskz_shuffle_f32x4(kAllLanes, c, d, 0xEE);
    x[i] = (vf)_mm512_maskz_shuffle_f32x4(kAllLanes, ab, cd, 0x88);
    x[4 + i] = (vf)_mm512_maskz_shuffle_f32x4(kAllLanes, ab, cd, 0xDD);
    x[8 + i] = (vf)_mm512_maskz_shuffle_f32x4(kAllLanes, ba, dc, 0x88);
    x[12 + i] = (vf)_mm512_maskz_shuffle_f32x4(kAllLanes, ba, dc, 0xDD);
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 4; ++i) {
    const __m256 a = (__m256)x[i], b = (__m256)x[4 + i];
    x[i] = (vf)_mm256_permute2f128_ps(a, b, 0x20), x[4 + i] = (vf)_mm256_permute2f128_ps(a, b, 0x31);
  }
#endif
}

// The first `length` elements of each of n <= kWidth rows, `step` elements apart, become vectors whose lanes are the rows,
// `to_step` floats apart. Lanes from n on are 0.
template <class T>
inline void turn_rows(const T* from, int64_t length, int64_t n, int64_t step, float* to, int64_t to_step) {
  for (int64_t i = 0; i < length; i += kWidth) {
    const int64_t some = std::min<int64_t>(kWidth, length - i);
    vf x[kWidth];
    if (n == kWidth && some == kWidth)
      for (int l = 0; l < kWidth; ++l) x[l] = load(from + l * step + i);
    else
      for (int l = 0; l < kWidth; ++l) x[l] = l < n ? load_some(from + l * step + i, some) : vf{};
    transpose(x);
    for (int64_t j = 0; j < some; ++j) store(to + (i + j) * to_step, x[j]);
  }
}

// The way back, from vectors one after the other.
template <class T>
inline void turn_back(const float* from, int64_t length, int64_t n, int64_t step, T* to) {
  for (int64_t i = 0; i < length; i += kWidth) {
    const int64_t some = std::min<int64_t>(kWidth, length - i);
    vf x[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) x[j] = j < some ? load(from + (i + j) * kWidth) : vf{};
    transpose(x);
    if (n == kWidth && some == kWidth)
      for (int l = 0; l < kWidth; ++l) store(to + l * step + i, x[l]);
    else
      for (int64_t l = 0; l < n; ++l) store_some(to + l * step + i, x[l], some);
  }
}

FASTVDIFF_END_ISA
