// How a convolution's kernels find the input element behind an output position and a tap.
#pragma once

#include "ptx.h"

namespace fastvdiff::cuda {

// One dimension of the sum: output i and tap j read input coordinate i * step + offset + j * reach, weight tap
// first_tap + j * tap_step, and belong to coordinate out_first + i * out_step of the result. A forward pass walks all
// outputs and taps; a data gradient with a stride walks one residue class of them, where it is a stride-1 convolution.
struct Axis {
  int32_t size, outputs, step, offset, reach, taps, first_tap, tap_step, out_first, out_step;
  bool replicate;
};

struct Gather {
  const void* in;
  const void* prefix;
  const float* prologue;
  int64_t stride[4], prefix_stride[4];  // batch, t, h, w
  Axis axis[3];
  int32_t channels, prefix_frames, prologue_frames, kernel_h, kernel_w;
  bool silu;
};

// An output position by its indices along the axes; batch -1 past the end.
struct alignas(16) Row {
  int32_t batch, t, h, w;
};

__device__ __forceinline__ Row row_of(const Gather& g, int64_t position, int64_t rows, int64_t first_batch) {
  if (position >= rows) return {-1, 0, 0, 0};
  const uint32_t flat = static_cast<uint32_t>(position);  // the launchers refuse 2^31 positions
  const uint32_t w_count = g.axis[2].outputs, h_count = g.axis[1].outputs, t_count = g.axis[0].outputs;
  const uint32_t line = flat / w_count, frame = line / h_count, sample = frame / t_count;
  return {static_cast<int32_t>(first_batch + sample), static_cast<int32_t>(frame - sample * t_count),
          static_cast<int32_t>(line - frame * h_count), static_cast<int32_t>(flat - line * w_count)};
}

// A place in the sum over taps and channels, channels innermost. Past the last tap j[0] == taps.
struct Term {
  int32_t channel, j[3];
};

__device__ __forceinline__ void advance(const Gather& g, Term& term, int by) {
  term.channel += by;
  while (term.channel >= g.channels) {
    term.channel -= g.channels;
    if (++term.j[2] < g.axis[2].taps) continue;
    term.j[2] = 0;
    if (++term.j[1] < g.axis[1].taps) continue;
    term.j[1] = 0;
    ++term.j[0];
  }
}

__device__ __forceinline__ bool past_end(const Gather& g, const Term& term) { return term.j[0] >= g.axis[0].taps; }

// Of the weight row (kT, kH, kW, channels).
__device__ __forceinline__ int64_t weight_offset(const Gather& g, const Term& term) {
  const int t = g.axis[0].first_tap + term.j[0] * g.axis[0].tap_step;
  const int h = g.axis[1].first_tap + term.j[1] * g.axis[1].tap_step;
  const int w = g.axis[2].first_tap + term.j[2] * g.axis[2].tap_step;
  return static_cast<int64_t>((t * g.kernel_h + h) * g.kernel_w + w) * g.channels + term.channel;
}

// Where every tap lies at a fixed distance (zero padding, no prefix): a row is the offset of its first tap and a bit
// per axis and tap that tells whether that tap is inside; a term is a distance and the three bits that it needs.
struct alignas(16) AffineRow {
  int64_t offset;
  uint32_t bits;
};
static_assert(sizeof(AffineRow) == sizeof(Row), "both tables take the same shared memory");

__device__ __forceinline__ AffineRow affine_row(const Gather& g, const Row& row) {
  if (row.batch < 0) return {0, 0};
  const int32_t index[3] = {row.t, row.h, row.w};
  AffineRow affine{row.batch * g.stride[0], 0};
  int at = 0;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const Axis& axis = g.axis[d];
    int place = index[d] * axis.step + axis.offset;
    affine.offset += place * g.stride[d + 1];
    for (int j = 0; j < axis.taps; ++j, ++at, place += axis.reach)
      affine.bits |= static_cast<uint32_t>(place >= 0 && place < axis.size) << at;
  }
  return affine;
}

constexpr int kMaxAffineTaps = 31;  // of all three axes together: bit 31 stands for a term past the end

__device__ __forceinline__ uint32_t needed_bits(const Gather& g, const Term& term) {
  if (past_end(g, term)) return 1u << 31;
  const int after_t = g.axis[0].taps, after_h = after_t + g.axis[1].taps;
  return 1u << term.j[0] | 1u << (after_t + term.j[1]) | 1u << (after_h + term.j[2]);
}

__device__ __forceinline__ int64_t distance(const Gather& g, const Term& term) {
  return term.j[0] * g.axis[0].reach * g.stride[1] + term.j[1] * g.axis[1].reach * g.stride[2] +
         term.j[2] * g.axis[2].reach * g.stride[3] + term.channel;
}

// Where they do not: the element of a term at a row, null for zero padding.
struct Source {
  const void* element;
  int32_t frame;  // of x, for the prologue; -1 where the prefix gives the element
};

__device__ __forceinline__ bool settle(const Axis& axis, int& place) {
  if (place >= 0 && place < axis.size) return true;
  place = place < 0 ? 0 : axis.size - 1;
  return axis.replicate;
}

template <class T>
__device__ __forceinline__ Source locate(const Gather& g, const Row& row, const Term& term) {
  int t = row.t * g.axis[0].step + g.axis[0].offset + term.j[0] * g.axis[0].reach;
  int h = row.h * g.axis[1].step + g.axis[1].offset + term.j[1] * g.axis[1].reach;
  int w = row.w * g.axis[2].step + g.axis[2].offset + term.j[2] * g.axis[2].reach;
  if (row.batch < 0 || past_end(g, term) || !settle(g.axis[1], h) || !settle(g.axis[2], w)) return {nullptr, 0};
  if (g.prefix != nullptr && t < 0) {
    const int64_t offset = row.batch * g.prefix_stride[0] + (t + g.prefix_frames) * g.prefix_stride[1] +
                           h * g.prefix_stride[2] + w * g.prefix_stride[3] + term.channel;
    return {static_cast<const T*>(g.prefix) + offset, -1};
  }
  if (!settle(g.axis[0], t)) return {nullptr, 0};
  const int64_t offset =
      row.batch * g.stride[0] + t * g.stride[1] + h * g.stride[2] + w * g.stride[3] + term.channel;
  return {static_cast<const T*>(g.in) + offset, t};
}

// The (factor, term) pairs of a frame, from `channel` on.
__device__ __forceinline__ const float* prologue_at(const Gather& g, int batch, int frame, int channel) {
  const int row = g.prologue_frames > 1 ? frame : 0;
  return g.prologue + ((static_cast<int64_t>(batch) * g.prologue_frames + row) * g.channels + channel) * 2;
}

__device__ __forceinline__ float activated(float x, float factor, float term, bool silu) {
  const float h = x * factor + term;
  return silu ? fast_divide(h, 1.0f + fast_exp(-h)) : h;
}

// One element as the kernels multiply it, the prologue applied.
template <class T>
__device__ __forceinline__ T element_at(const Gather& g, const Row& row, const Term& term) {
  const Source source = locate<T>(g, row, term);
  if (source.element == nullptr) return from_float<T>(0.0f);
  const T raw = *static_cast<const T*>(source.element);
  if (g.prologue == nullptr || source.frame < 0) return raw;
  const float* pair = prologue_at(g, row.batch, source.frame, term.channel);
  return from_float<T>(activated(to_float(raw), pair[0], pair[1], g.silu));
}

}  // namespace fastvdiff::cuda
