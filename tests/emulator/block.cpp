#include "block.h"

#include <boost/context/preallocated.hpp>
#include <map>
#include <tuple>
#include <utility>

#include "include/builtins.h"
#include "sanitizer.h"

namespace emulator {
namespace {

// Unwinds a thread that is not to run on.
struct Abandoned {};

}  // namespace

__thread Thread* current = nullptr;

std::string to_text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string to_text(Site site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void fail(Site site, const std::string& problem) {
  throw Error(current->block->launch().kernel + ": block " + to_text(current->block->index()) +
              ", thread " + to_text(current->index) + ", " + to_text(site) + ": " + problem);
}

Block::Block(const Launch& launch, uint3 index, SharedMemory& shared, Stacks& stacks)
    : launch_(launch), index_(index), shared_(shared) {
  const dim3 size = launch.block, grid = launch.grid;
  number_ = (uint64_t{index.z} * grid.y + index.y) * grid.x + index.x;
  random_state_ = (launch.seed + 1) * 0x9e3779b97f4a7c15u ^ (number_ + 1) * 0xbf58476d1ce4e5b9u;
  const size_t threads = size_t{size.x} * size.y * size.z;
  if (launch.capability == kHopper) hopper_.emplace(launch.shared_bytes, threads);
  // Both are pointed into, so neither may move.
  warps_.reserve((threads + 31) / 32);
  threads_.reserve(threads);
  for (size_t i = 0; i < threads; ++i) {
    const auto lane = static_cast<int>(i % 32);
    if (lane == 0) {
      const size_t lanes = threads - i < 32 ? threads - i : 32;
      warps_.emplace_back(*this, static_cast<uint32_t>((uint64_t{1} << lanes) - 1));
      priorities_.push_back(random());
    }
    const uint3 position = {static_cast<unsigned>(i % size.x),
                            static_cast<unsigned>(i / size.x % size.y),
                            static_cast<unsigned>(i / size.x / size.y)};
    threads_.push_back({this, &warps_.back(), lane, position, Copies(launch.delivery), {}});
    threads_.back().waited = !launch.overlaps;
    start(threads_.back(), stacks);
  }
  shared_.poison();
  ::blockIdx = index;
  ::blockDim = {size.x, size.y, size.z};
  ::gridDim = {grid.x, grid.y, grid.z};
}

// xorshift64*
uint32_t Block::random() {
  random_state_ ^= random_state_ >> 12;
  random_state_ ^= random_state_ << 25;
  random_state_ ^= random_state_ >> 27;
  return static_cast<uint32_t>(random_state_ * 0x2545f4914f6cdd1du >> 32);
}

void Block::start(Thread& thread, Stacks& stacks) {
  thread.stack = stacks.take();
  const boost::context::preallocated place(thread.stack.sp, thread.stack.size, thread.stack);
  thread.fiber =
      boost::context::fiber(std::allocator_arg, place, StackAllocator(stacks),
                            [this, &thread](boost::context::fiber&& caller) {
                              after_switch(nullptr, &scheduler_stack_, &scheduler_stack_size_);
                              scheduler_ = std::move(caller);
                              try {
                                if (!error_) {
                                  launch_.body();
                                  finish(thread);
                                }
                              } catch (const Abandoned&) {
                              } catch (const std::exception&) {
                                error_ = std::current_exception();
                              }
                              before_switch(nullptr, scheduler_stack_, scheduler_stack_size_);
                              return std::move(scheduler_);
                            });
}

void Block::resume(Thread& thread) {
  current = &thread;
  ::threadIdx = thread.index;
  void* state = nullptr;
  before_switch(&state, static_cast<char*>(thread.stack.sp) - thread.stack.size, thread.stack.size);
  thread.fiber = std::move(thread.fiber).resume();
  after_switch(state, nullptr, nullptr);
}

void Block::suspend(const char* instruction, Site site) {
  Thread& self = *current;
  self.waiting_at = instruction;
  self.site = site;
  self.warp->suspend(self.lane);
  leave();
}

void Block::yield() {
  if (random() % 2 == 0) return;
  priorities_[number(*current->warp)] = 0;
  yielded_ = true;
  leave();
}

// To the scheduler and, when it resumes this thread, back.
void Block::leave() {
  Thread& self = *current;
  before_switch(&self.sanitizer_state, scheduler_stack_, scheduler_stack_size_);
  scheduler_ = std::move(scheduler_).resume();
  after_switch(self.sanitizer_state, &scheduler_stack_, &scheduler_stack_size_);
  if (error_) throw Abandoned{};
}

// Ends the threads that an error has left somewhere in the kernel, so that their stacks come free.
void Block::abandon() {
  for (Thread& thread : threads_) {
    if (thread.fiber) resume(thread);
  }
}

void Block::finish(Thread& thread) {
  check_waited(Site::here(), "the end of the kernel");
  if (at_barrier_ > 0) {
    fail(barrier_site_, "this thread left the kernel while " + std::to_string(at_barrier_) +
                            " wait for it at __syncthreads");
  }
  thread.warp->exit(thread.lane);
  thread.exited = true;
  ++exited_;
}

void Block::barrier(Site site) {
  if (exited_ > 0) {
    fail(site, "__syncthreads, but " + std::to_string(exited_) +
                   " threads of the block have left the kernel");
  }
  if (at_barrier_ > 0 && !(site == barrier_site_)) {
    fail(site, "divergent __syncthreads: others wait at " + to_text(barrier_site_));
  }
  barrier_site_ = site;
  if (++at_barrier_ < threads_.size()) return suspend("__syncthreads", site);
  at_barrier_ = 0;
  for (Warp& warp : warps_) {
    warp.requests().count_into(counters_);
    warp.wake(warp.lanes());
    share_stores(warp);
  }
}

void Block::share_stores(const Warp& warp) {
  const size_t begin = 32 * number(warp), end = std::min(begin + 32, threads_.size());
  for (size_t i = begin; i < end; ++i) {
    std::vector<Bytes>& stored = threads_[i].stored;
    stored_.insert(stored_.end(), stored.begin(), stored.end());
    stored.clear();
  }
}

void Block::note_shared_store(Site site, const void* address) {
  if (!hopper_) return;
  const auto* begin = static_cast<const char*>(shared_.data());
  hopper_->chunks.store(site, static_cast<uint32_t>(static_cast<const char*>(address) - begin));
}

void Block::note_load(Site site, const void* address, size_t bytes) {
  if (launch_.unfenced.by_another(number_, Unfenced::bytes(address, bytes))) {
    fail(site, "load of what another block has stored without a __threadfence since");
  }
}

void Block::note_store(const void* address, size_t bytes) {
  current->stored.push_back(Unfenced::bytes(address, bytes));
  launch_.unfenced.store(number_, current->stored.back());
}

void Block::fence() {
  launch_.unfenced.fence(number_, current->stored);
  launch_.unfenced.fence(number_, stored_);
  current->stored.clear();
  stored_.clear();
}

// The warp of the highest priority runs as far as it can, which brings out a warp that overtakes
// the others; now and then a priority is drawn anew.
size_t Block::choose_warp() {
  if (random() % 8 == 0) priorities_[random() % warps_.size()] = random();
  size_t best = warps_.size();
  for (size_t i = 0; i < warps_.size(); ++i) {
    const bool better = best == warps_.size() || priorities_[i] > priorities_[best];
    if (warps_[i].ready() != 0 && better) best = i;
  }
  return best;
}

// As no thread can run, what was started on its own cannot come any later.
void Block::deliver_something() {
  const InFlight::Operation operation = hopper_->in_flight.take(random());
  current = operation.thread;
  try {
    operation.deliver();
  } catch (const std::exception&) {
    error_ = std::current_exception();
  }
}

void Block::run() {
  while (exited_ < threads_.size() && !error_) {
    const size_t w = choose_warp();
    if (w == warps_.size()) {
      if (hopper_ && !hopper_->in_flight.empty()) {
        deliver_something();
      } else {
        error_ = stuck();
      }
      continue;
    }
    yielded_ = false;
    while (!error_ && !yielded_ && warps_[w].ready() != 0) {
      const uint32_t turn = random() % 32, ready = warps_[w].ready();
      const uint32_t turned = ready >> turn | ready << (32 - turn) % 32;
      const uint32_t lane = (static_cast<uint32_t>(__builtin_ctz(turned)) + turn) % 32;
      resume(threads_[32 * w + lane]);
    }
  }
  if (error_) {
    abandon();
    std::rethrow_exception(error_);
  }
  if (const std::string left = hopper_ ? hopper_->problem_at_the_end() : ""; !left.empty()) {
    throw Error(launch_.kernel + ": block " + to_text(index_) + " has ended, but " + left);
  }
  if (!shared_.guards_intact()) {
    throw Error(launch_.kernel + ": block " + to_text(index_) +
                ": something was written outside the block's shared memory");
  }
}

std::exception_ptr Block::stuck() const {
  using Place = std::tuple<std::string, std::string>;  // instruction, site
  std::map<Place, std::pair<size_t, const Thread*>> waiting;
  for (const Thread& thread : threads_) {
    if (thread.exited) continue;
    auto& [count, first] = waiting[{thread.waiting_at, to_text(thread.site)}];
    if (count++ == 0) first = &thread;
  }
  std::string text = launch_.kernel + ": block " + to_text(index_) + " is stuck:";
  for (const auto& [place, who] : waiting) {
    text += " " + std::to_string(who.first) + " threads, the first " + to_text(who.second->index) +
            ", wait at " + std::get<0>(place) + " (" + std::get<1>(place) + ");";
  }
  text.back() = '.';
  return std::make_exception_ptr(Error(text));
}

}  // namespace emulator
