// Vectors of `kWidth` floats on GCC/Clang vector extensions: the same source for AVX-512, AVX2 and plain C++.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastvdiff/dtype.h"
#include "isa.h"

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)  // gcc 12 warns about its own _mm512_undefined_ps()
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

FASTVDIFF_BEGIN_ISA

#if defined(__AVX512F__)
constexpr int kWidth = 16;
// For the masked forms of intrinsics: gcc 12 takes the plain ones' undefined operand for an uninitialised variable.
constexpr __mmask16 kAllLanes = 0xFFFF;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

// 16-bit elements are told apart by type; both are plain bits.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline vf splat(float a) { return a - vf{}; }
inline vi splat_int(int32_t a) { return a - vi{}; }

// Like x86's own instructions: b where either is NaN.
#if defined(__AVX512F__)
inline vf vmax(vf a, vf b) { return bit_cast<vf>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b))); }
inline vf vmin(vf a, vf b) { return bit_cast<vf>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b))); }
#else
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif

inline vf square_root(vf x) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_maskz_sqrt_ps(kAllLanes, bit_cast<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast<vf>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// ---- scalar conversions -------------------------------------------------------------------------------------------

inline float to_float(float a) { return a; }
inline float to_float(bf16 a) { return bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }
inline float to_float(f16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16, rest = a.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return bit_cast<float>(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));  // inf, nan
  // Subnormals included: the exponent bias is made up by one exact multiplication.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}

template <class T>
inline T from_float(float a);
template <>
inline float from_float<float>(float a) {
  return a;
}
template <>
inline bf16 from_float<bf16>(float a) {
  const uint32_t u = bit_cast<uint32_t>(a);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float a) {
  const uint32_t u = bit_cast<uint32_t>(a), sign = (u >> 16) & 0x8000u, rest = u & 0x7FFFFFFFu;
  if (rest > 0x7F800000u) return f16{static_cast<uint16_t>(sign | 0x7E00u)};
  if (rest >= 0x477FF000u) return f16{static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to 65536 or beyond
  if (rest < 0x38800000u) {  // subnormal: the addition rounds to a multiple of 2^-24, ties to even
    const uint32_t half = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3F000000u;
    return f16{static_cast<uint16_t>(sign | half)};
  }
  const uint32_t rebiased = rest - 0x38000000u;
  return f16{static_cast<uint16_t>(sign | ((rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13))};
}

// ---- whole vectors ------------------------------------------------------------------------------------------------

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<vf>(__builtin_convertvector(h, vu) << 16);
}
inline void store(bf16* p, vf v) {
  const vu u = bit_cast<vu>(v);
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  const vh h = __builtin_convertvector((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded, vh);
  std::memcpy(p, &h, sizeof(h));
}

inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(kAllLanes, bit_cast<__m512>(v),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

// ---- the first n <= kWidth elements: the others read as 0 and are not touched --------------------------------------

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline vf load_n(const float* p, int64_t n) { return bit_cast<vf>(_mm512_maskz_loadu_ps(first_lanes(n), p)); }
inline void store_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), bit_cast<__m512>(v)); }
template <class T>
inline vf load_n(const T* p, int64_t n) {
  T part[kWidth];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(first_lanes(n), p));
  return load(part);
}
template <class T>
inline void store_n(T* p, vf v, int64_t n) {
  T part[kWidth];
  store(part, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
}
inline vf keep_n(vf v, int64_t n) { return bit_cast<vf>(_mm512_maskz_mov_ps(first_lanes(n), bit_cast<__m512>(v))); }
#else
template <class T>
inline vf load_n(const T* p, int64_t n) {
  T part[kWidth] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}
template <class T>
inline void store_n(T* p, vf v, int64_t n) {
  T part[kWidth];
  store(part, v);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}
// v with its lanes from n on set to 0.
inline vf keep_n(vf v, int64_t n) {
  vi lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return bit_cast<vf>(bit_cast<vi>(v) & (lane < splat_int(static_cast<int32_t>(n))));
}
#endif

// Mostly whole vectors: those take the plain instructions.
template <class T>
inline vf load_some(const T* p, int64_t n) {
  return n == kWidth ? load(p) : load_n(p, n);
}
template <class T>
inline void store_some(T* p, vf v, int64_t n) {
  if (n == kWidth)
    store(p, v);
  else
    store_n(p, v, n);
}

// A whole vector past the caches, to an address that is a multiple of the vector's bytes: the line is not read first. A
// fence() orders such stores before whatever tells another thread that they are done.
#if defined(__AVX512F__)
inline void stream(float* p, vf v) { _mm512_stream_ps(p, bit_cast<__m512>(v)); }
template <class T>
inline void stream(T* p, vf v) {
  T part[kWidth];
  store(part, v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
}
inline void fence() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream(float* p, vf v) { _mm256_stream_ps(p, bit_cast<__m256>(v)); }
template <class T>
inline void stream(T* p, vf v) {
  T part[kWidth];
  store(part, v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
}
inline void fence() { _mm_sfence(); }
#else
template <class T>
inline void stream(T* p, vf v) {
  store(p, v);
}
inline void fence() {}
#endif

// f(i, n) over [begin, end) in whole vectors and one partial one. f is to be inlined twice, so that n is a constant in
// the loop; FASTVDIFF_INLINE after a lambda's parameters sees to that where the compiler would not.
#define FASTVDIFF_INLINE __attribute__((always_inline))
template <class F>
inline void for_vectors(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) f(i, static_cast<int64_t>(kWidth));
  if (i < end) f(i, end - i);
}

inline float sum_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bit_cast<__m512>(v));
#else
  float part[kWidth];
  store(part, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
#endif
}

// ---- exp and silu -------------------------------------------------------------------------------------------------

// To the nearest integer, for |a| < 2^22.
inline vf round_small(vf a) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23
  return (a + magic) - magic;
}

// x = n ln 2 + r with whole n, for |x| < 2^21: e^r, so that e^x is e^r 2^n within 1 ulp.
inline vf exp_remainder(vf x, vf& n) {
  n = round_small(x * 1.44269504088896341f);
  vf r = x - n * 0.693359375f;  // ln 2 in two parts; the product with the first is exact
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.381416275e-3f);
  p = p * r + 8.368927209e-3f;
  p = p * r + 4.166840850e-2f;
  p = p * r + 1.666651889e-1f;
  p = p * r + 4.999999333e-1f;
  return p * (r * r) + r + 1.0f;
}

// e^x within 1 ulp, overflowing to inf and falling to 0 through the subnormals. NaN stays NaN: vmin and vmax pass it.
inline vf exp(vf x) {
  vf n;
  const vf p = exp_remainder(vmin(splat(89.0f), vmax(splat(-104.0f), x)), n);
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  // In two factors, each of them a normal number.
  const vi whole = __builtin_convertvector(n, vi), half = whole >> 1;
  return p * bit_cast<vf>((half + 127) << 23) * bit_cast<vf>((whole - half + 127) << 23);
#endif
}

#if defined(__AVX512F__)
// 2^(i / 32): two registers, so that looking one up is one instruction.
alignas(64) constexpr float kRoots[2 * kWidth] = {
    1.0f, 1.0218972f, 1.04427373f, 1.06714046f,
    1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f,
    1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f,
    1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f};
#endif

// 1 + e^x. Cheaper than exp: what e^x loses for large |x| (|x| 2^-25 of itself) does not show beside 1, or only in
// values near 0 that a sigmoid gives there.
inline vf one_plus_exp(vf x) {
#if defined(__AVX512F__)
  const vf t = x * 1.44269504088896341f;
  // The part beyond the nearest 1/32, 0 for infinities, so that nothing needs clamping.
  constexpr int kTo32nds = 5 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const vf f = bit_cast<vf>(_mm512_maskz_reduce_ps(kAllLanes, bit_cast<__m512>(t), kTo32nds)), n = t - f;
  const vf index = n + 393216.0f;  // 1.5 * 2^18: n's five bits below the point become the lowest ones
  const vf root = bit_cast<vf>(_mm512_permutex2var_ps(_mm512_load_ps(kRoots), bit_cast<__m512i>(index),
                                                      _mm512_load_ps(kRoots + kWidth)));
  const vf p = (f * 0.24022691f + 0.69315734f) * (f * root) + root;  // 2^f on [-1/64, 1/64] within 2^-24
  return 1.0f + bit_cast<vf>(_mm512_maskz_scalef_ps(kAllLanes, bit_cast<__m512>(p), bit_cast<__m512>(n)));
#else
  const vf t = vmin(splat(128.0f), vmax(splat(-126.0f), x * 1.44269504088896341f));
  const vf n = round_small(t), f = t - n;
  vf p = splat(1.535336181e-4f);  // 2^f on [-1/2, 1/2]
  p = p * f + 1.339887445e-3f;
  p = p * f + 9.618437358e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.0f;
  return 1.0f + p * bit_cast<vf>((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

inline vf sigmoid(vf x) { return 1.0f / one_plus_exp(-x); }
inline vf silu(vf x) { return x / one_plus_exp(-x); }

FASTVDIFF_END_ISA
