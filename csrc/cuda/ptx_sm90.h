// The inline PTX that only capability 9.0 has (sm_90a): barriers in shared memory, tensor copies, warpgroup products.
// PTX ISA 8.0. No part of the SIMT shim: kernels of this header are compiled, and held against the portable ones on a GPU.
#pragma once

#include <cuda.h>

#include "ptx.h"

namespace fastvdiff::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A barrier is 8 bytes of shared memory, named by their address; `phase` is the parity of how often it has completed.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// What barrier_init() wrote, the copies see; then every thread of the block has to meet.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at the barrier of this address in the cluster's block `rank`.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Arrives, and has the phase wait for so many bytes of copies besides.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
// The same where the other block of a cluster arrives too.
__device__ __forceinline__ void barrier_wait_for_cluster(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Pixels of an NDHWC tensor, from (w, h, d, n) on in the order of its map's box, each moved by the tap's offsets.
__device__ __forceinline__ void copy_pixels(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int c, int w, int h,
                                            int d, int n, uint16_t tap_w, uint16_t tap_h, uint16_t tap_d) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "h"(tap_w), "h"(tap_h), "h"(tap_d)
      : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// A box to the same place, and the same barrier, of both blocks of a cluster.
__device__ __forceinline__ void copy_box_to_both(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y,
                                                 int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(static_cast<uint16_t>(3))
      : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Rows of 128 bytes in the copies' 128-byte swizzle, 8 rows to 1024 bytes, 1024-byte aligned; 32 bytes further along the
// rows is + 2.
__device__ __forceinline__ uint64_t rows_of_128_bytes(uint32_t shared) {
  return (static_cast<uint64_t>(shared & 0x3ffffu) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING of the warpgroup's latest committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// What is read of d after this comes after it.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (64 x 2N, of a warpgroup) = a (64 x 16) b^T (2N x 16), + d if `add`; a and b by rows_of_128_bytes. In a warp's 16 rows a
// lane holds, of columns 8 i + 2 (lane % 4) and the next, d[4 i], d[4 i + 1] in row lane / 4 and d[4 i + 2], d[4 i + 3] in
// row lane / 4 + 8.
template <class T, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N], uint64_t a, uint64_t b, int add);

#define FASTVDIFF_NAMES2(t) "%" #t "0, %" #t "1"
#define FASTVDIFF_NAMES4(t) FASTVDIFF_NAMES2(t) ", %" #t "2, %" #t "3"
#define FASTVDIFF_NAMES8(t) FASTVDIFF_NAMES4(t) ", %" #t "4, %" #t "5, %" #t "6, %" #t "7"
#define FASTVDIFF_NAMES10(t) FASTVDIFF_NAMES8(t) ", %" #t "8, %" #t "9"
#define FASTVDIFF_NAMES30 FASTVDIFF_NAMES10() ", " FASTVDIFF_NAMES10(1) ", " FASTVDIFF_NAMES10(2)
#define FASTVDIFF_NAMES60 \
  FASTVDIFF_NAMES30 ", " FASTVDIFF_NAMES10(3) ", " FASTVDIFF_NAMES10(4) ", " FASTVDIFF_NAMES10(5)
#define FASTVDIFF_NAMES80 FASTVDIFF_NAMES60 ", " FASTVDIFF_NAMES10(6) ", " FASTVDIFF_NAMES10(7)
#define FASTVDIFF_NAMES120                                                                                        \
  FASTVDIFF_NAMES80 ", " FASTVDIFF_NAMES10(8) ", " FASTVDIFF_NAMES10(9) ", " FASTVDIFF_NAMES10(10) ", " FASTVDIFF_NAMES10(11)

#define FASTVDIFF_HELD2(i) "+f"(d[i]), "+f"(d[i + 1])
#define FASTVDIFF_HELD8(i) FASTVDIFF_HELD2(i), FASTVDIFF_HELD2(i + 2), FASTVDIFF_HELD2(i + 4), FASTVDIFF_HELD2(i + 6)
#define FASTVDIFF_HELD32(i) FASTVDIFF_HELD8(i), FASTVDIFF_HELD8(i + 8), FASTVDIFF_HELD8(i + 16), FASTVDIFF_HELD8(i + 24)

// names: the N operands of d; a, b and add are operands N, N + 1 and N + 2.
#define FASTVDIFF_PRODUCT(T, type, n, N, names, a_name, b_name, add_name, ...)                           \
  template <>                                                                                            \
  __device__ __forceinline__ void multiply_rows<T, N>(float (&d)[N], uint64_t a, uint64_t b, int add) {  \
    asm volatile(                                                                                        \
        "{\n"                                                                                            \
        ".reg .pred adds;\n"                                                                             \
        "setp.ne.b32 adds, " add_name ", 0;\n"                                                           \
        "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " a_name ", " b_name \
        ", adds, 1, 1, 0, 0;\n"                                                                          \
        "}\n"                                                                                            \
        : __VA_ARGS__                                                                                    \
        : "l"(a), "l"(b), "r"(add));                                                                     \
  }
#define FASTVDIFF_PRODUCTS(T, type)                                                                              \
  FASTVDIFF_PRODUCT(T, type, "64", 32, FASTVDIFF_NAMES30 ", " FASTVDIFF_NAMES2(3), "%32", "%33", "%34",          \
                    FASTVDIFF_HELD32(0))                                                                         \
  FASTVDIFF_PRODUCT(T, type, "128", 64, FASTVDIFF_NAMES60 ", " FASTVDIFF_NAMES4(6), "%64", "%65", "%66",         \
                    FASTVDIFF_HELD32(0), FASTVDIFF_HELD32(32))                                                   \
  FASTVDIFF_PRODUCT(T, type, "160", 80, FASTVDIFF_NAMES80, "%80", "%81", "%82", FASTVDIFF_HELD32(0),             \
                    FASTVDIFF_HELD32(32), FASTVDIFF_HELD8(64), FASTVDIFF_HELD8(72))                              \
  FASTVDIFF_PRODUCT(T, type, "256", 128, FASTVDIFF_NAMES120 ", " FASTVDIFF_NAMES8(12), "%128", "%129", "%130",   \
                    FASTVDIFF_HELD32(0), FASTVDIFF_HELD32(32), FASTVDIFF_HELD32(64), FASTVDIFF_HELD32(96))
FASTVDIFF_PRODUCTS(bf16, "bf16")
FASTVDIFF_PRODUCTS(f16, "f16")

#undef FASTVDIFF_NAMES2
#undef FASTVDIFF_NAMES4
#undef FASTVDIFF_NAMES8
#undef FASTVDIFF_NAMES10
#undef FASTVDIFF_NAMES30
#undef FASTVDIFF_NAMES60
#undef FASTVDIFF_NAMES80
#undef FASTVDIFF_NAMES120
#undef FASTVDIFF_HELD2
#undef FASTVDIFF_HELD8
#undef FASTVDIFF_HELD32
#undef FASTVDIFF_PRODUCT
#undef FASTVDIFF_PRODUCTS

#endif

}  // namespace fastvdiff::cuda
