// Winograd's minimal filtering F(4, 3), once over time or twice over height and width: what the passes share.
//
// Six points: 0, +-3/4, +-3/2 and infinity. In float32 they lose a third to a half of what the usual 0, +-1, +-2 lose
// (0.6e-6 of the result at 64 channels, where the usual ones lose 1.6e-6 and a direct sum 0.3e-6).
#pragma once

#include <algorithm>
#include <limits>

#include "fastvdiff/conv3d_cpu.h"
#include "simd.h"

FASTVDIFF_BEGIN_ISA

constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2)), kScaleB = 1 / (2 * kB2 * (kB2 - kA2)), kScale0 = 1 / (kA2 * kB2);

constexpr int kPanel = 2 * kWidth;  // output channels of one product
#if defined(__AVX512F__)
constexpr int kRows = 12;  // tiles of one product: 24 of 32 registers add up
#else
constexpr int kRows = 6;  // 12 of 16
#endif
constexpr int64_t kOutside = std::numeric_limits<int64_t>::min();  // the offset of what padding sets to 0
constexpr int kSkew = 16;  // floats between planes, lest all points of a tile fall into two sets of the first cache

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Values at i * s, i = 0 .. 5, in place of six inputs of a tile.
inline void points_of_input(vf* d, int s) {
  const vf ea = d[4 * s] - kB2 * d[2 * s], oa = kA * (d[3 * s] - kB2 * d[s]);
  const vf eb = d[4 * s] - kA2 * d[2 * s], ob = kB * (d[3 * s] - kA2 * d[s]);
  const vf first = d[4 * s] - (kA2 + kB2) * d[2 * s] + (kA2 * kB2) * d[0];
  const vf last = d[5 * s] - (kA2 + kB2) * d[3 * s] + (kA2 * kB2) * d[s];
  d[0] = first, d[s] = ea + oa, d[2 * s] = ea - oa, d[3 * s] = eb + ob, d[4 * s] = eb - ob, d[5 * s] = last;
}

// Four outputs in place of the first four of six points.
inline void outputs_of_points(vf* m, int s) {
  const vf sa = m[s] + m[2 * s], da = m[s] - m[2 * s], sb = m[3 * s] + m[4 * s], db = m[3 * s] - m[4 * s];
  m[0] = m[0] + sa + sb;
  m[s] = kA * da + kB * db;
  m[2 * s] = kA2 * sa + kB2 * sb;
  m[3 * s] = (kA * kA2) * da + (kB * kB2) * db + m[5 * s];
}

// Six points in place of four outputs: the transpose of outputs_of_points.
inline void points_of_output(vf* g, int s) {
  const vf ea = g[0] + kA2 * g[2 * s], oa = kA * (g[s] + kA2 * g[3 * s]);
  const vf eb = g[0] + kB2 * g[2 * s], ob = kB * (g[s] + kB2 * g[3 * s]);
  g[5 * s] = g[3 * s], g[s] = ea + oa, g[2 * s] = ea - oa, g[3 * s] = eb + ob, g[4 * s] = eb - ob;
}

// Six points in place of three taps.
inline void points_of_taps(vf* g, int s) {
  const vf ea = (g[0] + kA2 * g[2 * s]) * kScaleA, oa = (kA * kScaleA) * g[s];
  const vf eb = (g[0] + kB2 * g[2 * s]) * kScaleB, ob = (kB * kScaleB) * g[s];
  g[5 * s] = g[2 * s], g[0] = g[0] * kScale0;
  g[s] = ea + oa, g[2 * s] = ea - oa, g[3 * s] = eb + ob, g[4 * s] = eb - ob;
}

// Three taps in place of six points: the transpose of points_of_taps.
inline void taps_of_points(vf* u, int s) {
  const vf sa = (u[s] + u[2 * s]) * kScaleA, da = (u[s] - u[2 * s]) * kScaleA;
  const vf sb = (u[3 * s] + u[4 * s]) * kScaleB, db = (u[3 * s] - u[4 * s]) * kScaleB;
  u[0] = u[0] * kScale0 + sa + sb, u[s] = kA * da + kB * db, u[2 * s] = kA2 * sa + kB2 * sb + u[5 * s];
}

// An index beyond a dimension of `size`: the edge's, or -1 for zero.
inline int64_t inside(int64_t i, int64_t size, bool replicate) {
  if (i >= 0 && i < size) return i;
  return replicate ? std::min(std::max<int64_t>(i, 0), size - 1) : -1;
}

// 4 x 4 outputs of a frame, from 6 x 6 inputs of each frame under the kernel: 36 products for 144.
struct Planar {
  static constexpr int kPoints = 36, kTaps = 9, kOutputs = 16, kTiles = 24, kChunk = 192;
  int64_t rows, columns, b, t, h, w;

  static int64_t tiles(const Conv3dCpuParams& p) {
    return p.batch * p.out_size[0] * ((p.out_size[1] + 3) / 4) * ((p.out_size[2] + 3) / 4);
  }
  static int64_t slices(const Conv3dCpuParams& p) { return p.kernel[0]; }  // of the kernel, summed as channels are

  Planar(const Conv3dCpuParams& p, int64_t tile) {
    rows = (p.out_size[1] + 3) / 4, columns = (p.out_size[2] + 3) / 4;
    w = tile % columns * 4, h = tile / columns % rows * 4, t = tile / (columns * rows) % p.out_size[0];
    b = tile / (columns * rows * p.out_size[0]);
  }
  void inputs(const Conv3dCpuParams& p, int64_t slice, int64_t* at) const {
    const int64_t frame = inside(t + slice - p.before[0], p.size[0], p.replicate[0]);
    for (int i = 0; i < 6; ++i) {
      const int64_t row = inside(h + i - p.before[1], p.size[1], p.replicate[1]);
      for (int j = 0; j < 6; ++j) {
        const int64_t column = inside(w + j - p.before[2], p.size[2], p.replicate[2]);
        const bool zero = frame < 0 || row < 0 || column < 0;
        at[6 * i + j] = zero ? kOutside
                             : b * p.stride_x[0] + frame * p.stride_x[2] + row * p.stride_x[3] + column * p.stride_x[4];
      }
    }
  }
  void outputs(const Conv3dCpuParams& p, const int64_t (&stride)[5], int64_t* at) const {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const bool none = h + i >= p.out_size[1] || w + j >= p.out_size[2];
        at[4 * i + j] = none ? kOutside : b * stride[0] + t * stride[2] + (h + i) * stride[3] + (w + j) * stride[4];
      }
  }
  int64_t frame_of(int) const { return t; }
  static int64_t tap_at(const Conv3dCpuParams& p, int64_t slice, int tap) {
    int64_t at[3] = {slice, tap / 3, tap % 3};
    if (p.flipped) at[0] = p.kernel[0] - 1 - at[0], at[1] = 2 - at[1], at[2] = 2 - at[2];
    return at[0] * p.stride_w[2] + at[1] * p.stride_w[3] + at[2] * p.stride_w[4];
  }
  static void input_points(vf* d) {
    for (int j = 0; j < 6; ++j) points_of_input(d + j, 6);
    for (int i = 0; i < 6; ++i) points_of_input(d + 6 * i, 1);
  }
  static void point_outputs(vf* m) {  // 16 values in front
    for (int j = 0; j < 6; ++j) outputs_of_points(m + j, 6);
    for (int i = 0; i < 4; ++i) {
      outputs_of_points(m + 6 * i, 1);
      for (int j = 0; j < 4; ++j) m[4 * i + j] = m[6 * i + j];
    }
  }
  static void output_points(vf* g) {  // from 16 values in front
    for (int i = 3; i >= 0; --i) {
      for (int j = 3; j >= 0; --j) g[6 * i + j] = g[4 * i + j];
      points_of_output(g + 6 * i, 1);
    }
    for (int j = 0; j < 6; ++j) points_of_output(g + j, 6);
  }
  static void tap_points(vf* g) {  // from 9 values in front
    for (int i = 2; i >= 0; --i) {
      for (int j = 2; j >= 0; --j) g[6 * i + j] = g[3 * i + j];
      points_of_taps(g + 6 * i, 1);
    }
    for (int j = 0; j < 6; ++j) points_of_taps(g + j, 6);
  }
  static void point_taps(vf* u) {  // 9 values in front
    for (int j = 0; j < 6; ++j) taps_of_points(u + j, 6);
    for (int i = 0; i < 3; ++i) {
      taps_of_points(u + 6 * i, 1);
      for (int j = 0; j < 3; ++j) u[3 * i + j] = u[6 * i + j];
    }
  }
};

// 4 output frames of a position, from 6: 6 products for 12.
struct Temporal {
  static constexpr int kPoints = 6, kTaps = 3, kOutputs = 4, kTiles = 96, kChunk = 768;
  int64_t b, t, h, w;

  static int64_t tiles(const Conv3dCpuParams& p) {
    return p.batch * ((p.out_size[0] + 3) / 4) * p.out_size[1] * p.out_size[2];
  }
  static int64_t slices(const Conv3dCpuParams&) { return 1; }

  Temporal(const Conv3dCpuParams& p, int64_t tile) {
    w = tile % p.out_size[2], h = tile / p.out_size[2] % p.out_size[1];
    const int64_t frames = (p.out_size[0] + 3) / 4, rest = tile / (p.out_size[1] * p.out_size[2]);
    t = rest % frames * 4, b = rest / frames;
  }
  void inputs(const Conv3dCpuParams& p, int64_t, int64_t* at) const {
    const int64_t row = inside(h - p.before[1], p.size[1], p.replicate[1]);
    const int64_t column = inside(w - p.before[2], p.size[2], p.replicate[2]);
    for (int i = 0; i < 6; ++i) {
      const int64_t frame = inside(t + i - p.before[0], p.size[0], p.replicate[0]);
      const bool zero = frame < 0 || row < 0 || column < 0;
      at[i] = zero ? kOutside
                   : b * p.stride_x[0] + frame * p.stride_x[2] + row * p.stride_x[3] + column * p.stride_x[4];
    }
  }
  void outputs(const Conv3dCpuParams& p, const int64_t (&stride)[5], int64_t* at) const {
    for (int i = 0; i < 4; ++i)
      at[i] = t + i >= p.out_size[0] ? kOutside
                                     : b * stride[0] + (t + i) * stride[2] + h * stride[3] + w * stride[4];
  }
  int64_t frame_of(int output) const { return t + output; }
  static int64_t tap_at(const Conv3dCpuParams& p, int64_t, int tap) { return (p.flipped ? 2 - tap : tap) * p.stride_w[2]; }
  static void input_points(vf* d) { points_of_input(d, 1); }
  static void point_outputs(vf* m) { outputs_of_points(m, 1); }
  static void output_points(vf* g) { points_of_output(g, 1); }
  static void tap_points(vf* g) { points_of_taps(g, 1); }
  static void point_taps(vf* u) { taps_of_points(u, 1); }
};

// The first n <= kWidth channels from `channel` on at each of `count` offsets, channels `step` elements apart.
template <class T>
inline void gather(const T* from, const int64_t* at, int count, int64_t channel, int64_t step, int64_t n, vf* to) {
  if (step == 1) {
    for (int i = 0; i < count; ++i) to[i] = at[i] == kOutside ? vf{} : load_some(from + at[i] + channel, n);
    return;
  }
  float lanes[36][kWidth] = {};
  for (int64_t l = 0; l < n; ++l) {
    const T* plane = from + (channel + l) * step;
    for (int i = 0; i < count; ++i) lanes[i][l] = at[i] == kOutside ? 0.0f : to_float(plane[at[i]]);
  }
  for (int i = 0; i < count; ++i) to[i] = load(lanes[i]);
}

template <class T>
inline void scatter(T* to, const int64_t* at, int count, int64_t channel, int64_t step, int64_t n, const vf* from) {
  if (step == 1) {
    for (int i = 0; i < count; ++i)
      if (at[i] != kOutside) store_some(to + at[i] + channel, from[i], n);
    return;
  }
  float lanes[16][kWidth];
  for (int i = 0; i < count; ++i) store(lanes[i], from[i]);
  for (int64_t l = 0; l < n; ++l) {
    T* plane = to + (channel + l) * step;
    for (int i = 0; i < count; ++i)
      if (at[i] != kOutside) plane[at[i]] = from_float<T>(lanes[i][l]);
  }
}

// The points of tile `tile`'s inputs under slice `slice`, each `plane` floats from the last, kWidth channels at a time.
template <class Tile, class T>
inline void input_planes(const Conv3dCpuParams& p, int64_t tile, int64_t slice, float* v, int64_t plane) {
  int64_t at[Tile::kPoints];
  Tile(p, tile).inputs(p, slice, at);
  for_vectors(0, p.channels, [&](int64_t c, int64_t n) {
    vf d[Tile::kPoints];
    gather(static_cast<const T*>(p.x), at, Tile::kPoints, c, p.stride_x[1], n, d);
    Tile::input_points(d);
    for (int i = 0; i < Tile::kPoints; ++i) store(v + i * plane + c, d[i]);
  });
}

// m[r][k] (+)= sum over i < depth of a[r, i] b[i, k], for kRows rows and kPanel columns: what is there is added last, so
// that long sums are sums of shorter ones.
template <bool kAdd>
inline void product(const float* a, int64_t row, int64_t column, const float* b, int64_t b_row, float* m, int64_t m_row,
                    int64_t depth) {
  vf sums[kRows][2] = {};
  for (int64_t i = 0; i < depth; ++i) {
    const vf first = load(b + i * b_row), second = load(b + i * b_row + kWidth);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const vf value = splat(a[r * row + i * column]);
      sums[r][0] += value * first;
      sums[r][1] += value * second;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int h = 0; h < 2; ++h) {
      float* to = m + r * m_row + h * kWidth;
      store(to, kAdd ? load(to) + sums[r][h] : sums[r][h]);
    }
}

// f(Tile, T) for the kind of kernel and the dtype of a call.
template <class F>
inline void with_types(const Conv3dCpuParams& p, F&& f) {
  const auto with_dtype = [&](auto* tile) {
    switch (p.dtype) {
      case DType::bf16: return f(tile, static_cast<bf16*>(nullptr));
      case DType::f16: return f(tile, static_cast<f16*>(nullptr));
      default: return f(tile, static_cast<float*>(nullptr));
    }
  };
  if (p.kernel[1] == 3)
    with_dtype(static_cast<Planar*>(nullptr));
  else
    with_dtype(static_cast<Temporal*>(nullptr));
}

FASTVDIFF_END_ISA
