// Runs kernels on the CPU. A CUDA thread is a fiber; blocks run one after another. A fiber gives up the processor only
// at barriers, warp primitives, atomics and fences, so an order and a seed reproduce a run exactly.
#include "runtime.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT 1  // slower by a factor of ten or more
#endif
#if SIMT_UCONTEXT
#include <ucontext.h>
#endif

SIMT_LOCAL uint3 threadIdx, blockIdx;
SIMT_LOCAL dim3 blockDim, gridDim;

extern "C" {  // only in the address build
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* p, size_t size);
}

namespace simt {

Observer* observer;
State state;

namespace {

constexpr size_t kMaxParameters = 32764;
constexpr size_t kStack = 256 << 10;             // the address sanitizer writes its report on it
constexpr size_t kStackStride = kStack + kPage;  // no power of two, else all stacks would share the same cache sets
constexpr unsigned kSpins = 1 << 22;             // atomics and fences in a row without any other progress
// NaN and -1; 3e38, because fmaxf swallows NaN; -3e38
constexpr uint64_t kPoison[] = {~0ull, 0x7f61b1e67f61b1e6, 0xff61b1e6ff61b1e6};

enum class Order { forward, reverse, random } order;
enum class Wait : uint8_t { nothing, barrier, sync, ballot, shuffle, done };
const char* const kNames[] = {"nothing", "__syncthreads", "__syncwarp", "vote", "shuffle", "end"};

struct Context {  // of a fiber or of the host
#if SIMT_UCONTEXT
  ucontext_t registers;
#else
  void* sp;
#endif
  void* fake_stack;
  const void* bottom;
  size_t size;
};

struct alignas(64) Thread {
  uint3 index;
  Context* context;  // null until it first runs
  Wait wait;         // the last thing it waited for
  unsigned mask;     // of a warp primitive
  Place place;
};

// ---- The launch that runs ------------------------------------------------------------------------------------------

std::mutex one_at_a_time;
Launch launch;
bool running, failed, strict;
uint64_t launches, blocks, parameter_bytes, launch_serial, seed;

Thread threads[kMaxThreads];
Thread* current;
unsigned done, spins;
unsigned arrived, predicates, last_predicates;    // at the barrier
unsigned waiting[kMaxThreads / kWarp];            // lanes at a warp primitive
uint64_t given[kMaxThreads], taken[kMaxThreads];  // by shuffles and votes
uint8_t source[kMaxThreads];                      // the lane that a shuffle reads

Context host, stacks[kMaxThreads];
std::vector<Context*> free_stacks;
unsigned stacks_made;
bool stacks_dirty;  // left in the middle of a kernel: the address sanitizer still guards their variables

struct Memory {
  void* data;
  size_t bytes;
};
Memory dynamic_shared;
std::vector<Memory> static_shared;

bool inside() {  // a fiber; other host threads may run host code of the same library meanwhile
  return static_cast<size_t>(static_cast<const char*>(__builtin_frame_address(0)) - state.stacks) < state.stack_bytes;
}

uint64_t rng_state;
uint32_t rng() {  // splitmix64
  uint64_t z = rng_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  return static_cast<uint32_t>((z ^ z >> 27) >> 20);
}
template <class T>
void shuffle(T* items, size_t n) {
  for (uint64_t i = n; i > 1; --i) std::swap(items[i - 1], items[rng() * i >> 32]);
}

// ---- Fibers --------------------------------------------------------------------------------------------------------

#if !SIMT_UCONTEXT
extern "C" SIMT_LOCAL void simt_switch(void** from, void* to);
asm(R"(
.text
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, . - simt_switch
)");
#endif

void jump(Context& from, Context& to, bool for_good = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
#if SIMT_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  simt_switch(&from.sp, to.sp);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// Gives up the launch, from whichever fiber.
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(Place a, Place b, const char* format, ...) {
  va_list values;
  va_start(values, format);
  report(a, b, format, values);
  va_end(values);
  failed = true;
  static Context nowhere;
  jump(nowhere, host, true);
  abort();
}

struct Queue {
  static constexpr unsigned kSize = 2 * kMaxThreads;
  Thread* ring[kSize];
  unsigned head, count;
  void push_back(Thread* t) { ring[(head + count++) % kSize] = t; }
  void push_front(Thread* t) { ring[--head % kSize] = t, ++count; }
  Thread* pop() { return count ? --count, ring[head++ % kSize] : nullptr; }
} runnable;

void make_current(Thread* t) {
  current = t;
  state.thread = static_cast<unsigned>(t - threads);
  threadIdx = t->index;
}

[[noreturn]] void fiber() {
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!host.bottom) host.bottom = bottom, host.size = size;  // the host starts the first fiber of a block
  }
  Context* const mine = current->context;
  for (;;) {
    launch.call(launch.arguments);
    current->wait = Wait::done;
    ++done;
    spins = 0;
    Thread* const next = runnable.pop();
    if (next) make_current(next);
    if (next && !next->context) {  // on this stack: as good as a new one, and in the cache
      next->context = mine;
      continue;
    }
    free_stacks.push_back(mine);
    jump(*mine, next ? *next->context : host, true);
  }
}

Context* new_stack() {
  if (free_stacks.empty()) {
    const unsigned i = stacks_made++;
    char* const low = const_cast<char*>(state.stacks) + i * kStackStride;
    mprotect(low, kPage, PROT_NONE);
    stacks[i].bottom = low + kPage;
    stacks[i].size = kStack - i % 32 * 128;  // tops in different cache sets
    free_stacks.push_back(stacks + i);
  }
  Context* const c = free_stacks.back();
  free_stacks.pop_back();
#if SIMT_UCONTEXT
  getcontext(&c->registers);
  c->registers.uc_stack.ss_sp = const_cast<void*>(c->bottom);
  c->registers.uc_stack.ss_size = c->size;
  makecontext(&c->registers, fiber, 0);
#else
  // As if fiber() had been called: a return address (none), at 8 mod 16; below it, what simt_switch pops.
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(c->bottom) + c->size);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c->sp = top;
#endif
  return c;
}

// ---- Who runs next -------------------------------------------------------------------------------------------------

// Runs somebody else; the host if there is nobody.
void leave(Context& from) {
  Thread* const next = runnable.pop();
  if (!next) return jump(from, host);
  make_current(next);
  if (!next->context) next->context = new_stack();
  if (next->context != &from) jump(from, *next->context);
}
void suspend() { leave(*current->context); }

void enqueue_block() {
  static uint16_t list[kMaxThreads];
  const unsigned n = state.threads;
  for (unsigned i = 0; i < n; ++i) list[i] = static_cast<uint16_t>(order == Order::reverse ? n - 1 - i : i);
  if (order == Order::random) shuffle(list, n);
  for (unsigned i = 0; i < n; ++i) runnable.push_back(threads + list[i]);
  spins = 0;
}

// A warp that has met runs on at once, its stacks being in the cache; at random, others come first.
void enqueue_lanes(Thread* lanes, unsigned mask) {
  spins = 0;
  if (order == Order::forward) {
    for (; mask; mask &= ~(1u << (31 - __builtin_clz(mask)))) runnable.push_front(lanes + 31 - __builtin_clz(mask));
    return;
  }
  uint8_t list[kWarp];
  unsigned n = 0;
  for_lanes(mask, [&](unsigned l) { list[n++] = static_cast<uint8_t>(l); });
  if (order == Order::random) shuffle(list, n);
  const bool last = order == Order::random && rng() & 1;
  for (unsigned i = 0; i < n; ++i) last ? runnable.push_back(lanes + list[i]) : runnable.push_front(lanes + list[i]);
}

// Lets others come first before an atomic or a fence.
void maybe_yield(const void* pc) {
  if (++spins > kSpins) fail({pc, {}}, {}, "no thread gets on, this one spins at @0");
  if (order == Order::random ? rng() & 1 : spins > 1000) {
    runnable.push_back(current);
    suspend();
  }
}

// ---- Warp primitives -----------------------------------------------------------------------------------------------

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

[[noreturn]] void fail_meeting(Wait what, const Thread* lanes, unsigned mask) {
  const Place place = current->place;
  for_lanes(mask, [&](unsigned l) {
    if (lanes[l].wait != what || !same(lanes[l].place.site, place.site))
      fail(place, lanes[l].place, "divergent warp: this lane is at the %s of @0, lane %u at the %s of @1",
           kNames[int(what)], l, kNames[int(lanes[l].wait)]);
  });
  for_lanes(mask, [&](unsigned l) {
    const unsigned from = source[lanes - threads + l];
    if (!(mask >> from & 1))
      fail(place, {}, "shuffle at @0: lane %u reads lane %u, which mask %#x leaves out", l, from, mask);
  });
  abort();
}

// All lanes of the mask have to come to the same primitive. The last one does the exchange.
void meet(Wait what, unsigned mask, const void* pc, Site site) {
  const unsigned warp = state.thread / kWarp, lane = state.thread % kWarp, first = warp * kWarp;
  Thread* const lanes = threads + first;
  current->wait = what;
  current->mask = mask;
  current->place = {pc, site};
  waiting[warp] |= 1u << lane;
  if (!(mask >> lane & 1))
    fail({pc, site}, {}, "mask %#x of the %s at @0 leaves out the calling lane %u", mask, kNames[int(what)], lane);
  if ((waiting[warp] & mask) != mask) return suspend();
  bool complete = true, right = true;
  for_lanes(mask, [&](unsigned l) {
    complete &= lanes[l].mask == mask;
    right &= lanes[l].wait == what && lanes[l].place.site.line == site.line;
    right &= what != Wait::shuffle || mask >> source[first + l] & 1;
  });
  if (!complete) return suspend();
  if (!right) fail_meeting(what, lanes, mask);
  if (what == Wait::shuffle) {
    for_lanes(mask, [&](unsigned l) { taken[first + l] = given[first + source[first + l]]; });
  } else if (what == Wait::ballot) {
    uint64_t votes = 0;
    for_lanes(mask, [&](unsigned l) { votes |= given[first + l] << l; });
    for_lanes(mask, [&](unsigned l) { taken[first + l] = votes; });
  }
  waiting[warp] &= ~mask;
  if (observer && (what == Wait::sync || !strict)) observer->meet(warp, mask);
  enqueue_lanes(lanes, mask);
  suspend();
}

// ---- Blocks --------------------------------------------------------------------------------------------------------

// Nobody can run, and not everybody has finished.
void report_deadlock() {
  const Thread *at_barrier = nullptr, *gone = nullptr;
  for (unsigned i = state.threads; i-- > 0;) {
    if (threads[i].wait == Wait::done) gone = threads + i;
    if (threads[i].wait == Wait::barrier) at_barrier = threads + i;
  }
  for (unsigned i = 0; i < state.threads; ++i) {
    const Thread& t = threads[i];
    if (t.wait == Wait::barrier || t.wait == Wait::done) continue;
    unsigned missing = 0;
    for_lanes(t.mask, [&](unsigned l) {
      const unsigned id = i / kWarp * kWarp + l;
      if (id >= state.threads || threads[id].wait != t.wait || threads[id].mask != t.mask) missing |= 1u << l;
    });
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(missing)), id = i / kWarp * kWarp + lane;
    const Thread* const other = id < state.threads && threads[id].wait != Wait::done ? threads + id : nullptr;
    return report(t.place, other ? other->place : Place{},
                  "%s waits at the %s of @0: lanes %#x of mask %#x are missing; %s %u %s%s%s",
                  describe("thread", &t.index.x).c_str(), kNames[int(t.wait)], missing, t.mask, "lane", lane,
                  other                ? "waits at the "
                  : id < state.threads ? "has returned"
                                       : "is beyond the block",
                  other ? kNames[int(other->wait)] : "", other ? " of @1" : "");
  }
  report(at_barrier->place, {}, "%s waits at the __syncthreads of @0, but %u threads have returned, %s the first",
         describe("thread", &at_barrier->index.x).c_str(), done, describe("thread", &gone->index.x).c_str());
}

void poison(const Memory& m) {
  for (size_t i = 0; i < m.bytes; i += 8)
    memcpy(static_cast<char*>(m.data) + i, &kPoison[seed % 3], std::min<size_t>(8, m.bytes - i));
}

Memory allocate_shared(size_t bytes, size_t align) {
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;
  void* data;
  if (posix_memalign(&data, observer ? kPage : std::max<size_t>(align, 16), observer ? whole : bytes)) abort();
  poison({data, bytes});
  if (observer) observer->shared(data, whole);
  return {data, bytes};
}

bool run_block() {
  ++blocks;
  done = arrived = predicates = runnable.count = 0;
  memset(waiting, 0, sizeof waiting);
  for (unsigned i = 0; i < state.threads; ++i) threads[i].context = nullptr, threads[i].wait = Wait::nothing;
  poison(dynamic_shared);
  for (const Memory& m : static_shared) poison(m);
  if (observer) observer->start_block(&blockIdx.x);
  enqueue_block();
  host.bottom = nullptr;
  leave(host);
  if (!failed && done == state.threads) return true;
  if (!failed) report_deadlock();
  stacks_dirty = true;
  return false;
}

// ---- Launches ------------------------------------------------------------------------------------------------------

void prepare_stacks() {
  if (!state.stacks) {
    state.stack_bytes = kMaxThreads * kStackStride;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const p = mmap(nullptr, state.stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) abort();
    state.stacks = static_cast<const char*>(p);
    free_stacks.reserve(kMaxThreads);
    if (__sanitizer_set_death_callback)
      __sanitizer_set_death_callback([] { fprintf(stderr, "simt: %s\n", inside() ? where_we_are().c_str() : "host"); });
  }
  if (stacks_dirty) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(state.stacks, state.stack_bytes);
    free_stacks.clear();
    for (unsigned i = stacks_made; i-- > 0;) free_stacks.push_back(stacks + i);
    stacks_dirty = false;
  }
}

// Whether CUDA would refuse the launch, and why.
cudaError_t refusal() {
  const Place place{nullptr, launch.site};
  const unsigned *g = launch.grid, *b = launch.block;
  const uint64_t size = uint64_t{1} * b[0] * b[1] * b[2];
  const size_t limit = allowed_shared(launch.function);
  if (size == 0 || size > kMaxThreads || b[2] > 64) {
    report(place, {}, "launched at @0 with blocks of %u x %u x %u threads, at most %u (64 in z) are possible", b[0],
           b[1], b[2], kMaxThreads);
    return cudaErrorInvalidConfiguration;
  }
  if (g[0] == 0 || g[1] == 0 || g[2] == 0 || g[0] > 0x7fffffffu || g[1] > 65535 || g[2] > 65535) {
    report(place, {}, "launched at @0 with a grid of %u x %u x %u blocks", g[0], g[1], g[2]);
    return cudaErrorInvalidConfiguration;
  }
  if (launch.dynamic_bytes > limit) {
    report(place, {}, "launched at @0 with %zu bytes of dynamic shared memory, %zu are possible%s",
           launch.dynamic_bytes, limit,
           launch.dynamic_bytes <= kMaxShared ? " until cudaFuncSetAttribute asks for more" : "");
    return cudaErrorInvalidValue;
  }
  if (launch.parameter_bytes > kMaxParameters) {
    report(place, {}, "launched at @0 with %zu bytes of parameters, at most %zu are possible", launch.parameter_bytes,
           kMaxParameters);
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t run() {
  if (const cudaError_t error = refusal()) return error;
  prepare_stacks();
  ++launches;
  parameter_bytes += launch.parameter_bytes;
  ++launch_serial;
  failed = false;
  state.arguments = static_cast<const char*>(launch.arguments);
  state.argument_bytes = launch.argument_bytes;
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  state.threads = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned i = 0; i < state.threads; ++i)
    threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};

  const uint64_t count = uint64_t{1} * gridDim.x * gridDim.y * gridDim.z;
  std::vector<uint32_t> shuffled(order == Order::random ? count : 0);
  for (uint32_t i = 0; i < shuffled.size(); ++i) shuffled[i] = i;
  shuffle(shuffled.data(), shuffled.size());
  if (observer) observer->launch(count);
  dynamic_shared = allocate_shared(launch.dynamic_bytes, 16);
  bool good = true;
  running = true;
  for (uint64_t i = 0; good && i < count; ++i) {
    const uint64_t b = order == Order::forward ? i : order == Order::reverse ? count - 1 - i : shuffled[i];
    blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                static_cast<unsigned>(b / gridDim.x / gridDim.y)};
    good = run_block();
  }
  running = false;
  free(dynamic_shared.data);
  for (const Memory& m : static_shared) free(m.data);
  static_shared.clear();
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

std::string where_we_are() {
  std::string text = launch.kernel;
  if (text[0] == '(') text = text.substr(1, text.size() - 2);  // LAUNCH((kernel<T>), ...)
  if (running) text += ", " + describe("block", &blockIdx.x);
  if (inside()) text += ", " + describe("thread", &threadIdx.x);
  return text;
}

}  // namespace simt

using namespace simt;

// ---- What kernels call ---------------------------------------------------------------------------------------------

#define HERE __builtin_return_address(0)

void simt_launch(const Launch& l) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  launch = l;
  if (const cudaError_t error = run()) last_error = error;
  finish_reports();
}

void* simt_dynamic_shared() { return dynamic_shared.data; }

void* simt_shared(Shared* variable, size_t bytes, size_t align) {
  if (variable->launch == launch_serial) return variable->data;
  static_shared.push_back(allocate_shared(bytes, align));
  variable->launch = launch_serial;
  variable->data = static_shared.back().data;
  size_t sum = 0;
  for (const Memory& m : static_shared) sum += m.bytes;
  if (sum > kDefaultShared || sum + dynamic_shared.bytes > kMaxShared)
    fail({HERE, {}}, {}, "%zu bytes of static (@0) and %zu of dynamic shared memory, %zu and together %zu are possible",
         sum, dynamic_shared.bytes, kDefaultShared, kMaxShared);
  return variable->data;
}

int simt_barrier(bool predicate, Site site) {
  static Thread* first;
  current->wait = Wait::barrier;
  current->place = {HERE, site};
  if (arrived == 0) first = current;
  if (!same(first->place.site, site))
    fail(current->place, first->place, "divergent barrier: this thread is at the __syncthreads of @0, %s at that of @1",
         describe("thread", &first->index.x).c_str());
  predicates += predicate;
  if (++arrived == state.threads) {
    last_predicates = predicates;
    arrived = predicates = 0;
    if (observer) observer->barrier();
    enqueue_block();
  }
  suspend();
  return static_cast<int>(last_predicates);  // the next barrier needs this thread too, so it is still this one's
}

void simt_sync_warp(unsigned mask, Site site) { meet(Wait::sync, mask, HERE, site); }

unsigned simt_ballot(unsigned mask, bool predicate, Site site) {
  const unsigned me = state.thread;
  given[me] = predicate;
  meet(Wait::ballot, mask, HERE, site);
  return static_cast<unsigned>(taken[me]);
}

uint64_t simt_shuffle(Move move, unsigned mask, uint64_t bits, int operand, int width, Site site) {
  if (width < 1 || width > 32 || width & (width - 1))
    fail({HERE, site}, {}, "shuffle at @0: width %d is no power of two up to 32", width);
  const unsigned me = state.thread;
  const int lane = static_cast<int>(me % kWarp), first = lane & -width, last = first + width - 1;
  int from = lane;
  if (move == Move::index) from = first + (operand & (width - 1));
  if (move == Move::exclusive && (lane ^ operand) <= last) from = lane ^ operand;
  if (move == Move::up && lane - operand >= first) from = lane - operand;
  if (move == Move::down && lane + operand <= last) from = lane + operand;
  source[me] = static_cast<uint8_t>(from % int(kWarp));
  given[me] = bits;
  meet(Wait::shuffle, mask, HERE, site);
  return taken[me];
}

void simt_fence(bool device) {
  maybe_yield(HERE);
  if (observer) observer->fence(device);
}

void simt_atomic(const void* p, size_t bytes) {
  maybe_yield(HERE);
  if (observer) observer->atomic(p, bytes, HERE);
}

void simt_read_only(const void* p, size_t bytes) {
  if (observer) observer->read_only(p, bytes, HERE);
}

// The compiler's checks of alignment come here instead of into libubsan.
extern "C" SIMT_LOCAL void __ubsan_handle_type_mismatch_v1(void* data, void* p) {
  struct Type {
    uint16_t kind, info;
    char name[1];
  };
  const struct Check {
    const char* file;
    int line, column;
    const Type* type;
    uint8_t log_alignment, kind;
  }& check = *static_cast<const Check*>(data);
  const char* const what = p ? "misaligned access" : "access through a null pointer";
  if (inside()) fail({HERE, {check.file, check.line}}, {}, "%s at @0: %s at %p", what, check.type->name, p);
  fprintf(stderr, "simt: host code: %s at %s:%d\n", what, check.file, check.line);
  abort();
}
extern "C" SIMT_LOCAL void __ubsan_handle_type_mismatch_v1_abort(void* data, void* p) {
  __ubsan_handle_type_mismatch_v1(data, p);
}

// ---- What tests call -----------------------------------------------------------------------------------------------

void simt_configure(int o, uint64_t s) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  order = static_cast<Order>(o);
  seed = rng_state = s;
}
void simt_strict(int s) { strict = s; }
void simt_clear() {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  forget_reports();
  last_error = cudaSuccess;
  launches = blocks = parameter_bytes = 0;
}
uint64_t simt_launches() { return launches; }
uint64_t simt_blocks() { return blocks; }
uint64_t simt_parameter_bytes() { return parameter_bytes; }
