// Arithmetic on lane scratch: kWidth independent attentions at once, one per lane, so that nothing crosses lanes.
#pragma once

#include "temporal_attention_lanes.h"

FASTVDIFF_BEGIN_ISA

// ---- products -----------------------------------------------------------------------------------------------------

// A matrix of vectors in lane scratch, with the strides of its two indices in vectors.
template <class T>
struct Matrix {
  T* data;
  int64_t row, col;
};

constexpr int kTileRows = 4;
constexpr int kTileCols = kWidth == 16 ? 4 : 2;  // accumulators and operands fit the registers of the set

template <int Rows, int Cols>
inline void product_tile(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t b_col,
                         int64_t inner, float factor, float* c, int64_t c_row, int64_t c_col) {
  vf sum[Rows][Cols] = {};
  for (int64_t l = 0; l < inner; ++l) {
    vf right[Cols];
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) right[j] = load(vec(b, l * b_row + j * b_col));
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const vf left = load(vec(a, i * a_row + l * a_col));
#pragma GCC unroll 4
      for (int j = 0; j < Cols; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) store(vec(c, i * c_row + j * c_col), sum[i][j] * factor);
}

template <int Rows>
inline void product_rows(Matrix<const float> a, Matrix<const float> b, int64_t inner, float factor, Matrix<float> c,
                         int64_t cols) {
  int64_t j = 0;
  for (; j + kTileCols <= cols; j += kTileCols)
    product_tile<Rows, kTileCols>(a.data, a.row, a.col, vec(b.data, j * b.col), b.row, b.col, inner, factor,
                                  vec(c.data, j * c.col), c.row, c.col);
  for (; j < cols; ++j)
    product_tile<Rows, 1>(a.data, a.row, a.col, vec(b.data, j * b.col), b.row, b.col, inner, factor,
                          vec(c.data, j * c.col), c.row, c.col);
}

// c (rows x cols) = factor * a (rows x inner) b (inner x cols), lane by lane. A tile's rows of a stay in L1 while b
// passes by from L2.
inline void product(Matrix<const float> a, Matrix<const float> b, Matrix<float> c, int64_t rows, int64_t inner,
                    int64_t cols, float factor) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    product_rows<kTileRows>(a, b, inner, factor, c, cols);
    a.data = vec(a.data, kTileRows * a.row), c.data = vec(c.data, kTileRows * c.row);
  }
  switch (rows - i) {
    case 3: return product_rows<3>(a, b, inner, factor, c, cols);
    case 2: return product_rows<2>(a, b, inner, factor, c, cols);
    case 1: return product_rows<1>(a, b, inner, factor, c, cols);
    default: return;
  }
}

// ---- rotary positions ---------------------------------------------------------------------------------------------

// Turns the first dims of each frame of x by its row of the tables; `sign` -1 turns back.
inline void rotate(const TemporalAttentionParams& p, float* x, int64_t frames, int64_t row, int64_t first_row,
                   float sign) {
  const int64_t pairs = p.rotary_pairs;
  const int64_t step = p.rotary_interleaved ? 2 : 1, apart = p.rotary_interleaved ? 1 : pairs;
  for (int64_t t = 0; t < frames; ++t)
    for (int64_t i = 0; i < pairs; ++i) {
      const float c = p.cos[(first_row + t) * pairs + i], s = sign * p.sin[(first_row + t) * pairs + i];
      float* first = vec(x, t * row + i * step);
      float* second = vec(first, apart);
      const vf a = load(first), b = load(second);
      store(first, a * c - b * s);
      store(second, b * c + a * s);
    }
}

// ---- softmax ------------------------------------------------------------------------------------------------------

// e^x for x <= 0, and exactly 0 below -87 (so for forbidden keys): exp less the steps that only larger or subnormal
// results need. NaN stays NaN.
inline vf exp_nonpositive(vf x) {
  vf n;
  const vf p = exp_remainder(x, n);
  const vf y = bit_cast<vf>(bit_cast<vi>(p) + (__builtin_convertvector(n, vi) << 23));
  return x < -87.0f ? vf{} : y;
}

// Scores of `rows` queries, `row` vectors apart and `key` vectors from a key to the next, become weights that sum to 1;
// a query whose keys are all forbidden (every score -inf) gets zeros. `added` (rows, keys), if any, is the same for all
// lanes.
inline void softmax(float* scores, int64_t rows, int64_t keys, int64_t row, const float* added, int64_t key = 1) {
  for (int64_t t = 0; t < rows; ++t) {
    float* s = vec(scores, t * row);
    vf top = splat(-__builtin_inff());
    for (int64_t j = 0; j < keys; ++j) {
      vf x = load(vec(s, j * key));
      if (added != nullptr) {
        x += added[t * keys + j];
        store(vec(s, j * key), x);
      }
      top = vmax(top, x);
    }
    top = top == -__builtin_inff() ? vf{} : top;
    vf total{};
    for (int64_t j = 0; j < keys; ++j) {
      const vf e = exp_nonpositive(load(vec(s, j * key)) - top);
      store(vec(s, j * key), e);
      total += e;
    }
    const vf inverse = 1.0f / (total == 0.0f ? splat(1.0f) : total);
    for (int64_t j = 0; j < keys; ++j) store(vec(s, j * key), load(vec(s, j * key)) * inverse);
  }
}

// dscores, the gradient dP of the weights P, becomes that of the scores: dS = P (dP - rowsum(P dP)). The sum of dS over
// the keys is 0 but for rounding; what is left of it would all go into the sum of dk over the keys (the gradient of a
// bias of k, 0 in exact arithmetic), so it is taken out once more.
inline void softmax_backward(const float* weights, float* dscores, int64_t rows, int64_t keys, int64_t row,
                             int64_t key = 1) {
  for (int64_t t = 0; t < rows; ++t) {
    const float* w = vec(weights, t * row);
    float* d = vec(dscores, t * row);
    vf total{}, left{};
    for (int64_t j = 0; j < keys; ++j) total += load(vec(w, j * key)) * load(vec(d, j * key));
    for (int64_t j = 0; j < keys; ++j) {
      const vf ds = load(vec(w, j * key)) * (load(vec(d, j * key)) - total);
      store(vec(d, j * key), ds);
      left += ds;
    }
    for (int64_t j = 0; j < keys; ++j) store(vec(d, j * key), load(vec(d, j * key)) - load(vec(w, j * key)) * left);
  }
}

// What is added to the scores of every position of sample b and head h: bias, and -inf at forbidden keys.
inline void added_scores(const TemporalAttentionParams& p, int64_t b, int64_t h, float* added) {
  for (int64_t t = 0; t < p.frames; ++t) {
    const uint8_t* mask = p.mask ? p.mask + (b * p.mask_rows + (p.mask_rows > 1 ? t : 0)) * p.keys : nullptr;
    const float* bias = p.bias ? p.bias + (h * p.frames + t) * p.keys : nullptr;
    for (int64_t j = 0; j < p.keys; ++j) {
      const bool forbidden = (mask && !mask[j]) || (p.causal && j > t);
      added[t * p.keys + j] = forbidden ? -__builtin_inff() : bias ? bias[j] : 0.0f;
    }
  }
}

FASTVDIFF_END_ISA
