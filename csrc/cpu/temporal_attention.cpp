// temporal_attention on the CPU.
//
// Computes   y = softmax(scale * rot(q) rot(k)^T + bias, forbidden keys at -inf) v at each position and head, and its
//            backward: dv = P^T dy, dS = P (dP - rowsum(P dP)) with dP = dy v^T, dq = scale dS k, dk = scale dS^T q.
// Layout     any strides. Where dims are neighbours in memory, queries are the SIMD lanes of the scores and dims those
//            of everything else (temporal_attention_rows.h). Elsewhere positions are the lanes: a block of kWidth of
//            them in one head is kWidth independent attentions, so products, softmax and rotation need no shuffles.
// Work split rows: an item is up to four positions of as many heads as L2 holds; lanes: a strip of up to four blocks
//            that are neighbours in memory. A chunk of items runs on one worker (temporal_attention_chunks.h).
// Traffic    4 tensors forward, 7 backward, each element once; scratch stays in L2 to T of about 64. Rows fetch the
//            next item during the arithmetic of one, and results of large calls go past the caches.
// Precision  fp32 from the load to the store; the backward computes P again from q, k and the tables. dbias is summed
//            over a chunk (per lane, then over lanes), then over chunks in order: they follow from the sizes alone.
// Refuses    nothing; by lanes, those past the last position are wasted, so a handful of positions is slow.

#include "temporal_attention_rows.h"

FASTVDIFF_BEGIN_ISA

namespace {

constexpr int kMaxBlocks = 4;                     // of a strip: neighbouring cache lines are read together
constexpr int64_t kStripFloats = 384 * 1024 / 4;  // what a strip may take of a core's L2

// How a call is cut up, from its sizes alone. `backward` calls have p.grad.
struct Plan {
  bool backward, added;      // added: bias, mask or causal
  int64_t row, key_row;      // vectors from a frame to the next, and from a query's scores to the next: odd, so that
                             // frames do not share cache sets
  int64_t size;              // vectors of a packed tensor of one block
  int blocks;                // in a strip, at most
  int64_t matrix;            // vectors of a matrix of scores
  int64_t table;             // floats of what is added to them
  Chunks cut;
  int64_t worker;            // floats of a worker's scratch

  static int64_t longest(const TemporalAttentionParams& p) { return p.frames > p.keys ? p.frames : p.keys; }
  static int blocks_of(const TemporalAttentionParams& p) {
    const int64_t floats = (p.grad.data ? 4 : 3) * longest(p) * (p.dim | 1) * kWidth;
    int64_t fit = kStripFloats / floats;
    fit = fit < 1 ? 1 : fit > kMaxBlocks ? kMaxBlocks : fit;
    const int64_t all = (p.positions + kWidth - 1) / kWidth, parts = (all + fit - 1) / fit;
    return static_cast<int>((all + parts - 1) / parts);
  }

  explicit Plan(const TemporalAttentionParams& p) : blocks(blocks_of(p)), cut(p, blocks_of(p) * kWidth, 1) {
    backward = p.grad.data != nullptr;
    added = p.bias || p.mask || p.causal;
    row = p.dim | 1, key_row = p.keys | 1, size = longest(p) * row;
    matrix = (backward ? p.frames : kTileRows) * key_row;
    table = whole_lines(p.frames * p.keys);
    worker = ((backward ? 4 : 3) * blocks * size + (backward ? 3 : 1) * matrix) * kWidth + table;
  }
};

// One worker's scratch, cut up.
struct Scratch {
  float *added, *weights, *dscores, *dbias, *q, *k, *v, *grad;

  Scratch(const Plan& plan, float* base) {
    const int64_t strip = plan.blocks * plan.size;
    added = base;
    q = added + plan.table, k = vec(q, strip), v = vec(k, strip), grad = vec(v, strip);
    weights = plan.backward ? vec(grad, strip) : grad;
    dscores = vec(weights, plan.matrix), dbias = vec(dscores, plan.matrix);
  }
};

template <class T>
Strip<T> strip_at(const TemporalAttentionParams& p, const Plan& plan, const FrameView& x, const Place& at) {
  const int64_t positions = p.positions - at.s;
  const int64_t left = (positions + kWidth - 1) / kWidth;
  return Strip<T>(x, at, positions, left < plan.blocks ? left : plan.blocks);
}

// Turns every block of a packed strip.
void rotate_strip(const TemporalAttentionParams& p, const Plan& plan, float* x, int64_t frames, int64_t first_row,
                  float sign) {
  if (p.rotary_pairs == 0) return;
  for (int i = 0; i < plan.blocks; ++i) rotate(p, vec(x, i * plan.size), frames, plan.row, first_row, sign);
}

// Packs q, k and v, turned, and what is added to the scores.
template <class T>
void read_inputs(const TemporalAttentionParams& p, const Plan& plan, const Place& at, const Scratch& scratch) {
  pack(strip_at<const T>(p, plan, p.q, at), p.frames, p.dim, scratch.q, plan.row, plan.size);
  pack(strip_at<const T>(p, plan, p.k, at), p.keys, p.dim, scratch.k, plan.row, plan.size);
  pack(strip_at<const T>(p, plan, p.v, at), p.keys, p.dim, scratch.v, plan.row, plan.size);
  rotate_strip(p, plan, scratch.q, p.frames, 0, 1.0f);
  rotate_strip(p, plan, scratch.k, p.keys, p.k_offset, 1.0f);
  if (plan.added) added_scores(p, at.b, at.h, scratch.added);
}

template <class T>
void forward_item(const TemporalAttentionParams& p, const Plan& plan, const Place& at, const Scratch& scratch) {
  read_inputs<T>(p, plan, at, scratch);
  const Strip<T> y = strip_at<T>(p, plan, p.y, at);
  for (int i = 0; i < y.blocks; ++i) {
    const float* keys = vec(scratch.k, i * plan.size);
    const float* values = vec(scratch.v, i * plan.size);
    const float* added = plan.added ? scratch.added : nullptr;
    for (int64_t t = 0; t < p.frames; t += kTileRows) {
      const int64_t rows = p.frames - t < kTileRows ? p.frames - t : kTileRows;
      float* queries = vec(scratch.q, i * plan.size + t * plan.row);
      product({queries, plan.row, 1}, {keys, 1, plan.row}, {scratch.weights, plan.key_row, 1}, rows, p.dim, p.keys,
              p.scale);
      softmax(scratch.weights, rows, p.keys, plan.key_row, added ? added + t * p.keys : nullptr);
      // The queries have been used: the result takes their place.
      product({scratch.weights, plan.key_row, 1}, {values, plan.row, 1}, {queries, plan.row, 1}, rows, p.keys, p.dim,
              1.0f);
    }
  }
  unpack(y, p.frames, p.dim, scratch.q, plan.row, plan.size);
}

// Adds dS to the sum over items, lanes that exist only.
void add_dbias(const TemporalAttentionParams& p, const Plan& plan, const float* dscores, int64_t lanes, float* dbias) {
  for (int64_t t = 0; t < p.frames; ++t)
    for (int64_t j = 0; j < p.keys; ++j) {
      float* sum = vec(dbias, t * plan.key_row + j);
      store(sum, load(sum) + keep_n(load(vec(dscores, t * plan.key_row + j)), lanes));
    }
}

template <class T>
void backward_item(const TemporalAttentionParams& p, const Plan& plan, const Place& at, const Scratch& scratch) {
  read_inputs<T>(p, plan, at, scratch);
  const Strip<const T> grad = strip_at<const T>(p, plan, p.grad, at);
  pack(grad, p.frames, p.dim, scratch.grad, plan.row, plan.size);
  const int64_t row = plan.row, key_row = plan.key_row;
  for (int i = 0; i < grad.blocks; ++i) {
    float* q = vec(scratch.q, i * plan.size);
    float* k = vec(scratch.k, i * plan.size);
    float* v = vec(scratch.v, i * plan.size);
    float* dy = vec(scratch.grad, i * plan.size);
    product({q, row, 1}, {k, 1, row}, {scratch.weights, key_row, 1}, p.frames, p.dim, p.keys, p.scale);
    softmax(scratch.weights, p.frames, p.keys, key_row, plan.added ? scratch.added : nullptr);
    product({dy, row, 1}, {v, 1, row}, {scratch.dscores, key_row, 1}, p.frames, p.dim, p.keys, 1.0f);
    softmax_backward(scratch.weights, scratch.dscores, p.frames, p.keys, key_row);
    if (p.dbias)
      add_dbias(p, plan, scratch.dscores, grad.lanes(i), scratch.dbias);
    // Each gradient takes the place of the operand that was read last: dv of v, dq of dy, dk of k.
    product({scratch.weights, 1, key_row}, {dy, row, 1}, {v, row, 1}, p.keys, p.frames, p.dim, 1.0f);
    product({scratch.dscores, key_row, 1}, {k, row, 1}, {dy, row, 1}, p.frames, p.keys, p.dim, p.scale);
    product({scratch.dscores, 1, key_row}, {q, row, 1}, {k, row, 1}, p.keys, p.frames, p.dim, p.scale);
  }
  rotate_strip(p, plan, scratch.grad, p.frames, 0, -1.0f);
  rotate_strip(p, plan, scratch.k, p.keys, p.k_offset, -1.0f);
  unpack(strip_at<T>(p, plan, p.dq, at), p.frames, p.dim, scratch.grad, row, plan.size);
  unpack(strip_at<T>(p, plan, p.dk, at), p.keys, p.dim, scratch.k, row, plan.size);
  unpack(strip_at<T>(p, plan, p.dv, at), p.keys, p.dim, scratch.v, row, plan.size);
}

template <class T>
class LaneWorker {
 public:
  LaneWorker(const TemporalAttentionParams& p, const Plan& plan, float* base)
      : p_(p), plan_(plan), scratch_(plan, base) {}

  void clear() { std::memset(scratch_.dbias, 0, plan_.matrix * kWidth * sizeof(float)); }
  float sum(int64_t, int64_t t, int64_t j) const { return sum_lanes(load(vec(scratch_.dbias, t * plan_.key_row + j))); }

  void run(const Place& at, const Place&) {
    if (plan_.backward)
      backward_item<T>(p_, plan_, at, scratch_);
    else
      forward_item<T>(p_, plan_, at, scratch_);
  }

 private:
  const TemporalAttentionParams& p_;
  const Plan& plan_;
  const Scratch scratch_;
};

// Either direction.
template <class T>
void run(const TemporalAttentionParams& p) {
  if (dims_are_neighbours(p))
    run_chunks<RowsWorker<T>>(p, RowsPlan(p));
  else
    run_chunks<LaneWorker<T>>(p, Plan(p));
}

void run(const TemporalAttentionParams& p) {
  switch (p.dtype) {
    case DType::f32: return run<float>(p);
    case DType::bf16: return run<bf16>(p);
    case DType::f16: return run<f16>(p);
  }
}

template <class Plan>
int64_t workspace(const TemporalAttentionParams& p, const Plan& plan) {
  return whole_lines(plan.cut.partials) + p.threads * plan.worker + kAlign;
}

}  // namespace

int64_t temporal_attention_workspace(const TemporalAttentionParams& p) {
  return dims_are_neighbours(p) ? workspace(p, RowsPlan(p)) : workspace(p, Plan(p));
}

void temporal_attention_forward(const TemporalAttentionParams& p) { run(p); }

void temporal_attention_backward(const TemporalAttentionParams& p) { run(p); }

FASTVDIFF_END_ISA
