// Moves (frames, dim) blocks of kWidth neighbouring positions between a tensor of any strides and lane scratch:
// vectors [frame][dim] whose lane is the position, `row` vectors from a frame to the next.
#pragma once

#include "fastvdiff/temporal_attention.h"
#include "transpose.h"

FASTVDIFF_BEGIN_ISA

constexpr int64_t kAlign = 16;  // floats of a cache line

inline int64_t whole_lines(int64_t floats) { return (floats + kAlign - 1) / kAlign * kAlign; }

// p, moved on to the start of a cache line: by less than kAlign.
inline float* aligned(float* p) {
  const uintptr_t bytes = kAlign * sizeof(float);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + bytes - 1) / bytes * bytes);
}

inline float* vec(float* scratch, int64_t index) { return scratch + index * kWidth; }
inline const float* vec(const float* scratch, int64_t index) { return scratch + index * kWidth; }

// Where a strip starts: its sample, first head and first position.
struct Place {
  int64_t b, h, s;
};

// Blocks of one head that are read and written together, because they are neighbours in memory: kWidth positions each.
template <class T>
struct Strip {
  T* data;
  int64_t stride_t, stride_s, stride_d;
  int64_t stride_block;
  int64_t positions;  // from the first one on
  int blocks;

  Strip(const FrameView& x, const Place& at, int64_t positions, int64_t blocks)
      : data(static_cast<T*>(x.data) + at.b * x.stride_b + at.h * x.stride_h + at.s * x.stride_s),
        stride_t(x.stride_t),
        stride_s(x.stride_s),
        stride_d(x.stride_d),
        stride_block(kWidth * x.stride_s),
        positions(positions),
        blocks(static_cast<int>(blocks)) {}

  // Positions of block i that exist, at most kWidth.
  int64_t lanes(int i) const {
    const int64_t left = positions - i * kWidth;
    return left < kWidth ? left : kWidth;
  }
};

// ---- four neighbouring dims of every position: 4 x kWidth transposes ----------------------------------------------

constexpr int kDims = 4;

// Element groups of 4 from kWidth / 4 places, one after the other in a vector.
inline vf load_4s(const float* const* from) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from[0]));
  v = _mm512_maskz_insertf32x4(kAllLanes, v, _mm_loadu_ps(from[1]), 1);
  v = _mm512_maskz_insertf32x4(kAllLanes, v, _mm_loadu_ps(from[2]), 2);
  return (vf)_mm512_maskz_insertf32x4(kAllLanes, v, _mm_loadu_ps(from[3]), 3);
#elif defined(__AVX2__)
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[0])), _mm_loadu_ps(from[1]), 1);
#else
  return load(from[0]);
#endif
}
template <class T>
inline vf load_4s(const T* const* from) {
  typedef uint64_t packed __attribute__((vector_size(kWidth * 2)));
  packed words;
  for (int i = 0; i < kWidth / kDims; ++i) {
    uint64_t word;
    std::memcpy(&word, from[i], sizeof(word));
    words[i] = word;
  }
  T halves[kWidth];
  std::memcpy(halves, &words, sizeof(words));
  return load(halves);
}

// ---- whole blocks -------------------------------------------------------------------------------------------------

enum class Layout { lanes_next, dims_next, apart };

template <class T>
inline Layout layout_of(const Strip<T>& x, int64_t dim) {
  if (x.stride_s == 1) return Layout::lanes_next;
  return x.stride_d == 1 && dim >= kDims ? Layout::dims_next : Layout::apart;
}

template <class T>
inline vf gather(const T* p, int64_t stride, int64_t lanes) {
  float part[kWidth] = {};
  for (int64_t i = 0; i < lanes; ++i) part[i] = to_float(p[i * stride]);
  return load(part);
}
template <class T>
inline void scatter(T* p, int64_t stride, int64_t lanes, vf v) {
  float part[kWidth];
  store(part, v);
  for (int64_t i = 0; i < lanes; ++i) p[i * stride] = from_float<T>(part[i]);
}

// Runs f(t, d) in the order that walks memory forwards.
template <class F>
inline void walk(int64_t frames, int64_t dim, bool frames_inside, F&& f) {
  if (frames_inside) {
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t t = 0; t < frames; ++t) f(t, d);
  } else {
    for (int64_t t = 0; t < frames; ++t)
      for (int64_t d = 0; d < dim; ++d) f(t, d);
  }
}

// Reads the blocks of a strip into out, `size` vectors apart. Lanes past the last position hold zeros or another
// position's values: arithmetic whose result no one reads.
template <class T>
void pack(const Strip<const T>& x, int64_t frames, int64_t dim, float* out, int64_t row, int64_t size) {
  const Layout layout = layout_of(x, dim);
  if (layout == Layout::lanes_next) {
    walk(frames, dim, x.stride_t < x.stride_d, [&](int64_t t, int64_t d) {
      const T* from = x.data + t * x.stride_t + d * x.stride_d;
      for (int i = 0; i < x.blocks; ++i) {
        const T* block = from + i * x.stride_block;
        store(vec(out, i * size + t * row + d), load_some(block, x.lanes(i)));
      }
    });
    return;
  }
  const int64_t quads = layout == Layout::dims_next ? dim / kDims * kDims : 0;
  for (int64_t t = 0; t < frames; ++t) {
    for (int i = 0; i < x.blocks; ++i) {
      const int64_t lanes = x.lanes(i);
      int64_t offset[kWidth];
      for (int j = 0; j < kWidth; ++j) offset[j] = (j < lanes ? j : lanes - 1) * x.stride_s;
      const T* from = x.data + t * x.stride_t + i * x.stride_block;
      float* to = vec(out, i * size + t * row);
      for (int64_t d = 0; d < quads; d += kDims) {
        vf quad[kDims];
        for (int j = 0; j < kDims; ++j) {
          const T* places[kWidth / kDims];
          for (int g = 0; g < kWidth / kDims; ++g) places[g] = from + offset[g * kDims + j] + d;
          quad[j] = load_4s(places);
        }
        transpose_4x4(quad);
        for (int j = 0; j < kDims; ++j) store(vec(to, d + j), quad[j]);
      }
      for (int64_t d = quads; d < dim; ++d) store(vec(to, d), gather(from + d * x.stride_d, x.stride_s, lanes));
    }
  }
}

// The way back: writes only the positions that exist.
template <class T>
void unpack(const Strip<T>& y, int64_t frames, int64_t dim, const float* in, int64_t row, int64_t size) {
  const Layout layout = layout_of(y, dim);
  if (layout == Layout::lanes_next) {
    walk(frames, dim, y.stride_t < y.stride_d, [&](int64_t t, int64_t d) {
      T* to = y.data + t * y.stride_t + d * y.stride_d;
      for (int i = 0; i < y.blocks; ++i) {
        store_some(to + i * y.stride_block, load(vec(in, i * size + t * row + d)), y.lanes(i));
      }
    });
    return;
  }
  const int64_t quads = layout == Layout::dims_next ? dim / kDims * kDims : 0;
  for (int64_t t = 0; t < frames; ++t) {
    for (int i = 0; i < y.blocks; ++i) {
      const int64_t lanes = y.lanes(i);
      const float* from = vec(in, i * size + t * row);
      T* to = y.data + t * y.stride_t + i * y.stride_block;
      for (int64_t d = 0; d < quads; d += kDims) {
        vf quad[kDims];
        for (int j = 0; j < kDims; ++j) quad[j] = load(vec(from, d + j));
        transpose_4x4(quad);
        for (int j = 0; j < kDims; ++j) {
          T part[kWidth];
          store(part, quad[j]);
          for (int64_t lane = j; lane < lanes; lane += kDims)
            std::memcpy(to + lane * y.stride_s + d, part + lane - j, kDims * sizeof(T));
        }
      }
      for (int64_t d = quads; d < dim; ++d)
        scatter(to + d * y.stride_d, y.stride_s, lanes, load(vec(from, d)));
    }
  }
}

FASTVDIFF_END_ISA
