// The implicit matrix product behind the forward pass and the data gradient.
//
// Computes    out[m, n] = sum over taps and channels of act(in[m, tap, channel]) * weight[n, tap, channel], plus bias,
//             channel bias and residual; on request each column's mean and centred sum of squares, rounded as written.
// Layout      NDHWC in, (n, kT, kH, kW, channels) weights; out by strides, whole 16-byte chunks where it is NDHWC.
// Work split  A block owns 128 positions x 64 or 128 columns and walks the sum in steps of 128 bytes a row through three
//             stages of shared memory; neighbouring blocks share their positions, so that L2 gives them again. With
//             statistics a tile does not cross samples.
// Traffic     in + weight + residual + out once where L2 holds the positions that neighbouring taps and columns share.
// Precision   float32 sums (float inputs rounded to tf32, nearest); one rounding, after the epilogue.
// Refuses     nothing that the launchers let through: 2^31 output positions, groups.
#pragma once

#include "conv3d_epilogue.cuh"
#include "conv3d_gather.cuh"
#include "conv3d_tile.cuh"

namespace fastvdiff::cuda {

// How input elements reach shared memory.
enum class Load {
  affine,    // 16-byte asynchronous copies; every tap at a fixed distance
  clamped,   // 16-byte asynchronous copies; coordinates settled for each tap: repeated edges, a prefix
  prologue,  // 16 bytes through registers, activated on the way
  element    // element by element: channels or addresses that are no multiple of 16 bytes; with or without prologue
};

struct ProductArgs {
  Gather gather;
  Epilogue epilogue;
  const void* weight;
  int64_t weight_row;  // elements of one column's weights
};

template <class T, int COLUMNS>
constexpr int kStageBytes = (kConvRows + COLUMNS) * 128;

template <class T, int COLUMNS>
constexpr int kProductBytes = kConvStages * kStageBytes<T, COLUMNS>;

// A thread's share of every stage: one chunk of the step in rows row, row + 32, ...
template <class T, int COLUMNS, Load LOAD>
struct Loader {
  static constexpr int kA = kConvRows / 32, kB = COLUMNS / 32;

  const ProductArgs& args;
  const Row* rows;
  int row, chunk, first_column;
  Term term;
  uint4 held[kA];  // prologue: read in one iteration, deposited after the products of that iteration
  Term held_term{};

  __device__ __forceinline__ Loader(const ProductArgs& args, const Row* rows, int first_column)
      : args(args), rows(rows), row(threadIdx.x / 8), chunk(threadIdx.x % 8), first_column(first_column), term{} {
    advance(args.gather, term, chunk * kChunk<T>);
  }

  // Starts the next step's loads into `stage`.
  __device__ __forceinline__ void fetch(unsigned char* stage) {
    const Gather& g = args.gather;
    unsigned char* const a = stage + chunk_at(row, chunk);
    if constexpr (LOAD == Load::affine) {
      const uint32_t needed = needed_bits(g, term);
      const T* const away = static_cast<const T*>(g.in) + distance(g, term);
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        const AffineRow& at = reinterpret_cast<const AffineRow*>(rows)[row + 32 * i];
        const bool inside = (at.bits & needed) == needed;
        cp_async<16>(a + i * 4096, inside ? away + at.offset : g.in, inside ? 16 : 0);
      }
    } else if constexpr (LOAD == Load::clamped) {
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        const void* element = locate<T>(g, rows[row + 32 * i], term).element;
        cp_async<16>(a + i * 4096, element != nullptr ? element : g.in, element != nullptr ? 16 : 0);
      }
    } else if constexpr (LOAD == Load::prologue) {
      held_term = term;
#pragma unroll
      for (int i = 0; i < kA; ++i) {
        const void* element = locate<T>(g, rows[row + 32 * i], term).element;
        held[i] = element != nullptr ? load_128(element) : make_uint4(0, 0, 0, 0);
      }
    } else {
      copy_elements(stage);
    }
    if constexpr (LOAD != Load::element) fetch_weights(stage + kConvRows * 128);
    advance(g, term, kDepth<T>);
  }

  // Prologue: activates what fetch() read, and stores it.
  __device__ __forceinline__ void deposit(unsigned char* stage) {
    const Gather& g = args.gather;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      const Source source = locate<T>(g, rows[row + 32 * i], held_term);
      alignas(16) T values[kChunk<T>];
      *reinterpret_cast<uint4*>(values) = held[i];
      if (source.element != nullptr && source.frame >= 0) {
        const float* pairs = prologue_at(g, rows[row + 32 * i].batch, source.frame, held_term.channel);
#pragma unroll
        for (int e = 0; e < kChunk<T>; ++e)
          values[e] = from_float<T>(activated(to_float(values[e]), pairs[2 * e], pairs[2 * e + 1], g.silu));
      }
      *reinterpret_cast<uint4*>(stage + chunk_at(row, chunk) + i * 4096) = load_128(values);
    }
  }

 private:
  __device__ __forceinline__ void fetch_weights(unsigned char* stage) {
    const T* const weight = static_cast<const T*>(args.weight);
    const bool inside = !past_end(args.gather, term);
    const int64_t offset = inside ? weight_offset(args.gather, term) : 0;
#pragma unroll
    for (int i = 0; i < kB; ++i) {
      const int column = first_column + row + 32 * i;
      const bool valid = inside && column < args.epilogue.columns;
      cp_async<16>(stage + chunk_at(row, chunk) + i * 4096,
                   valid ? weight + column * args.weight_row + offset : weight, valid ? 16 : 0);
    }
  }

  __device__ __forceinline__ void copy_elements(unsigned char* stage) {
    const T* const weight = static_cast<const T*>(args.weight);
    Term at = term;
    for (int e = 0; e < kChunk<T>; ++e, advance(args.gather, at, 1)) {
      T* const a = reinterpret_cast<T*>(stage + chunk_at(row, chunk)) + e;
      for (int i = 0; i < kA; ++i) a[i * 32 * kDepth<T>] = element_at<T>(args.gather, rows[row + 32 * i], at);
      T* const b = reinterpret_cast<T*>(stage + kConvRows * 128 + chunk_at(row, chunk)) + e;
      const bool inside = !past_end(args.gather, at);
      const int64_t offset = inside ? weight_offset(args.gather, at) : 0;
      for (int i = 0; i < kB; ++i) {
        const int column = first_column + row + 32 * i;
        b[i * 32 * kDepth<T>] =
            inside && column < args.epilogue.columns ? weight[column * args.weight_row + offset] : from_float<T>(0.0f);
      }
    }
  }
};

template <class T, int COLUMNS, Load LOAD>
__global__ void __launch_bounds__(kConvThreads, LOAD == Load::affine || LOAD == Load::clamped ? 2 : 1)
    conv3d_product_kernel(const ProductArgs args) {
  FASTVDIFF_DYNAMIC_SHARED(arena);
  FASTVDIFF_SHARED(Row, rows, kConvRows);
  const Epilogue& e = args.epilogue;
  const int64_t tile = blockIdx.x / e.column_tiles;
  const int first_column = static_cast<int>(blockIdx.x % e.column_tiles) * COLUMNS;
  const int64_t segment = tile / e.row_tiles, first_row = tile % e.row_tiles * kConvRows;
  const Gather& g = args.gather;
  const auto tabulate = [&] { return row_of(g, first_row + threadIdx.x, e.rows, segment); };
  if (threadIdx.x < kConvRows) {
    if constexpr (LOAD == Load::affine) {
      reinterpret_cast<AffineRow*>(rows)[threadIdx.x] = affine_row(g, tabulate());
    } else {
      rows[threadIdx.x] = tabulate();
    }
  }
  sync_threads();

  const int64_t length = static_cast<int64_t>(g.axis[0].taps) * g.axis[1].taps * g.axis[2].taps * g.channels;
  const int steps = static_cast<int>(ceil_div(length, kDepth<T>));
  WarpTile<T, COLUMNS> product;
  if (steps > 0) {
    Loader<T, COLUMNS, LOAD> loader(args, rows, first_column);
    const auto stage_of = [&](int step) { return arena + step % kConvStages * kStageBytes<T, COLUMNS>; };
    for (int step = 0; step < kConvStages - 1; ++step) {
      if (step < steps) {
        loader.fetch(stage_of(step));
        if constexpr (LOAD == Load::prologue) loader.deposit(stage_of(step));
      }
      cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kConvStages - 2>();
      sync_threads();
      const int next = step + kConvStages - 1;
      if (next < steps) loader.fetch(stage_of(next));
      cp_async_commit();
      const unsigned char* stage = stage_of(step);
      product.add(stage, stage + kConvRows * 128);
      if constexpr (LOAD == Load::prologue) {
        if (next < steps) loader.deposit(stage_of(next));
      }
    }
    cp_async_wait<0>();
  }
  sync_threads();
  if (LOAD == Load::affine && threadIdx.x < kConvRows) rows[threadIdx.x] = tabulate();
  finish<T, COLUMNS>(g, e, product, rows, reinterpret_cast<float*>(arena), tile, first_column);
}

}  // namespace fastvdiff::cuda
