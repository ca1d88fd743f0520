// temporal_attention on the CPU.
//
// Computes   y = softmax(scale * rot(q) rot(k)^T + bias, forbidden keys at -inf) v at each position and head, and its
//            backward: dv = P^T dy, dS = P (dP - rowsum(P dP)) with dP = dy v^T, dq = scale dS k, dk = scale dS^T q.
// Layout     any strides. Positions are the SIMD lanes: a block of kWidth neighbouring positions of one head is kWidth
//            independent attentions, so products, softmax and rotation need no shuffles. Blocks enter lane scratch by
//            plain loads where positions are neighbours in memory, by 4 x kWidth transposes where dims are.
// Work split an item is a strip of up to four blocks that are neighbours in memory, of one head's next positions or of
//            the next heads; a chunk of items runs on one worker.
// Traffic    4 tensors forward, 7 backward, each element once; scratch stays in L2 to T of about 64.
// Precision  fp32 from the load to the store; the backward computes P again from q, k and the tables. dbias is summed
//            per lane over a chunk, then over lanes, then over chunks in order: the chunks follow from the sizes alone.
// Refuses    nothing; lanes past the last position are wasted, so a handful of positions is slow.

#include "parallel.h"
#include "temporal_attention_math.h"

FASTVDIFF_BEGIN_ISA

namespace {

constexpr int kMaxBlocks = 4;                     // of a strip: neighbouring cache lines are read together
constexpr int64_t kStripFloats = 384 * 1024 / 4;  // what a strip may take of a core's L2
constexpr int64_t kMaxChunks = 64;                // partial sums of dbias per head

// How a call is cut up, from its sizes alone. `backward` calls have p.grad.
struct Plan {
  bool backward, added;      // added: bias, mask or causal
  int64_t row, key_row;      // vectors from a frame to the next, and from a query's scores to the next: odd, so that
                             // frames do not share cache sets
  int64_t size;              // vectors of a packed tensor of one block
  bool of_heads;             // blocks of a strip are neighbouring heads, not neighbouring positions
  int blocks;                // in a strip, at most
  int64_t strips;            // in a sample and group of heads
  int64_t groups;            // of heads: all the strips of a group have the same heads
  int64_t per_chunk, chunks; // items in a chunk, chunks in a group
  int64_t matrix;            // vectors of a matrix of scores
  int64_t table;             // floats of what is added to them
  int64_t partials;          // floats of the partial sums of dbias
  int64_t worker;            // floats of a worker's scratch

  int64_t heads() const { return of_heads ? blocks : 1; }  // in a strip, at most

  // The table of block i of a strip, or null.
  const float* added_of(const float* tables, int i) const {
    return added ? tables + (of_heads ? i * table : 0) : nullptr;
  }

  explicit Plan(const TemporalAttentionParams& p) {
    backward = p.grad.data != nullptr;
    added = p.bias || p.mask || p.causal;
    row = p.dim | 1, key_row = p.keys | 1;
    size = (p.frames > p.keys ? p.frames : p.keys) * row;
    const int64_t tensors = backward ? 4 : 3, across = (p.positions + kWidth - 1) / kWidth;
    of_heads = p.q.stride_d == 1 && p.q.stride_s != 1 && p.q.stride_h == p.dim;
    const int64_t all = of_heads ? p.heads : across;
    int64_t fit = kStripFloats / (tensors * size * kWidth);
    fit = fit < 1 ? 1 : fit > kMaxBlocks ? kMaxBlocks : fit;
    const int64_t parts = (all + fit - 1) / fit;
    blocks = static_cast<int>((all + parts - 1) / parts);
    strips = of_heads ? across : parts;
    groups = of_heads ? (p.heads + blocks - 1) / blocks : p.heads;
    const int64_t items = p.batch * strips;
    per_chunk = p.dbias ? (items + kMaxChunks - 1) / kMaxChunks : 1;
    chunks = (items + per_chunk - 1) / per_chunk;
    matrix = (backward ? p.frames : kTileRows) * key_row;
    table = whole_lines(p.frames * p.keys);
    partials = p.dbias ? chunks * p.heads * p.frames * p.keys : 0;
    worker = (tensors * blocks * size + (backward ? 2 + heads() : 1) * matrix) * kWidth + heads() * table;
  }
};

// One worker's scratch, cut up.
struct Scratch {
  float *added, *weights, *dscores, *dbias, *q, *k, *v, *grad;

  Scratch(const Plan& plan, float* base) {
    const int64_t strip = plan.blocks * plan.size;
    added = base;
    q = added + plan.heads() * plan.table, k = vec(q, strip), v = vec(k, strip), grad = vec(v, strip);
    weights = plan.backward ? vec(grad, strip) : grad;
    dscores = vec(weights, plan.matrix), dbias = vec(dscores, plan.matrix);
  }
};

template <class T>
Strip<T> strip_at(const TemporalAttentionParams& p, const Plan& plan, const FrameView& x, const Place& at) {
  const int64_t positions = p.positions - at.s;
  const int64_t left = plan.of_heads ? p.heads - at.h : (positions + kWidth - 1) / kWidth;
  return Strip<T>(x, at, positions, left < plan.blocks ? left : plan.blocks, plan.of_heads);
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
  if (!plan.added) return;
  for (int64_t i = 0; i < plan.heads() && at.h + i < p.heads; ++i)
    added_scores(p, at.b, at.h + i, scratch.added + i * plan.table);
}

template <class T>
void forward_item(const TemporalAttentionParams& p, const Plan& plan, const Place& at, const Scratch& scratch) {
  read_inputs<T>(p, plan, at, scratch);
  const Strip<T> y = strip_at<T>(p, plan, p.y, at);
  for (int i = 0; i < y.blocks; ++i) {
    const float* keys = vec(scratch.k, i * plan.size);
    const float* values = vec(scratch.v, i * plan.size);
    const float* added = plan.added_of(scratch.added, i);
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
    softmax(scratch.weights, p.frames, p.keys, key_row, plan.added_of(scratch.added, i));
    product({dy, row, 1}, {v, 1, row}, {scratch.dscores, key_row, 1}, p.frames, p.dim, p.keys, 1.0f);
    softmax_backward(scratch.weights, scratch.dscores, p.frames, p.keys, key_row);
    if (p.dbias)
      add_dbias(p, plan, scratch.dscores, grad.lanes(i), vec(scratch.dbias, plan.of_heads ? i * plan.matrix : 0));
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

// Runs item(at, scratch) over every strip, chunk by chunk; with dbias, leaves each chunk's sum in the workspace.
template <class RunItem>
void run_chunks(const TemporalAttentionParams& p, const Plan& plan, RunItem&& item) {
  float* partials = aligned(p.workspace);
  float* scratches = partials + whole_lines(plan.partials);
  // Heads that are neighbours in memory share cache lines and pages: then they follow each other.
  const bool heads_inside = p.q.stride_h < p.q.stride_s;
  const int64_t items = p.batch * plan.strips, entries = p.frames * p.keys;
  const auto item_of = [&](int64_t group, int64_t index) {
    const int64_t strip = index % plan.strips * kWidth;
    return plan.of_heads ? Place{index / plan.strips, group * plan.blocks, strip}
                         : Place{index / plan.strips, group, strip * plan.blocks};
  };
  parallel_for(p.threads, plan.chunks * plan.groups, [&](int64_t begin, int64_t end, int worker) {
    const Scratch scratch(plan, scratches + worker * plan.worker);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t group = heads_inside ? n % plan.groups : n / plan.chunks;
      const int64_t chunk = heads_inside ? n / plan.groups : n % plan.chunks, first = chunk * plan.per_chunk;
      const int64_t last = first + plan.per_chunk < items ? first + plan.per_chunk : items;
      if (p.dbias) std::memset(scratch.dbias, 0, plan.heads() * plan.matrix * kWidth * sizeof(float));
      for (int64_t i = first; i < last; ++i) item(item_of(group, i), scratch);
      if (!p.dbias) continue;
      const int64_t head = group * plan.heads();
      for (int64_t h = 0; h < plan.heads() && head + h < p.heads; ++h) {
        float* partial = partials + (chunk * p.heads + head + h) * entries;
        for (int64_t t = 0; t < p.frames; ++t)
          for (int64_t j = 0; j < p.keys; ++j)
            partial[t * p.keys + j] = sum_lanes(load(vec(scratch.dbias, h * plan.matrix + t * plan.key_row + j)));
      }
    }
  });
}

void sum_partials(const TemporalAttentionParams& p, const Plan& plan) {
  const float* partials = aligned(p.workspace);
  const int64_t entries = p.heads * p.frames * p.keys;
  std::memset(p.dbias, 0, entries * sizeof(float));
  for (int64_t c = 0; c < plan.chunks; ++c)
    for (int64_t i = 0; i < entries; ++i) p.dbias[i] += partials[c * entries + i];
}

template <class T>
void forward(const TemporalAttentionParams& p) {
  const Plan plan(p);
  run_chunks(p, plan, [&](const Place& at, const Scratch& scratch) {
    forward_item<T>(p, plan, at, scratch);
  });
}

template <class T>
void backward(const TemporalAttentionParams& p) {
  const Plan plan(p);
  run_chunks(p, plan, [&](const Place& at, const Scratch& scratch) {
    backward_item<T>(p, plan, at, scratch);
  });
  if (p.dbias) sum_partials(p, plan);
}

}  // namespace

int64_t temporal_attention_workspace(const TemporalAttentionParams& p) {
  const Plan plan(p);
  return plan.partials + p.threads * plan.worker + 2 * kAlign;
}

void temporal_attention_forward(const TemporalAttentionParams& p) {
  switch (p.dtype) {
    case DType::f32: return forward<float>(p);
    case DType::bf16: return forward<bf16>(p);
    case DType::f16: return forward<f16>(p);
  }
}

void temporal_attention_backward(const TemporalAttentionParams& p) {
  switch (p.dtype) {
    case DType::f32: return backward<float>(p);
    case DType::bf16: return backward<bf16>(p);
    case DType::f16: return backward<f16>(p);
  }
}

FASTVDIFF_END_ISA
