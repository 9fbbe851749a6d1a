#include "shared_accesses.h"

#include <algorithm>
#include <string>

#include "block.h"

namespace emulator {
namespace {

uint32_t bits(size_t first, size_t end) { return ((1u << (end - first)) - 1) << first; }

// Apart from where races are looked for, which is done very often.
[[noreturn, gnu::noinline]] void fail_race(Site site, const char* what, size_t i, uint32_t bytes,
                                           Agent agent, const char* did, const Site* place) {
  const size_t byte = 16 * i + static_cast<size_t>(__builtin_ctz(bytes));
  fail(site, std::string(what) + " byte " + std::to_string(byte) + " of shared memory, which " +
                 current->block->name(agent) + did + (place ? " at " + to_text(*place) : "") +
                 ", and no barrier is between");
}

template <class Accesses>
void forget(Accesses& accesses, uint32_t bytes) {
  for (size_t i = 0; i < accesses.size();) {
    accesses[i].bytes &= ~bytes;
    if (accesses[i].bytes != 0) {
      ++i;
      continue;
    }
    accesses[i] = accesses.back();
    accesses.pop_back();
  }
}

}  // namespace

void SharedAccesses::begin_block(size_t agents) {
  ++block_;
  agents_ = agents;
}

template <class F>
void SharedAccesses::for_each_chunk(size_t offset, size_t bytes, F f) {
  for (const size_t end = offset + bytes; offset < end;) {
    const size_t i = offset / 16, end_here = std::min(end, 16 * i + 16);
    Chunk& chunk = chunks_[i];
    if (chunk.block != block_) {
      chunk.block = block_;
      chunk.stores.clear();
      chunk.loads.clear();
      chunk.all_loads.reset();
    }
    f(chunk, i, bits(offset - 16 * i, end_here - 16 * i));
    offset = end_here;
  }
}

[[gnu::always_inline]] inline void SharedAccesses::check_stores(Site site, const Observer& by,
                                                                const Chunk& chunk, size_t i,
                                                                uint32_t bytes,
                                                                const char* what) const {
  for (const Access& store : chunk.stores) {
    const uint32_t both = store.bytes & bytes;
    if (both == 0 || by.knows(store.agent, store.time)) continue;
    const char* did = store.time == kUnfinished ? " is still filling since a copy" : " has stored";
    fail_race(site, what, i, both, store.agent, did, &store.site);
  }
}

[[gnu::always_inline]] inline void SharedAccesses::check_loads(Site site, const Observer& by,
                                                               const Chunk& chunk, size_t i,
                                                               uint32_t bytes) const {
  for (const Access& load : chunk.loads) {
    const uint32_t both = load.bytes & bytes;
    if (both == 0 || by.knows(load.agent, load.time)) continue;
    fail_race(site, "store to", i, both, load.agent, " has loaded", &load.site);
  }
  if (!chunk.all_loads) return;
  for (size_t word = 0; word < 4; ++word) {
    if (!(bytes >> 4 * word & 15)) continue;
    if (by.clock().covers(chunk.all_loads->data() + word * agents_, agents_)) continue;
    for (Agent agent = 0; agent < agents_; ++agent) {
      const Time time = (*chunk.all_loads)[word * agents_ + agent];
      if (time == 0 || by.knows(agent, time)) continue;
      fail_race(site, "store to", i, 15u << 4 * word, agent, " has loaded", nullptr);
    }
  }
}

void SharedAccesses::load_chunk(const Observer& by, Chunk& chunk, const Access& access) {
  const auto keep = [&](const Access& load) {
    for (size_t word = 0; word < 4; ++word) {
      if (load.bytes >> 4 * word & 15) {
        (*chunk.all_loads)[word * agents_ + load.agent] = load.time;
      }
    }
  };
  if (chunk.all_loads) return keep(access);
  // Whoever is ordered after this load is so after those before it.
  for (size_t i = 0; i < chunk.loads.size();) {
    Access& load = chunk.loads[i];
    if (load.agent == access.agent && load.time == access.time) {
      load.bytes |= access.bytes;
      return;
    }
    if ((load.bytes & ~access.bytes) == 0 && by.knows(load.agent, load.time)) {
      load = chunk.loads.back();
      chunk.loads.pop_back();
    } else {
      ++i;
    }
  }
  chunk.loads.push_back(access);
  if (chunk.loads.size() <= kFew) return;
  chunk.all_loads = std::make_unique<std::vector<Time>>(4 * agents_, 0);
  for (const Access& load : chunk.loads) keep(load);
  chunk.loads.clear();
}

void SharedAccesses::store_chunk(Chunk& chunk, const Access& access) {
  forget(chunk.stores, access.bytes);
  forget(chunk.loads, access.bytes);
  for (size_t word = 0; chunk.all_loads && word < 4; ++word) {
    if ((access.bytes >> 4 * word & 15) != 15) continue;
    const auto begin = chunk.all_loads->begin() + static_cast<ptrdiff_t>(word * agents_);
    std::fill(begin, begin + static_cast<ptrdiff_t>(agents_), 0);
  }
  for (Access& store : chunk.stores) {
    if (store.agent == access.agent && store.time == access.time && store.site == access.site &&
        store.time != kUnfinished) {
      store.bytes |= access.bytes;
      return;
    }
  }
  chunk.stores.push_back(access);
}

void SharedAccesses::load(Site site, const Observer& by, size_t offset, size_t bytes, Time time) {
  for_each_chunk(offset, bytes, [&](Chunk& chunk, size_t i, uint32_t mask) {
    check_stores(site, by, chunk, i, mask, "load of");
    load_chunk(by, chunk, {by.agent, time, mask, site});
  });
}

void SharedAccesses::check_load(Site site, const Observer& by, size_t offset, size_t bytes) {
  for_each_chunk(offset, bytes, [&](Chunk& chunk, size_t i, uint32_t mask) {
    check_stores(site, by, chunk, i, mask, "load of");
  });
}

void SharedAccesses::store(Site site, const Observer& by, size_t offset, size_t bytes, Time time) {
  for_each_chunk(offset, bytes, [&](Chunk& chunk, size_t i, uint32_t mask) {
    check_stores(site, by, chunk, i, mask, "store to");
    check_loads(site, by, chunk, i, mask);
    store_chunk(chunk, {by.agent, time, mask, site});
  });
}

void SharedAccesses::note_load(Site site, const Observer& by, size_t offset, size_t bytes,
                               Time time) {
  for_each_chunk(offset, bytes, [&](Chunk& chunk, size_t, uint32_t mask) {
    load_chunk(by, chunk, {by.agent, time, mask, site});
  });
}

void SharedAccesses::finish_store(size_t offset, size_t bytes, Agent agent, Time time) {
  const uint32_t mask = bits(offset % 16, offset % 16 + bytes);
  for (Access& store : chunks_[offset / 16].stores) {
    const bool meant = store.agent == agent && (store.bytes & ~mask) == 0;
    if (meant && store.time == kUnfinished) store.time = time;
  }
}

}  // namespace emulator
