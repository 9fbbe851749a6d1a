#include "run.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "block.h"
#include "include/builtins.h"
#include "runtime.h"
#include "stream.h"
#include "symbols.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

uint3 block_index(uint64_t number, dim3 grid) {
  return {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
          static_cast<unsigned>(number / grid.x / grid.y)};
}

std::optional<Stream>& stream() {
  static std::optional<Stream> instance;
  return instance;
}

void run_to_the_end(Launch& launch) {
  const std::vector<uint3> blocks = shuffled_blocks(launch);
  std::mutex mutex;  // of the two below it
  Counters counters;
  std::exception_ptr error;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    SharedMemory shared(launch.shared_bytes);
    SharedAccesses accesses(launch.shared_bytes);
    Counters own;
    try {
      for (size_t i; (i = next++) < blocks.size();) {
        Block running(launch, blocks[i], shared, accesses, stacks());
        running.run();
        own.add(running.counters());
      }
    } catch (...) {
      next = blocks.size();
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
    const std::lock_guard lock(mutex);
    counters.add(own);
  };

  const auto workers = std::min(static_cast<size_t>(settings().workers), blocks.size());
  std::vector<std::thread> others;
  for (size_t i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
  record(launch, counters);
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

void record(const Launch& launch, const Counters& counters) {
  records().push_back({launch.kernel, launch.grid, launch.block, launch.shared_bytes, counters});
}

std::vector<uint3> shuffled_blocks(const Launch& launch) {
  std::vector<uint3> blocks(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = block_index(i, launch.grid);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(launch.seed));
  return blocks;
}

void begin_stream() {
  if (stream()) throw Error("begin_stream: a stream has begun already, expected end_stream first");
  stream().emplace();
}

void end_stream() {
  if (!stream()) throw Error("end_stream: no stream has begun");
  stream()->check_thread();
  Stream ending = std::move(*stream());
  stream().reset();
  ending.finish();
}

void when_done(std::function<void()> action) {
  stream() ? stream()->when_done(std::move(action)) : action();
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

  std::unique_ptr<Launch> launch(new Launch{kernel_name(kernel), grid, block, shared_bytes,
                                            std::move(body), settings().delivery, settings().seed,
                                            settings().capability, overlaps, allocations()});
  if (stream()) {
    stream()->add(std::move(launch));
  } else {
    run_to_the_end(*launch);
  }
  return cudaSuccess;
}

}  // namespace emulator
