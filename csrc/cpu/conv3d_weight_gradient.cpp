// Computes: dweight of conv3d.cpp's convolution (csrc/include/fastvdiff/conv3d_cpu.h): the transposed algorithm, with the
//   same share of a direct sum's multiplications: G^T [sum over tiles of (B^T x B) (A dy A^T)] G.
// Layout: as conv3d.cpp's.
// Work split: kChunk tiles at a time: their points of x and dy, by tiles; then products of channels x tiles x output
//   channels at each point. Where one chunk is all, a worker makes the points of kBlock channels and kPanel output channels
//   and their taps at once; else every point's sums wait in memory, a worker adds to kRows channels of one. The sums'
//   order follows from the sizes alone.
// Traffic: x 2.25 times and dy 2.25 times to the last cache and back (1.5 over time); dweight's points once a chunk, if
//   there are several.
// Precision: float32 throughout.
#include "conv3d_winograd.h"
#include "parallel.h"

FASTVDIFF_BEGIN_ISA
namespace {

constexpr int64_t kBlock = 48;

template <class Tile>
struct Sizes {
  static constexpr int64_t kOwn = Tile::kPoints * kBlock * kPanel;
  int64_t depth, width, x_plane, grad_plane, sums;

  explicit Sizes(const Conv3dCpuParams& p) {
    depth = round_up(round_up(p.channels, kWidth), kRows), width = round_up(p.out_channels, kPanel);
    x_plane = Tile::kChunk * depth + kSkew, grad_plane = Tile::kChunk * width + kSkew;
    const int64_t workers = std::min<int64_t>(std::max(p.threads, 1), (p.channels + kBlock - 1) / kBlock);
    sums = Tile::tiles(p) > Tile::kChunk ? Tile::kPoints * depth * width : workers * kOwn;
  }
  int64_t floats() const { return Tile::kPoints * (x_plane + grad_plane) + sums; }
};

template <class Tile, class T>
void grad_planes(const Conv3dCpuParams& p, int64_t first, int64_t count, float* e, int64_t row, int64_t plane) {
  Run<Tile, Tile::kOutputs, T> grad(p.stride_y);
  for (int64_t done = 0, tiles; done < count; done += tiles) {
    const Tile place(p, first + done);
    tiles = grad.direct ? 1 : place.run(count - done);
    grad.box = place.output_box(p, tiles);
    for (int64_t i = 0; i < tiles; ++i) Tile(p, first + done + i).outputs(p, grad.places(), grad.at[i]);
    for_vectors(0, p.out_channels, [&](int64_t k, int64_t n) {
      const T* from = static_cast<const T*>(p.grad) + place.b * p.stride_y[0] + k * p.stride_y[1];
      grad.read(from, n);
      for (int64_t i = 0; i < tiles; ++i) {
        vf g[Tile::kPoints];
        grad.load_tile(from, i, n, g);
        Tile::output_points(g);
        for (int j = 0; j < Tile::kPoints; ++j) store(e + (done + i) * row + j * plane + k, g[j]);
      }
    });
  }
}

// dweight of one slice and channel and `count` output channels from `first` on, whose points lie at u.
template <class Tile>
void taps(const Conv3dCpuParams& p, int64_t slice, int64_t c, int64_t first, int64_t count, const float* u, int64_t plane) {
  const int64_t all = Tile::slices(p) * Tile::kTaps;
  for_vectors(first, first + count, [&](int64_t k, int64_t n) {
    vf points[Tile::kPoints];
    for (int i = 0; i < Tile::kPoints; ++i) points[i] = load(u + i * plane + k - first);
    Tile::point_taps(points);
    alignas(64) float sums[Tile::kTaps * kWidth];
    for (int tap = 0; tap < Tile::kTaps; ++tap) store(sums + tap * kWidth, points[tap]);
    turn_back(sums, Tile::kTaps, n, p.channels * all, p.dweight + (k * p.channels + c) * all + slice * Tile::kTaps);
  });
}

// The taps of kBlock channels from `row` on, from all tiles; `own` holds Sizes::kOwn floats.
template <class Tile>
void block(const Conv3dCpuParams& p, const Sizes<Tile>& sizes, int64_t slice, int64_t row, const float* v, const float* e,
           float* own) {
  const int64_t tiles = Tile::tiles(p);
  constexpr int64_t plane = kBlock * kPanel;
  for (int64_t k = 0; k < p.out_channels; k += kPanel) {
    for (int64_t point = 0; point < Tile::kPoints; ++point)
      for (int64_t r = 0; r < kBlock && row + r < sizes.depth; r += kRows)
        product<false>(v + point * sizes.x_plane + row + r, 1, sizes.depth, e + point * sizes.grad_plane + k, sizes.width,
                       own + point * plane + r * kPanel, kPanel, tiles);
    for (int64_t r = 0; r < kBlock && row + r < p.channels; ++r)
      taps<Tile>(p, slice, row + r, k, std::min<int64_t>(kPanel, p.out_channels - k), own + r * kPanel, plane);
  }
}

template <class Tile, class T>
void points(const Conv3dCpuParams& p, const Sizes<Tile>& sizes, int64_t slice, int64_t first, int64_t count, float* v,
            float* e) {
  parallel_for(p.threads, count, [&](int64_t begin, int64_t end, int) {
    input_planes<Tile, T>(p, first + begin, end - begin, slice, v + begin * sizes.depth, sizes.depth, sizes.x_plane);
    grad_planes<Tile, T>(p, first + begin, end - begin, e + begin * sizes.width, sizes.width, sizes.grad_plane);
  });
}

// A point's sums of kRows channels from `row` on: those of `count` tiles more, or the first.
template <class Tile>
void add(const Sizes<Tile>& sizes, int64_t point, int64_t row, int64_t count, bool more, const float* v, const float* e,
         float* sums) {
  for (int64_t k = 0; k < sizes.width; k += kPanel) {
    const float* a = v + point * sizes.x_plane + row;
    const float* b = e + point * sizes.grad_plane + k;
    float* to = sums + (point * sizes.depth + row) * sizes.width + k;
    if (more)
      product<true>(a, 1, sizes.depth, b, sizes.width, to, sizes.width, count);
    else
      product<false>(a, 1, sizes.depth, b, sizes.width, to, sizes.width, count);
  }
}

template <class Tile, class T>
void weight_gradient(const Conv3dCpuParams& p) {
  const Sizes<Tile> sizes(p);
  float* v = p.workspace;
  float* e = v + Tile::kPoints * sizes.x_plane;
  float* sums = e + Tile::kPoints * sizes.grad_plane;
  const int64_t tiles = Tile::tiles(p), groups = sizes.depth / kRows;
  for (int64_t slice = 0; slice < Tile::slices(p); ++slice) {
    if (tiles <= Tile::kChunk) {
      points<Tile, T>(p, sizes, slice, 0, tiles, v, e);
      parallel_for(p.threads, (p.channels + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t i = begin; i < end; ++i) block(p, sizes, slice, i * kBlock, v, e, sums + worker * sizes.kOwn);
      });
      continue;
    }
    for (int64_t first = 0; first < tiles; first += Tile::kChunk) {
      const int64_t count = std::min<int64_t>(Tile::kChunk, tiles - first);
      points<Tile, T>(p, sizes, slice, first, count, v, e);
      parallel_for(p.threads, Tile::kPoints * groups, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) add(sizes, i / groups, i % groups * kRows, count, first > 0, v, e, sums);
      });
    }
    parallel_for(p.threads, p.channels, [&](int64_t begin, int64_t end, int) {
      for (int64_t c = begin; c < end; ++c)
        taps<Tile>(p, slice, c, 0, p.out_channels, sums + c * sizes.width, sizes.depth * sizes.width);
    });
  }
}

}  // namespace

int64_t conv3d_weight_gradient_workspace(const Conv3dCpuParams& p) {
  int64_t floats = 0;
  with_types(p, [&](auto* tile, auto*) { floats = Sizes<std::remove_pointer_t<decltype(tile)>>(p).floats(); });
  return floats;
}

void conv3d_weight_gradient(const Conv3dCpuParams& p) {
  with_types(p, [&](auto* tile, auto* element) {
    weight_gradient<std::remove_pointer_t<decltype(tile)>, std::remove_pointer_t<decltype(element)>>(p);
  });
}

FASTVDIFF_END_ISA
