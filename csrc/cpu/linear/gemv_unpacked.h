// gemv for formats that have no chunk (formats.h). A block of a row is unpacked to floats. The
// floats stay in the L1 cache while they are multiplied by all tokens.
#pragma once

#include "gemv.h"
#include "unpack.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kUnpackedBlock = 1024;  // a multiple of kUnpacked and of kSuperBlock

template <>
struct Few<UnpackedWords> {
  static void multiply(const WeightRows& w, int64_t count, const float* x, int64_t stride_x,
                       int64_t tokens, float* out, int64_t stride_out) {
    const Unpack<float> unpack = unpack_of<float, float>(w.format);
    for (int64_t row = 0; row < count; ++row) {
      multiply_row(w.from(row), unpack, x, stride_x, tokens, out + row, stride_out);
    }
  }

 private:
  static void multiply_row(const WeightRows& w, Unpack<float> unpack, const float* x,
                           int64_t stride_x, int64_t tokens, float* out, int64_t stride_out) {
    alignas(64) float values[kUnpackedBlock];
    Vec totals[kGemvTokens];
    for (int64_t token = 0; token < tokens; ++token) totals[token] = broadcast(0.0f);
    for (int64_t begin = 0; begin < w.inputs; begin += kUnpackedBlock) {
      const int64_t end = mistral::min(begin + kUnpackedBlock, padded(w.inputs));
      fetch_weights(w.values + w.bytes(begin) + kAheadBytes, w.bytes(end - begin));
      for (int64_t k = begin; k < end; k += kUnpacked) unpack(w, k, values + k - begin);
      for (int64_t token = 0; token < tokens; ++token) {
        const float* from = x + token * stride_x + begin;
        Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
        for (int64_t k = 0; k < end - begin; k += 4 * Vec::width) {
          for (int i = 0; i < 4; ++i) {
            sums[i] =
                fma(load(values + k + i * Vec::width), load(from + k + i * Vec::width), sums[i]);
          }
        }
        totals[token] = totals[token] + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
      }
    }
    for (int64_t token = 0; token < tokens; ++token) out[token * stride_out] = sum(totals[token]);
  }
};

}  // namespace mistral::cpu::MISTRAL_ISA
