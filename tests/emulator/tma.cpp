#include "tma.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "../../csrc/cuda/attention/tensor_map_sm90.h"
#include "block.h"
#include "instructions.h"

namespace emulator {
namespace {

constexpr uint32_t kRow = 128;  // bytes, of a box: as long as the swizzle
constexpr uint64_t kIsMap = 0x70616d726f736e74;

// The contents of the 128 bytes of a map, in the emulator.
struct Map {
  uint64_t is_map;
  const char* base;
  uint64_t sizes[5];
  uint64_t strides[4];  // in bytes, of axes 1 to 4
  uint32_t box[5];      // 1 for axes past the rank
  int32_t rank;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

Map decode(Site site, const CUtensorMap* map) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail(site, "tensor map is not 64-byte aligned");
  Map decoded;
  memcpy(&decoded, map, sizeof decoded);
  if (decoded.is_map != kIsMap) fail(site, "this is no tensor map");
  return decoded;
}

struct Load {
  Site site;
  char* shared;
  uint32_t offset;  // of `shared`
  Map map;
  int32_t coordinates[5];
  uint64_t* barrier;
  uint32_t rows, bytes;
};

// The row of the tensor where row i of the box begins, at element 0 of axis 0; null if outside.
const char* find_row(const Load& load, uint32_t i) {
  const char* row = load.map.base;
  for (int axis = 1; axis < load.map.rank; ++axis) {
    const int64_t at = int64_t{load.coordinates[axis]} + i % load.map.box[axis];
    if (at < 0 || at >= static_cast<int64_t>(load.map.sizes[axis])) return nullptr;
    row += static_cast<uint64_t>(at) * load.map.strides[axis - 1];
    i /= load.map.box[axis];
  }
  return row;
}

// The part of a row of the box that is inside the tensor: elements [begin, end) of axis 0.
struct Inside {
  const char* source;  // element 0
  int64_t begin, end;
  bool empty() const { return !source || begin >= end; }
  size_t bytes() const { return static_cast<size_t>(2 * (end - begin)); }
};

Inside inside(const Load& load, uint32_t i) {
  const int64_t x = load.coordinates[0];
  return {find_row(load, i), std::max<int64_t>(x, 0),
          std::min(x + 64, static_cast<int64_t>(load.map.sizes[0]))};
}

void check_row(const Load& load, uint32_t i) {
  const Inside row = inside(load, i);
  if (row.empty()) return;
  check_global(load.site, "TMA", Use::load, row.source + 2 * row.begin, row.bytes());
}

void copy_row(const Load& load, uint32_t i) {
  alignas(16) char row[kRow] = {};
  const int64_t x = load.coordinates[0];
  const auto [source, begin, end] = inside(load, i);
  if (source && begin < end) {
    const auto bytes = static_cast<size_t>(2 * (end - begin));
    memcpy(row + 2 * (begin - x), source + 2 * begin, bytes);
    current->block->counters().loaded_bytes += bytes;
    for (int64_t at = begin / 8 * 8; at < end; at += 8) {
      current->block->note_load(load.site, source + 2 * at, 16);
    }
  }
  for (uint32_t from = 0; from < kRow; from += 16) {
    const uint32_t to = swizzle_128(load.offset + kRow * i + from) - load.offset;
    memcpy(load.shared + to, row + from, 16);
  }
}

void deliver(const Load& load) {
  Block& block = *current->block;
  for (uint32_t i = 0; i < load.rows; ++i) copy_row(load, i);
  Mbarriers& mbarriers = block.hopper().mbarriers;
  const Agent copies = mbarriers.copies(load.site, load.barrier);
  for (uint32_t i = 0; i < load.bytes; i += 16) {
    block.hopper().chunks.end_tma(load.offset + i);
    block.accesses().finish_store(load.offset + i, 16, copies, block.ordering().now(copies));
  }
  block.counters().tma_bytes += load.bytes;
  mbarriers.complete(load.site, load.barrier, load.bytes);
}

}  // namespace

void tma_load(Site site, void* shared, const CUtensorMap* map, uint64_t* barrier,
              const int32_t* coordinates, int rank) {
  Block& block = *current->block;
  Load load{site, static_cast<char*>(shared), 0, decode(site, map), {}, barrier, 1, 0};
  if (load.map.rank != rank) {
    fail(site, "TMA with " + std::to_string(rank) + " coordinates from a tensor of " +
                   std::to_string(load.map.rank) + " axes");
  }
  std::copy(coordinates, coordinates + rank, load.coordinates);
  for (int axis = 1; axis < rank; ++axis) load.rows *= load.map.box[axis];
  load.bytes = kRow * load.rows;
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) {
    fail(site, "TMA with the 128-byte swizzle to an address that is not a multiple of 1024");
  }
  const std::string problem = block.shared().problem(shared, load.bytes);
  if (!problem.empty()) {
    fail(site, "TMA of " + std::to_string(load.bytes) + " bytes out of bounds: it " + problem);
  }
  load.offset = shared_offset(shared);
  Hopper& hopper = block.hopper();
  hopper.mbarriers.check_for_tma(site, barrier);
  for (uint32_t i = 0; i < load.rows; ++i) check_row(load, i);
  for (uint32_t i = 0; i < load.bytes; i += 16) hopper.chunks.begin_tma(site, load.offset + i);
  const SharedAccesses::Observer by = {block.ordering(), hopper.mbarriers.copies(site, barrier),
                                       current->number, nullptr};
  block.accesses().store(site, by, load.offset, load.bytes, kUnfinished);
  if (block.launch().delivery == Delivery::early) return deliver(load);
  memset(shared, 0xff, load.bytes);
  hopper.in_flight.add({current, site, [load] { deliver(load); }});
}

void tma_prefetch(Site site, const CUtensorMap* map) { decode(site, map); }

}  // namespace emulator

namespace mistral::cuda {

// Refuses what cuTensorMapEncodeTiled would.
cudaError_t make_tensor_map(CUtensorMap* map, const void* base, const TensorMapShape& shape) {
  constexpr uint64_t kMostSize = uint64_t{1} << 32, kMostStride = uint64_t{1} << 40;
  emulator::Map encoded{emulator::kIsMap, static_cast<const char*>(base), {}, {}, {}, shape.rank};
  if (shape.rank < 2 || shape.rank > 5) return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return cudaErrorInvalidValue;
  if (!base || reinterpret_cast<uintptr_t>(base) % 16 != 0) return cudaErrorInvalidValue;
  if (shape.box[0] != emulator::kRow / 2) return cudaErrorInvalidValue;
  for (int axis = 0; axis < shape.rank; ++axis) {
    encoded.sizes[axis] = shape.sizes[axis];
    encoded.box[axis] = shape.box[axis];
    if (shape.sizes[axis] == 0 || shape.sizes[axis] > kMostSize) return cudaErrorInvalidValue;
    if (shape.box[axis] == 0 || shape.box[axis] > 256) return cudaErrorInvalidValue;
    if (axis == 0) continue;
    const uint64_t stride = encoded.strides[axis - 1] = shape.stride_bytes[axis];
    if (stride % 16 != 0 || stride >= kMostStride) return cudaErrorInvalidValue;
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &encoded, sizeof encoded);
  return cudaSuccess;
}

}  // namespace mistral::cuda
