// Kernels that are right, and kernels with one mistake each that the shim has to find.
#include "device.h"
#include "entry.h"
#include "ptx.h"

namespace fastvdiff::cuda {

struct SelfTestParams {
  const void* a;  // (m, k)
  const void* b;  // (n, k), or (k, n) for the transposed load
  float* d;       // (m, n)
  int64_t m, n, k;
  int32_t mistake;
};

enum Mistake { kNone, kNoBarrier, kNoWait, kDivergent, kEarlyReturn, kWriteAfterRead, kOverrun, kNoWarpBarrier };

// One warp: d (16x8) = a (16xk) b^T, k a multiple of 16, through cp.async and ldmatrix.
template <class T, bool TRANSPOSED>
__global__ void one_warp_product(SelfTestParams p) {
  FASTVDIFF_SHARED(T, a, 16 * 16);
  FASTVDIFF_DYNAMIC_SHARED(bytes);
  T* b = reinterpret_cast<T*>(bytes);
  const int lane = threadIdx.x;
  float d[4] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += 16) {
    const int row = lane / 2, column = lane % 2 * 8;
    cp_async<16>(a + row * 16 + column, static_cast<const T*>(p.a) + row * p.k + k0 + column);
    if constexpr (TRANSPOSED) {
      if (lane < 16) cp_async<16>(b + lane * 8, static_cast<const T*>(p.b) + (k0 + lane) * 8);
    } else {
      if (lane < 16) cp_async<16>(b + row * 16 + column, static_cast<const T*>(p.b) + row * p.k + k0 + column);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_warp();
    uint32_t of_a[4], of_b[2];
    ldmatrix(of_a, a + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    if constexpr (TRANSPOSED) {
      ldmatrix_transposed(of_b, b + lane % 16 * 8);
    } else {
      ldmatrix(of_b, b + lane % 8 * 16 + lane / 8 % 2 * 8);
    }
    mma_m16n8k16<T>(d, of_a, of_b);
    sync_warp();
  }
  const int g = lane / 4, t = lane % 4;
  for (int e = 0; e < 4; ++e) p.d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2] = d[e];
}

__global__ void one_warp_product_tf32(SelfTestParams p) {
  const float *a = static_cast<const float*>(p.a), *b = static_cast<const float*>(p.b);
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float d[4] = {};
  for (int64_t k = 0; k < p.k; k += 8) {
    uint32_t of_a[4], of_b[2];
    for (int r = 0; r < 4; ++r) of_a[r] = to_tf32(a[(g + 8 * (r % 2)) * p.k + k + t + 4 * (r / 2)]);
    for (int r = 0; r < 2; ++r) of_b[r] = to_tf32(b[g * p.k + k + t + 4 * r]);
    mma_m16n8k8_tf32(d, of_a, of_b);
  }
  for (int e = 0; e < 4; ++e) p.d[(g + 8 * (e / 2)) * 8 + 2 * t + e % 2] = d[e];
}

// d[i] = sum of the block's 64 values of a, three times over, by way of shared memory; p.mistake leaves something out.
__global__ void block_sums(SelfTestParams p) {
  FASTVDIFF_SHARED(float, values, 64);
  const int i = threadIdx.x;
  const float* a = static_cast<const float*>(p.a) + blockIdx.x * 64;
  float total = 0;
  for (int round = 0; round < 3; ++round) {
    if (round && p.mistake != kWriteAfterRead) sync_threads();
    cp_async<4>(values + (p.mistake == kOverrun && i == 63 ? 64 : i), a + i);
    cp_async_commit();
    if (p.mistake != kNoWait) cp_async_wait<0>();
    if (p.mistake == kEarlyReturn && i == 5) return;
    if (p.mistake == kDivergent && i >= 32) {
      sync_threads();
    } else if (p.mistake != kNoBarrier) {
      sync_threads();
    }
    for (int k = 0; k < 64; ++k) total += values[k];
  }
  cp_async_wait<0>();
  p.d[blockIdx.x * 64 + i] = total;
}

// d[i] = the neighbour's value, within a warp: the barrier of the warp is enough.
__global__ void neighbours(SelfTestParams p) {
  FASTVDIFF_SHARED(float, values, 64);
  const int i = threadIdx.x;
  values[i] = static_cast<const float*>(p.a)[i];
  if (p.mistake != kNoWarpBarrier) sync_warp();
  const float next = values[i ^ 1];
  const float votes = ballot(next > 0) == 0xffffffffu ? shuffle_xor(next, 1) : shuffle(next, 0) + shuffle_down(next, 3);
  p.d[i] = votes;
}

template <class T>
void product(const SelfTestParams& p, void* stream) {
  FASTVDIFF_LAUNCH((one_warp_product<T, false>), dim3(1), dim3(32), 8 * 16 * sizeof(T), stream, p);
}
template <class T>
void product_transposed(const SelfTestParams& p, void* stream) {
  FASTVDIFF_LAUNCH((one_warp_product<T, true>), dim3(1), dim3(32), 8 * 16 * sizeof(T), stream, p);
}
void product_tf32(const SelfTestParams& p, void* stream) { FASTVDIFF_LAUNCH(one_warp_product_tf32, dim3(1), dim3(32), 0, stream, p); }
void sums(const SelfTestParams& p, void* stream) {
  FASTVDIFF_LAUNCH(block_sums, dim3(static_cast<unsigned>(p.m)), dim3(64), 0, stream, p);
}
void next(const SelfTestParams& p, void* stream) { FASTVDIFF_LAUNCH(neighbours, dim3(1), dim3(64), 0, stream, p); }

}  // namespace fastvdiff::cuda

using namespace fastvdiff::cuda;
SIMT_ENTRY(product_bf16, SelfTestParams, product<bf16>)
SIMT_ENTRY(product_f16, SelfTestParams, product<f16>)
SIMT_ENTRY(product_transposed_bf16, SelfTestParams, product_transposed<bf16>)
SIMT_ENTRY(product_tf32_f32, SelfTestParams, product_tf32)
SIMT_ENTRY(sums_f32, SelfTestParams, sums)
SIMT_ENTRY(neighbours_f32, SelfTestParams, next)
