// temporal_attention where the dims of every tensor are neighbours in memory. The frames of one position and head
// become rows that follow each other in scratch; scores are held with queries as lanes, [key][query], so that the
// softmax crosses no lanes, and every product broadcasts the elements of one operand over the vectors of the other.
#pragma once

#include "temporal_attention_chunks.h"

FASTVDIFF_BEGIN_ISA

inline int64_t whole_vectors(int64_t floats) { return (floats + kWidth - 1) / kWidth * kWidth; }

// ---- products -----------------------------------------------------------------------------------------------------

// A matrix of single elements, with the strides of its two indices.
struct Elements {
  const float* data;
  int64_t row, col;
};

constexpr int kMostRows = kWidth == 16 ? 10 : 5;  // of a tile of two vectors: accumulators fit the registers

template <int Rows, int Cols>
inline void broadcast_tile(Elements a, const float* b, int64_t b_row, int64_t inner, float factor, float* c,
                           int64_t c_row) {
  vf sum[Rows][Cols] = {};
  for (int64_t l = 0; l < inner; ++l) {
    vf right[Cols];
#pragma GCC unroll 2
    for (int j = 0; j < Cols; ++j) right[j] = load(vec(b + l * b_row, j));
#pragma GCC unroll 10
    for (int i = 0; i < Rows; ++i) {
      const float left = a.data[i * a.row + l * a.col];
#pragma GCC unroll 2
      for (int j = 0; j < Cols; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 10
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Cols; ++j) store(vec(c + i * c_row, j), sum[i][j] * factor);
}

// A row of tiles; Rows is found by counting down.
template <int Rows>
inline void broadcast_rows(Elements a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                           int64_t inner, int64_t floats, float factor) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return broadcast_rows<Rows - 1>(a, b, b_row, c, c_row, rows, inner, floats, factor);
  }
  int64_t j = 0;
  for (; j + 2 * kWidth <= floats; j += 2 * kWidth)
    broadcast_tile<Rows, 2>(a, b + j, b_row, inner, factor, c + j, c_row);
  if (j < floats) broadcast_tile<Rows, 1>(a, b + j, b_row, inner, factor, c + j, c_row);
}

// c (rows x floats) = factor * a (rows x inner) b (inner x floats), `floats` whole vectors. Tiles have about the same
// height: a low one would wait for its own sums.
inline void broadcast_product(Elements a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                              int64_t inner, int64_t floats, float factor) {
  const int64_t parts = (rows + kMostRows - 1) / kMostRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = rows * i / parts, height = rows * (i + 1) / parts - first;
    broadcast_rows<kMostRows>({a.data + first * a.row, a.row, a.col}, b, b_row, c + first * c_row, c_row, height, inner,
                              floats, factor);
  }
}

// Frames become lanes: out [dim][frame], `lanes` floats from a dim to the next, from rows of whole vectors. Lanes past
// the last frame hold another frame's values.
inline void transpose_rows(const float* x, int64_t frames, int64_t row, float* out, int64_t lanes) {
  for (int64_t t = 0; t < lanes; t += kWidth) {
    int64_t offset[kWidth];
    for (int i = 0; i < kWidth; ++i) offset[i] = (t + i < frames ? t + i : frames - 1) * row;
    for (int64_t d = 0; d < row; d += kDims) {
      vf quad[kDims];
      for (int j = 0; j < kDims; ++j) {
        const float* places[kWidth / kDims];
        for (int g = 0; g < kWidth / kDims; ++g) places[g] = x + offset[g * kDims + j] + d;
        quad[j] = load_4s(places);
      }
      transpose_4x4(quad);
      for (int j = 0; j < kDims; ++j) store(out + (d + j) * lanes + t, quad[j]);
    }
  }
}

// ---- rows in memory -----------------------------------------------------------------------------------------------

constexpr int64_t kLineBytes = kAlign * sizeof(float);

// The rows of neighbouring positions and heads in a tensor whose dims are neighbours.
template <class T>
struct Rows {
  T* data;
  int64_t stride_t, stride_s, stride_h;
  int64_t positions, heads;

  Rows(const FrameView& x, const Place& at, int64_t positions, int64_t heads)
      : data(static_cast<T*>(x.data) + at.b * x.stride_b + at.h * x.stride_h + at.s * x.stride_s),
        stride_t(x.stride_t),
        stride_s(x.stride_s),
        stride_h(x.stride_h),
        positions(positions),
        heads(heads) {}
};

// Runs f(row in memory, row in scratch) in the order of memory; in scratch, a position's heads follow each other, each
// `size` floats of rows.
template <class T, class F>
inline void walk_rows(const Rows<T>& x, int64_t frames, int64_t row, int64_t size, F&& f) {
  for (int64_t t = 0; t < frames; ++t)
    for (int64_t s = 0; s < x.positions; ++s)
      for (int64_t h = 0; h < x.heads; ++h)
        f(x.data + t * x.stride_t + s * x.stride_s + h * x.stride_h, (s * x.heads + h) * size + t * row);
}

// Asks for the `part`-th of `parts` of the rows, which a later read_rows() then finds in L2: the processor does not see
// ahead in so many frames. Inlined by force: gcc takes a function of nothing but prefetches for one without effect.
template <class T>
FASTVDIFF_INLINE inline void fetch_rows(const Rows<const T>& x, int64_t frames, int64_t dim, int64_t part,
                                        int64_t parts) {
  const int64_t all = frames * x.positions, last = all * (part + 1) / parts;
  for (int64_t n = all * part / parts; n < last; ++n) {
    const T* from = x.data + n / x.positions * x.stride_t + n % x.positions * x.stride_s;
    for (int64_t h = 0; h < x.heads; ++h)
      for (int64_t d = 0; d < dim; d += kLineBytes / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(from + h * x.stride_h + d, 0, 2);
  }
}

// dims beyond the last, to the next whole vector, read as 0.
template <class T>
void read_rows(const Rows<const T>& x, int64_t frames, int64_t dim, float* out, int64_t row, int64_t size) {
  walk_rows(x, frames, row, size, [&](const T* from, int64_t to) {
    for_vectors(0, dim, [&](int64_t d, int64_t n) FASTVDIFF_INLINE { store(out + to + d, load_some(from + d, n)); });
  });
}

// The way back; `streamed` for whole, aligned vectors only.
template <bool streamed, class T>
void write_rows(const Rows<T>& y, int64_t frames, int64_t dim, const float* in, int64_t row, int64_t size) {
  walk_rows(y, frames, row, size, [&](T* to, int64_t from) {
    for_vectors(0, dim, [&](int64_t d, int64_t n) FASTVDIFF_INLINE {
      if (streamed)
        stream(to + d, load(in + from + d));
      else
        store_some(to + d, load(in + from + d), n);
    });
  });
  if (streamed) fence();
}

// Turns the first dims of each frame by its row of the tables; `sign` -1 turns back.
inline void rotate_rows(const TemporalAttentionParams& p, float* x, int64_t frames, int64_t row, int64_t first_row,
                        float sign) {
  const int64_t pairs = p.rotary_pairs;
  const int64_t step = p.rotary_interleaved ? 2 : 1, apart = p.rotary_interleaved ? 1 : pairs;
  for (int64_t t = 0; t < frames; ++t)
    for (int64_t i = 0; i < pairs; ++i) {
      const float c = p.cos[(first_row + t) * pairs + i], s = sign * p.sin[(first_row + t) * pairs + i];
      float* first = x + t * row + i * step;
      const float a = first[0], b = first[apart];
      first[0] = a * c - b * s;
      first[apart] = b * c + a * s;
    }
}

// What is added to the scores, [key][query].
inline void transpose_added(const float* added, int64_t frames, int64_t keys, float* out, int64_t lanes) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t t = 0; t < lanes; ++t) out[j * lanes + t] = t < frames ? added[t * keys + j] : 0.0f;
}

// ---- the call -----------------------------------------------------------------------------------------------------

// Above this many bytes in all tensors of a call, a result has left the caches before it is read next: a plain store
// would first read a line that nobody wants.
constexpr int64_t kCachedBytes = int64_t{24} << 20;
constexpr int64_t kItemFloats = 192 * 1024 / 4;  // what an item's rows may take of a core's L2, beside the next one's
constexpr int64_t kItemPositions = 4;            // of an item, at most

// How a call is cut up, from its sizes alone. `backward` calls have p.grad.
struct RowsPlan {
  bool backward, added;  // added: bias, mask or causal
  bool streamed;   // results go past the caches
  int64_t row;     // floats from a frame's dims to the next's
  int64_t size;    // floats of one position and head of a tensor
  int64_t lanes;   // floats from a key's scores to the next's
  int64_t table;   // floats of what is added to the scores of a head
  int64_t scores;  // floats of the scores of one position and head
  int64_t units;   // positions times heads of an item, at most
  Chunks cut;
  int64_t worker;  // floats of a worker's scratch

  // Floats of one position and head of a tensor.
  static int64_t unit(const TemporalAttentionParams& p) {
    // An odd number of lines, so that units do not share cache sets.
    return (whole_lines((p.frames > p.keys ? p.frames : p.keys) * whole_vectors(p.dim)) / kAlign | 1) * kAlign;
  }
  static Chunks cut_up(const TemporalAttentionParams& p) {
    const int64_t floats = (p.grad.data ? 4 : 3) * unit(p);
    const auto fit = [&](int64_t most, int64_t room) { return room < 1 ? 1 : room > most ? most : room; };
    const int64_t heads = fit(p.heads, kItemFloats / floats);
    return Chunks(p, fit(kItemPositions, kItemFloats / (floats * heads)), heads);
  }

  // Whether whole vectors of x are where stream() wants them.
  template <class T>
  static bool streams(const TemporalAttentionParams& p, const FrameView& x) {
    const auto whole = [](int64_t elements) { return elements % kWidth == 0; };
    return reinterpret_cast<uintptr_t>(x.data) % (kWidth * sizeof(T)) == 0 && whole(x.stride_b) &&
           whole(x.stride_t) && whole(x.stride_s) && whole(x.stride_h) && whole(p.dim);
  }

  explicit RowsPlan(const TemporalAttentionParams& p) : cut(cut_up(p)) {
    backward = p.grad.data != nullptr;
    added = p.bias || p.mask || p.causal;
    const int64_t bytes = p.dtype == DType::f32 ? 4 : 2;
    streamed = (backward ? 7 : 4) * p.batch * p.positions * p.heads * p.dim * p.frames * bytes > kCachedBytes;
    row = whole_vectors(p.dim), size = unit(p), lanes = whole_vectors(p.frames);
    scores = whole_lines(p.keys * lanes), table = added ? scores : 0;
    units = cut.positions * cut.heads;
    worker = (backward ? 4 : 3) * units * size + (backward ? 2 : 1) * scores + whole_lines(row * lanes) +
             cut.heads * (table + (p.dbias ? scores : 0));
  }
};

// Whether every tensor has its dims next to each other.
inline bool dims_are_neighbours(const TemporalAttentionParams& p) {
  const auto next = [](const FrameView& x) { return x.data == nullptr || x.stride_d == 1; };
  return p.q.stride_s != 1 && next(p.q) && next(p.k) && next(p.v) && next(p.y) && next(p.grad) && next(p.dq) &&
         next(p.dk) && next(p.dv);
}

// One worker's scratch, cut up, and what it does with an item; a unit is one position and head of it.
template <class T>
class RowsWorker {
 public:
  RowsWorker(const TemporalAttentionParams& p, const RowsPlan& plan, float* base) : p_(p), plan_(plan) {
    const auto take = [&](int64_t floats) { return base += floats, base - floats; };
    q_ = take(plan.units * plan.size), k_ = take(plan.units * plan.size), v_ = take(plan.units * plan.size);
    if (plan.backward) grad_ = take(plan.units * plan.size);
    turned_ = take(whole_lines(plan.row * plan.lanes));
    weights_ = take(plan.scores);
    if (plan.backward) dscores_ = take(plan.scores);
    added_ = take(plan.cut.heads * plan.table);
    dbias_ = base;
  }

  void clear() { std::memset(dbias_, 0, plan_.cut.heads * plan_.scores * sizeof(float)); }
  float sum(int64_t h, int64_t t, int64_t j) const { return dbias_[h * plan_.scores + j * plan_.lanes + t]; }

  void run(const Place& at, const Place& next) {
    positions_ = positions(at), heads_ = heads(at), next_ = next;
    read(p_.q, at, p_.frames, q_);
    read(p_.k, at, p_.keys, k_);
    read(p_.v, at, p_.keys, v_);
    if (plan_.backward) read(p_.grad, at, p_.frames, grad_);
    turn(q_, p_.frames, 0, 1.0f);
    turn(k_, p_.keys, p_.k_offset, 1.0f);
    if (plan_.added) add_up(at);
    for (int64_t i = 0; i < positions_ * heads_; ++i) {
      if (plan_.backward)
        backward(i);
      else
        forward(i);
    }
    if (!plan_.backward) return write(p_.y, at, p_.frames, q_);
    turn(grad_, p_.frames, 0, -1.0f);
    turn(k_, p_.keys, p_.k_offset, -1.0f);
    write(p_.dq, at, p_.frames, grad_);
    write(p_.dk, at, p_.keys, k_);
    write(p_.dv, at, p_.keys, v_);
  }

 private:
  int64_t positions(const Place& at) const {
    const int64_t left = p_.positions - at.s;
    return left < plan_.cut.positions ? left : plan_.cut.positions;
  }
  int64_t heads(const Place& at) const {
    const int64_t left = p_.heads - at.h;
    return left < plan_.cut.heads ? left : plan_.cut.heads;
  }

  // Unit i's share of what the next item reads; spread over the arithmetic, so that memory is never idle.
  FASTVDIFF_INLINE void fetch(const FrameView& x, int64_t frames, int64_t i) {
    fetch_rows(Rows<const T>(x, next_, positions(next_), heads(next_)), frames, p_.dim, i, positions_ * heads_);
  }
  void read(const FrameView& x, const Place& at, int64_t frames, float* to) {
    read_rows(Rows<const T>(x, at, positions_, heads_), frames, p_.dim, to, plan_.row, plan_.size);
  }
  void write(const FrameView& x, const Place& at, int64_t frames, const float* from) {
    const Rows<T> rows(x, at, positions_, heads_);
    if (plan_.streamed && RowsPlan::streams<T>(p_, x))
      write_rows<true>(rows, frames, p_.dim, from, plan_.row, plan_.size);
    else
      write_rows<false>(rows, frames, p_.dim, from, plan_.row, plan_.size);
  }
  void turn(float* x, int64_t frames, int64_t first_row, float sign) {
    if (p_.rotary_pairs == 0) return;
    for (int64_t i = 0; i < positions_ * heads_; ++i)
      rotate_rows(p_, x + i * plan_.size, frames, plan_.row, first_row, sign);
  }
  void add_up(const Place& at) {
    for (int64_t h = 0; h < heads_; ++h) {
      // As many floats as a head's scores or fewer, free until the first product.
      added_scores(p_, at.b, at.h + h, weights_);
      transpose_added(weights_, p_.frames, p_.keys, added_ + h * plan_.table, plan_.lanes);
    }
  }

  // Weights of unit i from its q and k.
  void weigh(int64_t i) {
    const int64_t lanes = plan_.lanes;
    fetch(p_.q, p_.frames, i);
    transpose_rows(q_ + i * plan_.size, p_.frames, plan_.row, turned_, lanes);
    broadcast_product({k_ + i * plan_.size, plan_.row, 1}, turned_, lanes, weights_, lanes, p_.keys, p_.dim, lanes,
                      p_.scale);
    if (plan_.added) {
      const float* added = added_ + i % heads_ * plan_.table;
      for (int64_t n = 0; n < p_.keys * lanes; n += kWidth) store(weights_ + n, load(weights_ + n) + load(added + n));
    }
    fetch(p_.k, p_.keys, i);
    softmax(weights_, lanes / kWidth, p_.keys, 1, nullptr, lanes / kWidth);
  }

  void forward(int64_t i) {
    weigh(i);
    fetch(p_.v, p_.keys, i);
    // The queries have been used: the result takes their place.
    broadcast_product({weights_, 1, plan_.lanes}, v_ + i * plan_.size, plan_.row, q_ + i * plan_.size, plan_.row,
                      p_.frames, p_.keys, plan_.row, 1.0f);
  }

  void backward(int64_t i) {
    const int64_t row = plan_.row, lanes = plan_.lanes;
    float *q = q_ + i * plan_.size, *k = k_ + i * plan_.size, *v = v_ + i * plan_.size, *dy = grad_ + i * plan_.size;
    weigh(i);
    fetch(p_.v, p_.keys, i);
    transpose_rows(dy, p_.frames, row, turned_, lanes);
    broadcast_product({v, row, 1}, turned_, lanes, dscores_, lanes, p_.keys, p_.dim, lanes, 1.0f);
    fetch(p_.grad, p_.frames, i);
    softmax_backward(weights_, dscores_, lanes / kWidth, p_.keys, 1, lanes / kWidth);
    if (p_.dbias) {
      float* sum = dbias_ + i % heads_ * plan_.scores;
      for (int64_t n = 0; n < p_.keys * lanes; n += kWidth) store(sum + n, load(sum + n) + load(dscores_ + n));
    }
    // Each gradient takes the place of the operand that was read last: dv of v, dq of dy, dk of k.
    broadcast_product({weights_, lanes, 1}, dy, row, v, row, p_.keys, p_.frames, row, 1.0f);
    broadcast_product({dscores_, 1, lanes}, k, row, dy, row, p_.frames, p_.keys, row, p_.scale);
    broadcast_product({dscores_, lanes, 1}, q, row, k, row, p_.keys, p_.frames, row, p_.scale);
  }

  const TemporalAttentionParams& p_;
  const RowsPlan& plan_;
  Place next_{};
  int64_t positions_ = 0, heads_ = 0;  // of the item
  float *q_, *k_, *v_, *grad_ = nullptr, *turned_, *weights_, *dscores_ = nullptr, *added_, *dbias_;
};

FASTVDIFF_END_ISA
