// Measures the limits of this machine: how fast its threads read memory, and how fast they multiply
// when all operands are in registers. peaks.py builds this file with -march=native, so the compiler
// may use every instruction that the processor has.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// A chain is a row of multiply-adds, each of which needs the sum of the one before. Independent
// chains hide the latency of one multiply-add. Their sums must fit the registers: x86 processors
// without AVX-512 have 16 of them, others 32.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int kChains = 12;
#else
constexpr int kChains = 24;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef std::int64_t IntVector __attribute__((vector_size(kVectorBytes)));

// Makes the compiler believe that the value is needed here, and that it may have changed.
template <class T>
void touch(T& value) {
  asm volatile("" : : "r"(&value) : "memory");
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Seconds {
  double shortest, sum;
};

// Calls work(pass) for each of `passes` passes on each of `threads` threads, which begin a pass
// together. Returns the seconds of the shortest pass, and of all passes together. A pass ends when
// its last thread is done.
template <class Work>
Seconds time_passes(int threads, int passes, const Work& work) {
  std::atomic<int> there{1}, begun{0}, done{0};
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back([&] {
      ++there;
      for (int pass = 0; pass < passes; ++pass) {
        while (begun.load() <= pass) std::this_thread::yield();
        work(pass);
        ++done;
      }
    });
  }
  while (there.load() < threads) std::this_thread::yield();
  Seconds seconds{std::numeric_limits<double>::infinity(), 0.0};
  for (int pass = 0; pass < passes; ++pass) {
    const auto begin = Clock::now();
    begun = pass + 1;
    work(pass);
    while (done.load() < (threads - 1) * (pass + 1)) std::this_thread::yield();
    const double pass_seconds = seconds_since(begin);
    seconds.shortest = std::min(seconds.shortest, pass_seconds);
    seconds.sum += pass_seconds;
  }
  for (auto& thread : others) thread.join();
  return seconds;
}

// Reads `bytes` bytes as kStreams runs that advance together. A turn of the loop reads eight cache
// lines of 64 bytes. If kAhead is not 0, each turn also prefetches the lines that are kAhead bytes
// further on. They go into the first-level cache alone, because nothing is read twice.
template <int kStreams, int kAhead>
void read_all(const char* data, std::size_t bytes) {
  constexpr int kLine = 64, kLines = 8 / kStreams;
  const std::size_t run = bytes / kStreams;
  IntVector bits[8] = {};
  for (std::size_t at = 0; at < run; at += kLines * kLine) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const char* line = data + i / kLines * run + at + i % kLines * kLine;
      if (kAhead) __builtin_prefetch(line + kAhead, 0, 0);
#pragma GCC unroll 4
      for (int j = 0; j < kLine; j += kVectorBytes) {
        bits[i] |= *reinterpret_cast<const IntVector*>(line + j);
      }
    }
  }
  IntVector any = bits[0] | bits[1] | bits[2] | bits[3] | bits[4] | bits[5] | bits[6] | bits[7];
  touch(any);
}

// Each of the next structs describes an instruction to measure. `step` is one such instruction,
// which multiplies and adds vectors and returns the next sum (a vector). kOps is the number of its
// multiplications and additions.
struct Float32 {
  using Register = FloatVector;
  static constexpr double kOps = 2.0 * kVectorBytes / sizeof(float);
  static Register operand() { return Register{} + 0.5f; }
  // The sum is a factor too, because the compiler would compute x * x only once, before the loop.
  static Register step(Register sum, Register x) { return sum * x + x; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Register = __m512;
  static constexpr double kOps = 2 * 32;
  static Register operand() { return _mm512_castsi512_ps(_mm512_set1_epi16(0x3f80)); }
  static Register step(Register sum, Register x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x);
  }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8 {
  using Register = __m512i;
  static constexpr double kOps = 2 * 64;
  static Register operand() { return _mm512_set1_epi8(1); }
  static Register step(Register sum, Register x) {
    asm("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(x));  // GCC 12 spills the sums of the intrinsic
    return sum;
  }
};
#endif

template <class Unit>
void repeat(long turns) {
  typename Unit::Register x = Unit::operand(), sums[kChains];
  touch(x);
  sums[0] = x;
#pragma GCC unroll 24
  // The compiler would compute equal sums only once, so all begin with different values.
  for (int i = 1; i < kChains; ++i) sums[i] = sums[i - 1] + x;
  for (long turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = Unit::step(sums[i], x);
  }
  auto total = sums[0];
#pragma GCC unroll 24
  for (int i = 1; i < kChains; ++i) total += sums[i];
  touch(total);  // `touch` needs an address, so touching each sum would keep it in memory
}

template <class Unit>
double rate(int threads, int passes) {
  constexpr long kTurns = 20000000 / kChains;  // some milliseconds
  const Seconds seconds = time_passes(threads, passes, [](int) { repeat<Unit>(kTurns); });
  return Unit::kOps * kTurns * kChains * threads / seconds.shortest;
}

#if defined(__AMX_TILE__)
// Tiles 0 to 5 are sums of 16 x 16 numbers. Products of tiles 6 and 7 are added to each in turn.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The operating system lets a process use tiles only if the process asks for it.
bool allow_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

template <class Multiply>
double tile_rate(int threads, int passes, double ops, const Multiply& multiply) {
  constexpr long kTurns = 60000;  // some milliseconds
  const Seconds seconds = time_passes(threads, passes, [&](int) {
    TileConfig before, config;  // `before` is restored, because other code may rely on it
    _tile_storeconfig(&before);
    touch(before);  // GCC 12 believes that only the first 8 bytes are written or read
    touch(config);
    _tile_loadconfig(&config);
    _tile_zero(6);
    _tile_zero(7);
    for (long turn = 0; turn < kTurns; ++turn) multiply();
    _tile_loadconfig(&before);
  });
  return 6 * ops * kTurns * threads / seconds.shortest;
}
#endif

}  // namespace

extern "C" {

// Returns the bytes per second that the threads read, over all passes. `data` is aligned to 64
// bytes and larger than the caches. Bytes beyond the last multiple of 4 MB are not read. Threads
// take 4 MB at a time, so that a slow thread does not hold up the others. `loop` selects the loop:
// 0 reads one run with prefetches, 1 reads four runs without prefetches. Which of the two is faster
// depends on the processor.
double read_bandwidth(const char* data, std::size_t bytes, int threads, int passes, int loop) {
  constexpr std::size_t kPiece = 4 << 20;
  const std::size_t pieces = bytes / kPiece;
  std::vector<std::atomic<std::size_t>> next(passes);
  const Seconds seconds = time_passes(threads, passes, [&](int pass) {
    for (std::size_t piece; (piece = next[pass]++) < pieces;) {
      const char* own = data + piece * kPiece;
      loop ? read_all<4, 0>(own, kPiece) : read_all<1, 6144>(own, kPiece);
    }
  });
  return pieces * kPiece * passes / seconds.sum;
}

// These functions return operations per second. A multiplication and an addition are two
// operations. The result is 0 if the machine or the compiler does not have the instruction.
double fp32_rate(int threads, int passes) { return rate<Float32>(threads, passes); }

double bf16_rate(int threads, int passes) {
#if defined(__AVX512BF16__)
  return rate<Bfloat16>(threads, passes);
#else
  return 0;
#endif
}

double int8_rate(int threads, int passes) {
#if defined(__AVX512VNNI__)
  return rate<Int8>(threads, passes);
#else
  return 0;
#endif
}

double amx_bf16_rate(int threads, int passes) {
#if defined(__AMX_BF16__)
  if (!allow_tiles()) return 0;
  return tile_rate(threads, passes, 2.0 * 16 * 16 * 32, [] {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  });
#else
  return 0;
#endif
}

double amx_int8_rate(int threads, int passes) {
#if defined(__AMX_INT8__)
  if (!allow_tiles()) return 0;
  return tile_rate(threads, passes, 2.0 * 16 * 16 * 64, [] {
    _tile_dpbssd(0, 6, 7);
    _tile_dpbssd(1, 6, 7);
    _tile_dpbssd(2, 6, 7);
    _tile_dpbssd(3, 6, 7);
    _tile_dpbssd(4, 6, 7);
    _tile_dpbssd(5, 6, 7);
  });
#else
  return 0;
#endif
}
}
