// The race build: a shadow of shared memory, fed by the compiler's thread-sanitizer hooks (no libtsan is linked).
//
// Two accesses of a byte by different threads, one of them a write, are in order if a barrier of the block lies between,
// or, within one warp, a meeting of that warp; of threads of two blocks, if a barrier of the cluster does. Every byte
// remembers its last write and its latest reads of the current epoch, those by another block apart. The hooks must not
// throw: the first race is kept and raised at the end of the cluster.
#include "races.h"

#include <cstdint>
#include <cstdio>
#include <vector>

#include "simt.h"

namespace simt::races {
namespace {

struct Access {
  uint32_t cluster_epoch = 0;
  uint32_t block_epoch = 0;  // 0: none
  uint32_t warp_epoch = 0;
  int16_t thread = 0;
  bool lanes = false;  // reads: several lanes of the warp in this epoch of it
  bool warps = false;  // reads: several warps in this epoch of the block
  const void* from = nullptr;
};

struct Byte {
  Access write, read, read_from_afar;
};

const unsigned char* base;
size_t size;      // of one block's shared memory
int threads;      // of one block
uint32_t latest;  // epoch of all that began: none is ever used again
uint32_t cluster_epoch;
std::vector<Byte> shadow;
std::vector<uint32_t> block_epochs, warp_epochs;
std::string race;

bool ordered(const Access& before, int thread) {
  if (!before.block_epoch) return true;
  const int rank = thread / threads;
  if (before.thread / threads != rank) return before.cluster_epoch != cluster_epoch;
  if (before.block_epoch != block_epochs[rank]) return true;
  if (before.warps) return false;
  if (before.thread / kWarp != thread / kWarp) return false;
  if (before.warp_epoch != warp_epochs[thread / kWarp]) return true;
  return !before.lanes && before.thread == thread;
}

void report(const Access& before, int thread, bool wrote, bool writes, size_t at, const void* from) {
  if (!race.empty()) return;
  char text[256];
  std::snprintf(text, sizeof text, "race on byte %zu of shared memory: thread %d %s [%p], thread %d %s [%p], no barrier between",
                at, before.thread, wrote ? "wrote" : "read", before.from, thread, writes ? "writes" : "reads", from);
  race = text;
}

}  // namespace

void start_cluster(const void* arena, size_t bytes, int blocks, int of_block) {
  base = static_cast<const unsigned char*>(arena), size = bytes, threads = of_block;
  shadow.resize(bytes * blocks);
  block_epochs.resize(blocks);
  warp_epochs.resize((of_block + kWarp - 1) / kWarp * blocks);
  next_cluster_epoch();  // across clusters nothing is compared
  race.clear();
}

void next_cluster_epoch() {
  cluster_epoch = ++latest;
  for (uint32_t& epoch : block_epochs) epoch = ++latest;
}
void next_block_epoch(int rank) { block_epochs[rank] = ++latest; }
void next_warp_epoch(int warp) { ++warp_epochs[warp]; }

void access(int thread, const void* p, size_t bytes, bool write, const void* from) {
  const size_t first = static_cast<const unsigned char*>(p) - base;
  if (first >= shadow.size()) return;
  const int rank = thread / threads;
  const Access now{cluster_epoch, block_epochs[rank], warp_epochs[thread / kWarp], static_cast<int16_t>(thread), false,
                   false, from};
  for (size_t at = first; at < first + bytes && at < shadow.size(); ++at) {
    Byte& byte = shadow[at];
    const bool afar = at / size != static_cast<size_t>(rank);
    if (!ordered(byte.write, thread)) report(byte.write, thread, true, write, at, from);
    if (write) {
      for (const Access& read : {byte.read, byte.read_from_afar}) {
        if (!ordered(read, thread)) report(read, thread, false, true, at, from);
      }
      byte.write = now;
    } else if (afar) {
      byte.read_from_afar = now;
    } else if (byte.read.block_epoch != now.block_epoch) {
      byte.read = now;
    } else if (byte.read.thread / kWarp != thread / kWarp) {
      byte.read.warps = true;
    } else if (byte.read.warp_epoch != now.warp_epoch) {
      const bool warps = byte.read.warps;
      byte.read = now, byte.read.warps = warps;
    } else if (byte.read.thread != thread) {
      byte.read.lanes = true;
    }
  }
}

std::string found() { return race; }

}  // namespace simt::races

// The compiler calls these before every access in a source compiled with -fsanitize=thread.
extern "C" {
#define SIMT_HOOKS(n)                                                                                                  \
  void __tsan_read##n(void* p) { simt::note(p, n, false, __builtin_return_address(0)); }                              \
  void __tsan_write##n(void* p) { simt::note(p, n, true, __builtin_return_address(0)); }                              \
  void __tsan_unaligned_read##n(void* p) { simt::note(p, n, false, __builtin_return_address(0)); }                    \
  void __tsan_unaligned_write##n(void* p) { simt::note(p, n, true, __builtin_return_address(0)); }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, unsigned long n) { simt::note(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { simt::note(p, n, true, __builtin_return_address(0)); }
void __tsan_volatile_read4(void* p) { simt::note(p, 4, false, __builtin_return_address(0)); }
void __tsan_volatile_write4(void* p) { simt::note(p, 4, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
