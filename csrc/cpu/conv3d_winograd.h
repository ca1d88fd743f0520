// Winograd's minimal filtering F(4, 3), once over time or twice over height and width: what the passes share.
//
// Six points: 0, +-3/4, +-3/2 and infinity. In float32 they lose a third to a half of what the usual 0, +-1, +-2 lose
// (0.6e-6 of the result at 64 channels, where the usual ones lose 1.6e-6 and a direct sum 0.3e-6).
#pragma once

#include <algorithm>
#include <limits>

#include "fastvdiff/conv3d_cpu.h"
#include "transpose.h"

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

// The positions of a tensor that the tiles of a run read or write: (frames, rows, columns).
struct Box {
  static constexpr int64_t kMost = 400;  // positions
  int64_t begin[3], end[3];

  int64_t size(int i) const { return end[i] - begin[i]; }
  // From `first` on `count` in dimension i, or what the tensor has of them; at least the nearest it has.
  void clip(int i, int64_t first, int64_t count, int64_t size) {
    begin[i] = std::min(std::max<int64_t>(first, 0), size - 1), end[i] = std::min(std::max<int64_t>(first + count, 1), size);
  }
  // f(offset, length): rows of elements stride[4] apart that make up the box, as long as can be.
  template <class F>
  void for_rows(const int64_t (&stride)[5], F&& f) const {
    int64_t length = size(2), rows = size(1), frames = size(0);
    if (stride[4] == 1 && stride[3] == length) length *= rows, rows = 1;
    if (rows == 1 && stride[4] == 1 && stride[2] == length) length *= frames, frames = 1;
    for (int64_t i = 0; i < frames; ++i)
      for (int64_t j = 0; j < rows; ++j)
        f((begin[0] + i) * stride[2] + (begin[1] + j) * stride[3] + begin[2] * stride[4], length);
  }
};

// Offsets of (t, h, w) in a sample: of a tensor, or of a box whose positions follow each other as vectors.
struct Places {
  int64_t stride[3], origin;

  explicit Places(const int64_t (&tensor)[5]) : stride{tensor[2], tensor[3], tensor[4]}, origin(0) {}
  explicit Places(const Box& box) : stride{box.size(1) * box.size(2) * kWidth, box.size(2) * kWidth, kWidth} {
    origin = -(box.begin[0] * stride[0] + box.begin[1] * stride[1] + box.begin[2] * stride[2]);
  }
  int64_t operator()(int64_t t, int64_t h, int64_t w) const {
    return origin + t * stride[0] + h * stride[1] + w * stride[2];
  }
};

// Of `left` tiles, those from (row, column) on that make up a box: whole rows, or a part of one; `most`, or a whole row.
inline int64_t box_of_tiles(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t left, int64_t most) {
  const int64_t whole = std::min(std::min(most, left) / columns, rows - row);
  return column == 0 && whole > 0 ? whole * columns : std::min(std::min(left, most), columns - column);
}

// 4 x 4 outputs of a frame, from 6 x 6 inputs of each frame under the kernel: 36 products for 144.
struct Planar {
  static constexpr int kPoints = 36, kTaps = 9, kOutputs = 16, kTiles = 24, kChunk = 192, kRun = 16;
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
  int64_t run(int64_t left) const { return box_of_tiles(h / 4, rows, w / 4, columns, left, kRun); }
  Box output_box(const Conv3dCpuParams& p, int64_t tiles) const {
    const int64_t high = (tiles + columns - 1) / columns, wide = std::min(tiles, columns);
    Box box;
    box.clip(0, t, 1, p.out_size[0]), box.clip(1, h, 4 * high, p.out_size[1]), box.clip(2, w, 4 * wide, p.out_size[2]);
    return box;
  }
  Box input_box(const Conv3dCpuParams& p, int64_t slice, int64_t tiles) const {
    const int64_t high = (tiles + columns - 1) / columns, wide = std::min(tiles, columns);
    Box box;
    box.clip(0, t + slice - p.before[0], 1, p.size[0]), box.clip(1, h - p.before[1], 4 * high + 2, p.size[1]);
    box.clip(2, w - p.before[2], 4 * wide + 2, p.size[2]);
    return box;
  }
  void inputs(const Conv3dCpuParams& p, int64_t slice, const Places& places, int64_t* at) const {
    const int64_t frame = inside(t + slice - p.before[0], p.size[0], p.replicate[0]);
    for (int i = 0; i < 6; ++i) {
      const int64_t row = inside(h + i - p.before[1], p.size[1], p.replicate[1]);
      for (int j = 0; j < 6; ++j) {
        const int64_t column = inside(w + j - p.before[2], p.size[2], p.replicate[2]);
        const bool zero = frame < 0 || row < 0 || column < 0;
        at[6 * i + j] = zero ? kOutside : places(frame, row, column);
      }
    }
  }
  void outputs(const Conv3dCpuParams& p, const Places& places, int64_t* at) const {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const bool none = h + i >= p.out_size[1] || w + j >= p.out_size[2];
        at[4 * i + j] = none ? kOutside : places(t, h + i, w + j);
      }
  }
  int64_t frame_of(int) const { return t; }
  static int64_t tap_at(const Conv3dCpuParams& p, int64_t slice, int tap) {
    int64_t at[3] = {slice, tap / 3, tap % 3};
    if (p.flipped) at[0] = p.kernel[0] - 1 - at[0], at[1] = 2 - at[1], at[2] = 2 - at[2];
    return at[0] * p.stride_w[2] + at[1] * p.stride_w[3] + at[2] * p.stride_w[4];
  }
  static bool taps_in_a_row(const Conv3dCpuParams& p) { return p.stride_w[3] == 3 && p.stride_w[4] == 1; }
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
  static constexpr int kPoints = 6, kTaps = 3, kOutputs = 4, kTiles = 96, kChunk = 768, kRun = 64;
  int64_t rows, columns, b, t, h, w;

  static int64_t tiles(const Conv3dCpuParams& p) {
    return p.batch * ((p.out_size[0] + 3) / 4) * p.out_size[1] * p.out_size[2];
  }
  static int64_t slices(const Conv3dCpuParams&) { return 1; }

  Temporal(const Conv3dCpuParams& p, int64_t tile) {
    rows = p.out_size[1], columns = p.out_size[2], w = tile % columns, h = tile / columns % rows;
    const int64_t frames = (p.out_size[0] + 3) / 4, rest = tile / (rows * columns);
    t = rest % frames * 4, b = rest / frames;
  }
  int64_t run(int64_t left) const { return box_of_tiles(h, rows, w, columns, left, kRun); }
  Box output_box(const Conv3dCpuParams& p, int64_t tiles) const {
    Box box;
    box.clip(0, t, 4, p.out_size[0]), box.clip(1, h, (tiles + columns - 1) / columns, rows);
    box.clip(2, w, std::min(tiles, columns), columns);
    return box;
  }
  Box input_box(const Conv3dCpuParams& p, int64_t, int64_t tiles) const {
    Box box;
    box.clip(0, t - p.before[0], 6, p.size[0]);
    box.clip(1, h - p.before[1], (tiles + columns - 1) / columns, p.size[1]);
    box.clip(2, w - p.before[2], std::min(tiles, columns), p.size[2]);
    return box;
  }
  void inputs(const Conv3dCpuParams& p, int64_t, const Places& places, int64_t* at) const {
    const int64_t row = inside(h - p.before[1], p.size[1], p.replicate[1]);
    const int64_t column = inside(w - p.before[2], p.size[2], p.replicate[2]);
    for (int i = 0; i < 6; ++i) {
      const int64_t frame = inside(t + i - p.before[0], p.size[0], p.replicate[0]);
      at[i] = frame < 0 || row < 0 || column < 0 ? kOutside : places(frame, row, column);
    }
  }
  void outputs(const Conv3dCpuParams& p, const Places& places, int64_t* at) const {
    for (int i = 0; i < 4; ++i) at[i] = t + i >= p.out_size[0] ? kOutside : places(t + i, h, w);
  }
  int64_t frame_of(int output) const { return t + output; }
  static int64_t tap_at(const Conv3dCpuParams& p, int64_t, int tap) { return (p.flipped ? 2 - tap : tap) * p.stride_w[2]; }
  static bool taps_in_a_row(const Conv3dCpuParams& p) { return p.stride_w[2] == 1; }
  static void input_points(vf* d) { points_of_input(d, 1); }
  static void point_outputs(vf* m) { outputs_of_points(m, 1); }
  static void output_points(vf* g) { points_of_output(g, 1); }
  static void tap_points(vf* g) { points_of_taps(g, 1); }
  static void point_taps(vf* u) { taps_of_points(u, 1); }
};

// A run of tiles in one tensor, kCount elements each. Channels that are neighbours are read and written where they lie, a
// tile at a time; of others kWidth channels of the run's box are turned into vectors first, or come from there.
template <class Tile, int kCount, class T>
struct Run {
  const int64_t (&stride)[5];
  bool direct;
  Box box;
  int64_t at[Tile::kRun][kCount];
  alignas(64) float turned[Box::kMost * kWidth];

  explicit Run(const int64_t (&stride)[5]) : stride(stride), direct(stride[1] == 1) {}
  Places places() const { return direct ? Places(stride) : Places(box); }

  // The first n <= kWidth channels from `from` on.
  void read(const T* from, int64_t n) {
    if (direct) return;
    float* to = turned;
    box.for_rows(stride, [&](int64_t offset, int64_t length) {
      if (stride[4] == 1) {
        turn_rows(from + offset, length, n, stride[1], to, kWidth);
      } else {
        for (int64_t i = 0; i < length; ++i)
          for (int64_t l = 0; l < kWidth; ++l)
            to[i * kWidth + l] = l < n ? to_float(from[offset + i * stride[4] + l * stride[1]]) : 0.0f;
      }
      to += length * kWidth;
    });
  }
  void load_tile(const T* from, int64_t tile, int64_t n, vf* to) const {
    const int64_t* places = at[tile];
    if (direct)
      for (int i = 0; i < kCount; ++i) to[i] = places[i] == kOutside ? vf{} : load_some(from + places[i], n);
    else
      for (int i = 0; i < kCount; ++i) to[i] = places[i] == kOutside ? vf{} : load(turned + places[i]);
  }
  void store_tile(T* to, int64_t tile, int64_t n, const vf* from) {
    const int64_t* places = at[tile];
    for (int i = 0; i < kCount; ++i) {
      if (places[i] == kOutside) continue;
      if (direct)
        store_some(to + places[i], from[i], n);
      else
        store(turned + places[i], from[i]);
    }
  }
  void write(T* to, int64_t n) const {
    if (direct) return;
    const float* from = turned;
    box.for_rows(stride, [&](int64_t offset, int64_t length) {
      if (stride[4] == 1) {
        turn_back(from, length, n, stride[1], to + offset);
      } else {
        for (int64_t i = 0; i < length; ++i)
          for (int64_t l = 0; l < n; ++l)
            to[offset + i * stride[4] + l * stride[1]] = from_float<T>(from[i * kWidth + l]);
      }
      from += length * kWidth;
    });
  }
};

// The points of the inputs of `count` tiles from `first` on under slice `slice`: each `plane` floats from the last, a
// tile's `row` floats from those of the one before.
template <class Tile, class T>
inline void input_planes(const Conv3dCpuParams& p, int64_t first, int64_t count, int64_t slice, float* v, int64_t row,
                         int64_t plane) {
  Run<Tile, Tile::kPoints, T> x(p.stride_x);
  for (int64_t done = 0, tiles; done < count; done += tiles) {
    const Tile place(p, first + done);
    tiles = x.direct ? 1 : place.run(count - done);
    x.box = place.input_box(p, slice, tiles);
    for (int64_t i = 0; i < tiles; ++i) Tile(p, first + done + i).inputs(p, slice, x.places(), x.at[i]);
    for_vectors(0, p.channels, [&](int64_t c, int64_t n) {
      const T* from = static_cast<const T*>(p.x) + place.b * p.stride_x[0] + c * p.stride_x[1];
      x.read(from, n);
      for (int64_t i = 0; i < tiles; ++i) {
        vf d[Tile::kPoints];
        x.load_tile(from, i, n, d);
        Tile::input_points(d);
        for (int k = 0; k < Tile::kPoints; ++k) store(v + (done + i) * row + k * plane + c, d[k]);
      }
    });
  }
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
