// group_norm_silu's backward passes: sums of each channel, what they mean for groups and parameters, then dx.
//
// With xhat = (x - mean) / std, z = xhat gain + offset and dz = dy silu'(z), z computed from x again: sum dz and
// sum dz xhat of a channel give the parameters' gradients; m = mean of dz gain and n = mean of dz gain xhat over a group
// give dx = (dz gain - m - xhat n) / std.
#pragma once

#include "group_norm_silu_split.h"
#include "group_norm_silu_terms.h"

namespace fastvdiff::cuda {

// The backward's workspace.
struct Sums {
  float* partial;  // (batch, frames, parts, channels, 2): sum of dz, of dz xhat
  float* means;    // (batch, groups, 2): of dz gain, of dz gain xhat
  float* shares;   // (batch, channels, 2): a sample's part of dweight and of dbias
  int64_t parts;
};

// x and grad of a thread's chunk, called with the index, x and dy of each access.
template <class T, int V, bool CHANNELS_LAST, bool REVERSED, class Body>
__device__ __forceinline__ void walk(const GroupNormSiluParams& p, const Cut& cut, const Place<V, CHANNELS_LAST>& place,
                                     Body&& body) {
  const int64_t x_pitch = place.pitch(p.stride_xr), dy_pitch = place.pitch(p.stride_gr);
  const T* x = static_cast<const T*>(p.x) + place.start(cut, p.stride_xb, p.stride_xr);
  const T* dy = static_cast<const T*>(p.grad) + place.start(cut, p.stride_gb, p.stride_gr);
  for (int64_t turn = place.part; turn < cut.chunks; turn += cut.parts) {
    const int64_t chunk = REVERSED ? cut.chunks - 1 - turn : turn;
    const int64_t first = chunk * kUnrollBackward * cut.step + place.first;
    typename Access<T, V>::Raw raw_x[kUnrollBackward], raw_dy[kUnrollBackward];
#pragma unroll
    for (int u = 0; u < kUnrollBackward; ++u) {
      const int64_t index = first + u * cut.step;
      if (index >= cut.limit) continue;
      if constexpr (REVERSED) {
        raw_x[u] = Access<T, V>::load_last(x + index * x_pitch);
        raw_dy[u] = Access<T, V>::load_last(dy + index * dy_pitch);
      } else {
        raw_x[u] = Access<T, V>::load(x + index * x_pitch);
        raw_dy[u] = Access<T, V>::load(dy + index * dy_pitch);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnrollBackward; ++u) {
      const int64_t index = first + u * cut.step;
      if (index >= cut.limit) continue;
      float of_x[V], of_dy[V];
      Access<T, V>::widen(raw_x[u], of_x);
      Access<T, V>::widen(raw_dy[u], of_dy);
      body(index, of_x, of_dy);
    }
  }
}

// Sums of a column's channels over every parts-th chunk of a frame.
template <class T, int V, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kThreads, kResidentBackward)
    group_norm_silu_backward_sums(const GroupNormSiluParams p, const Cut cut, const Sums sums) {
  constexpr int K = CHANNELS_LAST ? V : 1;
  const Place<V, CHANNELS_LAST> place(p, cut, blockIdx.x, true);
  Line<K> line{};
  float sum[K] = {}, sum_apart[K] = {};
  if (place.active) {
    line.load(p, place);
    walk<T, V, CHANNELS_LAST, false>(p, cut, place, [&](int64_t, const float (&x)[V], const float (&dy)[V]) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = CHANNELS_LAST ? i : 0;
        const float apart = x[i] - line.centre[k];
        const float dz = p.silu ? through_silu(dy[i], apart * line.slope[k] + line.offset[k]) : dy[i];
        sum[k] += dz, sum_apart[k] += dz * apart;
      }
    });
  }
  float* const to = sums.partial + ((place.sample * p.frames + place.frame) * cut.parts + place.part) * p.channels * 2;
  const int64_t width = p.channels / p.groups;
  if constexpr (CHANNELS_LAST) {
    FASTVDIFF_SHARED(float, first, kThreads * V);
    FASTVDIFF_SHARED(float, second, kThreads * V);
    const int span = cut.across * V;
    if (place.first < cut.down) {
      const int at = static_cast<int>(place.first) * span + static_cast<int>(threadIdx.x) % cut.across * V;
#pragma unroll
      for (int i = 0; i < V; ++i) first[at + i] = sum[i], second[at + i] = sum_apart[i];
    }
    sync_threads();
    const int64_t c0 = place.column * span;
    for (int c = static_cast<int>(threadIdx.x); c < span && c0 + c < p.channels; c += kThreads) {
      float total = 0, total_apart = 0;
      for (int r = 0; r < cut.down; ++r) total += first[r * span + c], total_apart += second[r * span + c];
      const float rstd = p.moments[(place.sample * p.groups + (c0 + c) / width) * 2 + 1];
      to[(c0 + c) * 2] = total, to[(c0 + c) * 2 + 1] = total_apart * rstd;
    }
  } else {
    for (int mask = cut.across / 2; mask; mask /= 2) {
      sum[0] += shuffle_xor(sum[0], mask), sum_apart[0] += shuffle_xor(sum_apart[0], mask);
    }
    if (place.active && threadIdx.x % cut.across == 0) {
      const float rstd = p.moments[(place.sample * p.groups + place.channel / width) * 2 + 1];
      to[place.channel * 2] = sum[0], to[place.channel * 2 + 1] = sum_apart[0] * rstd;
    }
  }
}

constexpr int kGroupRows = 16;  // of 32 threads, a thread for each of 32 channels

// Of one group of one sample: the two means that dx needs, the gradients of scale and shift, shares of the rest.
__global__ void __launch_bounds__(32 * kGroupRows, 1)  // without the 1, 64 registers and spills on sm_120
    group_norm_silu_backward_groups(const GroupNormSiluParams p, const Sums sums) {
  enum { kGain, kGainXhat, kWeight, kBias, kScale, kShift, kTotals };
  FASTVDIFF_SHARED(float, scratch, kTotals * kGroupRows * 32);
  const int64_t sample = blockIdx.x / p.groups, group = blockIdx.x % p.groups, width = p.channels / p.groups;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32;
  // A row of threads takes whole frames, or, where there is but one, some of its parts: everything is linear in them.
  const bool by_frame = p.frames > 1;
  const int64_t frame0 = by_frame ? row : 0, frame_step = by_frame ? kGroupRows : 1;
  const int64_t part0 = by_frame ? 0 : row, part_step = by_frame ? 1 : kGroupRows;
  float group_gain = 0, group_gain_xhat = 0;
  for (int64_t c0 = 0; c0 < width; c0 += 32) {
    const int64_t channel = group * width + c0 + lane;
    float total[kTotals] = {};
    if (c0 + lane < width) {
      const float weight = p.weight.data ? load_parameter(p.weight, 0, channel, 0) : 1.0f;
      const float bias = p.bias.data ? load_parameter(p.bias, 0, channel, 0) : 0.0f;
      for (int64_t frame = frame0; frame < p.frames; frame += frame_step) {
        const float* from = sums.partial + ((sample * p.frames + frame) * sums.parts * p.channels + channel) * 2;
        float dz = 0, dz_xhat = 0;
#pragma unroll 4
        for (int64_t part = part0; part < sums.parts; part += part_step) {
          dz += from[part * p.channels * 2], dz_xhat += from[part * p.channels * 2 + 1];
        }
        const float factor = p.scale.data ? 1.0f + load_parameter(p.scale, sample, channel, frame) : 1.0f;
        total[kGain] += weight * factor * dz, total[kGainXhat] += weight * factor * dz_xhat;
        total[kWeight] += factor * dz_xhat, total[kBias] += factor * dz;
        // scale multiplies what weight and bias leave of xhat.
        const float of_scale = weight * dz_xhat + bias * dz;
        total[kScale] += of_scale, total[kShift] += dz;
        if (!by_frame) continue;
        const int64_t at = (sample * p.channels + channel) * p.frames + frame;
        if (p.dscale.data && p.dscale.per_frame) store_gradient(p.dscale, at, of_scale);
        if (p.dshift.data && p.dshift.per_frame) store_gradient(p.dshift, at, dz);
      }
    }
    sync_threads();  // the last round's totals have been read
#pragma unroll
    for (int i = 0; i < kTotals; ++i) scratch[(i * kGroupRows + row) * 32 + lane] = total[i];
    sync_threads();
    if (row == 0 && c0 + lane < width) {
#pragma unroll
      for (int i = 0; i < kTotals; ++i) {
        total[i] = 0;
        for (int r = 0; r < kGroupRows; ++r) total[i] += scratch[(i * kGroupRows + r) * 32 + lane];
      }
      group_gain += total[kGain], group_gain_xhat += total[kGainXhat];
      const int64_t at = sample * p.channels + channel;
      sums.shares[at * 2] = total[kWeight], sums.shares[at * 2 + 1] = total[kBias];
      if (p.dscale.data && !(by_frame && p.dscale.per_frame)) store_gradient(p.dscale, at, total[kScale]);
      if (p.dshift.data && !(by_frame && p.dshift.per_frame)) store_gradient(p.dshift, at, total[kShift]);
    }
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    group_gain += shuffle_xor(group_gain, mask), group_gain_xhat += shuffle_xor(group_gain_xhat, mask);
  }
  if (threadIdx.x == 0) {
    const float count = static_cast<float>(width) * static_cast<float>(p.positions);
    sums.means[int64_t{blockIdx.x} * 2] = group_gain / count;
    sums.means[int64_t{blockIdx.x} * 2 + 1] = group_gain_xhat / count;
  }
}

// dweight and dbias of the channels of one block, over the samples in order.
__device__ __forceinline__ void parameter_gradients(const GroupNormSiluParams& p, const Sums& sums, int64_t block) {
  const int64_t channel = block * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  float dweight = 0, dbias = 0;
#pragma unroll 4
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    const float* share = sums.shares + (sample * p.channels + channel) * 2;
    dweight += share[0], dbias += share[1];
  }
  if (p.dweight.data) store_gradient(p.dweight, channel, dweight);
  if (p.dbias.data) store_gradient(p.dbias, channel, dbias);
}

// dx of a column over every parts-th chunk of a frame, from the end to the start; the last blocks: dweight and dbias.
template <class T, int V, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kThreads, kResidentBackward)
    group_norm_silu_backward_dx(const GroupNormSiluParams p, const Cut cut, const Sums sums) {
  constexpr int K = CHANNELS_LAST ? V : 1;
  const int64_t blocks = cut.blocks();
  if (blockIdx.x >= blocks) {
    parameter_gradients(p, sums, blockIdx.x - blocks);
    return;
  }
  const Place<V, CHANNELS_LAST> place(p, cut, blocks - 1 - blockIdx.x, true);
  if (!place.active) return;  // no barrier follows
  Line<K> line;
  line.load(p, place);
  float level[K], tilt[K];
  const int64_t width = p.channels / p.groups;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t group = place.sample * p.groups + (place.channel + k) / width;
    const float rstd = p.moments[group * 2 + 1];
    level[k] = rstd * sums.means[group * 2], tilt[k] = rstd * rstd * sums.means[group * 2 + 1];
  }
  const int64_t pitch = place.pitch(p.stride_yr);
  T* dx = static_cast<T*>(p.dx) + place.start(cut, p.stride_yb, p.stride_yr);
  walk<T, V, CHANNELS_LAST, true>(p, cut, place, [&](int64_t index, const float (&x)[V], const float (&dy)[V]) {
    float out[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int k = CHANNELS_LAST ? i : 0;
      const float apart = x[i] - line.centre[k];
      const float dz = p.silu ? through_silu(dy[i], apart * line.slope[k] + line.offset[k]) : dy[i];
      out[i] = dz * line.slope[k] - (apart * tilt[k] + level[k]);
    }
    Access<T, V>::store(dx + index * pitch, out);
  });
}

}  // namespace fastvdiff::cuda
