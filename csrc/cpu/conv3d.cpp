// Computes: y = conv(x, weight) + bias + channel_bias + residual (csrc/include/fastvdiff/conv3d_cpu.h), for kernels of
//   (k, 3, 3) with a quarter of a direct sum's multiplications, of (3, 1, 1) with half of them; x's gradient too, by the
//   flipped kernel.
// Layout: lanes are channels: channels_last_3d is read and written as it lies, other strides value by value (a third of
//   the time at 64 channels, little at 320).
// Work split: tiles of 4 x 4 outputs (4 over time); a worker multiplies the points of some tiles (36 or 6 planes of tiles
//   x channels) by those of some output channels, plane by plane: few tiles and all channels, or, where the weight's
//   points are more than the last cache holds, many tiles and kPanel channels (struct Sizes).
// Traffic: x 2.25 times (1.5 over time) from the caches, once from memory; y once; the weight's points, 4 times the weight
//   (twice over time), once for each set of tiles, from a cache.
// Precision: float32 throughout, rounded to the dtype of y once; see conv3d_winograd.h for the points.
#include "conv3d_winograd.h"
#include "parallel.h"

FASTVDIFF_BEGIN_ISA
namespace {

// How a call is cut, in floats. Where all of the weight's points fit into the last cache they are made once, and a worker
// takes kTiles tiles with every output channel. Else a worker takes kPanel output channels, whose points it makes for
// itself, with `chunk` tiles, whose points are made before by all.
template <class Tile>
struct Sizes {
  static constexpr int64_t kCachedWeight = 4 << 20, kCachedInput = 4 << 20;
  bool by_panel;
  int64_t depth, width, panels, panel_weight, weight, chunk, input_plane, input, result_plane, worker, workers;

  explicit Sizes(const Conv3dCpuParams& p) {
    depth = round_up(p.channels, kWidth), width = round_up(p.out_channels, kPanel), panels = width / kPanel;
    panel_weight = Tile::slices(p) * Tile::kPoints * depth * kPanel;
    by_panel = panels * panel_weight > kCachedWeight;
    const int64_t fitting = kCachedInput / (Tile::kPoints * Tile::slices(p) * depth) / kRows * kRows;
    chunk = by_panel ? std::min<int64_t>(std::max<int64_t>(fitting, Tile::kTiles), Tile::kChunk) : Tile::kTiles;
    input_plane = chunk * depth + kSkew, input = Tile::kPoints * input_plane;
    result_plane = chunk * (by_panel ? kPanel : width) + kSkew;
    weight = by_panel ? Tile::slices(p) * input : panels * panel_weight;  // what the workers share
    worker = Tile::kPoints * result_plane + (by_panel ? panel_weight : input);
    workers = std::min<int64_t>(std::max(p.threads, 1), by_panel ? panels : (Tile::tiles(p) + chunk - 1) / chunk);
  }
};

// The points of kPanel output channels' taps: to[slice][point][channel][kPanel].
template <class Tile>
void weight_points(const Conv3dCpuParams& p, const Sizes<Tile>& sizes, int64_t panel, float* to) {
  constexpr int kBlock = 16;  // channels: where they lie side by side, a line
  float taps[Tile::kTaps][kBlock][kPanel];
  for (int64_t slice = 0; slice < Tile::slices(p); ++slice)
    for (int64_t first = 0; first < sizes.depth; first += kBlock) {
      std::fill(&taps[0][0][0], &taps[0][0][0] + Tile::kTaps * kBlock * kPanel, 0.0f);
      const int64_t count = std::min<int64_t>(kBlock, p.channels - first);
      for (int64_t k = 0; k < std::min<int64_t>(kPanel, p.out_channels - panel * kPanel); ++k) {
        const float* row = p.weight + (panel * kPanel + k) * p.stride_w[0] + first * p.stride_w[1];
        for (int tap = 0; tap < Tile::kTaps; ++tap) {
          const float* from = row + Tile::tap_at(p, slice, tap);
          for (int64_t c = 0; c < count; ++c) taps[tap][c][k] = from[c * p.stride_w[1]];
        }
      }
      for (int64_t c = 0; c < std::min<int64_t>(kBlock, sizes.depth - first); ++c)
        for (int half = 0; half < kPanel; half += kWidth) {
          vf g[Tile::kPoints];
          for (int tap = 0; tap < Tile::kTaps; ++tap) g[tap] = load(&taps[tap][c][half]);
          Tile::tap_points(g);
          for (int i = 0; i < Tile::kPoints; ++i) {
            const int64_t plane = slice * Tile::kPoints + i;
            store(to + (plane * sizes.depth + first + c) * kPanel + half, g[i]);
          }
        }
    }
}

// Results of `count` output channels from `first` on, whose points lie at m.
template <class Tile, class T>
void results(const Conv3dCpuParams& p, int64_t tile, int64_t first, int64_t count, const float* m, int64_t plane) {
  const Tile place(p, tile);
  int64_t to[Tile::kOutputs], from[Tile::kOutputs] = {};
  place.outputs(p, p.stride_y, to);
  if (p.residual) place.outputs(p, p.stride_r, from);
  for_vectors(first, first + count, [&](int64_t k, int64_t n) {
    vf y[Tile::kPoints];
    for (int i = 0; i < Tile::kPoints; ++i) y[i] = load(m + i * plane + k - first);
    Tile::point_outputs(y);
    const vf bias = p.bias ? load_some(p.bias + k, n) : vf{};
    for (int i = 0; i < Tile::kOutputs; ++i) {
      y[i] += bias;
      if (p.channel_bias && to[i] != kOutside) {
        const int64_t frame = p.bias_frames > 1 ? place.frame_of(i) : 0;
        y[i] += load_some(p.channel_bias + (place.b * p.bias_frames + frame) * p.out_channels + k, n);
      }
    }
    if (p.residual) {
      vf added[Tile::kOutputs];
      gather(static_cast<const T*>(p.residual), from, Tile::kOutputs, k, p.stride_r[1], n, added);
      for (int i = 0; i < Tile::kOutputs; ++i) y[i] += added[i];
    }
    scatter(static_cast<T*>(p.y), to, Tile::kOutputs, k, p.stride_y[1], n, y);
  });
}

// The products of one slice, one panel and `count` tiles, at every point: kSum channels at a time, for exactness.
template <class Tile>
void products(const Sizes<Tile>& sizes, int64_t slice, int64_t count, const float* v, const float* weight, float* m,
              int64_t m_row) {
  constexpr int64_t kSum = 192;
  for (int64_t point = 0; point < Tile::kPoints; ++point)
    for (int64_t row = 0; row < count; row += kRows) {
      const float* a = v + point * sizes.input_plane + row * sizes.depth;
      const float* b = weight + (slice * Tile::kPoints + point) * sizes.depth * kPanel;
      float* to = m + point * sizes.result_plane + row * m_row;
      for (int64_t c = 0; c < sizes.depth; c += kSum) {
        const int64_t depth = std::min(kSum, sizes.depth - c);
        if (slice == 0 && c == 0)
          product<false>(a, sizes.depth, 1, b, kPanel, to, m_row, depth);
        else
          product<true>(a + c, sizes.depth, 1, b + c * kPanel, kPanel, to, m_row, depth);
      }
    }
}

template <class Tile, class T>
void by_tiles(const Conv3dCpuParams& p, const Sizes<Tile>& sizes) {
  float* weight = p.workspace;
  parallel_for(p.threads, sizes.panels, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) weight_points<Tile>(p, sizes, i, weight + i * sizes.panel_weight);
  });
  const int64_t tiles = Tile::tiles(p);
  parallel_for(p.threads, (tiles + sizes.chunk - 1) / sizes.chunk, [&](int64_t begin, int64_t end, int worker) {
    float* v = weight + sizes.weight + worker * sizes.worker;
    float* m = v + sizes.input;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * sizes.chunk, count = std::min(sizes.chunk, tiles - first);
      for (int64_t slice = 0; slice < Tile::slices(p); ++slice) {
        for (int64_t i = 0; i < count; ++i)
          input_planes<Tile, T>(p, first + i, slice, v + i * sizes.depth, sizes.input_plane);
        for (int64_t i = 0; i < sizes.panels; ++i)
          products(sizes, slice, count, v, weight + i * sizes.panel_weight, m + i * kPanel, sizes.width);
      }
      for (int64_t i = 0; i < count; ++i)
        results<Tile, T>(p, first + i, 0, p.out_channels, m + i * sizes.width, sizes.result_plane);
    }
  });
}

template <class Tile, class T>
void by_panels(const Conv3dCpuParams& p, const Sizes<Tile>& sizes) {
  float* v = p.workspace;
  const int64_t tiles = Tile::tiles(p), slices = Tile::slices(p);
  for (int64_t first = 0; first < tiles; first += sizes.chunk) {
    const int64_t count = std::min(sizes.chunk, tiles - first);
    parallel_for(p.threads, slices * count, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        float* to = v + i / count * sizes.input + i % count * sizes.depth;
        input_planes<Tile, T>(p, first + i % count, i / count, to, sizes.input_plane);
      }
    });
    parallel_for(p.threads, sizes.panels, [&](int64_t begin, int64_t end, int worker) {
      float* weight = v + sizes.weight + worker * sizes.worker;
      float* m = weight + sizes.panel_weight;
      for (int64_t panel = begin; panel < end; ++panel) {
        weight_points<Tile>(p, sizes, panel, weight);
        for (int64_t slice = 0; slice < slices; ++slice)
          products(sizes, slice, count, v + slice * sizes.input, weight, m, kPanel);
        const int64_t k = panel * kPanel, width = std::min<int64_t>(kPanel, p.out_channels - k);
        for (int64_t i = 0; i < count; ++i)
          results<Tile, T>(p, first + i, k, width, m + i * kPanel, sizes.result_plane);
      }
    });
  }
}

}  // namespace

int64_t conv3d_workspace(const Conv3dCpuParams& p) {
  int64_t floats = 0;
  with_types(p, [&](auto* tile, auto*) {
    const Sizes<std::remove_pointer_t<decltype(tile)>> sizes(p);
    floats = sizes.weight + sizes.workers * sizes.worker;
  });
  return floats;
}

void conv3d_forward(const Conv3dCpuParams& p) {
  with_types(p, [&](auto* tile, auto* element) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using T = std::remove_pointer_t<decltype(element)>;
    const Sizes<Tile> sizes(p);
    sizes.by_panel ? by_panels<Tile, T>(p, sizes) : by_tiles<Tile, T>(p, sizes);
  });
}

FASTVDIFF_END_ISA
