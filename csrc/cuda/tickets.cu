// Tickets: the numbers in device memory in which a launch counts its finished blocks (is_last_block). Two launches that
// may run at the same time must not share a ticket. So each stream has one ticket, and each captured launch has its
// own.
#include <atomic>
#include <mutex>
#include <unordered_map>

#include "tile.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr unsigned kPool = 4096;  // tickets that are allocated at once, 16 KB

// A queue is a stream of one device, whose launches follow each other.
struct Queue {
  int device;                 // needed because the default streams have the same handles on every device
  cudaStream_t stream;        // cudaStreamPerThread is one handle for the streams of all threads
  unsigned long long thread;  // the thread for cudaStreamPerThread, 0 for any other stream

  bool operator==(const Queue& other) const {
    return device == other.device && stream == other.stream && thread == other.thread;
  }
};
struct Hash {
  size_t operator()(const Queue& q) const {
    return std::hash<const void*>()(q.stream) ^ (size_t(q.device) << 56) ^ (size_t(q.thread) << 32);
  }
};

// A number for every thread that is never used again. The address of a thread-local variable would not do: it may be
// used again after the thread has ended, when the stream of that thread still runs.
unsigned long long this_thread() {
  static std::atomic<unsigned long long> threads{0};
  thread_local const unsigned long long own = ++threads;
  return own;
}

Queue queue_of(int device, cudaStream_t stream) {
  if (stream == cudaStreamLegacy) return {device, nullptr, 0};
  return {device, stream, stream == cudaStreamPerThread ? this_thread() : 0};
}

// `count` zeros in device memory, or null. They are written on a stream of their own. On a captured stream the writing
// would become a part of the graph, and the legacy stream might wait for a captured one.
unsigned* zeros(unsigned count) {
  const Relaxed now;
  void* memory = nullptr;
  cudaStream_t own = nullptr;
  const size_t bytes = count * sizeof(unsigned);
  const bool there = cudaMalloc(&memory, bytes) == cudaSuccess &&
                     cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking) == cudaSuccess &&
                     cudaMemsetAsync(memory, 0, bytes, own) == cudaSuccess && cudaStreamSynchronize(own) == cudaSuccess;
  if (own != nullptr) cudaStreamDestroy(own);
  return there ? static_cast<unsigned*>(memory) : nullptr;
}

// The tickets of one device that are not in use. No memory is given back, so a ticket that was handed out stays valid.
struct Pool {
  unsigned* next = nullptr;
  unsigned left = 0;

  unsigned* take() {
    if (left == 0) {
      next = zeros(kPool);
      if (next == nullptr) return nullptr;
      left = kPool;
    }
    --left;
    return next++;
  }
};

}  // namespace

unsigned* ticket_for(cudaStream_t stream) {
  static std::mutex guard;
  static std::unordered_map<Queue, unsigned*, Hash> of_queue;
  static std::unordered_map<int, Pool> pools;  // by device
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  int device = 0;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess || cudaGetDevice(&device) != cudaSuccess) return nullptr;
  const std::lock_guard<std::mutex> lock(guard);
  if (status != cudaStreamCaptureStatusNone) return pools[device].take();  // The graph may run on any stream.
  unsigned*& ticket = of_queue[queue_of(device, stream)];
  if (ticket == nullptr) ticket = pools[device].take();
  return ticket;
}

}  // namespace gpu
}  // namespace absgd
