#include "shared_chunks.h"

#include <string>

#include "block.h"

namespace emulator {
namespace {

std::string at_byte(size_t offset) { return " at byte " + std::to_string(offset); }

}  // namespace

void SharedChunks::store(Site site, size_t begin, size_t bytes) {
  for (size_t offset = begin / 16 * 16; offset < begin + bytes; offset += 16) {
    Chunk& chunk = at(offset);
    if (chunk.readers > 0) {
      fail(site, "store to shared memory" + at_byte(offset) + ", which a wgmma may still read");
    }
    if (chunk.filling) {
      fail(site, "store to shared memory" + at_byte(offset) + ", which TMA is filling");
    }
    chunk.writer = current;
    chunk.written = moment();
  }
}

void SharedChunks::check_fenced(Site site, const char* what, uint32_t offset, uint64_t fence) {
  Chunk& chunk = at(offset);
  if (chunk.writer && chunk.writer->proxy_fence < chunk.written && fence < chunk.written) {
    fail(site, std::string(what) + at_byte(offset) + ", where thread " +
                   to_text(chunk.writer->index) + " has stored without a fence_proxy_async since");
  }
  chunk.writer = nullptr;
}

void SharedChunks::begin_wgmma(Site site, uint32_t offset, uint64_t fence) {
  check_fenced(site, "wgmma reads shared memory", offset, fence);
  if (at(offset).filling) {
    fail(site, "wgmma reads shared memory" + at_byte(offset) + ", which TMA is filling");
  }
  ++at(offset).readers;
}

void SharedChunks::begin_tma(Site site, uint32_t offset) {
  check_fenced(site, "TMA writes to shared memory", offset, current->proxy_fence);
  if (at(offset).readers > 0) {
    fail(site, "TMA writes to shared memory" + at_byte(offset) + ", which a wgmma may still read");
  }
  if (at(offset).filling) {
    fail(site, "TMA writes to shared memory" + at_byte(offset) + ", which another is filling");
  }
  at(offset).filling = true;
}

}  // namespace emulator
