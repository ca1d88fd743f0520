#include "parallel.h"

#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace fastvdiff {
namespace cpu {
namespace {

// libgomp's entry points, found in the process once torch is loaded. Linking OpenMP here would risk a second runtime
// with a second pool of threads; GOMP_parallel is the ABI that gcc and clang programs alike can call.
struct Gomp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;

  Gomp() {
#if defined(__unix__) || defined(__APPLE__)
    auto find = [](auto& target, const char* name) {
      target = reinterpret_cast<std::remove_reference_t<decltype(target)>>(dlsym(RTLD_DEFAULT, name));
    };
    find(parallel, "GOMP_parallel");
    find(thread_num, "omp_get_thread_num");
    find(num_threads, "omp_get_num_threads");
#endif
  }
  bool usable() const { return parallel && thread_num && num_threads; }
};

struct Team {
  void (*body)(void*, int, int);
  void* data;
  const Gomp* gomp;
};

void member(void* data) {
  const Team& team = *static_cast<const Team*>(data);
  team.body(team.data, team.gomp->thread_num(), team.gomp->num_threads());
}

}  // namespace

void run_team(int threads, void (*body)(void*, int, int), void* data) {
  static const Gomp gomp;
  if (gomp.usable()) {
    Team team{body, data, &gomp};
    gomp.parallel(member, &team, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) others.emplace_back(body, data, i, threads);
  body(data, 0, threads);
  for (std::thread& t : others) t.join();
}

}  // namespace cpu
}  // namespace fastvdiff
