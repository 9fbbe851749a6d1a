#include "emulation.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <mutex>

namespace mistral::cpu::emulated {
namespace {

// A thread's registers. Palette 0: not configured.
struct State {
  TileConfig config;
  unsigned char tiles[kTiles][kTileRows][kTileRowBytes];
};
thread_local State state;

std::atomic<int> configured{0};
std::atomic<int64_t> configurations{0}, loads{0}, stores{0}, dots{0};

std::mutex mutex;
std::string first_error;

void fail(const std::string& message) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (first_error.empty()) first_error = message;
}

int rows(int tile) { return state.config.rows[tile]; }
int row_bytes(int tile) { return state.config.row_bytes[tile]; }

// Whether an instruction may use a tile.
bool usable(const char* instruction, int tile) {
  const std::string subject = std::string(instruction) + " of tile " + std::to_string(tile);
  if (tile < 0 || tile >= kTiles) {
    fail(subject + ": there are 8 tiles");
  } else if (state.config.palette == 0) {
    fail(subject + " in a thread that has not configured its tiles");
  } else if (rows(tile) == 0) {
    fail(subject + ", which is not configured");
  } else {
    return true;
  }
  return false;
}

// Subnormal numbers count as zero, as operands and as results.
float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

float multiply_add(float a, float b, float c) {
  return flush(std::fma(flush(a), flush(b), flush(c)));
}

float element_bf16(int tile, int row, int column) {
  uint16_t half;
  memcpy(&half, state.tiles[tile][row] + column * sizeof half, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

void clear(int tile) { memset(state.tiles[tile], 0, sizeof state.tiles[tile]); }

}  // namespace

void configure(const TileConfig& config) {
  if (config.palette > 1) return fail("ldtilecfg: palette is " + std::to_string(config.palette));
  bool valid = config.start_row == 0;  // a restart is for the kernel of the operating system
  for (uint8_t byte : config.reserved) valid = valid && byte == 0;
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], bytes = config.row_bytes[tile];
    const bool unused = rows == 0 && bytes == 0;
    const bool fits = rows <= kTileRows && bytes <= kTileRowBytes && rows > 0 && bytes > 0;
    valid = valid && (unused || (fits && tile < kTiles));
  }
  if (config.palette == 1 && !valid) return fail("ldtilecfg: the configuration is not valid");
  if (config.palette == 0) {
    if (state.config.palette != 0) --configured;
    state = State{};
    return;
  }
  if (state.config.palette == 0) ++configured;
  state.config = config;
  for (int tile = 0; tile < kTiles; ++tile) clear(tile);
  ++configurations;
}

TileConfig configuration() { return state.config; }

void zero(int tile) {
  if (usable("tilezero", tile)) clear(tile);
}

void load(int tile, const void* p, int64_t stride) {
  if (!usable("tileloadd", tile)) return;
  clear(tile);
  for (int row = 0; row < rows(tile); ++row) {
    memcpy(state.tiles[tile][row], static_cast<const char*>(p) + row * stride, row_bytes(tile));
  }
  ++loads;
}

void store(int tile, void* p, int64_t stride) {
  if (!usable("tilestored", tile)) return;
  for (int row = 0; row < rows(tile); ++row) {
    memcpy(static_cast<char*>(p) + row * stride, state.tiles[tile][row], row_bytes(tile));
  }
  ++stores;
}

void dot_bf16(int c, int a, int b) {
  for (int tile : {c, a, b}) {
    if (!usable("tdpbf16ps", tile)) return;
  }
  if (c == a || a == b || b == c) return fail("tdpbf16ps: one tile is two operands");
  if (rows(c) != rows(a) || row_bytes(c) != row_bytes(b) || row_bytes(a) != 4 * rows(b) ||
      row_bytes(c) % 4 != 0) {
    return fail("tdpbf16ps: the operands' sizes do not match");
  }
  for (int m = 0; m < rows(c); ++m) {
    for (int n = 0; n < row_bytes(c) / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < rows(b); ++k) {
        even = multiply_add(element_bf16(a, m, 2 * k), element_bf16(b, k, 2 * n), even);
        odd = multiply_add(element_bf16(a, m, 2 * k + 1), element_bf16(b, k, 2 * n + 1), odd);
      }
      unsigned char* to = state.tiles[c][m] + n * sizeof sum;
      memcpy(&sum, to, sizeof sum);
      sum = flush(flush(sum) + flush(even + odd));
      memcpy(to, &sum, sizeof sum);
    }
  }
  ++dots;
}

Counts take_counts() {
  return {configurations.exchange(0), loads.exchange(0), stores.exchange(0), dots.exchange(0)};
}

int configured_threads() { return configured; }

std::string take_error() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::string error;
  error.swap(first_error);
  return error;
}

}  // namespace mistral::cpu::emulated
