// group_norm_silu's forward passes: partial moments, the moments of each group, the result.
#pragma once

#include "group_norm_silu_split.h"
#include "group_norm_silu_terms.h"

namespace fastvdiff::cuda {

// Where the partial moments of a group stand: `items` of them in a row, those there are first.
struct Partials {
  float* data;  // four floats each: mean, what its rounding left, centred sum of squares, count
  int64_t items;
  int vector;  // channels of a thread, channels_last

  __device__ __forceinline__ float* at(int64_t group_of_all, int64_t item) const {
    return data + (group_of_all * items + item) * 4;
  }
};

// channels_last: from each thread's V channels to the groups that the block's column meets.
template <int V, class Place>
__device__ __forceinline__ void pool_column(const GroupNormSiluParams& p, const Cut& cut, const Partials& partials,
                                            const Place& place, const Seen<V>& seen) {
  FASTVDIFF_SHARED(float, means, kThreads * V);
  FASTVDIFF_SHARED(float, lows, kThreads * V);
  FASTVDIFF_SHARED(float, squares, kThreads * V);
  FASTVDIFF_SHARED(float, counts, kThreads);
  const int span = cut.across * V;
  if (place.first < cut.down) {
    const int to = static_cast<int>(place.first) * span + static_cast<int>(threadIdx.x) % cut.across * V;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Sum mean(seen.pivot[i], seen.mean[i]);
      means[to + i] = mean.high, lows[to + i] = mean.low, squares[to + i] = seen.m2[i];
    }
    if (static_cast<int>(threadIdx.x) % cut.across == 0) counts[place.first] = seen.n;
  }
  sync_threads();
  // Each channel over the rows of threads, as a difference from its group's first mean; then the squares around it.
  const int64_t c0 = place.column * span, width = p.channels / p.groups;
  const int channels = static_cast<int>(min(int64_t{span}, p.channels - c0));
  float rows = 0;
  for (int r = 0; r < cut.down; ++r) rows += counts[r];
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += kThreads) {
    const float near = means[max((c0 + c) / width * width - c0, int64_t{0})];
    float apart = 0, sum = 0;
    for (int r = 0; r < cut.down; ++r) {
      if (counts[r] > 0) apart += counts[r] * (means[r * span + c] - near + lows[r * span + c]);
    }
    apart /= rows;
    for (int r = 0; r < cut.down; ++r) {
      const float off = counts[r] > 0 ? means[r * span + c] - near + lows[r * span + c] - apart : 0.0f;
      sum += squares[r * span + c] + counts[r] * off * off;
    }
    lows[c] = apart, squares[c] = sum;  // row 0's, which no other thread reads
  }
  sync_threads();
  // A warp for each group of the column; every channel has seen the same number of rows.
  const int64_t last = (c0 + channels - 1) / width;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t group = c0 / width + threadIdx.x / 32; group <= last; group += kThreads / 32) {
    const int from = static_cast<int>(max(group * width - c0, int64_t{0}));
    const int to = static_cast<int>(min((group + 1) * width - c0, int64_t{channels}));
    float apart = 0, sum = 0;
    for (int c = from + lane; c < to; c += 32) apart += lows[c];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) apart += shuffle_xor(apart, mask);
    apart /= static_cast<float>(to - from);
    for (int c = from + lane; c < to; c += 32) {
      const float off = lows[c] - apart;
      sum += squares[c] + rows * off * off;
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    const int64_t share = place.column - group * width / span;
    if (lane == 0) {
      store_moments(partials.at(place.sample * p.groups + group, share * cut.parts + place.part), Sum(means[from], apart),
                    sum, rows * static_cast<float>(to - from));
    }
  }
}

// contiguous: from each thread's V accumulators of one channel to that channel's part.
template <int V, class Place>
__device__ __forceinline__ void pool_row(const GroupNormSiluParams& p, const Cut& cut, const Partials& partials,
                                         const Place& place, const Seen<V>& seen) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float near = shuffle(seen.pivot[0], lane - lane % cut.across);
  Moments found{};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (seen.n > 0) found = found.with({seen.pivot[i] - near + seen.mean[i], seen.m2[i], seen.n});
  }
  for (int mask = cut.across / 2; mask; mask /= 2) {
    found = found.with({shuffle_xor(found.mean, mask), shuffle_xor(found.m2, mask), shuffle_xor(found.n, mask)});
  }
  const int64_t width = p.channels / p.groups;
  if (place.active && lane % cut.across == 0) {
    const int64_t item = place.channel % width * cut.parts + place.part;
    store_moments(partials.at(place.sample * p.groups + place.channel / width, item), Sum(near, found.mean), found.m2,
                  found.n);
  }
}

// Partial moments of a column of channels over every parts-th chunk of a sample.
template <class T, int V, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kThreads, kResident)
    group_norm_silu_stats(const GroupNormSiluParams p, const Cut cut, const Partials partials) {
  const Place<V, CHANNELS_LAST> place(p, cut, blockIdx.x, false);
  Seen<V> seen;
  if (place.active) {
    const int64_t pitch = place.pitch(p.stride_xr);
    const T* x = static_cast<const T*>(p.x) + place.start(cut, p.stride_xb, p.stride_xr);
    for (int64_t chunk = place.part; chunk < cut.chunks; chunk += cut.parts) {
      const int64_t first = chunk * kUnroll * cut.step + place.first;
      typename Access<T, V>::Raw raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * cut.step < cut.limit) raw[u] = Access<T, V>::load(x + (first + u * cut.step) * pitch);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * cut.step >= cut.limit) continue;
        float value[V];
        Access<T, V>::widen(raw[u], value);
        seen.add(value);
      }
    }
  }
  if constexpr (CHANNELS_LAST) {
    pool_column(p, cut, partials, place, seen);
  } else {
    pool_row(p, cut, partials, place, seen);
  }
}

constexpr int kPoolThreads = 128;

// Mean and 1/std of one group from its partial moments, or from `p.stats`.
__global__ void __launch_bounds__(kPoolThreads)
    group_norm_silu_moments(const GroupNormSiluParams p, const Cut cut, const Partials partials) {
  FASTVDIFF_SHARED(float, scratch, kPoolThreads / 32);
  const int64_t width = p.channels / p.groups, group = blockIdx.x % p.groups;
  const float count = static_cast<float>(width) * static_cast<float>(p.positions);
  float mean, m2;
  if (p.stats) {
    mean = p.stats[int64_t{blockIdx.x} * 2], m2 = p.stats[int64_t{blockIdx.x} * 2 + 1];
  } else {
    int64_t items = partials.items;
    if (p.channels_last) {
      const int64_t column = int64_t{cut.across} * partials.vector;
      items = (((group + 1) * width - 1) / column - group * width / column + 1) * cut.parts;
    }
    const float* of_group = partials.at(blockIdx.x, 0);
    const float near = of_group[0];
    float apart = 0;
    for (int64_t i = threadIdx.x; i < items; i += kPoolThreads) {
      apart += of_group[i * 4 + 3] * (of_group[i * 4] - near + of_group[i * 4 + 1]);
    }
    apart = block_sum(apart, scratch, kPoolThreads / 32) / count;
    mean = near + apart;
    m2 = 0;
    for (int64_t i = threadIdx.x; i < items; i += kPoolThreads) {
      const float off = of_group[i * 4] - near + of_group[i * 4 + 1] - apart;
      m2 += of_group[i * 4 + 2] + of_group[i * 4 + 3] * off * off;
    }
    m2 = block_sum(m2, scratch, kPoolThreads / 32);
  }
  if (threadIdx.x == 0) {
    p.moments[int64_t{blockIdx.x} * 2] = mean;
    p.moments[int64_t{blockIdx.x} * 2 + 1] = reciprocal(square_root(m2 / count + p.eps));
  }
}

// The result of a column over every parts-th chunk of a frame, from the end of x to its start: what the statistics pass
// read last is still in the caches.
template <class T, int V, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kThreads, kResident) group_norm_silu_apply(const GroupNormSiluParams p, const Cut cut) {
  constexpr int K = CHANNELS_LAST ? V : 1;
  const Place<V, CHANNELS_LAST> place(p, cut, gridDim.x - 1 - int64_t{blockIdx.x}, true);
  if (!place.active) return;  // no barrier follows
  Line<K> line;
  line.load(p, place);
  const int64_t pitch = place.pitch(p.stride_xr), to_pitch = place.pitch(p.stride_yr);
  const T* x = static_cast<const T*>(p.x) + place.start(cut, p.stride_xb, p.stride_xr);
  T* y = static_cast<T*>(p.y) + place.start(cut, p.stride_yb, p.stride_yr);
  for (int64_t turn = place.part; turn < cut.chunks; turn += cut.parts) {
    const int64_t first = (cut.chunks - 1 - turn) * kUnroll * cut.step + place.first;
    typename Access<T, V>::Raw raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * cut.step < cut.limit) raw[u] = Access<T, V>::load_last(x + (first + u * cut.step) * pitch);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * cut.step >= cut.limit) continue;
      float value[V];
      Access<T, V>::widen(raw[u], value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] = line.result(CHANNELS_LAST ? i : 0, value[i], p.silu);
      }
      Access<T, V>::store(y + (first + u * cut.step) * to_pitch, value);
    }
  }
}

}  // namespace fastvdiff::cuda
