// group_norm_silu where the channel stride is 1: a position is a row of `channels` values, read whole.
#pragma once

#include "group_norm_silu_parts.h"

FASTVDIFF_BEGIN_ISA
namespace {

constexpr int64_t kPanel = 1024;  // channels whose sums a block keeps on its stack
constexpr int64_t kFirst = 8;     // positions whose mean a block's values are summed around

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// f(Count, first row) over `rows` rows. Four narrow rows go together, so that coefficients and sums are loaded once for
// them; wide ones one by one, because reading several streams at once costs more there than the loads (2x from memory).
template <class F>
inline void each_step(int64_t rows, bool narrow, F f) {
  int64_t r = 0;
  if (narrow)
    for (; r + 4 <= rows; r += 4) f(Count<4>{}, r);
  for (; r < rows; ++r) f(Count<1>{}, r);
}

// One block of positions: which sample and frame, and where it starts within the sample.
struct Block {
  int64_t b, t, start, rows;
};

template <class T, bool kSilu>
struct ChannelsLast {
  const Params& p;
  const Plan& plan;

  const T* x_at(const Block& k) const {
    return static_cast<const T*>(p.x) + k.b * p.stride_xb + k.start * p.stride_xs;
  }
  const T* grad_at(const Block& k) const {
    return static_cast<const T*>(p.grad) + k.b * p.stride_gb + k.start * p.stride_gs;
  }
  T* out_at(void* out, const Block& k) const {
    return static_cast<T*>(out) + k.b * p.stride_yb + k.start * p.stride_ys;
  }

  int64_t frames() const { return p.batch * p.frames; }
  int64_t blocks() const { return frames() * plan.blocks; }

  Block block(int64_t i) const {
    const int64_t frame = i / plan.blocks, offset = i % plan.blocks * plan.block;
    const int64_t t = frame % p.frames;
    return {frame / p.frames, t, t * plan.frame + offset, min_of(plan.block, plan.frame - offset)};
  }

  // Forward: moments of each block's groups, then each frame's coefficients (mean, a, b). Backward: each block's two
  // sums by channel, the same as (batch, channels, frames), and coefficients (mean, a, b, constant, slope).
  int64_t workspace() const {
    const int64_t forward = blocks() * p.groups * int64_t{sizeof(Moments) / sizeof(float)} + frames() * 3 * p.channels;
    const int64_t backward = blocks() * 2 * p.channels + frames() * (2 + 5) * p.channels;
    return forward > backward ? forward : backward;
  }

  bool narrow() const { return p.channels * int64_t{sizeof(T)} <= 512; }

  void block_moments(const Block& k, Moments* out) const {
    alignas(64) float centre[kPanel], sum[kPanel], square[kPanel];
    for (int64_t g = 0; g < p.groups; ++g) out[g] = Moments{};
    for (int64_t first = 0; first < p.channels; first += kPanel) {
      const int64_t width = min_of(kPanel, p.channels - first), some = min_of(kFirst, k.rows);
      const T* x = x_at(k) + first;
      for_vectors(0, width, [&](int64_t c, int64_t lanes) FASTVDIFF_INLINE {
        vf s = {};
        for (int64_t r = 0; r < some; ++r) s += load_some(x + r * p.stride_xs + c, lanes);
        store(centre + c, s * (1.0f / static_cast<float>(some)));
        store(sum + c, vf{});
        store(square + c, vf{});
      });
      each_step(k.rows, narrow(), [&](auto count, int64_t r) FASTVDIFF_INLINE {
        for_vectors(0, width, [&](int64_t c, int64_t lanes) FASTVDIFF_INLINE {
          const vf about = load(centre + c);
          vf s = {}, q = {};
          for (int i = 0; i < count.value; ++i) {
            const vf d = load_some(x + (r + i) * p.stride_xs + c, lanes) - about;
            s += d;
            q += d * d;
          }
          store(sum + c, load(sum + c) + s);
          store(square + c, load(square + c) + q);
        });
      });
      for (int64_t c = 0; c < width;) {
        const int64_t g = (first + c) / plan.width, end = min_of((g + 1) * plan.width - first, width);
        merge_channels(k.rows, end - c, centre + c, sum + c, square + c, out[g]);
        c = end;
      }
    }
  }

  // Adds `channels` channels of `rows` values each, given by their sums around `centre`, to a group.
  static void merge_channels(int64_t rows, int64_t channels, const float* centre, const float* sum,
                             const float* square, Moments& group) {
    const double n = static_cast<double>(rows), share = 1 / n;
    double mean = 0, m2 = 0;
    for (int64_t c = 0; c < channels; ++c) mean += centre[c] + sum[c] * share;
    mean /= static_cast<double>(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double shift = sum[c] * share, inside = square[c] - sum[c] * shift, off = centre[c] + shift - mean;
      m2 += (inside < 0 ? 0 : inside) + n * off * off;
    }
    group.merge(n * static_cast<double>(channels), mean, m2);
  }

  Group combine(int64_t unit, const Moments* moments) const {
    const int64_t b = unit / p.groups, g = unit % p.groups, each = p.frames * plan.blocks;
    return combine_moments(p, unit, moments + b * each * p.groups + g, each, p.groups);
  }

  void forward() const {
    Moments* moments = reinterpret_cast<Moments*>(p.workspace);
    float* coefficients = reinterpret_cast<float*>(moments + blocks() * p.groups);
    if (!p.stats)
      parallel_for(plan.threads, blocks(), [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) block_moments(block(i), moments + i * p.groups);
      });
    for (int64_t unit = 0; unit < p.batch * p.groups; ++unit) {
      const Group group = p.stats ? given_group(p, plan, unit) : combine(unit, moments);
      const int64_t b = unit / p.groups, first = unit % p.groups * plan.width;
      for (int64_t t = 0; t < p.frames; ++t) {
        float* at = coefficients + (b * p.frames + t) * 3 * p.channels;
        for (int64_t c = first; c < first + plan.width; ++c) {
          const Affine<float> k = affine(p, group, b, c, t);
          at[c] = k.mean, at[p.channels + c] = k.a, at[2 * p.channels + c] = k.b;
        }
      }
    }
    parallel_for(plan.threads, blocks(), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = end - 1; i >= begin; --i) {
        const Block k = block(i);
        forward_block(k, coefficients + (k.b * p.frames + k.t) * 3 * p.channels);
      }
    });
  }

  Affine<vf> affine_of(const float* k, int64_t lanes) const {
    return {load_some(k, lanes), load_some(k + p.channels, lanes), load_some(k + 2 * p.channels, lanes)};
  }

  void forward_block(const Block& k, const float* coefficients) const {
    const T* x = x_at(k);
    T* y = out_at(p.y, k);
    each_step(k.rows, narrow(), [&](auto count, int64_t r) FASTVDIFF_INLINE {
      for_vectors(0, p.channels, [&](int64_t c, int64_t lanes) FASTVDIFF_INLINE {
        const Affine<vf> v = affine_of(coefficients + c, lanes);
        for (int64_t i = r; i < r + count.value; ++i)
          store_some(y + i * p.stride_ys + c, forward_value<kSilu>(load_some(x + i * p.stride_xs + c, lanes), v),
                     lanes);
      });
    });
  }

  // The block's sums of dz and of dz * (x - mean), by channel.
  void block_sums(const Block& k, const float* coefficients, float* plain, float* centred_sum) const {
    const T* x = x_at(k);
    const T* grad = grad_at(k);
    T* dx = out_at(p.dx, k);
    for (int64_t c = 0; c < p.channels; ++c) plain[c] = centred_sum[c] = 0;
    each_step(k.rows, narrow(), [&](auto count, int64_t r) FASTVDIFF_INLINE {
      for_vectors(0, p.channels, [&](int64_t c, int64_t lanes) FASTVDIFF_INLINE {
        const Affine<vf> v = affine_of(coefficients + c, lanes);
        vf s = {}, q = {};
        for (int64_t i = r; i < r + count.value; ++i) {
          const vf centred = load_some(x + i * p.stride_xs + c, lanes) - v.mean;
          const vf dz = gradient_value<kSilu>(centred, load_some(grad + i * p.stride_gs + c, lanes), v);
          if (kept_in_dx<T, kSilu>()) store_some(dx + i * p.stride_ys + c, dz, lanes);
          s += dz;
          q += dz * centred;
        }
        store_some(plain + c, load_some(plain + c, lanes) + s, lanes);
        store_some(centred_sum + c, load_some(centred_sum + c, lanes) + q, lanes);
      });
    });
  }

  void block_dx(const Block& k, const float* coefficients) const {
    const T* x = x_at(k);
    T* dx = out_at(p.dx, k);
    constexpr bool kKept = kept_in_dx<T, kSilu>();
    const T* source = kKept ? dx : grad_at(k);
    const int64_t stride = kKept ? p.stride_ys : p.stride_gs;
    each_step(k.rows, narrow(), [&](auto count, int64_t r) FASTVDIFF_INLINE {
      for_vectors(0, p.channels, [&](int64_t c, int64_t lanes) FASTVDIFF_INLINE {
        const Affine<vf> v = affine_of(coefficients + c, lanes);
        const vf constant = load_some(coefficients + 3 * p.channels + c, lanes);
        const vf slope = load_some(coefficients + 4 * p.channels + c, lanes);
        for (int64_t i = r; i < r + count.value; ++i) {
          const vf centred = load_some(x + i * p.stride_xs + c, lanes) - v.mean;
          const vf value = load_some(source + i * stride + c, lanes);
          const vf dz = kKept ? value : gradient_value<kSilu>(centred, value, v);
          store_some(dx + i * p.stride_ys + c, dz * v.a - (centred * slope + constant), lanes);
        }
      });
    });
  }

  // The sums of sample b's channels, from its blocks in order.
  void gather_sums(int64_t b, const float* partial, Sums* sums) const {
    for (int64_t t = 0; t < p.frames; ++t)
      for (int64_t c = 0; c < p.channels; ++c) {
        const float* at = partial + (b * p.frames + t) * plan.blocks * 2 * p.channels + c;
        double plain = 0, centred = 0;
        for (int64_t i = 0; i < plan.blocks; ++i, at += 2 * p.channels) plain += at[0], centred += at[p.channels];
        const double rstd = p.moments[2 * (b * p.groups + c / plan.width) + 1];
        sums[(b * p.channels + c) * p.frames + t] = {static_cast<float>(plain), static_cast<float>(centred * rstd)};
      }
  }

  void backward() const {
    float* partial = p.workspace;
    Sums* sums = reinterpret_cast<Sums*>(partial + blocks() * 2 * p.channels);
    float* coefficients = reinterpret_cast<float*>(sums + frames() * p.channels);
    auto coefficients_of = [&](int64_t b, int64_t t) { return coefficients + (b * p.frames + t) * 5 * p.channels; };
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t t = 0; t < p.frames; ++t)
        for (int64_t c = 0; c < p.channels; ++c) {
          const Affine<float> k = affine(p, saved_group(p, b * p.groups + c / plan.width), b, c, t);
          float* at = coefficients_of(b, t) + c;
          at[0] = k.mean, at[p.channels] = k.a, at[2 * p.channels] = k.b;
        }
    parallel_for(plan.threads, blocks(), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Block k = block(i);
        float* own = partial + i * 2 * p.channels;
        block_sums(k, coefficients_of(k.b, k.t), own, own + p.channels);
      }
    });
    for (int64_t b = 0; b < p.batch; ++b) gather_sums(b, partial, sums);
    for (int64_t unit = 0; unit < p.batch * p.groups; ++unit) {
      const Spread<float> spread = group_spread(p, plan, unit, sums);
      const int64_t b = unit / p.groups, first = unit % p.groups * plan.width;
      for (int64_t t = 0; t < p.frames; ++t)
        for (int64_t c = first; c < first + plan.width; ++c) {
          coefficients_of(b, t)[3 * p.channels + c] = spread.constant;
          coefficients_of(b, t)[4 * p.channels + c] = spread.slope;
        }
    }
    parallel_for(plan.threads, blocks(), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = end - 1; i >= begin; --i) {
        const Block k = block(i);
        block_dx(k, coefficients_of(k.b, k.t));
      }
    });
    parameter_gradients(p, sums);
  }
};

}  // namespace
FASTVDIFF_END_ISA
