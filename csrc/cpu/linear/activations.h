// Packs activations: converts them to the type that the kernels multiply, and puts them in the
// order in which the kernels unpack the values of a row of weights. The order depends on the
// format. A call may have several weights, its parts (linear.h), in different formats. Then their
// activations may be packed differently.
#pragma once

#include <type_traits>

#include "../norm.h"
#include "gemv_bytes.h"
#include "gemv_halves.h"
#include "gemv_int16.h"
#include "gemv_int8.h"
#include "gemv_pairs.h"
#include "gemv_unpacked.h"

namespace mistral::cpu::MISTRAL_ISA {

// Returns the activations of one token. If the layer has a norm, writes the normalised activations
// to `normalised` and returns these.
template <class T>
const T* input_row(const LinearParams& p, int64_t token, T* normalised) {
  const T* x = static_cast<const T*>(p.x) + token * p.stride_x_token;
  if (!p.norm) return x;
  normalise<T>(x, nullptr, static_cast<const T*>(p.norm), normalised, p.inputs, p.eps);
  return normalised;
}

// Packs the K activations of a token. Element i is activation Order::k_at(i) (formats.h). Zeros
// fill up to padded(K) elements.
template <class Order, class T, class Element>
void pack_row(const T* x, int64_t inputs, Element* out) {
  for (int64_t begin = 0; begin < inputs; begin += kPadding) {
    const int64_t count = mistral::min(kPadding, inputs - begin);
    Element natural[kPadding] = {};
    Element* to = !Order::kInOrder || count < kPadding ? natural : out + begin;
    if constexpr (sizeof(T) == sizeof(Element)) {
      memcpy(to, x + begin, count * sizeof(T));
    } else {
      int64_t i = 0;
      for (; i + Vec::width <= count; i += Vec::width) store(to + i, load(x + begin + i));
      if (i < count) store_first(to + i, load_first(x + begin + i, count - i), count - i);
    }
    if (!Order::kInOrder) {
      for (int64_t i = 0; i < kPadding; ++i) out[begin + i] = natural[Order::k_at(i)];
    } else if (count < kPadding) {
      memcpy(out + begin, natural, sizeof natural);
    }
  }
}

// Rearranges the packed rows [width, padded K] of one vector of tokens into the layout of gemm.h. A
// vector of tokens is Vec::width neighbouring tokens, one for each lane.
template <class Tile>
void pack_vector(const typename Tile::Element* rows, int64_t inputs, int64_t vectors,
                 int64_t vector, typename Tile::Element* out) {
  // The number of units that are read from a row at a time. A unit is 4 bytes here, one element or
  // a pair of elements, and moves as a whole.
  constexpr int64_t kUnits = 8;
  static_assert(sizeof(typename Tile::Element) * Tile::kDepth == sizeof(uint32_t), "");
  const int64_t all = padded(inputs);
  for (int64_t begin = 0; begin < all; begin += Tile::kBlockDepth) {
    const int64_t depth = mistral::min(Tile::kBlockDepth, all - begin);
    auto* block = out + begin * vectors * Vec::width + vector * depth * Vec::width;
    for (int64_t k = 0; k < depth; k += kUnits * Tile::kDepth) {
      uint32_t units[Vec::width][kUnits];
      for (int64_t lane = 0; lane < Vec::width; ++lane) {
        memcpy(units[lane], rows + lane * all + begin + k, sizeof units[lane]);
      }
      for (int64_t unit = 0; unit < kUnits; ++unit) {
        uint32_t lanes[Vec::width];
        for (int64_t lane = 0; lane < Vec::width; ++lane) lanes[lane] = units[lane][unit];
        memcpy(block + (k + unit * Tile::kDepth) * Vec::width, lanes, sizeof lanes);
      }
    }
  }
}

// The type that selects the gemv kernels of a format, for activations of type T that are not
// rounded to bytes. It is a chunk type (formats.h) or a tag in its place, such as InPairs
// (gemv_pairs.h): a type that only selects kernels.
template <WeightFormat format, class T>
struct FewChunkOf {
  // Integers of 16 bits would lose bits of activations in fp32.
  static constexpr bool kFits = sizeof(T) == sizeof(int16_t);
  static constexpr bool kInInt16 =
      kFits && Int16Chunk<format>::template kFastest<typename ArithmeticOf<T>::type>;
  using InFloatsOrInt16 =
      std::conditional_t<kInInt16, Int16Chunk<format>, typename ChunkOf<format, T>::type>;
  using InFewerBits =
      std::conditional_t<kFits && has_int8_products(format), InIntegers, InFloatsOrInt16>;
  using InPairsOrFewerBits =
      std::conditional_t<kFits && has_pair_products(format), InPairs, InFewerBits>;
  using type =
      std::conditional_t<kFits && has_half_products(format), InHalves<format>, InPairsOrFewerBits>;
};

// Whether activations of type T are rounded to bytes (gemv_bytes.h) for a weight of this format,
// unless the caller asks for exact products. `tokens` is the number of tokens of the call.
template <class T>
bool rounds_to_bytes(WeightFormat format, int64_t tokens) {
  return tokens <= kGemvTokens ? has_bytes(format) : has_many_bytes<T>(format);
}

// Whether a part of the weights is multiplied in bytes in this call.
template <class T>
bool in_bytes(const LinearParams& p, int64_t part) {
  return !p.exact && rounds_to_bytes<T>(p.parts[part].format, p.tokens);
}

// Calls f with a value of the chunk type of a part of the weights. The call must have at most
// kGemvTokens tokens, or the part must be multiplied in bytes.
template <class T, class F>
auto with_few_chunk(const LinearParams& p, int64_t part, const F& f) {
  return with_format(p.parts[part].format, [&](auto format) {
    if constexpr (has_bytes(format.value)) {
      if (in_bytes<T>(p, part)) return f(InBytes<format.value>{});
    }
    return f(typename FewChunkOf<format.value, T>::type{});
  });
}

// Whether several tokens are packed differently from one token alone. Only products with i8mm need
// this: they multiply two rows of activations at a time, which are those of two tokens (InBytes),
// or the high and the low bytes of one token (InHalves).
template <class Chunk>
constexpr bool kPacksTogether = false;
#if defined(__ARM_FEATURE_MATMUL_INT8)
template <WeightFormat format>
constexpr bool kPacksTogether<InBytes<format>> = true;
template <WeightFormat format>
constexpr bool kPacksTogether<InHalves<format>> = true;
#endif

// Packs the K activations of a token for a chunk type.
template <class Chunk>
struct Packing {
  // The number of elements from one packed token to the next. Tokens that are a multiple of kWay
  // bytes apart, as they would be at K = 4096, compete for the same lines of the L1 cache. So the
  // distance is an odd multiple of kHalf, with which only every second token competes. (kWay is the
  // size of a way of this cache on x86.)
  static int64_t elements(int64_t inputs) {
    constexpr int64_t kSize = sizeof(typename Chunk::Arithmetic::Element);
    constexpr int64_t kWay = 4096, kHalf = kWay / 2;
    const int64_t bytes = padded(inputs) * kSize;
    return (ceil_div(mistral::max(bytes - kHalf, int64_t{0}), kWay) * kWay + kHalf) / kSize;
  }
  template <class T, class Element>
  static void pack(const T* x, int64_t inputs, Element* out) {
    pack_row<Chunk>(x, inputs, out);
  }
};
template <WeightFormat format>
struct Packing<Int16Chunk<format>> {
  using Chunk = Int16Chunk<format>;
  static int64_t elements(int64_t inputs) {
    return Chunk::kHead + padded(inputs) / Chunk::kValues * Chunk::kLine;
  }
  template <class T>
  static void pack(const T* x, int64_t inputs, int16_t* out) {
    pack_int16<Chunk>(x, inputs, out);
  }
};
#if defined(MISTRAL_VECTORS)
template <WeightFormat format>
struct Packing<InBytes<format>> {
  static int64_t elements(int64_t inputs) { return packed_byte_row(inputs); }
  template <class T>
  static void pack(const T* x, int64_t inputs, char* out) {
    pack_bytes(x, inputs, out);
  }
#if defined(__ARM_FEATURE_MATMUL_INT8)
  template <class T>
  static void pack_together(const T* x, int64_t inputs, int64_t token, int64_t tokens,
                            char* packed) {
    pack_bytes_together(x, inputs, token, tokens, packed);
  }
#endif
};
#endif
#if defined(__ARM_FEATURE_DOTPROD)
template <WeightFormat format>
struct Packing<InHalves<format>> {
  static int64_t elements(int64_t inputs) { return packed_halves_row(inputs); }
  template <class T>
  static void pack(const T* x, int64_t inputs, char* out) {
    pack_halves<false>(x, inputs, out);
  }
  template <class T>
  static void pack_together(const T* x, int64_t inputs, int64_t token, int64_t, char* packed) {
    pack_halves<true>(x, inputs, packed + token * elements(inputs));
  }
};
#endif
#if defined(__AVX512VNNI__)
template <>
struct Packing<InIntegers> {
  static int64_t elements(int64_t inputs) {
    return InIntegers::kHeadBytes + padded(inputs) / InIntegers::kValues * InIntegers::kLineBytes;
  }
  template <class T>
  static void pack(const T* x, int64_t inputs, uint8_t* out) {
    pack_integers(x, inputs, out);
  }
};
template <>
struct Packing<InPairs> {
  static int64_t elements(int64_t inputs) { return packed_pair_row(inputs); }
  template <class T>
  static void pack(const T* x, int64_t inputs, char* out) {
    pack_pairs(x, inputs, out);
  }
};
#endif

// The type that stands for the packing of a chunk type. If it is the same for two chunk types,
// their activations are packed alike, so parts of these types can share them.
template <class Chunk>
struct PackedAlike {
  using type = Chunk;
};
template <WeightFormat format>
struct PackedAlike<InBytes<format>> {
  using type = ByteActivations;
};
template <WeightFormat format>
struct PackedAlike<InHalves<format>> {
  using type = HalvesLayout;
};
template <class>
constexpr char kMark = 0;

// An address that stands for the packing of a part's activations. Parts with the same address share
// the packed activations.
template <class T>
const void* packing_mark(const LinearParams& p, int64_t part) {
  if (p.tokens <= kGemvTokens || in_bytes<T>(p, part)) {
    return with_few_chunk<T>(p, part, [](auto chunk) -> const void* {
      return &kMark<typename PackedAlike<decltype(chunk)>::type>;
    });
  }
  return with_format(p.parts[part].format, [](auto format) -> const void* {
    return &kMark<std::bool_constant<kUnpacksInOrder<format.value>>>;
  });
}

}  // namespace mistral::cpu::MISTRAL_ISA
