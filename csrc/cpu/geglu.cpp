// Computes: y = h gelu(g), (h, g) the halves of a row of x, gelu(g) = g Phi(g) with the normal distribution
//   function Phi itself; backward dh = dy gelu(g), dg = dy h (Phi(g) + g phi(g)).
// Layout: rows of any stride, their elements neighbours.
// Work split: rows, as many to each thread.
// Traffic: 2N read and N written; backward 3N read and 2N written.
// Precision: float32, rounded once. Phi(-u) = exp(-u^2 / 2) R(u), u >= 0, R a polynomial of degree 8 in 1 / (1 + 0.3 u)
//   that is within 1.5e-7 of its value up to u = 14, where Phi(-u) is no normal number any more: small results are as
//   exact as large ones, which 1 + erf(g / sqrt 2), nearly 0 there, is not.
#include "fastvdiff/geglu.h"

#include <type_traits>

#include "parallel.h"
#include "simd.h"

FASTVDIFF_BEGIN_ISA
namespace {

// Phi(g), and exp(-g^2 / 2).
inline vf normal_below(vf g, vf& bell) {
  const vf u = vmax(g, -g);
  bell = exp(-0.5f * (g * g));
  const vf s = 1.0f / (1.0f + 0.3f * u);
  vf r = splat(3.567482903e-2f);
  r = r * s - 1.572033018e-1f;
  r = r * s + 2.063538581e-1f;
  r = r * s - 5.368394777e-2f;
  r = r * s + 1.285617799e-1f;
  r = r * s + 9.991344810e-2f;
  r = r * s + 1.207539588e-1f;
  r = r * s + 1.196293011e-1f;
  const vf tail = bell * (r * s);
  return g < 0.0f ? tail : 1.0f - tail;
}

template <class T>
void forward_rows(const GegluParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T *h = static_cast<const T*>(p.x) + r * p.stride_x, *gate = h + p.width;
    T* y = static_cast<T*>(p.y) + r * p.width;
    for_vectors(0, p.width, [&](int64_t i, int64_t n) FASTVDIFF_INLINE {
      const vf g = load_some(gate + i, n);
      vf bell;
      store_some(y + i, load_some(h + i, n) * (g * normal_below(g, bell)), n);
    });
  }
}

template <class T>
void backward_rows(const GegluParams& p, int64_t begin, int64_t end) {
  constexpr float kBell = 0.398942280f;  // 1 / sqrt(2 pi)
  for (int64_t r = begin; r < end; ++r) {
    const T *h = static_cast<const T*>(p.x) + r * p.stride_x, *gate = h + p.width;
    const T* dy = static_cast<const T*>(p.grad) + r * p.stride_grad;
    T *dh = static_cast<T*>(p.dx) + 2 * r * p.width, *dgate = dh + p.width;
    for_vectors(0, p.width, [&](int64_t i, int64_t n) FASTVDIFF_INLINE {
      const vf g = load_some(gate + i, n), grad = load_some(dy + i, n);
      vf bell;
      const vf below = normal_below(g, bell);
      store_some(dh + i, grad * (g * below), n);
      store_some(dgate + i, grad * load_some(h + i, n) * (below + g * (kBell * bell)), n);
    });
  }
}

template <class F>
void by_rows(const GegluParams& p, F&& f) {
  parallel_for(p.threads, p.rows, [&](int64_t begin, int64_t end, int) {
    switch (p.dtype) {
      case DType::bf16: return f(static_cast<bf16*>(nullptr), begin, end);
      case DType::f16: return f(static_cast<f16*>(nullptr), begin, end);
      default: return f(static_cast<float*>(nullptr), begin, end);
    }
  });
}

}  // namespace

void geglu_forward(const GegluParams& p) {
  by_rows(p, [&](auto* element, int64_t begin, int64_t end) {
    forward_rows<std::remove_pointer_t<decltype(element)>>(p, begin, end);
  });
}

void geglu_backward(const GegluParams& p) {
  by_rows(p, [&](auto* element, int64_t begin, int64_t end) {
    backward_rows<std::remove_pointer_t<decltype(element)>>(p, begin, end);
  });
}

FASTVDIFF_END_ISA
