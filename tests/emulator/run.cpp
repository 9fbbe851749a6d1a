#include "run.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <utility>

#include "block.h"
#include "include/builtins.h"
#include "runtime.h"
#include "symbols.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

uint3 block_index(uint64_t number, dim3 grid) {
  return {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
          static_cast<unsigned>(number / grid.x / grid.y)};
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}

int max_shared_bytes() { return (settings().capability == kHopper ? 227 : 99) * 1024; }

std::vector<Record>& records() {
  static std::vector<Record> instance;
  return instance;
}

void* shared_memory() { return current->block->shared().data(); }

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                std::function<void()> body, bool overlaps) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0) return cudaSuccess;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > shared_limit(kernel)) return cudaErrorInvalidValue;

  GlobalStores stores;
  AtomicWords atomics;
  const Launch launch{kernel_name(kernel),
                      grid,
                      block,
                      shared_bytes,
                      std::move(body),
                      settings().delivery,
                      settings().seed,
                      stores,
                      atomics,
                      settings().capability,
                      overlaps};
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), std::mt19937_64(launch.seed));

  static Stacks stacks;
  std::mutex mutex;  // of the two below it
  Counters counters;
  std::exception_ptr error;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    SharedMemory shared(shared_bytes);
    SharedAccesses accesses(shared_bytes);
    Counters own;
    try {
      for (size_t i; (i = next++) < blocks;) {
        Block running(launch, block_index(order[i], grid), shared, accesses, stacks);
        running.run();
        own.add(running.counters());
      }
    } catch (...) {
      next = blocks;
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
    const std::lock_guard lock(mutex);
    counters.add(own);
  };

  const auto workers = std::min<uint64_t>(static_cast<uint64_t>(settings().workers), blocks);
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
  records().push_back({launch.kernel, grid, block, shared_bytes, counters});
  return cudaSuccess;
}

}  // namespace emulator
