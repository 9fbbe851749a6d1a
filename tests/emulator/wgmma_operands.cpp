#include "wgmma_operands.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "block.h"
#include "elements.h"

namespace emulator {
namespace {

// A descriptor's fields, in bytes.
struct Matrix {
  uint32_t start, leading, stride;
};

Matrix decode(Site site, const char* name, uint64_t descriptor) {
  const auto field = [&](int bit, int bits) {
    return static_cast<uint32_t>(descriptor >> bit & ((uint64_t{1} << bits) - 1));
  };
  const auto refuse = [&](const std::string& problem) {
    fail(site, std::string("descriptor of ") + name + ": " + problem);
  };
  constexpr uint64_t kFields = 0xc00e3fff3fff3fff;
  constexpr uint32_t kSwizzle128 = 1;
  if (descriptor & ~kFields) refuse("bits are set that have no meaning");
  if (field(62, 2) != kSwizzle128) refuse("another swizzle than that of 128 bytes");
  if (field(49, 3) != 0) refuse("a base offset, which is for matrices that begin within an atom");
  const Matrix matrix{field(0, 14) << 4, field(16, 14) << 4, field(32, 14) << 4};
  if (matrix.start / 128 % 8 != 0) refuse("the matrix does not begin in row 0 of an atom");
  return matrix;
}

// Calls f(offset, first, k) for each 16 bytes: 8 elements from (first, k), in the direction of k.
// `first` counts rows of a or columns of b, from `begin`.
template <class F>
void for_each_chunk_k_major(const Matrix& matrix, int begin, int count, F f) {
  for (int first = begin; first < begin + count; ++first) {
    for (int k = 0; k < 16; k += 8) {
      const auto row = static_cast<uint32_t>(first);
      f(swizzle_128(matrix.start + row / 8 * matrix.stride + row % 8 * 128 + k * 2), first, k);
    }
  }
}

// The 8 elements are in the direction of n.
template <class F>
void for_each_chunk_n_major(const Matrix& matrix, int n, F f) {
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t column = 0; column < static_cast<uint32_t>(n); column += 8) {
      const uint32_t row = matrix.start + k / 8 * matrix.stride + k % 8 * 128;
      f(swizzle_128(row + column / 64 * matrix.leading + column % 64 * 2), static_cast<int>(column),
        static_cast<int>(k));
    }
  }
}

int first_row() { return static_cast<int>(current->block->number(*current->warp) % 4 * 16); }

template <class T>
void read_chunk(uint32_t offset, float (&values)[8]) {
  T elements[8];
  memcpy(elements, static_cast<const char*>(current->block->shared().data()) + offset, 16);
  for (int i = 0; i < 8; ++i) values[i] = widen(elements[i]);
}

template <class T>
void read_a(Site site, const Wgmma& w, const uint32_t (&registers)[32][4], float (&a)[16][16]) {
  if (w.a) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float* pair = &a[lane / 4 + i % 2 * 8][2 * (lane % 4) + i / 2 * 8];
        unpack<T>(registers[lane][i], pair[0], pair[1]);
      }
    }
    return;
  }
  const Matrix matrix = decode(site, "a", w.a_matrix);
  for_each_chunk_k_major(matrix, first_row(), 16, [&](uint32_t offset, int row, int k) {
    float values[8];
    read_chunk<T>(offset, values);
    std::copy(values, values + 8, &a[row - first_row()][k]);
  });
}

template <class T>
void read_b(Site site, const Wgmma& w, float (&b)[16][128]) {
  const Matrix matrix = decode(site, "b", w.b_matrix);
  float values[8];
  if (w.b_transposed) {
    for_each_chunk_n_major(matrix, w.n, [&](uint32_t offset, int column, int k) {
      read_chunk<T>(offset, values);
      std::copy(values, values + 8, &b[k][column]);
    });
  } else {
    for_each_chunk_k_major(matrix, 0, w.n, [&](uint32_t offset, int column, int k) {
      read_chunk<T>(offset, values);
      for (int i = 0; i < 8; ++i) b[k + i][column] = values[i];
    });
  }
}

template <int N>
void multiply(const float (&a)[16][16], const float (&b)[16][128], float (&d)[16][128]) {
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      const float factor = a[i][k];
      for (int j = 0; j < N; ++j) d[i][j] += factor * b[k][j];
    }
  }
}

template <class T>
void multiply(Site site, const Wgmma& w, const uint32_t (&a_registers)[32][4],
              float (&d)[16][128]) {
  float a[16][16], b[16][128];
  read_a<T>(site, w, a_registers, a);
  read_b<T>(site, w, b);
  if (!w.accumulate) memset(d, 0, sizeof d);
  w.n == 64 ? multiply<64>(a, b, d) : multiply<128>(a, b, d);
}

}  // namespace

std::vector<uint32_t> chunks_of(Site site, const Wgmma& w) {
  std::vector<uint32_t> offsets;
  const auto add = [&](uint32_t offset, int, int) { offsets.push_back(offset); };
  if (!w.a) for_each_chunk_k_major(decode(site, "a", w.a_matrix), first_row(), 16, add);
  const Matrix b = decode(site, "b", w.b_matrix);
  if (w.b_transposed) {
    for_each_chunk_n_major(b, w.n, add);
  } else {
    for_each_chunk_k_major(b, 0, w.n, add);
  }
  return offsets;
}

void multiply(Site site, const Wgmma& w, const uint32_t (&a_registers)[32][4],
              float (&d)[16][128]) {
  if (w.type == Half::bf16) {
    multiply<__nv_bfloat16>(site, w, a_registers, d);
  } else {
    multiply<__half>(site, w, a_registers, d);
  }
}

}  // namespace emulator
