// Races in shared memory: what two threads did to one byte with no barrier between. races.cpp finds them in the race
// build, in which the kernel's own accesses are instrumented; in the others nothing here does anything.
#pragma once

#include <cstddef>
#include <string>

namespace simt::races {

#ifdef SIMT_RACES
// `blocks` blocks of `threads` threads, each with `bytes` of the arena.
void start_cluster(const void* arena, size_t bytes, int blocks, int threads);
void next_cluster_epoch();
void next_block_epoch(int rank);
void next_warp_epoch(int warp);
void access(int thread, const void* p, size_t bytes, bool write, const void* from);
std::string found();
#else
inline void start_cluster(const void*, size_t, int, int) {}
inline void next_cluster_epoch() {}
inline void next_block_epoch(int) {}
inline void next_warp_epoch(int) {}
inline void access(int, const void*, size_t, bool, const void*) {}
inline std::string found() { return {}; }
#endif

}  // namespace simt::races
