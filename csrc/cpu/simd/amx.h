// The instructions of AMX, one function each. A thread has 8 tiles, matrix registers of up to 16
// rows of 64 bytes, which it has to configure before it uses them. Tests emulate them: tests/amx.
#pragma once

#include <cstdint>

namespace mistral::cpu {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// The operand of ldtilecfg and sttilecfg.
struct TileConfig {
  uint8_t palette;    // 0: tiles are not in use, and a switch of threads has none to save
  uint8_t start_row;  // where an interrupted load or store goes on
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "");

// A configuration in which every tile has all of its rows.
constexpr TileConfig whole_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < kTiles; ++tile) {
    config.row_bytes[tile] = kTileRowBytes;
    config.rows[tile] = kTileRows;
  }
  return config;
}

// Configures the tiles of this thread and sets them to zero. The compiler's intrinsics are not used
// here. In GCC 12 the intrinsic of ldtilecfg declares only 8 of the 64 bytes as read, and the
// intrinsics that load and store tiles declare no memory at all, so the compiler may drop or move
// writes to that memory.
[[gnu::always_inline]] inline void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

[[gnu::always_inline]] inline void tile_store_config(TileConfig& config) {
  asm volatile("sttilecfg %0" : "=m"(config));
}

// While it lives, its thread may use tiles. At its end the earlier configuration is valid again:
// other libraries configure the tiles of a thread once, and rely on it later.
class TilesInUse {
 public:
  TilesInUse() {
    tile_store_config(before_);
    static constexpr TileConfig config = whole_tiles();
    tile_configure(config);
  }
  ~TilesInUse() { tile_configure(before_); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;

 private:
  TileConfig before_;
};

template <int tile>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Loads or stores a tile, whose rows lie `stride` bytes apart.
template <int tile>
[[gnu::always_inline]] inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
[[gnu::always_inline]] inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}

// c [16][16] floats += a [16][32] * b, of bf16; b holds rows 2 k and 2 k + 1 in pairs:
// [16][16 columns][2]. The products of 32 values are summed on their own, then added to c.
template <int c, int a, int b>
[[gnu::always_inline]] inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace mistral::cpu
