// group_norm_silu where the position stride is 1: a channel is a row of `positions` values.
#pragma once

#include "group_norm_silu_parts.h"

FASTVDIFF_BEGIN_ISA
namespace {

template <class T, bool kSilu>
void apply_run(const T* x, T* y, int64_t n, const Affine<float>& k) {
  const Affine<vf> v{splat(k.mean), splat(k.a), splat(k.b)};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, forward_value<kSilu>(load(x + i), v));
  if (i < n) store_n(y + i, forward_value<kSilu>(load_n(x + i, n - i), v), n - i);
}

template <class T, bool kSilu>
struct Rows {
  const Params& p;
  const Plan& plan;

  const T* x_at(int64_t b, int64_t c) const {
    return static_cast<const T*>(p.x) + b * p.stride_xb + c * p.stride_xc;
  }
  const T* grad_at(int64_t b, int64_t c) const {
    return static_cast<const T*>(p.grad) + b * p.stride_gb + c * p.stride_gc;
  }
  T* out_at(void* out, int64_t b, int64_t c) const {
    return static_cast<T*>(out) + b * p.stride_yb + c * p.stride_yc;
  }

  // Forward: moments of the runs, then the groups. Backward: the sums of the runs, then the groups' spreads.
  int64_t workspace() const {
    const int64_t units = p.batch * p.groups;
    const int64_t forward = units * plan.runs * int64_t{sizeof(Moments)} + units * int64_t{sizeof(Group)};
    const int64_t backward =
        p.batch * p.channels * p.frames * int64_t{sizeof(Sums)} + units * int64_t{sizeof(Spread<float>)};
    return (forward > backward ? forward : backward) / int64_t{sizeof(float)};
  }

  Moments moments(int64_t unit, int64_t run) const {
    const int64_t b = unit / p.groups, c = unit % p.groups * plan.width + run;
    return run_moments(x_at(b, c), plan.runs == 1 ? plan.count : p.positions);
  }

  void forward_row(int64_t b, int64_t c, const Group& group) const {
    for (int64_t t = 0; t < p.frames; ++t)
      apply_run<T, kSilu>(x_at(b, c) + t * plan.frame, out_at(p.y, b, c) + t * plan.frame, plan.frame,
                          affine(p, group, b, c, t));
  }

  Group combine(int64_t unit, const Moments* runs) const {
    return combine_moments(p, unit, runs, plan.runs, 1);
  }

  // Enough groups to keep every thread busy with whole ones?
  bool by_group() const {
    const int64_t units = p.batch * p.groups;
    return units % plan.threads == 0 || units >= 4 * plan.threads;
  }

  void forward() const {
    const int64_t units = p.batch * p.groups;
    Moments* runs = reinterpret_cast<Moments*>(p.workspace);
    Group* groups = reinterpret_cast<Group*>(runs + units * plan.runs);
    if (by_group()) {
      parallel_for(plan.threads, units, [&](int64_t begin, int64_t end, int) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t b = unit / p.groups, c = unit % p.groups * plan.width;
          Moments* own = runs + unit * plan.runs;
          for (int64_t r = 0; r < plan.runs && !p.stats; ++r) own[r] = moments(unit, r);
          const Group group = p.stats ? given_group(p, plan, unit) : combine(unit, own);
          for (int64_t i = plan.width - 1; i >= 0; --i) forward_row(b, c + i, group);
        }
      });
      return;
    }
    if (!p.stats)
      parallel_for(plan.threads, units * plan.runs, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) runs[i] = moments(i / plan.runs, i % plan.runs);
      });
    for (int64_t unit = 0; unit < units; ++unit)
      groups[unit] = p.stats ? given_group(p, plan, unit) : combine(unit, runs + unit * plan.runs);
    parallel_for(plan.threads, p.batch * p.channels, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = end - 1; i >= begin; --i)
        forward_row(i / p.channels, i % p.channels, groups[i / plan.width]);
    });
  }

  Sums run_sums(const T* x, const T* grad, T* dx, const Affine<float>& k, float rstd) const {
    const Affine<vf> v{splat(k.mean), splat(k.a), splat(k.b)};
    double plain = 0, normal = 0;
    for (int64_t start = 0; start < plan.frame; start += kTile) {
      const int64_t end = min_of(start + kTile, plan.frame);
      vf s = {}, q = {};
      int64_t i = start;
      for (; i + kWidth <= end; i += kWidth) {
        const vf centred = load(x + i) - v.mean, dz = gradient_value<kSilu>(centred, load(grad + i), v);
        if (kept_in_dx<T, kSilu>()) store(dx + i, dz);
        s += dz;
        q += dz * centred;
      }
      if (i < end) {
        const int64_t lanes = end - i;
        const vf centred = load_n(x + i, lanes) - v.mean;
        const vf dz = keep_n(gradient_value<kSilu>(centred, load_n(grad + i, lanes), v), lanes);
        if (kept_in_dx<T, kSilu>()) store_n(dx + i, dz, lanes);
        s += dz;
        q += keep_n(dz * centred, lanes);
      }
      plain += sum_lanes(s);
      normal += sum_lanes(q);
    }
    return {static_cast<float>(plain), static_cast<float>(normal * rstd)};
  }

  void run_dx(const T* x, const T* grad, T* dx, const Affine<float>& k, const Spread<float>& spread) const {
    const Affine<vf> v{splat(k.mean), splat(k.a), splat(k.b)};
    const vf constant = splat(spread.constant), slope = splat(spread.slope);
    constexpr bool kKept = kept_in_dx<T, kSilu>();
    const T* source = kKept ? dx : grad;
    auto value = [&](vf x_value, vf source_value) {
      const vf centred = x_value - v.mean, dz = kKept ? source_value : gradient_value<kSilu>(centred, source_value, v);
      return dz * v.a - (centred * slope + constant);
    };
    int64_t i = 0;
    for (; i + kWidth <= plan.frame; i += kWidth) store(dx + i, value(load(x + i), load(source + i)));
    if (const int64_t lanes = plan.frame - i; lanes > 0)
      store_n(dx + i, value(load_n(x + i, lanes), load_n(source + i, lanes)), lanes);
  }

  void row_sums(int64_t b, int64_t c, Sums* sums) const {
    const Group group = saved_group(p, b * p.groups + c / plan.width);
    for (int64_t t = 0, at = 0; t < p.frames; ++t, at += plan.frame)
      sums[(b * p.channels + c) * p.frames + t] = run_sums(
          x_at(b, c) + at, grad_at(b, c) + at, out_at(p.dx, b, c) + at, affine(p, group, b, c, t), group.rstd);
  }

  void row_dx(int64_t b, int64_t c, const Spread<float>& spread) const {
    const Group group = saved_group(p, b * p.groups + c / plan.width);
    for (int64_t t = 0; t < p.frames; ++t)
      run_dx(x_at(b, c) + t * plan.frame, grad_at(b, c) + t * plan.frame, out_at(p.dx, b, c) + t * plan.frame,
             affine(p, group, b, c, t), spread);
  }

  void backward() const;
};

template <class T, bool kSilu>
void Rows<T, kSilu>::backward() const {
  const int64_t units = p.batch * p.groups;
  Sums* sums = reinterpret_cast<Sums*>(p.workspace);
  Spread<float>* spreads = reinterpret_cast<Spread<float>*>(sums + p.batch * p.channels * p.frames);
  if (by_group()) {
    parallel_for(plan.threads, units, [&](int64_t begin, int64_t end, int) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / p.groups, c = unit % p.groups * plan.width;
        for (int64_t i = 0; i < plan.width; ++i) row_sums(b, c + i, sums);
        const Spread<float> spread = group_spread(p, plan, unit, sums);
        for (int64_t i = plan.width - 1; i >= 0; --i) row_dx(b, c + i, spread);
      }
    });
  } else {
    const int64_t rows = p.batch * p.channels;
    parallel_for(plan.threads, rows, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) row_sums(i / p.channels, i % p.channels, sums);
    });
    for (int64_t unit = 0; unit < units; ++unit) spreads[unit] = group_spread(p, plan, unit, sums);
    parallel_for(plan.threads, rows, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = end - 1; i >= begin; --i) row_dx(i / p.channels, i % p.channels, spreads[i / plan.width]);
    });
  }
  parameter_gradients(p, sums);
}

}  // namespace
FASTVDIFF_END_ISA
