// The race checker. Kernels compiled with -fsanitize=thread call the __tsan_* functions below instead of libtsan's:
// they know CUDA's rules of ordering, and that all threads of a launch are unordered until one of these orders them.
//
//   __syncthreads           everything before it, before everything after it, in the block
//   __syncwarp, shuffle     the same for the lanes of the mask (simt_strict: a shuffle or vote orders nothing)
//   fence; atomic on x      what the thread knows of before the fence is released at x,
//   atomic on x; fence      and known to whoever, later, does this. __threadfence_block counts in its block only.
//
// Blocks run one after another, so whether accesses of two blocks are ordered never depends on luck.
#include <string.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace simt {
namespace {

// An access: block (24 bits, counted over all launches) | thread (10) | time in the block (29) | atomic (1). 0 is none.
using Label = uint64_t;
constexpr uint64_t kMaxBlocks = 1 << 24;
constexpr size_t kMaxPages = 1 << 15;  // remembered between launches: about 1.6 GB of cells

uint64_t block_of(Label l) { return l >> 40; }
uint32_t thread_of(Label l) { return l >> 30 & 1023; }
uint32_t time_of(Label l) { return static_cast<uint32_t>(l >> 1) & ((1u << 29) - 1); }
bool is_atomic(Label l) { return l & 1; }

// The last write, and three reads that it does not follow, of 4 bytes or of one
struct Cell {
  Label write, reads[3];
  uint32_t write_pc, read_pcs[3];
};
struct Page {
  unsigned shift;  // log2 of the bytes of a cell; 2 until somebody touches less than 4 bytes
  bool shared;
  std::vector<Cell> cells;
};

std::unordered_map<uintptr_t, Page> pages;
struct {
  uintptr_t number;
  Page* page;
} recent[1024];
std::vector<Page*> shared_pages;

struct Sync;
using Versions = std::map<Sync*, unsigned>;  // how many of its releases are known

struct Release {
  unsigned version;
  std::vector<uint32_t> fenced[2];  // [device?][thread]: its accesses up to this time; empty = none
};
struct Sync {  // a variable that fenced threads do atomics on
  unsigned version = 0;
  std::unordered_map<uint64_t, std::vector<Release>> releases;  // of a block
  Versions inherited;                                           // what the releasing threads had acquired
};
std::unordered_map<const void*, Sync> syncs;

struct Fence {  // accesses of all threads up to `all`, and of the lanes of the warp up to `lanes`, lie before it
  uint32_t all = 0, lanes[kWarp] = {};
};
struct View {  // of a thread, beyond what its block knows
  bool used = false;
  Versions seen, acquired[2];  // by atomics; by a fence after that [device?]
  bool fenced[2] = {};
  Fence fences[2];
  std::set<Sync*> released;  // since the last fence
};
View views[kMaxThreads], of_block;
std::vector<uint32_t> fenced_by_block[2];

uint64_t block, first_block;
uint32_t now, barrier_time;
uint32_t known[kMaxThreads][kWarp];  // [thread][lane of its warp]: accesses up to this time happened before
std::vector<std::array<unsigned, 3>> block_index;
std::set<std::array<uint64_t, 3>> reported;

void merge(Versions& to, const Versions& from) {
  for (const auto& [sync, version] : from) to[sync] = std::max(to[sync], version);
}
void merge(Fence& to, const Fence& from) {
  to.all = std::max(to.all, from.all);
  for (unsigned l = 0; l < kWarp; ++l) to.lanes[l] = std::max(to.lanes[l], from.lanes[l]);
}
void merge(View& to, const View& from) {
  to.used |= from.used;
  merge(to.seen, from.seen);
  for (int device = 0; device < 2; ++device) {
    merge(to.acquired[device], from.acquired[device]);
    merge(to.fences[device], from.fences[device]);
    to.fenced[device] |= from.fenced[device];
  }
  to.released.clear();
}

bool acquired(Label l) {
  const int device = block_of(l) != block;
  for (const View* view : {&views[state.thread], &of_block}) {
    for (const auto& [sync, version] : view->acquired[device]) {
      const auto found = sync->releases.find(block_of(l));
      if (found == sync->releases.end()) continue;
      for (const Release& r : found->second)
        if (r.version < version && !r.fenced[device].empty() && r.fenced[device][thread_of(l)] >= time_of(l))
          return true;
    }
  }
  return false;
}

bool ordered(Label l) {
  if (block_of(l) == block) {
    const uint32_t t = thread_of(l);
    if (t == state.thread || time_of(l) <= barrier_time) return true;
    if (t / kWarp == state.thread / kWarp && time_of(l) <= known[state.thread][t % kWarp]) return true;
  }
  return acquired(l);
}

bool alive(Label l, bool shared) { return shared ? block_of(l) == block : block_of(l) >= first_block; }

// ---- Memory -------------------------------------------------------------------------------------------------------

Page& page_of(uintptr_t number) {
  auto& entry = recent[number % 1024];
  if (entry.number != number || !entry.page) {
    entry = {number, &pages[number]};
    if (entry.page->cells.empty()) *entry.page = {2, false, std::vector<Cell>(kPage / 4)};
  }
  return *entry.page;
}

void refine(Page& page) {
  std::vector<Cell> bytes(kPage);
  for (size_t i = 0; i < kPage; ++i) bytes[i] = page.cells[i / 4];
  page.cells.swap(bytes);
  page.shift = 0;
}

const char base = 0;  // program counters are kept in 32 bits, relative to this library
uint32_t pack(const void* pc) { return static_cast<uint32_t>(static_cast<const char*>(pc) - &base); }
const void* unpack(uint32_t pc) { return &base + static_cast<int32_t>(pc); }

enum Kind { kRead, kWrite, kAtomic };

__attribute__((noinline, cold)) void race(Kind kind, uint32_t pc, bool shared, Label other, bool other_reads,
                                          uint32_t other_pc) {
  if (reported.size() > 50 || !reported.insert({pc, other_pc, kind}).second) return;
  static const char* const verbs[] = {"reads", "writes", "atomically updates"};
  const char* other_verb = other_reads ? "read" : "wrote";
  if (is_atomic(other)) other_verb = "atomically updated";
  std::string whose = "this block";
  if (block_of(other) != block) whose = describe("block", block_index[block_of(other) - first_block].data());
  report({unpack(pc), {}}, {unpack(other_pc), {}}, "race on %s memory: %s at @0 what thread %u of %s %s at @1",
         shared ? "shared" : "global", verbs[kind], thread_of(other), whose.c_str(), other_verb);
}

__attribute__((noinline, cold)) void complain(const char* what, uint32_t pc) {
  if (reported.insert({pc, 0, 3}).second) report({unpack(pc), {}}, {}, "%s", what);
}

template <Kind kind>
void check(Cell& c, bool shared, Label me, uint32_t pc) {
  if (kind == kRead && (c.reads[0] == me || c.write == me)) return;
  if (kind == kWrite && c.write == me && !c.reads[0]) return;
  if (alive(c.write, shared)) {
    if (!(kind == kAtomic && is_atomic(c.write)) && !ordered(c.write))
      race(kind, pc, shared, c.write, false, c.write_pc);
  } else if (kind != kWrite && shared) {
    complain("uninitialised shared memory is read at @0", pc);
  }
  if (kind == kRead) {
    int slot = static_cast<int>(now + state.thread) % 3;  // if all three must stay, one has to go all the same
    for (int i = 0; i < 3; ++i) {
      if (alive(c.reads[i], shared) && !ordered(c.reads[i])) continue;
      slot = i;
      break;
    }
    c.reads[slot] = me;
    c.read_pcs[slot] = pc;
  } else {
    for (int i = 0; i < 3; ++i) {
      if (alive(c.reads[i], shared) && !ordered(c.reads[i])) race(kind, pc, shared, c.reads[i], true, c.read_pcs[i]);
      c.reads[i] = 0;
    }
    c.write = me | (kind == kAtomic);
    c.write_pc = pc;
  }
}

bool tracked(const void* p) {  // by a fiber, and neither its own variables nor the kernel's parameters
  auto within = [](const void* q, const char* low, size_t bytes) {
    return static_cast<size_t>(static_cast<const char*>(q) - low) < bytes;
  };
  return within(__builtin_frame_address(0), state.stacks, state.stack_bytes) &&
         !within(p, state.stacks, state.stack_bytes) && !within(p, state.arguments, state.argument_bytes);
}

template <class F>
inline void for_cells(const void* p, size_t bytes, F f) {
  uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const uintptr_t end = at + bytes;
  while (at < end) {
    Page& page = page_of(at / kPage);
    const uintptr_t stop = std::min(end, (at / kPage + 1) * kPage);
    if (page.shift && (at | stop) % 4) refine(page);
    Cell* cells = page.cells.data();
    for (size_t i = at % kPage >> page.shift; i <= (stop - 1) % kPage >> page.shift; ++i) f(cells[i], page.shared);
    at = stop;
  }
}

// How many accesses to memory each thread of the running block has made: a measure of its work that repeats exactly.
unsigned long long accesses[kMaxThreads];
unsigned long long longest_before;  // of a thread, in all blocks of a launch but the one that ran last

unsigned long long longest_now() { return *std::max_element(accesses, accesses + kMaxThreads); }

template <Kind kind>
inline void access(const void* p, size_t bytes, const void* pc) {
  if (!tracked(p)) return;
  ++accesses[state.thread];
  const Label me = block << 40 | uint64_t{state.thread} << 30 | now << 1;
  const uint32_t packed = pack(pc);
  for_cells(p, bytes, [=](Cell& c, bool shared) { check<kind>(c, shared, me, packed); });
}

// ---- What orders --------------------------------------------------------------------------------------------------

struct Checker : Observer {
  Checker() { observer = this; }

  void launch(uint64_t blocks) override {
    longest_before = 0;
    memset(accesses, 0, sizeof accesses);
    if (block + blocks >= kMaxBlocks || pages.size() > kMaxPages) {
      pages.clear();
      memset(recent, 0, sizeof recent);
      shared_pages.clear();
      block = 0;
    }
    for (Page* page : shared_pages) page->shared = false;
    shared_pages.clear();
    first_block = block + 1;
    block_index.clear();
    syncs.clear();
    reported.clear();
  }

  void start_block(const unsigned* index) override {
    longest_before = std::max(longest_before, longest_now());
    memset(accesses, 0, sizeof accesses);
    ++block;
    block_index.push_back({index[0], index[1], index[2]});
    now = 1;
    barrier_time = 0;
    memset(known, 0, state.threads * sizeof known[0]);
    for (unsigned t = 0; t < state.threads; ++t)
      if (views[t].used) views[t] = View();
    of_block = View();
    for (auto& fenced : fenced_by_block) fenced.clear();
  }

  void shared(const void* p, size_t bytes) override {
    for (size_t i = 0; i < bytes; i += kPage) {
      shared_pages.push_back(&page_of(reinterpret_cast<uintptr_t>(p) / kPage + i / kPage));
      shared_pages.back()->shared = true;
    }
  }

  void barrier() override {
    barrier_time = now++;
    uint32_t all[2] = {};
    for (unsigned t = 0; t < state.threads; ++t) {
      View& view = views[t];
      if (!view.used) continue;
      merge(of_block, view);
      for (int device = 0; device < 2; ++device) {
        if (!view.fenced[device]) continue;
        auto& fenced = fenced_by_block[device];
        fenced.resize(state.threads);
        all[device] = std::max(all[device], view.fences[device].all);
        for (unsigned u = t / kWarp * kWarp; u < std::min(state.threads, (t / kWarp + 1) * kWarp); ++u)
          fenced[u] = std::max(fenced[u], view.fences[device].lanes[u % kWarp]);
      }
      view = View();
    }
    for (int device = 0; device < 2; ++device)
      for (uint32_t& time : fenced_by_block[device]) time = std::max(time, all[device]);
  }

  void meet(unsigned warp, unsigned mask) override {
    const uint32_t time = now++;
    uint32_t joint[kWarp] = {};
    View view;
    for_lanes(mask, [&](unsigned lane) {
      const unsigned t = warp * kWarp + lane;
      for (unsigned l = 0; l < kWarp && mask != ~0u; ++l) joint[l] = std::max(joint[l], known[t][l]);
      if (views[t].used) merge(view, views[t]);
    });
    for_lanes(mask, [&](unsigned lane) { joint[lane] = time; });
    for_lanes(mask, [&](unsigned lane) {
      memcpy(known[warp * kWarp + lane], joint, sizeof joint);
      if (view.used) views[warp * kWarp + lane] = view;
    });
  }

  void fence(bool device) override {
    View& view = views[state.thread];
    view.used = true;
    view.released.clear();
    for (int d = 0; d <= device; ++d) {
      Fence fence;
      fence.all = barrier_time;
      memcpy(fence.lanes, known[state.thread], sizeof fence.lanes);
      fence.lanes[state.thread % kWarp] = now;
      merge(view.fences[d], fence);
      view.fenced[d] = true;
      merge(view.acquired[d], view.seen);
      merge(view.acquired[d], of_block.seen);
    }
    ++now;
  }

  void atomic(const void* p, size_t bytes, const void* pc) override {
    access<kAtomic>(p, bytes, pc);
    View& view = views[state.thread];
    const auto found = syncs.find(p);
    if (found != syncs.end()) {
      view.used = true;
      merge(view.seen, found->second.inherited);
      view.seen[&found->second] = found->second.version;
    }
    Release release;
    bool any = false;
    for (int device = 0; device < 2; ++device) {
      std::vector<uint32_t>& fenced = release.fenced[device] = fenced_by_block[device];
      if (view.fenced[device]) {
        const Fence& fence = view.fences[device];
        fenced.resize(state.threads);
        for (unsigned t = 0; t < state.threads; ++t)
          fenced[t] = std::max({fenced[t], fence.all, t / kWarp == state.thread / kWarp ? fence.lanes[t % kWarp] : 0u});
      }
      any |= !fenced.empty();
    }
    if (!any) return;
    Sync& sync = syncs[p];
    view.used = true;
    if (!view.released.insert(&sync).second) return;
    for (const View* v : {&view, &of_block}) merge(sync.inherited, v->acquired[1]);
    release.version = sync.version++;
    sync.releases[block].push_back(std::move(release));
  }

  void read_only(const void* p, size_t bytes, const void* pc) override {
    if (!tracked(p)) return;
    for_cells(p, bytes, [=](Cell& c, bool shared) {
      if (alive(c.write, shared)) complain("__ldg at @0 reads what this launch has written", pack(pc));
    });
  }
} checker;

}  // namespace
}  // namespace simt

// Accesses of the thread that made most: in the block that ran last, or in those before it.
SIMT_API uint64_t simt_longest(int before) { return before ? simt::longest_before : simt::longest_now(); }

// ---- What the compiler calls --------------------------------------------------------------------------------------

using namespace simt;

#define PC __builtin_return_address(0)
#define HOOK extern "C" SIMT_LOCAL

HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_read_range(void* p, size_t n) { access<kRead>(p, n, PC); }
HOOK void __tsan_write_range(void* p, size_t n) { access<kWrite>(p, n, PC); }

#define ACCESS(n)                                                          \
  HOOK void __tsan_read##n(void* p) { access<kRead>(p, n, PC); }           \
  HOOK void __tsan_write##n(void* p) { access<kWrite>(p, n, PC); }         \
  HOOK void __tsan_unaligned_read##n(void* p) { access<kRead>(p, n, PC); } \
  HOOK void __tsan_unaligned_write##n(void* p) { access<kWrite>(p, n, PC); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

// std::atomic and static variables of host code; kernels do not use them
#define ATOMIC(bits)                                                                                              \
  using u##bits = uint##bits##_t;                                                                                 \
  HOOK u##bits __tsan_atomic##bits##_load(const u##bits* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  HOOK void __tsan_atomic##bits##_store(u##bits* p, u##bits v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  HOOK u##bits __tsan_atomic##bits##_exchange(u##bits* p, u##bits v, int) {                                       \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                               \
  HOOK u##bits __tsan_atomic##bits##_fetch_add(u##bits* p, u##bits v, int) {                                      \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                               \
  HOOK u##bits __tsan_atomic##bits##_fetch_sub(u##bits* p, u##bits v, int) {                                      \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                               \
  HOOK bool __tsan_atomic##bits##_compare_exchange_strong(u##bits* p, u##bits* e, u##bits v, int, int) {          \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                       \
  }                                                                                                               \
  HOOK bool __tsan_atomic##bits##_compare_exchange_weak(u##bits* p, u##bits* e, u##bits v, int, int) {            \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
  }
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)
HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
