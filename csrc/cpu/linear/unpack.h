// Unpacks weights of every format to the elements that kernels multiply. gemm.h, backward.cpp and
// embedding.cpp use this for all formats, gemv_unpacked.h for the formats without a chunk. Chunks
// (formats.h) unpack the other formats for gemv.h, in registers.
#pragma once

#include "unpack_words.h"

namespace mistral::cpu::MISTRAL_ISA {

constexpr int64_t kUnpacked = 8 * Vec::width;  // the number of values that are unpacked at a time

// A function that unpacks kUnpacked values of the first row of `w`, from value k on. k is a
// multiple of kUnpacked. Values past the end of the row become finite numbers, which do not matter:
// the activations there are 0, or nothing is written there. kUnpacksInOrder says in which order the
// values come.
template <class Element>
using Unpack = void (*)(const WeightRows& w, int64_t k, Element* out);

// Whether a format is unpacked in the order of the row. Formats that consist of words are not:
// vector i has value i of each word (Int4Chunk::k_at in formats.h).
template <WeightFormat format>
constexpr bool kUnpacksInOrder = ChunkOf<format, float>::type::kInOrder;

// Stores the lanes of `first`, then the lanes of `second`.
MISTRAL_SIMD void put(float* out, Vec first, Vec second) {
  store(out, first);
  store(out + Vec::width, second);
}
#if defined(MISTRAL_BF16_PAIRS)
MISTRAL_SIMD void put(bf16* out, Vec first, Vec second) {
  store_pairs(out, to_pairs(first, second));
}
#endif

// The address from which kUnpacked values can be read, from value k on. If the row has fewer values
// left, it is the address of a copy that is padded with zeros.
struct ValuesAt {
  const char* values;
  char rest[kUnpacked * sizeof(float)];

  MISTRAL_SIMD ValuesAt(const WeightRows& w, int64_t k) : values(w.values + w.bytes(k)) {
    if (k + kUnpacked > w.inputs) {
      const int64_t there = w.bytes(w.inputs - k);
      memcpy(rest, values, there);
      memset(rest + there, 0, w.bytes(kUnpacked) - there);
      values = rest;
    }
  }
};

template <class Element>
void unpack_int4(const WeightRows& w, int64_t k, Element* out) {
  const ValuesAt from(w, k);
  const Words words = load_words(from.values);
  const GroupScales groups(w.group_log2, mistral::min(kUnpacked, w.inputs - k));
  const Vec scales = groups.of_chunk(groups.load(w.scales + (k >> w.group_log2) * kScaleBytes), 0);
  for (int i = 0; i < 8; i += 2) {
    put(out + i * Vec::width, int4_value(words, i) * scales, int4_value(words, i + 1) * scales);
  }
}

template <class Element>
void unpack_q8_0(const WeightRows& w, int64_t k, Element* out) {
  const ValuesAt from(w, k);
  const int8_t* x = reinterpret_cast<const int8_t*>(from.values);
  const f16* scales = reinterpret_cast<const f16*>(w.scales);
  const int64_t last = w.inputs / 32 - 1;  // values after this block are 0, so any scale will do
  for (int i = 0; i < kUnpacked; i += 2 * Vec::width) {
    const Vec scale = broadcast(scales[mistral::min((k + i) / 32, last)]);
    put(out + i, load(x + i) * scale, load(x + i + Vec::width) * scale);
  }
}

template <class Element>
void unpack_int8(const WeightRows& w, int64_t k, Element* out) {
  const ValuesAt from(w, k);
  const int8_t* x = reinterpret_cast<const int8_t*>(from.values);
  const Vec scale = broadcast(to_float(*reinterpret_cast<const bf16*>(w.scales)));
  for (int i = 0; i < kUnpacked; i += 2 * Vec::width) {
    put(out + i, load(x + i) * scale, load(x + i + Vec::width) * scale);
  }
}

template <class T, class Element>
void unpack_plain(const WeightRows& w, int64_t k, Element* out) {
  const ValuesAt from(w, k);
  const T* x = reinterpret_cast<const T*>(from.values);
  if constexpr (sizeof(T) == sizeof(Element)) {
    memcpy(out, x, kUnpacked * sizeof(T));
  } else {
    for (int i = 0; i < kUnpacked; i += 2 * Vec::width) {
      put(out + i, load(x + i), load(x + i + Vec::width));
    }
  }
}

template <WeightFormat format, class T, class Element>
void unpack(const WeightRows& w, int64_t k, Element* out) {
  if (k >= w.inputs) {
    memset(out, 0, kUnpacked * sizeof(Element));
  } else if constexpr (format == WeightFormat::plain) {
    unpack_plain<T>(w, k, out);
  } else if constexpr (format == WeightFormat::int8) {
    unpack_int8(w, k, out);
  } else if constexpr (format == WeightFormat::q8_0) {
    unpack_q8_0(w, k, out);
  } else if constexpr (format == WeightFormat::int4) {
    unpack_int4(w, k, out);
  } else {
    Vec before{};
    unpack_words<format>(w, k, [&](int i, Vec values) {
      if (i % 2 != 0) put(out + (i - 1) * Vec::width, before, values);
      before = values;
    });
  }
}

// Returns the function that unpacks a format. Plain weights have type T.
template <class T, class Element>
Unpack<Element> unpack_of(WeightFormat format) {
  return with_format(format, [](auto f) -> Unpack<Element> {
    using Plain = std::conditional_t<f.value == WeightFormat::plain, T, float>;
    return &unpack<f.value, Plain, Element>;
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA
