// The host's side of csrc/cuda/device.h: enough of CUDA's names for a .cu source to compile with g++ and run on a CPU.
//
// Blocks run one after another, or cluster by cluster, their threads as fibers. A barrier, shuffle, vote or warp-wide instruction is a
// meeting; one that a thread never reaches, or reaches at another line, is an error that names file and line. Shared
// memory starts as 0xFF bytes, and so does the target of an asynchronous copy until its wait. See simt.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the running fiber; set whenever one is resumed.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }

namespace simt {

constexpr int kWarp = 32;
constexpr int kSlot = 64;  // bytes that a lane can bring to a meeting

// Thrown by `launch` for whatever a kernel does wrong.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a meeting stands in the source.
struct Site {
  const char* what;
  const char* file;
  int line;
};

[[noreturn]] void fail(const char* message, Site site);

void meet_block(Site site);
void meet_cluster(Site site);

// What stands at `shared` in the block of this rank of the running cluster.
void* of_rank(const void* shared, unsigned rank, Site site);

// Brings `bytes` to a meeting of the warp. The last lane runs combine(slots) if given; all get the 32 slots, valid
// until the lane's next meeting.
using Slot = unsigned char[kSlot];
Slot* meet_warp(const void* mine, size_t bytes, void (*combine)(Slot*), Site site);

int lane();

// The same memory for every thread of a block; `key` tells declarations (and template instances) apart.
void* static_shared(const void* key, size_t bytes, Site site);
unsigned char* dynamic_shared();

// What a wrapper does to shared memory, where the compiler's instrumentation does not see it. For the race build.
void note(const void* p, size_t bytes, bool write, const void* from);
inline void note_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_RACES
  note(p, bytes, false, __builtin_return_address(0));
#endif
}
inline void note_write([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_RACES
  note(p, bytes, true, __builtin_return_address(0));
#endif
}

void async_copy(void* shared, const void* global, int bytes, int valid, Site site);
void async_commit();
void async_wait(int pending);

void run(const char* kernel, dim3 grid, dim3 block, unsigned cluster, size_t bytes, void (*body)(const void*),
         const void* closure);

template <class Body>
void launch(const char* kernel, dim3 grid, dim3 block, unsigned cluster, size_t bytes, const Body& body) {
  run(kernel, grid, block, cluster, bytes, [](const void* closure) { (*static_cast<const Body*>(closure))(); }, &body);
}

inline void check_aligned(const void* p, size_t to, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % to) fail("misaligned address", site);
}

}  // namespace simt

// The key is a static of the enclosing function, so each instance of a template has its own.
#define FASTVDIFF_SHARED(T, name, n)                     \
  static char simt_key_##name;                           \
  T* const name = static_cast<T*>(                       \
      ::simt::static_shared(&simt_key_##name, sizeof(T) * (n), {"shared " #name, __FILE__, __LINE__}))
#define FASTVDIFF_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()
#define FASTVDIFF_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), ::simt::launch(#kernel, grid, block, 1, bytes, [&] { kernel(__VA_ARGS__); }))
#define FASTVDIFF_LAUNCH_CLUSTERS(kernel, grid, block, cluster, bytes, stream, ...) \
  ((void)(stream), ::simt::launch(#kernel, grid, block, cluster, bytes, [&] { kernel(__VA_ARGS__); }))

namespace fastvdiff::cuda {

using std::max;
using std::min;

#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <class Kernel>
void allow_shared(Kernel, size_t) {}

inline void sync_threads(SIMT_HERE) { simt::meet_block({"sync_threads", file, line}); }
inline void sync_cluster(SIMT_HERE) { simt::meet_cluster({"sync_cluster", file, line}); }
template <class T>
const T* of_rank(const T* shared, unsigned rank, SIMT_HERE) {
  return static_cast<const T*>(simt::of_rank(shared, rank, {"of_rank", file, line}));
}
inline void sync_warp(SIMT_HERE) { simt::meet_warp(nullptr, 0, nullptr, {"sync_warp", file, line}); }

template <class T>
T take(simt::Slot* slots, int lane) {
  T value;
  std::memcpy(&value, slots[lane], sizeof(T));
  return value;
}
template <class T>
T shuffle(T value, int lane, SIMT_HERE) {
  return take<T>(simt::meet_warp(&value, sizeof(T), nullptr, {"shuffle", file, line}), lane % simt::kWarp);
}
template <class T>
T shuffle_xor(T value, int mask, SIMT_HERE) {
  return take<T>(simt::meet_warp(&value, sizeof(T), nullptr, {"shuffle_xor", file, line}), simt::lane() ^ mask);
}
template <class T>
T shuffle_down(T value, int by, SIMT_HERE) {
  const int from = simt::lane() + by;
  simt::Slot* slots = simt::meet_warp(&value, sizeof(T), nullptr, {"shuffle_down", file, line});
  return from < simt::kWarp ? take<T>(slots, from) : value;
}
inline unsigned ballot(bool vote, SIMT_HERE) {
  simt::Slot* slots = simt::meet_warp(&vote, sizeof(vote), nullptr, {"ballot", file, line});
  unsigned votes = 0;
  for (int i = 0; i < simt::kWarp; ++i) votes |= static_cast<unsigned>(take<bool>(slots, i)) << i;
  return votes;
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float a, float b) { return std::fabs(b) > 8.507059e37f && std::isfinite(b) ? 0 * a : a / b; }
inline float reciprocal(float x) { return 1.0f / x; }
inline float square_root(float x) { return std::sqrt(x); }
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace fastvdiff::cuda
