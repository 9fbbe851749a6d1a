#include "block.h"

#include <algorithm>
#include <boost/context/preallocated.hpp>
#include <map>
#include <tuple>
#include <utility>

#include "include/builtins.h"
#include "sanitizer.h"

namespace emulator {
namespace {

// Unwinds a thread that must not run on.
struct Abandoned {};

}  // namespace

__thread Thread* current = nullptr;

std::string to_text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string to_text(Site site) {
  if (!site.file) return "start";
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void fail(Site site, const std::string& problem) {
  throw Error(current->block->launch().kernel + ": block " + to_text(current->block->index()) +
              ", thread " + to_text(current->index) + ", " + to_text(site) + ": " + problem);
}

Block::Block(Launch& launch, uint3 index, SharedMemory& shared, SharedAccesses& accesses,
             Stacks& stacks)
    : launch_(launch), index_(index), shared_(shared), accesses_(accesses) {
  const dim3 size = launch.block, grid = launch.grid;
  number_ = (uint64_t{index.z} * grid.y + index.y) * grid.x + index.x;
  random_state_ = (launch.seed + 1) * 0x9e3779b97f4a7c15u ^ (number_ + 1) * 0xbf58476d1ce4e5b9u;
  const size_t threads = size_t{size.x} * size.y * size.z;
  const size_t warps = (threads + 31) / 32;
  if (launch.capability == kHopper) hopper_.emplace(launch.shared_bytes, threads);
  ordering_.emplace(threads, hopper_ ? kMostMbarriers + warps : 0);
  accesses_.begin_block(ordering_->agents());
  // Both are pointed into, so neither may move.
  warps_.reserve(warps);
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
    threads_.push_back(
        {this, &warps_.back(), static_cast<Agent>(i), lane, position, Copies(launch.delivery), {}});
    threads_.back().waited = !launch.overlaps;
    start(threads_.back(), stacks);
  }
  shared_.poison();
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
                                if (!error_) error_ = std::current_exception();
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
  self.latest = site;
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

// Ends the threads that are still somewhere in the kernel, so that their stacks come free.
void Block::abandon() {
  if (!error_) error_ = std::make_exception_ptr(Abandoned{});
  for (Thread& thread : threads_) {
    if (thread.fiber) resume(thread);
  }
  current = nullptr;
}

void Block::finish(Thread& thread) {
  check_waited(thread.latest, "the end of the kernel");
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
  ordering_->synchronise();
  for (Warp& warp : warps_) {
    warp.requests().count_into(counters_);
    warp.wake(warp.lanes());
  }
}

void Block::wait_for_earlier_kernels(Site site) {
  if (launch_.waits) {
    wait_earlier_.push_back(current);
    suspend("wait_for_earlier_kernels", site);
  }
  current->waited = true;
}

// As on a GPU, the first thread that calls this does it for the block. So what the other threads do
// before their own calls may come late too.
void Block::let_later_kernels_begin(Site site) {
  current->latest = site;
  if (std::exchange(lets_later_, true) || !launch_.holds || launch_.waits) return;
  held_ = yielded_ = true;
  leave();
}

std::string Block::name(Agent agent) const {
  if (agent < threads_.size()) return "thread " + to_text(threads_[agent].index);
  return agent < threads_.size() + kMostMbarriers ? "TMA" : "a wgmma";
}

void Block::load_shared(Site site, const void* address, size_t bytes) {
  accesses_.load(site, thread(), offset(address), bytes, ordering_->now(current->number));
}

void Block::load_shared_together(Site site, const uintptr_t (&addresses)[32]) {
  const Agent first = first_thread(*current->warp);
  const Clock& common = ordering_->common(first, current->warp->lanes());
  for (Agent lane = 0; lane < 32; ++lane) {
    const SharedAccesses::Observer by = {*ordering_, first + lane, 0, &common};
    const auto* address = reinterpret_cast<const void*>(addresses[lane]);
    accesses_.load(site, by, offset(address), 16, ordering_->now(first + lane));
  }
}

void Block::check_load_shared(Site site, const void* address, size_t bytes) {
  accesses_.check_load(site, thread(), offset(address), bytes);
}

void Block::store_shared(Site site, const void* address, size_t bytes) {
  accesses_.store(site, thread(), offset(address), bytes, ordering_->now(current->number));
  if (hopper_) hopper_->chunks.store(site, offset(address), bytes);
}

void Block::begin_copy(Site site, const void* address, size_t bytes) {
  accesses_.store(site, thread(), offset(address), bytes, kUnfinished);
  if (hopper_) hopper_->chunks.store(site, offset(address), bytes);
}

void Block::finish_copy(Site site, const void* address, size_t bytes, Time time) {
  accesses_.finish_store(offset(address), bytes, current->number, time);
  if (hopper_) hopper_->chunks.store(site, offset(address), bytes);
}

void Block::note_plain_access(const void* address, size_t bytes, bool store) noexcept {
  if (error_) return;
  try {
    if (offset(address) < launch_.shared_bytes) {
      const size_t inside = std::min(bytes, launch_.shared_bytes - offset(address));
      if (store) return store_shared(current->latest, address, inside);
      return load_shared(current->latest, address, inside);
    }
    // Other memory, such as parameters, is not checked.
    if (launch_.allocations.find(address)) {
      check_global(current->latest, store ? "plain store" : "plain load",
                   store ? Use::store : Use::load, address, bytes);
    }
  } catch (const std::exception&) {
    error_ = std::current_exception();
  }
}

bool Block::knows(const GlobalStores::Store& store) const {
  const Agent self = current->number;
  if (store.block == number_) return ordering_->knows(self, store.thread, store.time);
  return std::any_of(learnt_.begin(), learnt_.end(), [&](const Learnt& learnt) {
    if (!ordering_->knows(self, learnt.thread, learnt.time)) return false;
    const auto times = learnt.knowledge.find(store.block);
    return times != learnt.knowledge.end() && (*times->second)[store.thread] >= store.time;
  });
}

void Block::note_load(Site site, const void* address, size_t bytes) {
  const auto unknown = launch_.stores.find_unknown(GlobalStores::bytes(address, bytes),
                                                   [&](const auto& store) { return knows(store); });
  if (!unknown) return;
  const std::string place = " at " + to_text(unknown->site);
  if (unknown->block == number_) {
    fail(site, "load of what " + name(unknown->thread) + " has stored" + place +
                   ", and no barrier is between");
  }
  fail(site, "load of what another block has stored" + place +
                 ", and no __threadfence before an atomic function there and after one here");
}

void Block::note_store(Site site, const void* address, size_t bytes) {
  const Bytes stored = GlobalStores::bytes(address, bytes);
  launch_.stores.add(
      stored, {number_, current->number, ordering_->now(current->number), stored.mask, site});
}

void Block::note_atomic(const void* address) {
  Knowledge& word = launch_.atomics.words[reinterpret_cast<uintptr_t>(address)];
  join(current->seen, word);
  join(word, current->fenced);
}

void Block::fence() {
  Thread& self = *current;
  if (!self.seen.empty()) {
    learnt_.push_back({self.number, ordering_->now(self.number), std::move(self.seen)});
    self.seen.clear();
  }
  self.fenced.clear();
  for (const Learnt& learnt : learnt_) {
    if (ordering_->knows(self.number, learnt.thread, learnt.time)) {
      join(self.fenced, learnt.knowledge);
    }
  }
  self.fenced[number_] = ordering_->publish(self.number);
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

// No thread can run, so the copies in flight must arrive now.
void Block::deliver_something() {
  const InFlight::Operation operation = hopper_->in_flight.take(random());
  current = operation.thread;
  try {
    operation.deliver();
  } catch (const std::exception&) {
    if (!error_) error_ = std::current_exception();
  }
}

void Block::run() {
  const struct NobodyRuns {
    ~NobodyRuns() { current = nullptr; }
  } at_the_end;
  ::blockIdx = index_;
  ::blockDim = {launch_.block.x, launch_.block.y, launch_.block.z};
  ::gridDim = {launch_.grid.x, launch_.grid.y, launch_.grid.z};
  held_ = false;
  if (!launch_.waits) {
    for (const Thread* thread : wait_earlier_) thread->warp->wake(1u << thread->lane);
    wait_earlier_.clear();
  }
  while (!ended() && !error_ && !held_) {
    const size_t w = choose_warp();
    if (w == warps_.size()) {
      if (!wait_earlier_.empty()) return;
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
  if (held_) return;
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
