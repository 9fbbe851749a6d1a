// Running a launch, and what a test may set and ask.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "copies.h"
#include "counters.h"

namespace emulator {

struct Launch;

struct Settings {
  uint64_t seed = 0;  // of the order in which threads and blocks run
  Delivery delivery = Delivery::late;
  int multiprocessors = 4;
  int workers = 2;      // threads of this process that run blocks
  int capability = 89;  // of the device; 8.9 has the least shared memory
};
Settings& settings();

// The shared memory that a block can have.
int max_shared_bytes();

struct Record {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;
  Counters counters;
};
std::vector<Record>& records();  // of the launches since they were last cleared
void record(const Launch& launch, const Counters& counters);

// The indices of all blocks in the order in which they are to run, which is random.
std::vector<uint3> shuffled_blocks(const Launch& launch);

// Runs all blocks or, between begin_stream and end_stream, leaves the launch to a Stream. Returns
// the status that CUDA would give for the shape of the launch. Throws Error if a thread does
// something wrong. overlaps: see wait_for_earlier_kernels.
cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                std::function<void()> body, bool overlaps = false);

// From begin to end, launches overlap; they are over at the end. All are of the calling thread, and
// the memory that they access lives as long. They throw Error for a second begin, for an end
// without a begin, and in another thread.
void begin_stream();
void end_stream();

// Calls `action` when the launches so far are over.
void when_done(std::function<void()> action);

// The shared memory of the running block.
void* shared_memory();

}  // namespace emulator
