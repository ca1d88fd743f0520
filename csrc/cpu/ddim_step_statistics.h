// The two statistics a step may need of a whole sample before it: the rescale of guidance and the dynamic threshold.
#pragma once

#include "ddim_step_terms.h"

FASTVDIFF_BEGIN_ISA

// ---- standard deviations ------------------------------------------------------------------------------------------

struct Moments {
  double mean, centred;  // of a block, and the sum of squares around that mean
};

inline Moments moments_of(const float* values, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += 256) {
    vf part{};
    for_vectors(i, n < i + 256 ? n : i + 256,
                [&](int64_t j, int64_t m) FASTVDIFF_INLINE { part += load_some(values + j, m); });
    sum += sum_lanes(part);
  }
  const float mean = static_cast<float>(sum / static_cast<double>(n));
  double squares = 0, rest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(values[i]) - mean;
    rest += d, squares += d * d;
  }
  const double shift = rest / static_cast<double>(n);  // what rounding the mean left
  return {mean + shift, squares - rest * shift};
}

inline void merge(Moments& total, int64_t seen, const Moments& block, int64_t n) {
  const double delta = block.mean - total.mean, all = static_cast<double>(seen + n);
  total.mean += delta * static_cast<double>(n) / all;
  total.centred += block.centred + delta * delta * static_cast<double>(seen) * static_cast<double>(n) / all;
}

// workspace: two Moments a block; then factors[b] = rescale * std(output) / std(guided) + 1 - rescale.
template <class T>
void rescale_factors(const DdimStepParams& p, float* factors, Moments* blocks) {
  const int64_t per_sample = (p.elements + kDdimBlock - 1) / kDdimBlock;
  for_blocks(p, [&](int64_t b, int64_t first, int64_t last) {
    float plain[kDdimBlock], guided[kDdimBlock];
    const int64_t base = b * p.elements;
    const DdimInputs<T> in(p);
    for_runs(p, b, first, last, [&](int64_t begin, int64_t end, float scale) {
      for_vectors(begin, end, [=, &plain, &guided](int64_t i, int64_t n) FASTVDIFF_INLINE {
        store_some(plain + (i - first), load_some(in.output + base + i, n), n);
        store_some(guided + (i - first), in.guided(scale, base + i, n), n);
      });
    });
    Moments* out = blocks + 2 * (b * per_sample + first / kDdimBlock);
    out[0] = moments_of(plain, last - first), out[1] = moments_of(guided, last - first);
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    Moments plain{}, guided{};
    for (int64_t k = 0; k < per_sample; ++k) {
      const int64_t seen = k * kDdimBlock, n = p.elements - seen < kDdimBlock ? p.elements - seen : kDdimBlock;
      merge(plain, seen, blocks[2 * (b * per_sample + k)], n);
      merge(guided, seen, blocks[2 * (b * per_sample + k) + 1], n);
    }
    // The unbiased divisors cancel, except that one value has no spread at all.
    const double ratio = p.elements > 1 ? __builtin_sqrt(plain.centred / guided.centred) : __builtin_nan("");
    factors[b] = static_cast<float>(p.guidance_rescale * ratio + 1 - p.guidance_rescale);
  }
}

// ---- quantile of magnitudes -----------------------------------------------------------------------------------------
//
// Bits of non-negative floats sort as the floats do, so a histogram of their top bits finds the bin of a rank, one of
// the next bits inside that bin the next digits, and a third the value itself: no sort, no limit on the size.

constexpr int kBins = 2048;
constexpr uint32_t kInfinityBits = 0x7F800000u;

struct Selection {
  uint32_t bits;   // of the value with this rank
  int64_t not_above;  // how many values are <= it
  bool nan;        // whether any value is
};

// counts: (threads, kBins).
inline Selection select_rank(const uint32_t* values, int64_t n, int64_t rank, int threads, int64_t* counts) {
  constexpr int shifts[3] = {20, 9, 0};
  constexpr uint32_t masks[3] = {0x7FF, 0x7FF, 0x1FF};
  Selection found{0, 0, false};
  uint32_t prefix_mask = 0;
  for (int pass = 0; pass < 3; ++pass) {
    for (int64_t i = 0; i < static_cast<int64_t>(threads) * kBins; ++i) counts[i] = 0;
    const int shift = shifts[pass];
    const uint32_t mask = masks[pass], prefix = found.bits;
    parallel_for(threads, n, [&](int64_t begin, int64_t end, int worker) {
      int64_t* mine = counts + worker * kBins;
      for (int64_t i = begin; i < end; ++i)
        if ((values[i] & prefix_mask) == prefix) ++mine[(values[i] >> shift) & mask];
    });
    for (int w = 1; w < threads; ++w)
      for (int bin = 0; bin < kBins; ++bin) counts[bin] += counts[w * kBins + bin];
    uint32_t bin = 0;
    while (found.not_above + counts[bin] <= rank) found.not_above += counts[bin++];
    found.bits |= bin << shift;
    prefix_mask |= mask << shift;
    if (pass == 2) found.not_above += counts[bin];
  }
  return found;
}

inline uint32_t smallest_above(const uint32_t* values, int64_t n, uint32_t bits, int threads, int64_t* smallest) {
  for (int w = 0; w < threads; ++w) smallest[w] = UINT32_MAX;
  parallel_for(threads, n, [&](int64_t begin, int64_t end, int worker) {
    uint32_t least = UINT32_MAX;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t candidate = values[i] > bits ? values[i] : UINT32_MAX;
      least = candidate < least ? candidate : least;
    }
    smallest[worker] = least;
  });
  uint32_t least = UINT32_MAX;
  for (int w = 0; w < threads; ++w) least = smallest[w] < least ? static_cast<uint32_t>(smallest[w]) : least;
  return least;
}

// The ratio quantile of n magnitudes, between neighbours linearly; NaN if any is NaN (those sort last).
inline double magnitude_quantile(const uint32_t* values, int64_t n, double ratio, int threads, int64_t* counts) {
  const double position = ratio * static_cast<double>(n - 1);
  const int64_t below = static_cast<int64_t>(__builtin_floor(position));
  if (smallest_above(values, n, kInfinityBits, threads, counts) != UINT32_MAX) return __builtin_nan("");
  const Selection low = select_rank(values, n, below, threads, counts);
  const uint32_t high = below + 1 < n && low.not_above <= below + 1
                            ? smallest_above(values, n, low.bits, threads, counts)
                            : low.bits;
  const double low_value = bit_cast<float>(low.bits), high_value = bit_cast<float>(high);
  return low.bits == high ? low_value : low_value + (position - static_cast<double>(below)) * (high_value - low_value);
}

// Below this many elements a thread, starting threads costs more than the sweep.
constexpr int64_t kElementsPerThread = 32768;

// limits[b] = the quantile of |x0| between 1 and threshold_max; magnitudes: room for one sample.
template <class T, Prediction kind>
void dynamic_limits(const DdimStepParams& p, const float* factors, float* limits, uint32_t* magnitudes,
                    int64_t* counts) {
  const int64_t useful = 1 + p.elements / kElementsPerThread;
  const int threads = useful < p.threads ? static_cast<int>(useful) : p.threads;
  for (int64_t b = 0; b < p.batch; ++b) {
    DdimTerms t = ddim_terms(p, b);
    if (factors) t.rescale = factors[b];
    const int64_t base = b * p.elements, blocks = (p.elements + kDdimBlock - 1) / kDdimBlock;
    parallel_for(threads, blocks, [&](int64_t begin_block, int64_t end_block, int) {
      const int64_t last = end_block * kDdimBlock < p.elements ? end_block * kDdimBlock : p.elements;
      for_runs(p, b, begin_block * kDdimBlock, last, [&](int64_t begin, int64_t end, float scale) {
        const DdimInputs<T> in(p);
        for_vectors(begin, end, [=](int64_t i, int64_t n) FASTVDIFF_INLINE {
          const vf x = load_some(in.sample + base + i, n);
          const vf x0 = original_of<kind>(t, x, in.guided(scale, base + i, n) * t.rescale);
          store_some(reinterpret_cast<float*>(magnitudes) + i, bit_cast<vf>(bit_cast<vi>(x0) & 0x7FFFFFFF), n);
        });
      });
    });
    const double s = magnitude_quantile(magnitudes, p.elements, p.threshold_ratio, threads, counts);
    const double raised = s < 1 ? 1 : s;  // NaN passes both
    limits[b] = static_cast<float>(raised > p.threshold_max ? p.threshold_max : raised);
  }
}

FASTVDIFF_END_ISA
