// What every kernel source here starts from: shared memory, launches, barriers, shuffles, element types and fast math.
// A kernel uses these names only, so that the same source compiles with nvcc and, for the tests, with a host compiler
// under the SIMT shim (tests/simt/simt.h declares the host's side of everything below).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastvdiff/dtype.h"

#ifdef FASTVDIFF_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// T name[n] in static shared memory, 16-byte aligned.
#define FASTVDIFF_SHARED(T, name, n) __shared__ __align__(16) T name[n]
// unsigned char* name: the launch's dynamic shared memory, 128-byte aligned; at most once in a kernel.
#define FASTVDIFF_DYNAMIC_SHARED(name)                                      \
  extern __shared__ __align__(128) unsigned char fastvdiff_dynamic_shared[]; \
  unsigned char* const name = fastvdiff_dynamic_shared
// kernel<<<grid, block, bytes, stream>>>(...) and an exception that names it if it cannot start. Parenthesise a
// kernel's name that has template arguments. `bytes` of dynamic shared memory above 48 KiB: allow_shared() first.
#define FASTVDIFF_LAUNCH(kernel, grid, block, bytes, stream, ...)              \
  do {                                                                         \
    kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::fastvdiff::cuda::check(#kernel, cudaGetLastError());                      \
  } while (0)
// The same in clusters of so many blocks (1 to 8) along x, of which the grid has a whole number. Capability 9.0 and newer.
#define FASTVDIFF_LAUNCH_CLUSTERS(kernel, grid, block, cluster, bytes, stream, ...) \
  ::fastvdiff::cuda::launch_clusters(#kernel, kernel, grid, block, cluster, bytes, stream, __VA_ARGS__)

namespace fastvdiff::cuda {

inline void check(const char* what, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  check("cudaFuncSetAttribute",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <class... Parameters>
void launch_clusters(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster,
                     size_t bytes, void* stream, const Parameters&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
  check(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Every thread of the cluster comes here; what they wrote before, the others see after. Kernels of clusters compile for
// older architectures too, and stop there.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __trap();
#endif
}
// What stands at `shared` in the block of this rank, until that block ends.
template <class T>
__device__ __forceinline__ const T* of_rank(const T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const T*>(__cluster_map_shared_rank(shared, rank));
#else
  return shared;
#endif
}

// Every thread of the block comes here.
__device__ __forceinline__ void sync_threads() { __syncthreads(); }
// Every lane of the warp comes to each of these.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, int by) {
  return __shfl_down_sync(0xffffffffu, value, by);
}
__device__ __forceinline__ unsigned ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float reciprocal(float x) { return __frcp_rn(x); }
__device__ __forceinline__ float square_root(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_from_bits(uint32_t x) { return __uint_as_float(x); }

}  // namespace fastvdiff::cuda
#endif

namespace fastvdiff::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
struct Pair;  // two elements as one 32-bit register, the first in its low half

template <>
struct Pair<bf16> {
  static __device__ __forceinline__ float low(uint32_t pair) { return float_from_bits(pair << 16); }
  static __device__ __forceinline__ float high(uint32_t pair) { return float_from_bits(pair & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t of(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

template <>
struct Pair<f16> {
  static __device__ __forceinline__ float low(uint32_t pair) {
    return __low2float(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ __forceinline__ float high(uint32_t pair) {
    return __high2float(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ __forceinline__ uint32_t of(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

// Rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// call(T()) for the element type that `dtype` names.
template <class Call>
void with_dtype(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::f32: return call(float());
    case DType::bf16: return call(bf16());
    case DType::f16: return call(f16());
  }
  throw std::invalid_argument("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace fastvdiff::cuda
