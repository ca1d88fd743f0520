// Threads for CPU kernels: torch's own OpenMP runtime where the process has one, else std::thread.
#pragma once

#include <cstdint>

namespace fastvdiff {
namespace cpu {

// Calls body(data, index, count) on `count` <= `threads` workers at once, index 0 .. count - 1.
void run_team(int threads, void (*body)(void* data, int index, int count), void* data);

// f(begin, end, worker) over contiguous shares of [0, items); shares depend on the team, so f must not let results
// depend on where a share begins.
template <class F>
void parallel_for(int threads, int64_t items, F&& f) {
  if (items <= 0) return;
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1) {
    f(static_cast<int64_t>(0), items, 0);
    return;
  }
  struct Job {
    F& f;
    int64_t items;
  } job{f, items};
  run_team(
      threads,
      [](void* data, int index, int count) {
        Job& job = *static_cast<Job*>(data);
        const int64_t begin = job.items * index / count, end = job.items * (index + 1) / count;
        if (begin < end) job.f(begin, end, index);
      },
      &job);
}

}  // namespace cpu
}  // namespace fastvdiff
