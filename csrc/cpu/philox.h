// Philox4x32-10 and Box-Muller, one block of four words per lane; fastvdiff/reference/philox.py is the definition.
#pragma once

#include "simd.h"

FASTVDIFF_BEGIN_ISA

typedef uint64_t vu64 __attribute__((vector_size(kWidth * 4)));

// 64-bit products of the low halves of 64-bit lanes. (The masked forms keep gcc 12 from warning about its own header.)
inline vu64 multiply_low_halves(vu64 a, uint32_t m) {
#if defined(__AVX512F__)
  return (vu64)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(m);
#endif
}

// High and low words of a * m: even lanes and odd lanes by themselves.
inline void multiply_wide(vu a, uint32_t m, vu& high, vu& low) {
  const vu64 pairs = bit_cast<vu64>(a);
  const vu64 even = multiply_low_halves(pairs, m), odd = multiply_low_halves(pairs >> 32, m);
  high = bit_cast<vu>((even >> 32) | (odd & 0xFFFFFFFF00000000u));
  low = bit_cast<vu>((even & 0xFFFFFFFFu) | (odd << 32));
}

// The four words of the blocks whose numbers have these low and high halves.
inline void philox(vu block_low, vu block_high, uint64_t seed, vu words[4]) {
  vu c0 = block_low, c1 = block_high, c2{}, c3{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// ln x for x in (0, 1], normal: x = m 2^e with m in [sqrt(1/2), sqrt(2)), a degree-9 polynomial for ln m.
inline vf log_of_uniform(vf x) {
  const vi bits = bit_cast<vi>(x) - 0x3F3504F3;
  const vf e = __builtin_convertvector(bits >> 23, vf);
  const vf r = bit_cast<vf>((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const vf square = r * r;
  vf p = splat(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return (p * r * square + e * -2.12194440e-4f - 0.5f * square) + r + e * 0.693359375f;
}

// sqrt(-2 ln u) with u = float(word) 2^-32 + 2^-33.
inline vf magnitude(vu word) {
  const vf u = __builtin_convertvector(word, vf) * 0x1p-32f + 0x1p-33f;
  return square_root(vmax(-2.0f * log_of_uniform(u), vf{}));
}

// cos and sin of 2 pi v with v = (word >> 8) 2^-24: the quarter turn is exact, the rest lies within pi / 4.
inline void turn(vu word, vf& cosine, vf& sine) {
  const vi steps = bit_cast<vi>(word >> 8), quarter = (steps + 0x200000) >> 22;
  const vf a = __builtin_convertvector(steps - (quarter << 22), vf) * 3.7450704e-7f;  // 2 pi 2^-24
  const vf square = a * a;
  vf s = splat(-1.9515295891e-4f);
  s = s * square + 8.3321608736e-3f;
  s = s * square - 1.6666654611e-1f;
  s = s * square * a + a;
  vf c = splat(2.443315711809948e-5f);
  c = c * square - 1.388731625493765e-3f;
  c = c * square + 4.166664568298827e-2f;
  c = c * square * square - 0.5f * square + 1.0f;
  const vi odd = (quarter & 1) != 0, flip_sine = (quarter & 2) << 30, flip_cosine = ((quarter + 1) & 2) << 30;
  cosine = bit_cast<vf>(bit_cast<vi>(odd ? s : c) ^ flip_cosine);
  sine = bit_cast<vf>(bit_cast<vi>(odd ? c : s) ^ flip_sine);
}

// The normals of elements first .. first + count - 1 in logical order; `out` has room for 8 kWidth more.
inline void normals_in_order(float* out, int64_t first, int64_t count, uint64_t seed) {
  int64_t block = first >> 2;
  const int64_t skipped = first & 3;
  float lanes[4][kWidth];
  vu words[4];
  for (int64_t done = -skipped; done < count; done += 4 * kWidth, block += kWidth) {
    vu low, high;
    for (int i = 0; i < kWidth; ++i) {
      low[i] = static_cast<uint32_t>(block + i);
      high[i] = static_cast<uint32_t>(static_cast<uint64_t>(block + i) >> 32);
    }
    philox(low, high, seed, words);
    for (int pair = 0; pair < 4; pair += 2) {
      vf c, s;
      turn(words[pair + 1], c, s);
      const vf m = magnitude(words[pair]);
      store(lanes[pair], m * c);
      store(lanes[pair + 1], m * s);
    }
    for (int i = 0; i < kWidth; ++i)
      for (int j = 0; j < 4; ++j)
        if (done + 4 * i + j >= 0) out[done + 4 * i + j] = lanes[j][i];
  }
}

// The normals of kWidth elements anywhere: each lane draws its element's block and keeps one of its four.
inline vf normals_at(const int64_t* elements, uint64_t seed) {
  vu low, high, words[4];
  vi lane;
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t block = static_cast<uint64_t>(elements[i]) >> 2;
    low[i] = static_cast<uint32_t>(block), high[i] = static_cast<uint32_t>(block >> 32);
    lane[i] = static_cast<int32_t>(elements[i] & 3);
  }
  philox(low, high, seed, words);
  const vi second = lane >= 2;
  vf c, s;
  turn(second ? words[3] : words[1], c, s);
  return magnitude(second ? words[2] : words[0]) * ((lane & 1) != 0 ? s : c);
}

FASTVDIFF_END_ISA
