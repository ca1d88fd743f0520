// What both passes of the temporal attention block do on lane scratch: [row][feature] vectors whose lane is the
// position; a row is one frame of one group of kWidth neighbouring positions.
#pragma once

#include "fastvdiff/temporal_attention_block.h"
#include "temporal_attention_math.h"

FASTVDIFF_BEGIN_ISA

// ---- work split -----------------------------------------------------------------------------------------------------

// How a call is cut up, from its sizes alone, so that results depend on no thread count. A task is up to `groups`
// neighbouring groups of one sample.
struct Split {
  int64_t groups, tasks_per_sample, tasks;
  int64_t row, head_row, key_row;  // vectors from a row to the next of channels, of one head, and of scores: odd, so
                                   // that rows do not share cache sets

  explicit Split(const TemporalAttentionBlockParams& p) {
    const TemporalAttentionParams& a = p.attention;
    // Enough rows for full register tiles at small T, few enough that a task's scratch stays in L2 and that there are
    // tasks for several threads.
    const int64_t most_rows = kTaskVectors / p.channels < kTaskRows ? kTaskVectors / p.channels : kTaskRows;
    const int64_t all = (a.positions + kWidth - 1) / kWidth, shared = a.batch * all / kTasks;
    groups = most_rows / a.frames;
    if (groups > shared) groups = shared;
    groups = groups < 1 ? 1 : groups > all ? all : groups;
    tasks_per_sample = (all + groups - 1) / groups, tasks = tasks_per_sample * a.batch;
    row = p.channels | 1, head_row = a.dim | 1, key_row = a.frames | 1;
  }
  static constexpr int64_t kTaskRows = 32, kTaskVectors = 4096, kTasks = 16;
};

// One task's place: its sample, first position, positions that exist, groups and rows.
struct Task {
  int64_t b, s, positions, groups, rows;
};

inline Task task_at(const TemporalAttentionBlockParams& p, const Split& split, int64_t index) {
  const TemporalAttentionParams& a = p.attention;
  const int64_t b = index / split.tasks_per_sample, s = index % split.tasks_per_sample * split.groups * kWidth;
  const int64_t left = a.positions - s, most = split.groups * kWidth;
  const int64_t positions = left < most ? left : most, groups = (positions + kWidth - 1) / kWidth;
  return {b, s, positions, groups, groups * a.frames};
}

template <class T>
Strip<T> strip_of(const FrameView& x, const Task& task) {
  return Strip<T>(x, {task.b, 0, task.s}, task.positions, task.groups);
}

template <class T>
void read_task(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, const FrameView& from,
               float* to) {
  const int64_t frames = p.attention.frames;
  pack(strip_of<const T>(from, task), frames, p.channels, to, split.row, frames * split.row);
}

template <class T>
void write_task(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, const FrameView& to,
                const float* from) {
  const int64_t frames = p.attention.frames;
  unpack(strip_of<T>(to, task), frames, p.channels, from, split.row, frames * split.row);
}

// Hands out consecutive pieces of one worker's scratch, sizes in vectors.
struct Scratch {
  float* next;
  float* take(int64_t vectors) {
    float* piece = next;
    next = vec(next, vectors);
    return piece;
  }
};

// ---- products with a shared matrix ----------------------------------------------------------------------------------

// An (outputs x inner) matrix of scalars, the same for every lane.
struct Weights {
  const float* data;
  int64_t out, in;  // strides in floats
};

constexpr int kProjectRows = 4;
constexpr int kProjectCols = kWidth == 16 ? 6 : 2;

template <int Rows, int Cols>
inline void project_tile(const float* in, int64_t in_row, int64_t inner, Weights w, const float* bias, bool add,
                         float* out, int64_t out_row) {
  vf sum[Rows][Cols];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Cols; ++j)
      sum[i][j] = add ? load(vec(out, i * out_row + j)) : splat(bias != nullptr ? bias[j] : 0.0f);
  for (int64_t c = 0; c < inner; ++c) {
    vf left[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) left[i] = load(vec(in, i * in_row + c));
#pragma GCC unroll 8
    for (int j = 0; j < Cols; ++j) {
      const vf right = splat(w.data[j * w.out + c * w.in]);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) sum[i][j] += left[i] * right;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Cols; ++j) store(vec(out, i * out_row + j), sum[i][j]);
}

template <int Rows, int Cols>
inline void project_cols(const float* in, int64_t in_row, int64_t inner, Weights w, const float* bias, bool add,
                         float* out, int64_t out_row, int64_t outputs) {
  int64_t j = 0;
  for (; j + Cols <= outputs; j += Cols)
    project_tile<Rows, Cols>(in, in_row, inner, {w.data + j * w.out, w.out, w.in}, bias ? bias + j : nullptr, add,
                             vec(out, j), out_row);
  if constexpr (Cols > 1) {
    if (j < outputs)
      project_cols<Rows, Cols / 2>(in, in_row, inner, {w.data + j * w.out, w.out, w.in}, bias ? bias + j : nullptr, add,
                                   vec(out, j), out_row, outputs - j);
  }
}

// out[n][j] = (add ? out[n][j] : bias[j]) + sum over c of in[n][c] * w[j][c].
inline void project(const float* in, int64_t in_row, int64_t rows, int64_t inner, Weights w, const float* bias,
                    bool add, float* out, int64_t out_row, int64_t outputs) {
  int64_t n = 0;
  for (; n + kProjectRows <= rows; n += kProjectRows)
    project_cols<kProjectRows, kProjectCols>(vec(in, n * in_row), in_row, inner, w, bias, add, vec(out, n * out_row),
                                             out_row, outputs);
  for (; n < rows; ++n)
    project_cols<1, kProjectCols>(vec(in, n * in_row), in_row, inner, w, bias, add, vec(out, n * out_row), out_row,
                                  outputs);
}

// ---- norm -----------------------------------------------------------------------------------------------------------

// Each row of x becomes (x - mean) / std over its channels (rms: x / root mean square); 1/std of each row to `inverse`.
// The mean is corrected by the mean of what is left, so that rows far from 0 keep their digits.
inline void standardise(const TemporalAttentionBlockParams& p, float* x, int64_t rows, int64_t x_row, float* inverse) {
  const int64_t channels = p.channels;
  const bool layer = p.norm == BlockNorm::layer;
  const float share = 1.0f / static_cast<float>(channels);
  for (int64_t n = 0; n < rows; ++n) {
    float* row = vec(x, n * x_row);
    vf mean{};
    if (layer) {
      for (int64_t c = 0; c < channels; ++c) mean += load(vec(row, c));
      mean *= share;
    }
    vf rest{}, squares{};
    for (int64_t c = 0; c < channels; ++c) {
      const vf d = load(vec(row, c)) - mean;
      store(vec(row, c), d);
      rest += d, squares += d * d;
    }
    rest *= layer ? share : 0.0f;
    const vf variance = squares * share - rest * rest + p.eps;
    const vf scale = 1.0f / square_root(variance);
    for (int64_t c = 0; c < channels; ++c) store(vec(row, c), (load(vec(row, c)) - rest) * scale);
    store(vec(inverse, n), scale);
  }
}

// h = norm(h) + frame_embedding, in place; `inverse` as in standardise.
inline void normalise(const TemporalAttentionBlockParams& p, float* h, int64_t rows, int64_t h_row, float* inverse) {
  if (p.norm != BlockNorm::none) standardise(p, h, rows, h_row, inverse);
  if (p.norm_weight == nullptr && p.norm_bias == nullptr && p.frame_embedding == nullptr) return;
  const int64_t channels = p.channels;
  for (int64_t n = 0; n < rows; ++n) {
    const float* embedding = p.frame_embedding ? p.frame_embedding + n % p.attention.frames * channels : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      float* place = vec(h, n * h_row + c);
      vf v = load(place);
      if (p.norm_weight != nullptr) v *= p.norm_weight[c];
      if (p.norm_bias != nullptr) v += p.norm_bias[c];
      if (embedding != nullptr) v += embedding[c];
      store(place, v);
    }
  }
}

// ---- one head -------------------------------------------------------------------------------------------------------

// Turns every group of a task by its frames' rotary positions; `sign` -1 turns back.
inline void rotate_task(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, float* x,
                        float sign) {
  const TemporalAttentionParams& a = p.attention;
  if (a.rotary_pairs == 0) return;
  for (int64_t g = 0; g < task.groups; ++g)
    rotate(a, vec(x, g * a.frames * split.head_row), a.frames, split.head_row, 0, sign);
}

// q, k, v of head `head`, [rows][dim] each, turned by their rotary positions.
inline void project_head(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, int64_t head,
                         const float* h, float* const qkv[3]) {
  const int64_t dim = p.attention.dim, first = head * dim;
  for (int i = 0; i < 3; ++i)
    project(h, split.row, task.rows, p.channels, {p.in_weight[i] + first * p.channels, p.channels, 1},
            p.in_bias[i] ? p.in_bias[i] + first : nullptr, false, qkv[i], split.head_row, dim);
  rotate_task(p, split, task, qkv[0], 1.0f);
  rotate_task(p, split, task, qkv[1], 1.0f);
}

// The (frames, frames) weights of one group's attention.
inline void attention_weights(const TemporalAttentionParams& a, const Split& split, const float* q, const float* k,
                              const float* added, float* weights) {
  const int64_t row = split.head_row, key_row = split.key_row;
  product({q, row, 1}, {k, 1, row}, {weights, key_row, 1}, a.frames, a.dim, a.frames, a.scale);
  softmax(weights, a.frames, a.frames, key_row, added);
}

// Vectors of the table that is added to one head's scores, and whether there is anything to add.
inline int64_t added_vectors(const TemporalAttentionParams& a) {
  const bool any = a.bias != nullptr || a.mask != nullptr || a.causal;
  return any ? (a.frames * a.frames + kWidth - 1) / kWidth : 0;
}

FASTVDIFF_END_ISA
