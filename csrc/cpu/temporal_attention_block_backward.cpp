// Computes: the gradients of the temporal attention block, everything but x and the parameters computed again.
// Layout: as in temporal_attention_block.cpp.
// Work split: tasks as in the forward, in consecutive runs ("parts") that follow from the sizes alone. A part sums
//   parameter gradients in its own buffer; the buffers are added in order at the end, so results are deterministic.
// Traffic: x twice (the second read for the norm's backward), dL/dy once, dx once.
// Precision: float32 throughout, dx rounded to its dtype once.
#include <array>
#include <cstring>

#include "parallel.h"
#include "temporal_attention_block_math.h"

FASTVDIFF_BEGIN_ISA
namespace {

// ---- sums of parameter gradients ------------------------------------------------------------------------------------

struct Gradient {
  float* target;  // null where it is not wanted
  int64_t size;
};
constexpr int kGradients = 12;
enum { kInWeight = 0, kInBias = 3, kOutWeight = 6, kOutBias, kNormWeight, kNormBias, kEmbedding, kBias };

std::array<Gradient, kGradients> gradients_of(const TemporalAttentionBlockParams& p) {
  const TemporalAttentionParams& a = p.attention;
  const int64_t channels = p.channels, inner = a.heads * a.dim, matrix = inner * channels;
  return {{{p.din_weight[0], matrix}, {p.din_weight[1], matrix}, {p.din_weight[2], matrix},
           {p.din_bias[0], inner}, {p.din_bias[1], inner}, {p.din_bias[2], inner},
           {p.dout_weight, matrix}, {p.dout_bias, channels}, {p.dnorm_weight, channels}, {p.dnorm_bias, channels},
           {p.dframe_embedding, a.frames * channels}, {a.dbias, a.heads * a.frames * a.frames}}};
}

// The runs of tasks and the size of the buffer each has.
struct Parts {
  int64_t count, size;

  Parts(const TemporalAttentionBlockParams& p, const Split& split) : count(split.tasks), size(0) {
    for (const Gradient& g : gradients_of(p))
      if (g.target != nullptr) size += g.size;
    size = whole_lines(size);
    if (size == 0) return;
    int64_t most = 32;
    while (most > 4 && most * size > kMostFloats) most /= 2;
    if (count > most) count = most;
  }
  static constexpr int64_t kMostFloats = 4 << 20;  // 16 MB for all buffers, unless four of them take more
};

// Where one part sums each gradient; null where it is not wanted.
struct Sums {
  std::array<float*, kGradients> at;

  Sums(const TemporalAttentionBlockParams& p, float* buffer) {
    const auto gradients = gradients_of(p);
    for (int i = 0; i < kGradients; ++i) {
      at[i] = gradients[i].target != nullptr ? buffer : nullptr;
      if (at[i] != nullptr) buffer += gradients[i].size;
    }
  }
};

typedef float quad __attribute__((vector_size(kDims * sizeof(float))));

// out[j] += the sum over the lanes of x[j].
inline void add_sums(vf x[kDims], float* out) {
  transpose_4x4(x);
  quad part[kWidth / kDims], sum;
  const vf folded = (x[0] + x[1]) + (x[2] + x[3]);
  std::memcpy(part, &folded, sizeof(part));
  std::memcpy(&sum, out, sizeof(sum));
  for (int g = 0; g < kWidth / kDims; ++g) sum += part[g];
  std::memcpy(out, &sum, sizeof(sum));
}

template <int Rows>
inline void outer_tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t rows, float* out,
                       int64_t out_row) {
  vf sum[Rows][kDims] = {};
  for (int64_t n = 0; n < rows; ++n) {
    vf right[kDims];
#pragma GCC unroll 4
    for (int j = 0; j < kDims; ++j) right[j] = load(vec(b, n * b_row + j));
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const vf left = load(vec(a, n * a_row + i));
#pragma GCC unroll 4
      for (int j = 0; j < kDims; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) add_sums(sum[i], out + i * out_row);
}

// out[i][j] += the sum over rows n and lanes of a[n][i] * b[n][j]; null `out`: nothing.
void outer_sum(const float* a, int64_t a_row, int64_t a_size, const float* b, int64_t b_row, int64_t b_size,
               int64_t rows, float* out, int64_t out_row) {
  if (out == nullptr) return;
  constexpr int kRows = kWidth == 16 ? 4 : 2;
  const int64_t quads = b_size / kDims * kDims;
  int64_t i = 0;
  for (; i + kRows <= a_size; i += kRows)
    for (int64_t j = 0; j < quads; j += kDims)
      outer_tile<kRows>(vec(a, i), a_row, vec(b, j), b_row, rows, out + i * out_row + j, out_row);
  for (; i < a_size; ++i)
    for (int64_t j = 0; j < quads; j += kDims)
      outer_tile<1>(vec(a, i), a_row, vec(b, j), b_row, rows, out + i * out_row + j, out_row);
  for (i = 0; i < a_size; ++i)
    for (int64_t j = quads; j < b_size; ++j) {
      vf sum{};
      for (int64_t n = 0; n < rows; ++n) sum += load(vec(a, n * a_row + i)) * load(vec(b, n * b_row + j));
      out[i * out_row + j] += sum_lanes(sum);
    }
}

// out[i] += the sum over rows and lanes of x[n][i]; null `out`: nothing.
void column_sum(const float* x, int64_t x_row, int64_t rows, int64_t size, float* out) {
  if (out == nullptr) return;
  for (int64_t i = 0; i < size; ++i) {
    vf sum{};
    for (int64_t n = 0; n < rows; ++n) sum += load(vec(x, n * x_row + i));
    out[i] += sum_lanes(sum);
  }
}

// ---- one task -------------------------------------------------------------------------------------------------------

struct Buffers {
  float *h, *grad, *dh;  // [rows][channels]
  float *qkv[3];         // [rows][dim] each; then dq, dk, dv
  float *dy, *y;         // [rows][dim]: the attention's result and its gradient
  float *inverse;        // [rows]
  float *weights, *dscores, *added;

  static int64_t vectors(const TemporalAttentionBlockParams& p, const Split& split) {
    const TemporalAttentionParams& a = p.attention;
    const int64_t rows = split.groups * a.frames;
    return rows * (3 * split.row + 5 * split.head_row + 1) + 2 * a.frames * split.key_row + added_vectors(a);
  }
  Buffers(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, Scratch scratch) {
    const TemporalAttentionParams& a = p.attention;
    for (float** wide : {&h, &grad, &dh}) *wide = scratch.take(task.rows * split.row);
    for (float** narrow : {&qkv[0], &qkv[1], &qkv[2], &dy, &y}) *narrow = scratch.take(task.rows * split.head_row);
    inverse = scratch.take(task.rows);
    for (float** square : {&weights, &dscores}) *square = scratch.take(a.frames * split.key_row);
    added = added_vectors(a) > 0 ? scratch.next : nullptr;
  }
};

// Lanes past the last position become 0: they must add nothing to a sum over lanes.
void clear_absent(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, float* x) {
  const int64_t lanes = task.positions - (task.groups - 1) * kWidth;
  if (lanes == kWidth) return;
  for (int64_t n = task.rows - p.attention.frames; n < task.rows; ++n)
    for (int64_t c = 0; c < p.channels; ++c) {
      float* place = vec(x, n * split.row + c);
      store(place, keep_n(load(place), lanes));
    }
}

// One group of one head: y, and dq, dk, dv in the places of q, k, v.
void attention_group(const TemporalAttentionBlockParams& p, const Split& split, const Buffers& at, int64_t group,
                     float* dbias) {
  const TemporalAttentionParams& a = p.attention;
  const int64_t frames = a.frames, dim = a.dim, row = split.head_row, key_row = split.key_row;
  const int64_t first = group * frames * row;
  float *q = vec(at.qkv[0], first), *k = vec(at.qkv[1], first), *v = vec(at.qkv[2], first);
  float *dy = vec(at.dy, first), *y = vec(at.y, first);
  attention_weights(a, split, q, k, at.added, at.weights);
  product({at.weights, key_row, 1}, {v, row, 1}, {y, row, 1}, frames, frames, dim, 1.0f);
  product({dy, row, 1}, {v, 1, row}, {at.dscores, key_row, 1}, frames, dim, frames, 1.0f);
  softmax_backward(at.weights, at.dscores, frames, frames, key_row);
  if (dbias != nullptr)
    for (int64_t t = 0; t < frames; ++t) column_sum(vec(at.dscores, t * key_row), 0, 1, frames, dbias + t * frames);
  // dv takes the place of v; dq that of dy, until dk has been made of q.
  product({at.weights, 1, key_row}, {dy, row, 1}, {v, row, 1}, frames, frames, dim, 1.0f);
  product({at.dscores, key_row, 1}, {k, row, 1}, {dy, row, 1}, frames, frames, dim, a.scale);
  product({at.dscores, 1, key_row}, {q, row, 1}, {k, row, 1}, frames, frames, dim, a.scale);
}

void backward_head(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, int64_t head,
                   Buffers& at, const Sums& sums) {
  const TemporalAttentionParams& a = p.attention;
  const int64_t channels = p.channels, inner = a.heads * a.dim, first = head * a.dim, square = a.frames * a.frames;
  project_head(p, split, task, head, at.h, at.qkv);
  project(at.grad, split.row, task.rows, channels, {p.out_weight + first, 1, inner}, nullptr, false, at.dy,
          split.head_row, a.dim);
  if (at.added != nullptr) added_scores(a, task.b, head, at.added);
  float* dbias = sums.at[kBias] != nullptr ? sums.at[kBias] + head * square : nullptr;
  for (int64_t g = 0; g < task.groups; ++g) attention_group(p, split, at, g, dbias);
  float* const gradients[3] = {at.dy, at.qkv[1], at.qkv[2]};
  rotate_task(p, split, task, gradients[0], -1.0f);
  rotate_task(p, split, task, gradients[1], -1.0f);

  float* dout = sums.at[kOutWeight];
  outer_sum(at.grad, split.row, channels, at.y, split.head_row, a.dim, task.rows, dout ? dout + first : nullptr, inner);
  for (int i = 0; i < 3; ++i) {
    float *din = sums.at[kInWeight + i], *bias = sums.at[kInBias + i];
    outer_sum(gradients[i], split.head_row, a.dim, at.h, split.row, channels, task.rows,
              din ? din + first * channels : nullptr, channels);
    column_sum(gradients[i], split.head_row, task.rows, a.dim, bias ? bias + first : nullptr);
    project(gradients[i], split.head_row, task.rows, a.dim, {p.in_weight[i] + first * channels, 1, channels}, nullptr,
            head > 0 || i > 0, at.dh, split.row, channels);
  }
}

// dh becomes dx; `xhat` is the standardised x where there is a norm.
void norm_backward(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, const Buffers& at,
                   const float* xhat, const Sums& sums) {
  const int64_t channels = p.channels;
  const float share = 1.0f / static_cast<float>(channels);
  if (sums.at[kNormWeight] != nullptr)
    for (int64_t c = 0; c < channels; ++c) {
      vf sum{};
      for (int64_t n = 0; n < task.rows; ++n)
        sum += load(vec(at.dh, n * split.row + c)) * load(vec(xhat, n * split.row + c));
      sums.at[kNormWeight][c] += sum_lanes(sum);
    }
  for (int64_t n = 0; n < task.rows; ++n) {
    float* d = vec(at.dh, n * split.row);
    const float *x = vec(xhat, n * split.row), *grad = vec(at.grad, n * split.row);
    vf mean{}, along{}, inverse = splat(1.0f);
    if (p.norm != BlockNorm::none) {
      for (int64_t c = 0; c < channels; ++c) {
        const vf v = load(vec(d, c)) * (p.norm_weight ? p.norm_weight[c] : 1.0f);
        store(vec(d, c), v);
        mean += v, along += v * load(vec(x, c));
      }
      mean *= p.norm == BlockNorm::layer ? share : 0.0f, along *= share;
      inverse = load(vec(at.inverse, n));
    }
    for (int64_t c = 0; c < channels; ++c) {
      vf v = load(vec(d, c));
      if (p.norm != BlockNorm::none) v = inverse * (v - mean - along * load(vec(x, c)));
      store(vec(d, c), p.residual ? v + load(vec(grad, c)) : v);
    }
  }
}

template <class T>
void backward_task(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, Scratch scratch,
                   const Sums& sums) {
  const TemporalAttentionParams& a = p.attention;
  Buffers at(p, split, task, scratch);
  read_task<T>(p, split, task, p.grad, at.grad);
  clear_absent(p, split, task, at.grad);
  read_task<T>(p, split, task, p.x, at.h);
  normalise(p, at.h, task.rows, split.row, at.inverse);
  clear_absent(p, split, task, at.h);
  for (int64_t head = 0; head < a.heads; ++head) backward_head(p, split, task, head, at, sums);

  column_sum(at.grad, split.row, task.rows, p.channels, sums.at[kOutBias]);
  column_sum(at.dh, split.row, task.rows, p.channels, sums.at[kNormBias]);
  if (sums.at[kEmbedding] != nullptr)
    for (int64_t t = 0; t < a.frames; ++t)
      column_sum(vec(at.dh, t * split.row), a.frames * split.row, task.groups, p.channels,
                 sums.at[kEmbedding] + t * p.channels);
  float* xhat = at.h;
  if (p.norm != BlockNorm::none) {
    read_task<T>(p, split, task, p.x, xhat);
    standardise(p, xhat, task.rows, split.row, at.inverse);
    clear_absent(p, split, task, xhat);
  }
  norm_backward(p, split, task, at, xhat, sums);
  write_task<T>(p, split, task, p.dx, at.dh);
}

// The parts' buffers added in order, into the gradients themselves.
void add_parts(const TemporalAttentionBlockParams& p, const Parts& parts, const float* buffers) {
  int64_t offset = 0;
  for (const Gradient& g : gradients_of(p)) {
    if (g.target == nullptr) continue;
    parallel_for(p.attention.threads, g.size, [&](int64_t begin, int64_t end, int) {
      std::memset(g.target + begin, 0, (end - begin) * sizeof(float));
      for (int64_t part = 0; part < parts.count; ++part) {
        const float* from = buffers + part * parts.size + offset;
        for (int64_t i = begin; i < end; ++i) g.target[i] += from[i];
      }
    });
    offset += g.size;
  }
}

template <class T>
void backward(const TemporalAttentionBlockParams& p) {
  const Split split(p);
  const Parts parts(p, split);
  const int64_t size = Buffers::vectors(p, split);
  float* buffers = aligned(p.attention.workspace);
  float* scratches = buffers + parts.count * parts.size;
  parallel_for(p.attention.threads, parts.count, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t part = begin; part < end; ++part) {
      float* buffer = buffers + part * parts.size;
      std::memset(buffer, 0, parts.size * sizeof(float));
      const Sums sums(p, buffer);
      const int64_t last = split.tasks * (part + 1) / parts.count;
      for (int64_t i = split.tasks * part / parts.count; i < last; ++i)
        backward_task<T>(p, split, task_at(p, split, i), Scratch{vec(scratches, worker * size)}, sums);
    }
  });
  add_parts(p, parts, buffers);
}

}  // namespace

int64_t temporal_attention_block_backward_workspace(const TemporalAttentionBlockParams& p) {
  const Split split(p);
  const Parts parts(p, split);
  return parts.count * parts.size + p.attention.threads * Buffers::vectors(p, split) * kWidth + kAlign;
}

void temporal_attention_block_backward(const TemporalAttentionBlockParams& p) {
  switch (p.attention.dtype) {
    case DType::f32: return backward<float>(p);
    case DType::bf16: return backward<bf16>(p);
    case DType::f16: return backward<f16>(p);
  }
}

FASTVDIFF_END_ISA
