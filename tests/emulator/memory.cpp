#include "memory.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "sanitizer.h"

namespace emulator {
namespace {

constexpr size_t kGuard = 1024;
constexpr size_t kAlignment = 1024;
constexpr unsigned char kPoison = 0xff;

std::string text_of_bytes(size_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

void Allocations::add(const void* begin, size_t bytes, const std::string& name, bool constant) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  ranges_.push_back({first, first + bytes, name, constant});
}

const Allocations::Range* Allocations::find(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const Range& range : ranges_) {
    if (range.begin <= at && at < range.end) return &range;
  }
  return nullptr;
}

std::string Allocations::problem(const void* address, size_t bytes) const {
  if (ranges_.empty()) return {};
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const Range* nearest = nullptr;
  uintptr_t nearest_distance = UINTPTR_MAX;
  for (const Range& range : ranges_) {
    if (range.begin <= begin && begin + bytes <= range.end) return {};
    const uintptr_t distance =
        begin < range.begin ? range.begin - begin : begin - std::min(begin, range.end);
    if (distance < nearest_distance) {
      nearest = &range;
      nearest_distance = distance;
    }
  }
  const std::string size = text_of_bytes(nearest->end - nearest->begin);
  const std::string tensor = nearest->name + " (" + size + ")";
  return begin < nearest->begin
             ? "begins " + text_of_bytes(nearest->begin - begin) + " before " + tensor
             : "ends " + text_of_bytes(begin + bytes - nearest->end) + " after " + tensor;
}

Allocations& allocations() {
  static Allocations instance;
  return instance;
}

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuard + kAlignment) {
  const auto begin = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
  data_ = memory_.data() + kGuard + (kAlignment - begin % kAlignment) % kAlignment;
  std::fill(memory_.begin(), memory_.end(), kPoison);
  forbid(data_ - kGuard, kGuard);
  forbid(data_ + bytes_, kGuard);
}

SharedMemory::~SharedMemory() { allow(memory_.data(), memory_.size()); }

std::string SharedMemory::problem(const void* address, size_t bytes) const {
  const auto* begin = static_cast<const unsigned char*>(address);
  if (begin >= data_ && begin + bytes <= data_ + bytes_) return {};
  return "is at byte " + std::to_string(begin - data_) + " of the block's " +
         text_of_bytes(bytes_) + " of shared memory";
}

void SharedMemory::poison() { memset(data_, kPoison, bytes_); }

bool SharedMemory::guards_intact() const {
  if (kSanitized) return true;  // AddressSanitizer has reported it, and forbids reading the guards
  const auto poisoned = [](unsigned char byte) { return byte == kPoison; };
  return std::all_of(data_ - kGuard, data_, poisoned) &&
         std::all_of(data_ + bytes_, data_ + bytes_ + kGuard, poisoned);
}

void check_waited(Site site, const char* what) {
  if (!current->waited) fail(site, std::string(what) + " before wait_for_earlier_kernels");
}

void check_alignment(Site site, const char* what, const void* address, size_t bytes) {
  const size_t past = reinterpret_cast<uintptr_t>(address) % bytes;
  if (past != 0) {
    fail(site, std::string(what) + " of " + text_of_bytes(bytes) +
                   " is misaligned: its address is " + text_of_bytes(past) +
                   " past a multiple of " + std::to_string(bytes));
  }
}

void check_global(Site site, const char* what, Use use, const void* address, size_t bytes) {
  const Allocations& allocations = current->block->launch().allocations;
  const std::string problem = allocations.problem(address, bytes);
  if (!problem.empty()) {
    fail(site, std::string(what) + " of " + text_of_bytes(bytes) + " out of bounds: it " + problem);
  }
  if (use == Use::load && current->waited) return;
  const Allocations::Range* range = allocations.find(address);
  const bool constant = range && range->constant;
  if (use == Use::store && constant) fail(site, std::string(what) + " to constant " + range->name);
  if (constant) return;
  check_waited(site, (std::string(what) + (range ? " of " + range->name : "")).c_str());
}

void check_shared(Site site, const char* what, const void* address, size_t bytes) {
  check_alignment(site, what, address, bytes);
  const std::string problem = current->block->shared().problem(address, bytes);
  if (!problem.empty()) {
    fail(site, std::string(what) + " of " + text_of_bytes(bytes) + " out of bounds: it " + problem);
  }
}

}  // namespace emulator
