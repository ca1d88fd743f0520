// Computes: y = x + Wo attention(q, k, v) + bo, with q, k, v = W (norm(x) + embedding) + b, over the frames of each
//   position (csrc/include/fastvdiff/temporal_attention_block.h).
// Layout: x and y with any strides; inside, lanes are positions, so that nothing crosses lanes and a weight is one
//   broadcast for kWidth positions.
// Work split: a task is a few groups of kWidth neighbouring positions with all their frames and channels; heads one
//   after the other, each adding its part of the output projection.
// Traffic: x once, y once; q, k, v and the scores of one head of one task live in the worker's scratch.
// Precision: float32 throughout, rounded to the dtype of y once.
#include "parallel.h"
#include "temporal_attention_block_math.h"

FASTVDIFF_BEGIN_ISA
namespace {

int64_t worker_vectors(const TemporalAttentionBlockParams& p, const Split& split) {
  const TemporalAttentionParams& a = p.attention;
  const int64_t rows = split.groups * a.frames;
  return rows * (2 * split.row + 3 * split.head_row + 1) + a.frames * split.key_row + added_vectors(a);
}

template <class T>
void forward_task(const TemporalAttentionBlockParams& p, const Split& split, const Task& task, Scratch scratch) {
  const TemporalAttentionParams& a = p.attention;
  const int64_t row = split.head_row, key_row = split.key_row, inner = a.heads * a.dim;
  float* h = scratch.take(task.rows * split.row);
  float* y = scratch.take(task.rows * split.row);
  float* qkv[3];
  for (float*& piece : qkv) piece = scratch.take(task.rows * row);
  float* inverse = scratch.take(task.rows);
  float* weights = scratch.take(a.frames * key_row);
  float* added = added_vectors(a) > 0 ? scratch.next : nullptr;

  read_task<T>(p, split, task, p.x, h);
  for (int64_t n = 0; n < task.rows; ++n)
    for (int64_t c = 0; c < p.channels; ++c) {
      const vf start = p.residual ? load(vec(h, n * split.row + c)) : vf{};
      store(vec(y, n * split.row + c), start + (p.out_bias ? p.out_bias[c] : 0.0f));
    }
  normalise(p, h, task.rows, split.row, inverse);
  for (int64_t head = 0; head < a.heads; ++head) {
    project_head(p, split, task, head, h, qkv);
    if (added != nullptr) added_scores(a, task.b, head, added);
    for (int64_t g = 0; g < task.groups; ++g) {
      const int64_t at = g * a.frames * row;
      float* q = vec(qkv[0], at);
      attention_weights(a, split, q, vec(qkv[1], at), added, weights);
      // The queries have been used: the result takes their place.
      product({weights, key_row, 1}, {vec(qkv[2], at), row, 1}, {q, row, 1}, a.frames, a.frames, a.dim, 1.0f);
    }
    project(qkv[0], row, task.rows, a.dim, {p.out_weight + head * a.dim, inner, 1}, nullptr, true, y, split.row,
            p.channels);
  }
  write_task<T>(p, split, task, p.y, y);
}

template <class T>
void forward(const TemporalAttentionBlockParams& p) {
  const Split split(p);
  const int64_t size = worker_vectors(p, split);
  float* scratches = aligned(p.attention.workspace);
  parallel_for(p.attention.threads, split.tasks, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i)
      forward_task<T>(p, split, task_at(p, split, i), Scratch{vec(scratches, worker * size)});
  });
}

}  // namespace

int64_t temporal_attention_block_forward_workspace(const TemporalAttentionBlockParams& p) {
  return p.attention.threads * worker_vectors(p, Split(p)) * kWidth + kAlign;
}

void temporal_attention_block_forward(const TemporalAttentionBlockParams& p) {
  switch (p.attention.dtype) {
    case DType::f32: return forward<float>(p);
    case DType::bf16: return forward<bf16>(p);
    case DType::f16: return forward<f16>(p);
  }
}

FASTVDIFF_END_ISA
