// What kernels compiled by simt_host.h, the runtime and the race checker tell each other.
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <string>

#define SIMT_LOCAL __attribute__((visibility("hidden")))  // a process may hold several such libraries
#define SIMT_API extern "C" __attribute__((visibility("default")))

namespace simt {

struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Launch {
  const char* kernel;
  Site site;
  unsigned grid[3], block[3];
  size_t dynamic_bytes;    // of shared memory
  size_t parameter_bytes;  // of the kernel's parameters, as CUDA lays them out
  const void* function;
  void (*call)(void* arguments);  // runs the kernel as the current thread
  void* arguments;
  size_t argument_bytes;
};

struct Shared {  // one __shared__ variable, in memory of its own so that the address sanitizer sees where it ends
  uint64_t launch;
  void* data;
};

enum class Move { index, exclusive, up, down };

// ---- Between runtime.cpp, report.cpp, cuda_api.cpp and race.cpp ----------------------------------------------------

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kPage = 4096;
constexpr size_t kMaxShared = 232448, kDefaultShared = 48 << 10;  // bytes of a block: at most, and without asking

SIMT_LOCAL extern struct State {
  unsigned thread, threads;  // the running one, and how many the block has
  const char *stacks, *arguments;
  size_t stack_bytes, argument_bytes;
} state;

template <class F>
void for_lanes(unsigned mask, F f) {
  for (; mask; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
}

struct Observer {  // the race checker
  virtual void launch(uint64_t blocks) = 0;
  virtual void start_block(const unsigned* index) = 0;
  virtual void shared(const void* p, size_t bytes) = 0;  // whole pages that the block shares
  virtual void barrier() = 0;                            // all threads of the block have come
  virtual void meet(unsigned warp, unsigned mask) = 0;   // these lanes have come, and memory is ordered
  virtual void fence(bool device) = 0;
  virtual void atomic(const void* p, size_t bytes, const void* pc) = 0;
  virtual void read_only(const void* p, size_t bytes, const void* pc) = 0;
};
SIMT_LOCAL extern Observer* observer;  // null in the other builds

struct Place {  // the code that a return address belongs to; the site serves where there are no tools to look it up
  const void* pc;
  Site site;
};
// Notes a failure; @0 and @1 in the text become the places. The launch goes on.
SIMT_LOCAL void report(Place a, Place b, const char* format, ...) __attribute__((format(printf, 3, 4)));
SIMT_LOCAL void report(Place a, Place b, const char* format, va_list values);
SIMT_LOCAL void finish_reports();  // looks the places up; on the host's stack
SIMT_LOCAL void forget_reports();
SIMT_LOCAL std::string where_we_are();  // kernel, block, thread
SIMT_LOCAL std::string describe(const char* what, const unsigned* xyz);

SIMT_LOCAL extern int last_error;  // a cudaError_t
SIMT_LOCAL size_t allowed_shared(const void* kernel);

}  // namespace simt

// ---- What kernels call ---------------------------------------------------------------------------------------------

extern "C" {
SIMT_LOCAL void simt_launch(const simt::Launch& launch);
SIMT_LOCAL void* simt_shared(simt::Shared* variable, size_t bytes, size_t align);
SIMT_LOCAL void* simt_dynamic_shared();
SIMT_LOCAL int simt_barrier(bool predicate, simt::Site site);  // for how many threads the predicate is true
SIMT_LOCAL void simt_sync_warp(unsigned mask, simt::Site site);
SIMT_LOCAL unsigned simt_ballot(unsigned mask, bool predicate, simt::Site site);
SIMT_LOCAL uint64_t simt_shuffle(simt::Move move, unsigned mask, uint64_t bits, int operand, int width,
                                 simt::Site site);
SIMT_LOCAL void simt_fence(bool device);
SIMT_LOCAL void simt_atomic(const void* p, size_t bytes);  // right before the update
SIMT_LOCAL void simt_read_only(const void* p, size_t bytes);
}

// ---- What tests call -----------------------------------------------------------------------------------------------

SIMT_API void simt_configure(int order, uint64_t seed);  // 0 forward, 1 reverse, 2 random; seed % 3 chooses the poison
SIMT_API void simt_strict(int strict);  // shuffles and votes order no memory (CUDA's letter); by default they do
SIMT_API int simt_failures();
SIMT_API const char* simt_failure(int i);
SIMT_API void simt_clear();  // forgets failures, counts and errors
SIMT_API uint64_t simt_launches();
SIMT_API uint64_t simt_blocks();
SIMT_API uint64_t simt_parameter_bytes();                // of all launches
SIMT_API void simt_capture(void* stream, int captures);  // whether it is captured, as another thread would do that
