// Functions for AMX, Intel's instructions for products of matrices. Each function tile_... is one
// instruction. A thread has 8 tiles. A tile is a matrix register of up to 16 rows of 64 bytes. A
// thread must configure its tiles before it uses them. tests/amx emulates the instructions.
#pragma once

#include <cstdint>

namespace mistral::cpu {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// The operand of ldtilecfg and sttilecfg.
struct TileConfig {
  uint8_t palette;    // 1: tiles are in use; 0: they are not, so a thread switch need not save them
  uint8_t start_row;  // the row at which an interrupted load or store continues
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
// here, because those of GCC 12 declare too little. Its intrinsic of ldtilecfg declares only 8 of
// the 64 bytes as read, and its intrinsics that load and store tiles declare no memory at all. So
// the compiler may drop or move writes to that memory.
[[gnu::always_inline]] inline void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

[[gnu::always_inline]] inline void tile_store_config(TileConfig& config) {
  asm volatile("sttilecfg %0" : "=m"(config));
}

// While an object of this class lives, its thread may use tiles. The destructor restores the
// earlier configuration, because other libraries configure the tiles of a thread once and rely on
// it later.
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

// Loads or stores a tile. Its rows lie `stride` bytes apart in memory.
template <int tile>
[[gnu::always_inline]] inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
[[gnu::always_inline]] inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}

// c += a * b, where c is [16][16] in fp32, a is [16][32] in bf16, and b is [32][16] in bf16. Row k
// of the tile of b holds rows 2 k and 2 k + 1 of b, interleaved: [16 columns][2]. For each element
// of c, the 32 products are summed first, then added.
template <int c, int a, int b>
[[gnu::always_inline]] inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace mistral::cpu
