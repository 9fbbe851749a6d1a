#include "counters.h"

#include <algorithm>

namespace emulator {
namespace {

uint64_t count_sectors(const uintptr_t (&addresses)[32], uint32_t lanes) {
  uintptr_t sectors[32];
  int count = 0;
  // An aligned access of 16 bytes or less lies in one sector.
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) sectors[count++] = addresses[lane] / 32;
  }
  std::sort(sectors, sectors + count);
  return static_cast<uint64_t>(std::unique(sectors, sectors + count) - sectors);
}

}  // namespace

void Counters::add(const Counters& other) {
  loaded_bytes += other.loaded_bytes;
  stored_bytes += other.stored_bytes;
  load_requests += other.load_requests;
  store_requests += other.store_requests;
  load_sectors += other.load_sectors;
  store_sectors += other.store_sectors;
  shared_requests += other.shared_requests;
  shared_conflicts += other.shared_conflicts;
  mma += other.mma;
  wgmma_flops += other.wgmma_flops;
  tma_bytes += other.tma_bytes;
}

uint64_t bank_conflicts(const uintptr_t (&addresses)[32], uint32_t lanes, uint32_t bytes) {
  uint64_t conflicts = 0;
  // The 32 banks have 128 bytes, so as many lanes are served together, and have as many places for
  // what they access; accesses in the same place collide unless they are of the same bytes.
  const int together = static_cast<int>(128 / bytes);
  for (int first = 0; first < 32; first += together) {
    uintptr_t rows[16][16];
    int count[16] = {};
    for (int lane = first; lane < first + together; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      const uintptr_t row = addresses[lane] / bytes;
      const size_t place = row % (128 / bytes);
      const auto* end = rows[place] + count[place];
      if (std::find(rows[place], rows[place] + count[place], row) == end) {
        rows[place][count[place]++] = row;
      }
    }
    conflicts += static_cast<uint64_t>(std::max(1, *std::max_element(count, count + 16)) - 1);
  }
  return conflicts;
}

void Requests::add(int lane, Site site, Access access, const void* address, uint32_t bytes) {
  const uint32_t bit = 1u << lane;
  size_t i = next_[lane];
  while (i < requests_.size() && !(requests_[i].site == site && requests_[i].access == access &&
                                   requests_[i].bytes == bytes && !(requests_[i].lanes & bit))) {
    ++i;
  }
  if (i == requests_.size()) {
    // The lanes before this one did without: it belongs between what they did, in program order.
    i = next_[lane];
    requests_.insert(requests_.begin() + static_cast<ptrdiff_t>(i), {site, access, bytes, 0, {}});
    for (size_t& next : next_) next += next > i;
  }
  requests_[i].lanes |= bit;
  requests_[i].address[lane] = reinterpret_cast<uintptr_t>(address);
  next_[lane] = i + 1;
}

void Requests::count_into(Counters& counters) {
  for (const Request& r : requests_) {
    const auto lanes = static_cast<uint64_t>(__builtin_popcount(r.lanes));
    switch (r.access) {
      case Access::global_load:
        counters.loaded_bytes += lanes * r.bytes;
        counters.load_requests += 1;
        counters.load_sectors += count_sectors(r.address, r.lanes);
        break;
      case Access::global_store:
        counters.stored_bytes += lanes * r.bytes;
        counters.store_requests += 1;
        counters.store_sectors += count_sectors(r.address, r.lanes);
        break;
      case Access::shared:
        counters.shared_requests += 1;
        counters.shared_conflicts += bank_conflicts(r.address, r.lanes, r.bytes);
        break;
    }
  }
  requests_.clear();
  std::fill(next_, next_ + 32, size_t{0});
}

}  // namespace emulator
