// GroupNorm, modulation and SiLU forward on clusters of blocks: x is read once and stays in shared memory.
//
// **Computes** y and the moments as group_norm_silu.cu does; its backward reads them.
// **Layout** NDHWC, 16 bytes of every row aligned; scale and shift any strides and dtype, frame by frame or not.
// **Work split** a cluster owns a sample's column: a few whole groups of channels, all positions. Its blocks share the
// positions out, copy their rows to shared memory, take the moments of what has arrived while the rest is under way,
// read each other's partial moments, and write the result from shared memory.
// **Traffic** T bytes of x: 2T, in segments of a column's width (64 bytes and more where the groups allow it).
// **Precision** float32; Welford's update from each thread's first value, merges of centred moments around a value of
// the group, one fixed order.
// **Refuses** contiguous tensors, rows that are not whole 16-byte accesses, samples of whose narrowest column a block's
// share does not fit beside its partial moments (fastvdiff/native/group_norm_silu_cuda_sm90.py chooses the cut).
#include "group_norm_silu_terms.h"

namespace fastvdiff::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr size_t kMostShared = 227 * 1024;  // of one block; one value for every call, since it belongs to the kernel
constexpr int kStages = 4;  // parts of a block's rows that are waited for one by one

struct Column {
  int groups, ranks;  // groups of a column, blocks of a cluster
  int across, down;   // 16-byte accesses of a row's column, rows that the block's threads span
  int64_t rows;       // of a block, at most
  int64_t columns;

  // Rows; of each channel centre, slope and offset; of each group the block's moments (mean, what its rounding left,
  // squares, count), every warp's, and mean and 1/std.
  size_t shared(int channels) const {
    return static_cast<size_t>(rows) * across * 16 + sizeof(float) * (3 * channels + groups * (4 + 3 * kWarps + 2));
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) group_norm_silu_resident(const GroupNormSiluParams p, const Column cut) {
  FASTVDIFF_DYNAMIC_SHARED(memory);
  uint4* const rows = reinterpret_cast<uint4*>(memory);
  float* const lines = reinterpret_cast<float*>(memory + cut.rows * cut.across * 16);
  float* const own = lines + 3 * cut.across * V;
  float* const of_warps = own + 4 * cut.groups;
  float* const means = of_warps + 3 * kWarps * cut.groups;
  const unsigned rank = blockIdx.x % cut.ranks;
  const int64_t work = blockIdx.x / cut.ranks, sample = work / cut.columns;
  const int along = static_cast<int>(threadIdx.x) % cut.across, other = static_cast<int>(threadIdx.x) / cut.across;
  const bool active = other < cut.down;
  const int64_t width = p.channels / p.groups, group0 = work % cut.columns * cut.groups;
  const int64_t channel = group0 * width + along * V;
  const int64_t row0 = rank * cut.rows, count = min(max(p.positions - row0, int64_t{0}), cut.rows);

  // A thread's rows, part by part; only itself reads them, so its own wait is all there is to wait for.
  const T* x = static_cast<const T*>(p.x) + sample * p.stride_xb + row0 * p.stride_xr + channel;
  const int64_t turns = ceil_div(ceil_div(cut.rows, cut.down), kStages) * cut.down;  // rows of a part
  const int64_t end = active ? count : 0;
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    for (int64_t row = stage * turns + other; row < min((stage + 1) * turns, end); row += cut.down) {
      cp_async<16>(rows + row * cut.across + along, x + row * p.stride_xr);
    }
    cp_async_commit();
  }
  Seen<V> seen;
  int64_t row = other;
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    switch (stage) {
      case 0: cp_async_wait<3>(); break;
      case 1: cp_async_wait<2>(); break;
      case 2: cp_async_wait<1>(); break;
      default: cp_async_wait<0>();
    }
#pragma unroll 2
    for (; row < min((stage + 1) * turns, end); row += cut.down) {
      float value[V];
      Access<T, V>::widen(rows[row * cut.across + along], value);
      seen.add(value);
    }
  }
  sync_threads();

  // The block's moments of each group, around the group's first value here.
  auto near_of = [&](int group) {
    return count ? to_float(reinterpret_cast<const T*>(rows)[group * width]) : 0.0f;
  };
#pragma unroll 1
  for (int group = 0; group < cut.groups; ++group) {
    const float near = near_of(group);
    Moments found{};
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t c = along * V + i - group * width;
      if (active && seen.n > 0 && c >= 0 && c < width) {
        found = found.with({seen.pivot[i] - near + seen.mean[i], seen.m2[i], seen.n});
      }
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
      found = found.with({shuffle_xor(found.mean, mask), shuffle_xor(found.m2, mask), shuffle_xor(found.n, mask)});
    }
    if (threadIdx.x % 32 == 0) {
      float* to = of_warps + (group * kWarps + threadIdx.x / 32) * 3;
      to[0] = found.mean, to[1] = found.m2, to[2] = found.n;
    }
  }
  sync_threads();
  const int mine = static_cast<int>(threadIdx.x);
  if (mine < cut.groups) {
    Moments found{};
    for (int warp = 0; warp < kWarps; ++warp) {
      const float* from = of_warps + (mine * kWarps + warp) * 3;
      if (from[2] > 0) found = found.with({from[0], from[1], from[2]});
    }
    store_moments(own + 4 * mine, Sum(near_of(mine), found.mean), found.m2, found.n);
  }
  sync_cluster();

  // The cluster's, in every block alike.
  if (mine < cut.groups) {
    const float near = of_rank(own, 0)[4 * mine];
    float apart = 0, m2 = 0;
#pragma unroll 1
    for (int r = 0; r < cut.ranks; ++r) {
      const float* from = of_rank(own, r) + 4 * mine;
      if (from[3] > 0) apart += from[3] * (from[0] - near + from[1]);
    }
    const float all = static_cast<float>(width) * static_cast<float>(p.positions);
    apart /= all;
#pragma unroll 1
    for (int r = 0; r < cut.ranks; ++r) {
      const float* from = of_rank(own, r) + 4 * mine;
      const float off = from[0] - near + from[1] - apart;
      if (from[3] > 0) m2 += from[2] + from[3] * off * off;
    }
    means[2 * mine] = near + apart, means[2 * mine + 1] = reciprocal(square_root(m2 / all + p.eps));
    if (rank == 0) {
      float* to = p.moments + (sample * p.groups + group0 + mine) * 2;
      to[0] = means[2 * mine], to[1] = means[2 * mine + 1];
    }
  }
  sync_cluster();  // no block ends, or goes on, before all have read its moments

  T* y = static_cast<T*>(p.y) + sample * p.stride_yb + row0 * p.stride_yr + channel;
  const int64_t frame_rows = p.positions / p.frames;
  const int channels = cut.across * V;
  for (int64_t frame = row0 / frame_rows; count && frame * frame_rows < row0 + count; ++frame) {
    for (int c = mine; c < channels; c += kThreads) {
      const float* of_group = means + c / width * 2;
      const Affine affine(p, sample, group0 * width + c, frame);
      lines[c] = of_group[0], lines[channels + c] = of_group[1] * affine.gain, lines[2 * channels + c] = affine.offset;
    }
    sync_threads();
    Line<V> line;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float* own_line = lines + along * V + k;
      line.centre[k] = own_line[0], line.slope[k] = own_line[channels], line.offset[k] = own_line[2 * channels];
    }
    sync_threads();
    const int64_t first = max(frame * frame_rows - row0, int64_t{0}), last = min((frame + 1) * frame_rows - row0, end);
    const int64_t skipped = max(ceil_div(first - other, cut.down), int64_t{0});
#pragma unroll 2
    for (row = skipped * cut.down + other; row < last; row += cut.down) {
      float value[V];
      Access<T, V>::widen(rows[row * cut.across + along], value);
#pragma unroll
      for (int k = 0; k < V; ++k) value[k] = line.result(k, value[k], p.silu);
      Access<T, V>::store(y + row * p.stride_yr, value);
    }
  }
}

}  // namespace

bool group_norm_silu_resident_takes(const GroupNormSiluParams& p) {
  const int vector = p.dtype == DType::f32 ? 4 : 8;
  auto whole = [&](const void* data, int64_t batch, int64_t row) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row % vector == 0 && (p.batch == 1 || batch % vector == 0);
  };
  return whole(p.x, p.stride_xb, p.stride_xr) && whole(p.y, p.stride_yb, p.stride_yr);
}

void group_norm_silu_resident_forward(const GroupNormSiluParams& p, int groups, int ranks, void* stream) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const int64_t channels = groups > 0 ? p.channels / p.groups * groups : 0;
    if (channels <= 0 || p.groups % groups || channels % V || channels / V > kThreads || ranks < 1 || !p.channels_last ||
        !group_norm_silu_resident_takes(p)) {
      throw std::invalid_argument("group_norm_silu_resident: not a column that it takes");
    }
    Column cut{};
    cut.groups = groups, cut.ranks = ranks;
    cut.across = static_cast<int>(channels / V), cut.down = kThreads / cut.across;
    cut.rows = ceil_div(p.positions, ranks), cut.columns = p.groups / groups;
    const int64_t blocks = p.batch * cut.columns * ranks;
    if (blocks > 0x7fffffff) throw std::invalid_argument("group_norm_silu_resident: more blocks than a CUDA grid has");
    const size_t shared = cut.shared(static_cast<int>(channels));
    allow_shared(group_norm_silu_resident<T, V>, kMostShared);
    FASTVDIFF_LAUNCH_CLUSTERS((group_norm_silu_resident<T, V>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                              static_cast<unsigned>(ranks), shared, stream, p, cut);
  });
}

}  // namespace fastvdiff::cuda
