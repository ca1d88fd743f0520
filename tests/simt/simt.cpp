// The SIMT shim's runtime: the threads of a block, or of a cluster's blocks, as fibers on one CPU thread. Compiled without
// race instrumentation.
//
// A fiber runs until it meets others and must wait; then the next runnable one in the order runs. Whoever comes last to
// a meeting completes it. When none can run and some wait, the kernel is wrong and the message says where they stand.
#include "simt.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

#if !defined(__x86_64__)
#error "the context switch below is written for x86-64"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)0)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves what the ABI keeps across a call on the current stack, and goes on where the other stack was left.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStack = SIMT_ASAN ? 512 * 1024 : 128 * 1024;
constexpr size_t kMostShared = 227 * 1024;  // of one block, on sm_90
constexpr size_t kArena = (kMostShared + 8192 + 4095) / 4096 * 4096;
constexpr int kMostBlocks = 16;  // of a cluster
constexpr size_t kGap = 64;                 // between arrays: AddressSanitizer sees an overrun

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid, group;
  Site site;
};

enum class State { runnable, waiting, done };

struct Fiber {
  void* sp;
  char* stack;
  void* fake_stack;
  State state;
  Site site;  // where it waits, or last waited
  unsigned meetings;
  std::vector<Copy> copies;
  int groups;
};

// A meeting under way of a cluster, a block or a warp.
struct Meeting {
  int came = 0;
  Site site{};
  Slot slots[2][kWarp];  // in turn: a lane may bring the next value before a slower one has read this
};

struct Array {
  const void* key;
  size_t at;
};

// One block of the cluster that runs: its shared memory, the arrays in it, its barrier.
struct Block {
  unsigned char* arena;
  size_t used, dynamic_at;
  std::vector<Array> arrays;
  Meeting whole;
};

std::vector<Fiber> fibers;
std::vector<Meeting> warps;
std::vector<Block> blocks;
Meeting everyone;  // of the cluster
char* stacks = nullptr;
size_t stack_count = 0;
void* scheduler;
#if SIMT_ASAN
void* scheduler_fake_stack;
const void* scheduler_bottom;
size_t scheduler_size;
#endif
unsigned char* arena = nullptr;  // kArena bytes for each block of a cluster
int threads, current;            // threads of a block; the running fiber, counted through the cluster
uint3 first_block;               // of the cluster
std::string failure;
void (*kernel_body)(const void*);
const void* kernel_closure;
int order_code = 0;

Block& own_block() { return blocks[current / threads]; }

void to_fiber(int thread) {
  current = thread;
  const unsigned in_block = thread % threads;
  threadIdx = {in_block % blockDim.x, in_block / blockDim.x % blockDim.y, in_block / (blockDim.x * blockDim.y)};
  blockIdx = {first_block.x + thread / threads, first_block.y, first_block.z};
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fibers[thread].stack, kStack);
#endif
  simt_switch(&scheduler, fibers[thread].sp);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void to_scheduler() {
  Fiber& own = fibers[current];
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(own.state == State::done ? nullptr : &own.fake_stack, scheduler_bottom, scheduler_size);
#endif
  simt_switch(&own.sp, scheduler);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(own.fake_stack, nullptr, nullptr);
#endif
}

std::string described(Site site) {
  return std::string(site.what) + " at " + site.file + ":" + std::to_string(site.line);
}

void fiber_main() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  kernel_body(kernel_closure);
  Fiber& own = fibers[current];
  if (!own.copies.empty() && failure.empty()) {
    failure = "thread " + std::to_string(current) + " ends with an asynchronous copy never waited for: " +
              described(own.copies.front().site);
  }
  own.state = State::done;
  to_scheduler();
  __builtin_unreachable();
}

void prepare(int thread) {
  Fiber& fiber = fibers[thread];
  fiber.stack = stacks + kStack * thread;
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);  // abandoned frames of a block that failed
  fiber.state = State::runnable, fiber.site = {"the start", "", 0}, fiber.meetings = 0;
  fiber.copies.clear(), fiber.groups = 0;
  // As if simt_switch had been called by something that returns to fiber_main: six registers, then the address.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.sp = top;
}

// True for the last of `expected` that comes. Fails if the others stand elsewhere.
bool arrive(Meeting& meeting, int expected, Site site) {
  if (meeting.came == 0) {
    meeting.site = site;
  } else if (meeting.site.line != site.line || std::strcmp(meeting.site.file, site.file) ||
             std::strcmp(meeting.site.what, site.what)) {
    fail(("divergent: others wait in " + described(meeting.site)).c_str(), site);
  }
  fibers[current].site = site;
  if (++meeting.came < expected) return false;
  meeting.came = 0;
  return true;
}

void release(int first, int count) {
  for (int i = first; i < first + count; ++i) {
    if (fibers[i].state == State::waiting) fibers[i].state = State::runnable;
  }
}

void wait() {
  fibers[current].state = State::waiting;
  to_scheduler();
}

size_t reserve(Block& block, size_t bytes, Site site) {
  const size_t at = (block.used + 127) / 128 * 128;
  block.used = at + bytes + kGap;
  if (block.used > kMostShared + 4096) fail("more shared memory than a block can have", site);
  ASAN_UNPOISON_MEMORY_REGION(block.arena + at, bytes);
  std::memset(block.arena + at, 0xff, bytes);
  return at;
}

void start_cluster(size_t dynamic) {
  for (size_t rank = 0; rank < blocks.size(); ++rank) {
    Block& block = blocks[rank];
    block.arena = arena + rank * kArena;
    ASAN_POISON_MEMORY_REGION(block.arena, kArena);
    block.arrays.clear(), block.used = 0, block.whole.came = 0;
    block.dynamic_at = reserve(block, dynamic, {"dynamic shared memory", "", 0});
  }
  everyone.came = 0;
  for (Meeting& warp : warps) warp.came = 0;
  for (size_t i = 0; i < fibers.size(); ++i) prepare(static_cast<int>(i));
  races::start_cluster(arena, kArena, static_cast<int>(blocks.size()), threads);
}

void run_cluster() {
  const int count = static_cast<int>(fibers.size());
  int left = count;
  while (left && failure.empty()) {
    bool ran = false;
    for (int turn = 0; turn < count && failure.empty(); ++turn) {
      const int thread = order_code ? count - 1 - turn : turn;
      if (fibers[thread].state != State::runnable) continue;
      ran = true;
      to_fiber(thread);
      left -= fibers[thread].state == State::done;
    }
    if (ran || !failure.empty()) continue;
    int waits = 0, other = -1;
    while (fibers[waits].state != State::waiting) ++waits;
    for (int i = 0; i < count; ++i) {
      const Site a = fibers[i].site, b = fibers[waits].site;
      if (fibers[i].state == State::done || a.line != b.line || std::strcmp(a.file, b.file)) other = i;
    }
    failure = "thread " + std::to_string(waits) + " waits in " + described(fibers[waits].site);
    if (other >= 0) {
      failure += ", thread " + std::to_string(other) +
                 (fibers[other].state == State::done ? " has ended" : " waits in " + described(fibers[other].site));
    }
  }
  if (failure.empty()) failure = races::found();
}

void reserve_stacks(size_t count) {
  if (count <= stack_count) return;
  if (stacks) munmap(stacks, kStack * stack_count);
  void* got = mmap(nullptr, kStack * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) throw Error("no memory for the fibers' stacks");
  stacks = static_cast<char*>(got), stack_count = count;
}

}  // namespace

void fail(const char* message, Site site) {
  if (failure.empty()) failure = "thread " + std::to_string(current) + ", " + described(site) + ": " + message;
  to_scheduler();
  __builtin_unreachable();
}

int lane() { return current % kWarp; }

void meet_block(Site site) {
  const int rank = current / threads;
  if (arrive(blocks[rank].whole, threads, site)) {
    races::next_block_epoch(rank);
    release(rank * threads, threads);
  } else {
    wait();
  }
}

void meet_cluster(Site site) {
  if (arrive(everyone, static_cast<int>(fibers.size()), site)) {
    races::next_cluster_epoch();
    release(0, static_cast<int>(fibers.size()));
  } else {
    wait();
  }
}

void* of_rank(const void* shared, unsigned rank, Site site) {
  const size_t at = static_cast<const unsigned char*>(shared) - own_block().arena;
  if (at >= own_block().used) fail("not an address in this block's shared memory", site);
  if (rank >= blocks.size()) fail("no block of this rank in the cluster", site);
  return blocks[rank].arena + at;
}

Slot* meet_warp(const void* mine, size_t bytes, void (*combine)(Slot*), Site site) {
  const int warp = current / kWarp;
  Meeting& meeting = warps[warp];
  Slot* slots = meeting.slots[fibers[current].meetings++ % 2];
  if (bytes > kSlot) fail("more bytes than a lane can bring", site);
  if (bytes) std::memcpy(slots[current % kWarp], mine, bytes);
  if (arrive(meeting, kWarp, site)) {
    if (combine) combine(slots);
    races::next_warp_epoch(warp);
    release(warp * kWarp, kWarp);
  } else {
    wait();
  }
  return slots;
}

void* static_shared(const void* key, size_t bytes, Site site) {
  Block& block = own_block();
  for (const Array& array : block.arrays) {
    if (array.key == key) return block.arena + array.at;
  }
  block.arrays.push_back({key, reserve(block, bytes, site)});
  return block.arena + block.arrays.back().at;
}

unsigned char* dynamic_shared() { return own_block().arena + own_block().dynamic_at; }

void note(const void* p, size_t bytes, bool write, const void* from) { races::access(current, p, bytes, write, from); }

void async_copy(void* shared, const void* global, int bytes, int valid, Site site) {
  check_aligned(shared, bytes, site);
  if (valid < 0 || valid > bytes) fail("the valid bytes of a copy are not among its bytes", site);
  if (valid) check_aligned(global, bytes, site);
  const size_t at = static_cast<unsigned char*>(shared) - own_block().arena;
  if (at > own_block().used) fail("the copy's target is not shared memory", site);
  races::access(current, shared, bytes, true, __builtin_return_address(0));
  std::memset(shared, 0xff, bytes);
  fibers[current].copies.push_back({shared, global, bytes, valid, fibers[current].groups, site});
}

void async_commit() { ++fibers[current].groups; }

void async_wait(int pending) {
  Fiber& own = fibers[current];
  size_t kept = 0;
  for (const Copy& copy : own.copies) {
    if (copy.group >= own.groups - pending) {
      own.copies[kept++] = copy;
      continue;
    }
    races::access(current, copy.shared, copy.bytes, true, __builtin_return_address(0));
    std::memset(copy.shared, 0, copy.bytes);
    if (copy.valid) std::memcpy(copy.shared, copy.global, copy.valid);
  }
  own.copies.resize(kept);
}

void run(const char* kernel, dim3 grid, dim3 block, unsigned cluster, size_t bytes, void (*body)(const void*),
         const void* closure) {
  const std::string prefix = std::string(kernel) + ": ";
  const size_t count = size_t{block.x} * block.y * block.z;
  if (count == 0 || count > 1024 || count % kWarp) throw Error(prefix + "blocks are whole warps, 32 to 1024 threads");
  if (!grid.x || !grid.y || !grid.z) throw Error(prefix + "an empty grid");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw Error(prefix + "a grid larger than CUDA allows");
  if (bytes > kMostShared) throw Error(prefix + "more dynamic shared memory than a block can have");
  if (!cluster || cluster > kMostBlocks || grid.x % cluster) throw Error(prefix + "a grid of no whole clusters");
  threads = static_cast<int>(count), gridDim = grid, blockDim = block;
  reserve_stacks(count * cluster);
  if (!arena) arena = static_cast<unsigned char*>(aligned_alloc(4096, kArena * kMostBlocks));
  fibers.resize(count * cluster), warps.resize(count / kWarp * cluster), blocks.resize(cluster);
  kernel_body = body, kernel_closure = closure;
  failure.clear();
  const uint64_t all = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t turn = 0; turn < all; turn += cluster) {
    const uint64_t at = order_code ? all - cluster - turn : turn;
    first_block = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                   static_cast<unsigned>(at / grid.x / grid.y)};
    start_cluster(bytes);
    run_cluster();
    if (!failure.empty()) throw Error(prefix + "block " + std::to_string(at) + ": " + failure);
  }
}

}  // namespace simt

// 0: threads and blocks in ascending order, 1: in descending order.
extern "C" void simt_set_order(int code) { simt::order_code = code; }
