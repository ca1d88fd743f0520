// What the two layouts of group_norm_silu share: the plan of a call, statistics, the pointwise formulas and the sums
// that become parameter gradients. Included by group_norm_silu.cpp alone.
#pragma once

#include <type_traits>

#include "fastvdiff/group_norm_silu.h"
#include "parallel.h"
#include "simd.h"

FASTVDIFF_BEGIN_ISA
namespace {

using Params = GroupNormSiluParams;

constexpr int64_t kTile = 4096;    // values summed in float32 before float64 takes over
constexpr int64_t kGrain = 16384;  // values that are worth another thread

template <class A>
inline A min_of(A a, A b) {
  return a < b ? a : b;
}

// What a call's sizes and strides decide.
struct Plan {
  bool channels_last;
  int64_t width;   // channels of a group
  int64_t count;   // values of a group
  int64_t frame;   // positions of a frame
  int64_t runs;    // rows: pieces of a group whose moments are taken one by one
  int64_t block;   // channels_last: positions of a block
  int64_t blocks;  // channels_last: blocks of a frame
  int threads;

  explicit Plan(const Params& p) {
    channels_last = p.positions > 1 && p.stride_xc == 1 && p.stride_xs != 1;
    width = p.channels / p.groups;
    count = width * p.positions;
    frame = p.positions / p.frames;
    runs = p.stride_xc == p.positions && p.positions < kTile ? 1 : width;
    block = 32768 / p.channels;
    block = block < 64 ? 64 : block > 512 ? 512 : block;
    blocks = (frame + block - 1) / block;
    const int64_t useful = p.batch * p.channels * p.positions / kGrain;
    threads = static_cast<int>(min_of<int64_t>(p.threads, useful < 1 ? 1 : useful));
  }
};

// ---- statistics ---------------------------------------------------------------------------------------------------

struct Moments {
  double n, mean, m2;  // m2: centred sum of squares

  void merge(double other_n, double other_mean, double other_m2) {
    const double total = n + other_n, delta = other_mean - mean;
    mean += delta * (other_n / total);
    m2 += other_m2 + delta * delta * (n * other_n / total);
    n = total;
  }
};

// A group's statistics as the normalisation uses them; mean + low is the mean.
struct Group {
  float mean, low, rstd;
};

Group finish(double mean, double variance, const Params& p, int64_t unit) {
  const float rounded = static_cast<float>(mean);
  const Group group{rounded, static_cast<float>(mean - rounded),
                    static_cast<float>(1.0 / __builtin_sqrt(variance + static_cast<double>(p.eps)))};
  p.moments[2 * unit] = group.mean;
  p.moments[2 * unit + 1] = group.rstd;
  return group;
}

// One group from `pieces` moments, `stride` apart.
Group combine_moments(const Params& p, int64_t unit, const Moments* moments, int64_t pieces, int64_t stride) {
  double n = 0, sum = 0, m2 = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    n += moments[i * stride].n;
    sum += moments[i * stride].n * moments[i * stride].mean;
  }
  const double mean = sum / n;
  for (int64_t i = 0; i < pieces; ++i) {
    const double off = moments[i * stride].mean - mean;
    m2 += moments[i * stride].m2 + moments[i * stride].n * off * off;
  }
  return finish(mean, m2 / n, p, unit);
}

Group given_group(const Params& p, const Plan& plan, int64_t unit) {
  return finish(p.stats[2 * unit], p.stats[2 * unit + 1] / static_cast<double>(plan.count), p, unit);
}

Group saved_group(const Params& p, int64_t unit) { return {p.moments[2 * unit], 0.0f, p.moments[2 * unit + 1]}; }

template <class T>
float tile_mean(const T* x, int64_t n) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int k = 0; k < 4; ++k) sum[k] += load(x + i + k * kWidth);
  for (; i < n; i += kWidth) sum[0] += load_n(x + i, min_of<int64_t>(kWidth, n - i));
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(n);
}

// The moments of n values in a row. Each tile is summed around the mean so far, the first around its own.
template <class T>
Moments run_moments(const T* x, int64_t n) {
  Moments total{};
  for (int64_t start = 0; start < n; start += kTile, x += kTile) {
    const int64_t m = min_of(kTile, n - start);
    const float about = start ? static_cast<float>(total.mean) : tile_mean(x, m);
    const vf centre = splat(about);
    vf sum[4] = {}, square[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= m; i += 4 * kWidth)
      for (int k = 0; k < 4; ++k) {
        const vf d = load(x + i + k * kWidth) - centre;
        sum[k] += d;
        square[k] += d * d;
      }
    for (; i < m; i += kWidth) {
      const int64_t lanes = min_of<int64_t>(kWidth, m - i);
      const vf d = keep_n(load_n(x + i, lanes) - centre, lanes);
      sum[0] += d;
      square[0] += d * d;
    }
    const double s = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])), size = static_cast<double>(m);
    const double q = sum_lanes((square[0] + square[1]) + (square[2] + square[3])) - s * s / size;
    total.merge(size, about + s / size, q < 0 ? 0 : q);
  }
  return total;
}

// ---- the pointwise part -------------------------------------------------------------------------------------------

// z = (x - mean) * a + b
template <class V>
struct Affine {
  V mean, a, b;
};

Affine<float> affine(const Params& p, const Group& group, int64_t b, int64_t c, int64_t t) {
  const int64_t at = (b * p.channels + c) * p.frames + t;
  const float one = p.scale ? 1.0f + p.scale[at] : 1.0f;
  const float a = group.rstd * (p.weight ? p.weight[c] : 1.0f) * one;
  const float plain = (p.bias ? p.bias[c] * one : 0.0f) + (p.shift ? p.shift[at] : 0.0f);
  return {group.mean, a, plain - group.low * a};
}

template <bool kSilu>
inline vf forward_value(vf x, const Affine<vf>& k) {
  const vf z = (x - k.mean) * k.a + k.b;
  return kSilu ? silu(z) : z;
}

// dL/dz
template <bool kSilu>
inline vf gradient_value(vf centred, vf grad, const Affine<vf>& k) {
  if (!kSilu) return grad;
  const vf z = centred * k.a + k.b;
  const vf s = sigmoid(z);
  return grad * s * (1.0f + z * (1.0f - s));
}

// Whether the backward's first pass leaves dz in dx for the second, which then needs no sigmoid; rounded to 16 bits it
// would lose too much.
template <class T, bool kSilu>
constexpr bool kept_in_dx() {
  return kSilu && std::is_same<T, float>::value;
}

// dx = dz * a - constant - (x - mean) * slope
template <class V>
struct Spread {
  V constant, slope;
};

// Sums over one channel (of one frame): of dz, and of dz * (x - mean) / std.
struct Sums {
  float plain, normal;
};

// The two group sums of dx's formula, from the channels' sums.
Spread<float> group_spread(const Params& p, const Plan& plan, int64_t unit, const Sums* sums) {
  const int64_t b = unit / p.groups, first = unit % p.groups * plan.width;
  double plain = 0, normal = 0;
  for (int64_t c = first; c < first + plan.width; ++c)
    for (int64_t t = 0; t < p.frames; ++t) {
      const int64_t at = (b * p.channels + c) * p.frames + t;
      const double factor = (p.weight ? p.weight[c] : 1.0) * (p.scale ? 1.0 + p.scale[at] : 1.0);
      plain += factor * sums[at].plain;
      normal += factor * sums[at].normal;
    }
  const double rstd = p.moments[2 * unit + 1], share = rstd / static_cast<double>(plan.count);
  return {static_cast<float>(share * plain), static_cast<float>(share * rstd * normal)};
}

void parameter_gradients(const Params& p, const Sums* sums) {
  for (int64_t c = 0; c < p.channels; ++c) {
    const float weight = p.weight ? p.weight[c] : 1.0f, bias = p.bias ? p.bias[c] : 0.0f;
    double dweight = 0, dbias = 0;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t t = 0; t < p.frames; ++t) {
        const int64_t at = (b * p.channels + c) * p.frames + t;
        const Sums s = sums[at];
        const double one = p.scale ? 1.0 + p.scale[at] : 1.0;
        dweight += one * s.normal;
        dbias += one * s.plain;
        if (p.dscale) p.dscale[at] = weight * s.normal + bias * s.plain;
        if (p.dshift) p.dshift[at] = s.plain;
      }
    if (p.dweight) p.dweight[c] = static_cast<float>(dweight);
    if (p.dbias) p.dbias[c] = static_cast<float>(dbias);
  }
}

}  // namespace
FASTVDIFF_END_ISA
