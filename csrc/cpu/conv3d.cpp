// Computes: y = conv(x, weight) + bias + channel_bias + residual (csrc/include/fastvdiff/conv3d_cpu.h), for kernels of
//   (k, 3, 3) with a quarter of a direct sum's multiplications, of (3, 1, 1) with half of them; x's gradient too, by the
//   flipped kernel.
// Layout: lanes are channels: channels_last_3d is read and written as it lies. Of other strides a run of tiles is turned
//   into vectors of channels first, whole lines at a time (struct Run): read tile by tile, the lines of 16 channels, a
//   power of 2 apart, drove each other out of the first cache, and contiguous tensors took a third longer.
// Work split: tiles of 4 x 4 outputs (4 over time); a worker multiplies the points of some tiles (36 or 6 planes of tiles
//   x channels) by those of some output channels, plane by plane: some tiles and all channels, or, where the weight's
//   points are many beside the tiles', kPanel channels and as many tiles as there are (struct Sizes).
// Traffic: x 2.25 times (1.5 over time) from the caches, once from memory; y once; the weight's points, 4 times the weight
//   (twice over time), once for each set of tiles, from a cache.
// Precision: float32 throughout, rounded to the dtype of y once; see conv3d_winograd.h for the points.
#include "conv3d_winograd.h"
#include "parallel.h"

FASTVDIFF_BEGIN_ISA
namespace {

// How a call is cut, in floats. Where all of the weight's points are few and the tiles are many, they are made once, and a
// worker takes kTiles tiles with every output channel. Else a worker takes kPanel output channels, whose points it makes for
// itself, in memory that stays in its second cache, with `chunk` tiles, whose points are made before by all.
template <class Tile>
struct Sizes {
  static constexpr int64_t kCachedWeight = 1 << 20, kCachedInput = 1 << 20, kFewTiles = 4 * Tile::kTiles;
  bool by_panel;
  int64_t depth, width, panels, weight_plane, panel_weight, weight, chunk, input_plane, input, result_plane, worker, workers;

  explicit Sizes(const Conv3dCpuParams& p) {
    depth = round_up(p.channels, kWidth), width = round_up(p.out_channels, kPanel), panels = width / kPanel;
    weight_plane = depth * kPanel + kSkew, panel_weight = Tile::slices(p) * Tile::kPoints * weight_plane;
    by_panel = panels * panel_weight > kCachedWeight || Tile::tiles(p) <= kFewTiles;
    const int64_t fitting = kCachedInput / (Tile::kPoints * Tile::slices(p) * depth) / kRows * kRows;
    const int64_t most = std::min<int64_t>(kFewTiles, round_up(Tile::tiles(p), kRows));
    chunk = by_panel ? std::min(std::max<int64_t>(fitting, Tile::kTiles), most) : Tile::kTiles;
    input_plane = chunk * depth + kSkew, input = Tile::kPoints * input_plane;
    result_plane = chunk * (by_panel ? kPanel : width) + kSkew;
    weight = by_panel ? Tile::slices(p) * input : panels * panel_weight;  // what the workers share
    worker = Tile::kPoints * result_plane + (by_panel ? panel_weight : input);
    workers = std::min<int64_t>(std::max(p.threads, 1), by_panel ? panels : (Tile::tiles(p) + chunk - 1) / chunk);
  }
};

// The taps of one slice of `count` channels from `first` on, their lanes n <= kWidth output channels from k on, to
// [channel][tap].
template <class Tile>
void taps(const Conv3dCpuParams& p, int64_t slice, int64_t first, int64_t count, int64_t k, int64_t n, float* to) {
  constexpr int kTaps = Tile::kTaps;
  const int64_t step = p.stride_w[0], channel = p.stride_w[1];
  const float* weight = p.weight + k * step + first * channel;
  const auto at = [&](int64_t c, int tap) { return weight + c * channel + Tile::tap_at(p, slice, tap); };
  if (step == 1) {
    for (int64_t c = 0; c < count; ++c)
      for (int tap = 0; tap < kTaps; ++tap) store(to + (c * kTaps + tap) * kWidth, load_some(at(c, tap), n));
  } else if (channel == 1) {
    for (int tap = 0; tap < kTaps; ++tap)
      turn_rows(at(0, tap), count, n, step, to + tap * kWidth, kTaps * kWidth);
  } else if (!Tile::taps_in_a_row(p)) {
    for (int64_t c = 0; c < count; ++c)
      for (int tap = 0; tap < kTaps; ++tap)
        for (int64_t l = 0; l < kWidth; ++l) to[(c * kTaps + tap) * kWidth + l] = l < n ? at(c, tap)[l * step] : 0.0f;
  } else if (p.flipped) {
    for (int64_t c = 0; c < count; ++c)
      turn_rows(at(c, kTaps - 1), kTaps, n, step, to + (c * kTaps + kTaps - 1) * kWidth, -kWidth);
  } else if (channel == kTaps) {
    turn_rows(at(0, 0), count * kTaps, n, step, to, kWidth);
  } else {
    for (int64_t c = 0; c < count; ++c) turn_rows(at(c, 0), kTaps, n, step, to + c * kTaps * kWidth, kWidth);
  }
}

// The points of kPanel output channels' taps: to[slice][point][channel][kPanel].
template <class Tile>
void weight_points(const Conv3dCpuParams& p, const Sizes<Tile>& sizes, int64_t panel, float* to) {
  constexpr int kBlock = 16;  // channels: where they lie side by side, a line
  alignas(64) float read[kBlock * Tile::kTaps * kWidth];
  for (int64_t slice = 0; slice < Tile::slices(p); ++slice)
    for (int64_t first = 0; first < sizes.depth; first += kBlock)
      for (int half = 0; half < kPanel; half += kWidth) {
        const int64_t k = panel * kPanel + half, n = std::min<int64_t>(kWidth, p.out_channels - k);
        const int64_t count = n > 0 ? std::min<int64_t>(kBlock, p.channels - first) : 0;
        if (count > 0) taps<Tile>(p, slice, first, count, k, n, read);
        for (int64_t c = 0; c < std::min<int64_t>(kBlock, sizes.depth - first); ++c) {
          vf g[Tile::kPoints] = {};
          if (c < count) {
            for (int tap = 0; tap < Tile::kTaps; ++tap) g[tap] = load(read + (c * Tile::kTaps + tap) * kWidth);
            Tile::tap_points(g);
          }
          float* at = to + slice * Tile::kPoints * sizes.weight_plane + (first + c) * kPanel + half;
          for (int i = 0; i < Tile::kPoints; ++i) store(at + i * sizes.weight_plane, g[i]);
        }
      }
}

// Results of `count` tiles from `begin` on, of `width` output channels from `first` on, whose points lie at m: a tile's
// `row` floats from those of the one before.
template <class Tile, class T>
void results(const Conv3dCpuParams& p, int64_t begin, int64_t count, int64_t first, int64_t width, const float* m,
             int64_t row, int64_t plane) {
  Run<Tile, Tile::kOutputs, T> y(p.stride_y);
  Run<Tile, Tile::kOutputs, const T> added(p.stride_r);
  for (int64_t done = 0, tiles; done < count; done += tiles) {
    const Tile place(p, begin + done);
    tiles = y.direct ? 1 : place.run(count - done);
    y.box = added.box = place.output_box(p, tiles);
    for (int64_t i = 0; i < tiles; ++i) {
      Tile(p, begin + done + i).outputs(p, y.places(), y.at[i]);
      if (p.residual) Tile(p, begin + done + i).outputs(p, added.places(), added.at[i]);
    }
    for_vectors(first, first + width, [&](int64_t k, int64_t n) {
      T* to = static_cast<T*>(p.y) + place.b * p.stride_y[0] + k * p.stride_y[1];
      const T* from = static_cast<const T*>(p.residual);
      if (from) from += place.b * p.stride_r[0] + k * p.stride_r[1], added.read(from, n);
      const vf bias = p.bias ? load_some(p.bias + k, n) : vf{};
      for (int64_t i = 0; i < tiles; ++i) {
        vf points[Tile::kPoints], sums[Tile::kOutputs] = {};
        for (int j = 0; j < Tile::kPoints; ++j) points[j] = load(m + (done + i) * row + j * plane + k - first);
        Tile::point_outputs(points);
        if (from) added.load_tile(from, i, n, sums);
        for (int j = 0; j < Tile::kOutputs; ++j) {
          points[j] += bias;
          if (p.channel_bias && y.at[i][j] != kOutside) {
            const int64_t frame = p.bias_frames > 1 ? place.frame_of(j) : 0;
            points[j] += load_some(p.channel_bias + (place.b * p.bias_frames + frame) * p.out_channels + k, n);
          }
          if (from) points[j] += sums[j];
        }
        y.store_tile(to, i, n, points);
      }
      y.write(to, n);
    });
  }
}

// The products of one slice, one panel and `count` tiles, at every point: kSum channels at a time, for exactness.
template <class Tile>
void products(const Sizes<Tile>& sizes, int64_t slice, int64_t count, const float* v, const float* weight, float* m,
              int64_t m_row) {
  constexpr int64_t kSum = 192;
  for (int64_t point = 0; point < Tile::kPoints; ++point)
    for (int64_t row = 0; row < count; row += kRows) {
      const float* a = v + point * sizes.input_plane + row * sizes.depth;
      const float* b = weight + (slice * Tile::kPoints + point) * sizes.weight_plane;
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
        input_planes<Tile, T>(p, first, count, slice, v, sizes.depth, sizes.input_plane);
        for (int64_t i = 0; i < sizes.panels; ++i)
          products(sizes, slice, count, v, weight + i * sizes.panel_weight, m + i * kPanel, sizes.width);
      }
      results<Tile, T>(p, first, count, 0, p.out_channels, m, sizes.width, sizes.result_plane);
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
      for (int64_t i = begin, some; i < end; i += some) {
        const int64_t slice = i / count, tile = i % count;
        some = std::min(end - i, count - tile);
        float* to = v + slice * sizes.input + tile * sizes.depth;
        input_planes<Tile, T>(p, first + tile, some, slice, to, sizes.depth, sizes.input_plane);
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
        results<Tile, T>(p, first, count, k, width, m, kPanel, sizes.result_plane);
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
