// Repacks the values of a GGUF block in two steps: each value becomes an integer in a byte of its
// own, then the bytes are packed into words. (The values of q8_0 stay bytes.) This file is compiled
// once, not for every instruction set. Compilers vectorise its loops even for the oldest
// processors, and a weight takes less than a nanosecond.
#include "../repack.h"

#include <cstring>

#include "parallel.h"

namespace mistral::cpu {
namespace {

uint32_t load_word(const uint8_t* from) {
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

// ---- The integers of blocks, a byte each

// Takes the fields of kBits bits in kBytes bytes, shifts them by `shift`, and ORs them into
// integers. The bytes are read in runs of kRun bytes. The lowest fields of a run belong to kRun
// consecutive integers. The next higher fields of the same bytes belong to the next kRun integers,
// and so on.
template <int kBits, int kRun, int kBytes>
void add_fields(const uint8_t* in, int shift, uint8_t* integers) {
  constexpr int kMask = (1 << kBits) - 1;
  for (int run = 0; run < kBytes; run += kRun) {
    for (int bit = 0; bit < 8; bit += kBits) {
      for (int i = 0; i < kRun; ++i) {
        *integers++ |= static_cast<uint8_t>(((in[run + i] >> bit) & kMask) << shift);
      }
    }
  }
}

// For each i below 32, ORs bit i % 8 of in[i / 8] into bit 4 of integers[i].
void add_fifth_bits(const uint8_t* in, uint8_t* integers) {
  for (int i = 0; i < 4; ++i) {
    // Byte j of `bits` keeps only bit j of in[i]. The addition sets the highest bit of each byte
    // that is not 0. The shift moves this bit to bit 4.
    const uint64_t bits = (in[i] * uint64_t{0x0101010101010101}) & 0x8040201008040201;
    const uint64_t fifth = ((bits + 0x7f7f7f7f7f7f7f7f) >> 3) & 0x1010101010101010;
    uint64_t eight;
    memcpy(&eight, integers + 8 * i, sizeof eight);
    eight |= fifth;
    memcpy(integers + 8 * i, &eight, sizeof eight);
  }
}

// ---- Words of 4-bit integers, and further words with their higher bits (csrc/formats.h)

static_assert(int4_shift(1) == 16 && int4_shift(2) == 4 && int4_shift(4) == 8);

// Moves bytes 0 and 1 of a word below 2^16 to its bytes 0 and 2.
uint32_t spread(uint32_t word) { return (word | word << 8) & 0x00ff00ff; }

// Packs the low 4 bits of kCount integers into words.
template <int kCount>
void pack(const uint8_t* integers, uint32_t* words) {
  for (int i = 0; i < kCount / 8; ++i) {
    const uint32_t first = load_word(integers + 8 * i) & 0x0f0f0f0f;
    const uint32_t last = load_word(integers + 8 * i + 4) & 0x0f0f0f0f;
    // The integers of bytes 2 and 3 go to the high 4 bits of bytes 0 and 1.
    words[i] = spread((first | first >> 12) & 0xffff) | spread((last | last >> 12) & 0xffff) << 8;
  }
}

template <int kCount>
void store_words(const uint8_t* integers, uint8_t* out) {
  uint32_t words[kCount / 8];
  pack<kCount>(integers, words);
  memcpy(out, words, sizeof words);
}

// Writes 256 integers of kBits bits, 5 or 6. First come the words with their low 4 bits, then the
// further words with the bits above these: a fifth bit or two high bits.
template <int kBits>
void store_wide(const uint8_t* integers, uint8_t* out) {
  constexpr int kBlocks = 8;               // the number of blocks of 32 integers
  constexpr int kShare = 4 / (kBits - 4);  // the number of words that share a further word
  constexpr uint32_t kMask = kBits == 5 ? 0x03030303 : 0x0f0f0f0f;
  uint8_t high[kSuperBlock];
  for (int i = 0; i < kSuperBlock; ++i) high[i] = integers[i] >> 4;
  uint32_t high_words[4 * kBlocks], words[kBits * kBlocks] = {};
  pack<kSuperBlock>(high, high_words);
  pack<kSuperBlock>(integers, words);
  for (int block = 0; block < kBlocks; ++block) {
    for (int i = 0; i < 4; ++i) {
      const int shift = kBits == 5 ? fifth_bit_shift(i, 0) : high_bits_shift(i, 0);
      const uint32_t word = high_words[4 * block + i];
      // Each byte of `word` has two integers, one in its low and one in its high 4 bits. Moves the
      // second beside the first.
      const uint32_t bits = (word | word >> (8 - kBits)) & kMask;
      words[kBlocks * (4 + i / kShare) + block] |= bits << shift;
    }
  }
  memcpy(out, words, sizeof words);
}

// ---- The values of each type of block

// Repacks unsigned values of 4 bits. They begin at byte kBegin of the block. kRun is that of
// add_fields.
template <int kCount, int kBegin, int kRun>
void words_of_block(const uint8_t* block, uint8_t* out) {
  uint8_t q[kCount] = {};
  add_fields<4, kRun, kCount / 2>(block + kBegin, 0, q);
  store_words<kCount>(q, out);
}

void q4_0_values(const uint8_t* block, uint8_t* out) {
  uint8_t q[32] = {};
  add_fields<4, 16, 16>(block + 2, 0, q);
  for (uint8_t& value : q) value ^= 8;  // the low 4 bits are now q - 8 in two's complement
  store_words<32>(q, out);
}

void q5_0_values(const uint8_t* block, uint8_t* out) {
  uint8_t q[32] = {};
  add_fields<4, 16, 16>(block + 6, 0, q);
  add_fifth_bits(block + 2, q);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>(q[i] - 16);
}

void q8_0_values(const uint8_t* block, uint8_t* out) { memcpy(out, block + 2, 32); }

void q3_k_values(const uint8_t* block, uint8_t* out) {
  uint8_t q[kSuperBlock] = {};
  add_fields<2, 32, 64>(block + 32, 0, q);
  add_fields<1, 32, 32>(block, 2, q);
  // Q3_K becomes q6_k. In Q3_K an integer q stands for q - 4, in q6_k an integer q' stands for q' -
  // 32. So q' = q + 28.
  for (uint8_t& value : q) value += 28;
  store_wide<6>(q, out);
}

void q5_k_values(const uint8_t* block, uint8_t* out) {
  uint8_t q[kSuperBlock] = {};
  add_fields<4, 32, 128>(block + 48, 0, q);
  add_fields<1, 32, 32>(block + 16, 4, q);
  store_wide<5>(q, out);
}

void q6_k_values(const uint8_t* block, uint8_t* out) {
  uint8_t q[kSuperBlock] = {};
  add_fields<4, 64, 128>(block, 0, q);
  add_fields<2, 32, 64>(block + 128, 4, q);
  store_wide<6>(q, out);
}

// ---- Scales

template <int kBytes>
void first_bytes(const uint8_t* block, uint8_t* out) {
  memcpy(out, block, kBytes);
}

void q6_k_scales(const uint8_t* block, uint8_t* out) {
  memcpy(out, block + 192, 18);
  memset(out + 18, 0, 2);
}

void q3_k_scales(const uint8_t* block, uint8_t* out) {
  uint8_t scales[16] = {};
  add_fields<4, 8, 8>(block + 96, 0, scales);
  add_fields<2, 4, 4>(block + 104, 4, scales);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(scales[i] - 32);
  memcpy(out + 16, block + 108, 2);
  memset(out + 18, 0, 2);
}

using Part = void (*)(const uint8_t* block, uint8_t* out);
struct Parts {
  Part values, scales;
};

constexpr Parts kParts[kNumBlockTypes] = {
    {q4_0_values, first_bytes<2>},                           // Q4_0
    {words_of_block<32, 4, 16>, first_bytes<4>},             // Q4_1
    {q5_0_values, first_bytes<2>},                           // Q5_0
    {q8_0_values, first_bytes<2>},                           // Q8_0
    {q3_k_values, q3_k_scales},                              // Q3_K
    {words_of_block<kSuperBlock, 16, 32>, first_bytes<16>},  // Q4_K
    {q5_k_values, first_bytes<16>},                          // Q5_K
    {q6_k_values, q6_k_scales},                              // Q6_K
    {words_of_block<32, 2, 16>, first_bytes<2>},             // IQ4_NL
    {words_of_block<kSuperBlock, 8, 16>, first_bytes<8>},    // IQ4_XS
};

void repack_row(const RepackParams& p, int64_t row) {
  const BlockInfo& block = info(p.type);
  const Parts& parts = kParts[static_cast<int>(p.type)];
  for (int64_t i = 0; i < p.row_blocks; ++i) {
    const uint8_t* in = p.blocks + row * p.stride_row + i * block.bytes;
    const int64_t index = row * p.row_blocks + i;
    if (p.values) parts.values(in, p.values + index * value_bytes(block));
    if (p.scales) parts.scales(in, p.scales + index * scale_bytes(block));
  }
}

// The rows that a thread takes at a time have at least this many values together. That is some 10
// us of work, so the time to take rows does not matter.
constexpr int64_t kValuesAtOnce = int64_t{1} << 15;

}  // namespace

void repack(const RepackParams& p, int threads) {
  const int64_t inputs = max(1, p.row_blocks * info(p.type).values);
  parallel_ranges(threads, p.rows, 1, ceil_div(kValuesAtOnce, inputs),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t row = begin; row < end; ++row) repack_row(p, row);
                  });
}

}  // namespace mistral::cpu
