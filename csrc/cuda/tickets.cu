// Where a launch counts its blocks that are done (is_last_block): a number in device memory that no launch which may
// run at the same time counts in.
#include <atomic>
#include <mutex>
#include <unordered_map>

#include "tile.cuh"

namespace absgd {
namespace gpu {
namespace {

constexpr unsigned kPool = 4096;  // tickets that are obtained at once, 16 KB

// Launches of one queue follow each other.
struct Queue {
  int device;                 // the default streams have the same handles on every device
  cudaStream_t stream;        // cudaStreamPerThread is the handle of as many streams as there are threads
  unsigned long long thread;  // of that, else 0

  bool operator==(const Queue& other) const {
    return device == other.device && stream == other.stream && thread == other.thread;
  }
};
struct Hash {
  size_t operator()(const Queue& q) const {
    return std::hash<const void*>()(q.stream) ^ (size_t(q.device) << 56) ^ (size_t(q.thread) << 32);
  }
};

// A number of its own for every thread: the address of something local to it would come again after its end, when its
// stream may still run.
unsigned long long this_thread() {
  static std::atomic<unsigned long long> threads{0};
  thread_local const unsigned long long own = ++threads;
  return own;
}

Queue queue_of(int device, cudaStream_t stream) {
  if (stream == cudaStreamLegacy) return {device, nullptr, 0};
  return {device, stream, stream == cudaStreamPerThread ? this_thread() : 0};
}

// So many zeros in device memory, or null. They are written on a stream of its own: on a captured one they would become
// a part of the graph, and the legacy stream may wait for one that is captured.
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

// Tickets of one device that nobody has yet. What was handed out stays valid: no memory is given back.
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
  if (status != cudaStreamCaptureStatusNone) return pools[device].take();  // its graph may run on any stream
  unsigned*& ticket = of_queue[queue_of(device, stream)];
  if (ticket == nullptr) ticket = pools[device].take();
  return ticket;
}

}  // namespace gpu
}  // namespace absgd
