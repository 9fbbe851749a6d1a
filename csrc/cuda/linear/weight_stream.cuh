// Streams weights from global memory to a warp, through stages in shared memory. The stages belong
// to this warp alone, so the warp need not wait for others.
#pragma once

#include <ptx.cuh>

#include "formats.cuh"

namespace mistral::cuda {

// The 8 warps of a thread block share the chunks of each row: warp w takes chunks w, w + 8, ... So
// the order of the additions depends on K and the format alone.
constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = kLinearWarps * kWarp;

// log2 of the number of outputs of a tile. A tile has 16 rows. With SwiGLU it has 8 rows of gate
// above 8 rows of up, so that a lane gets both products of an output.
MISTRAL_HOST_DEVICE int tile_outputs_log2(const LinearParams& p) {
  return p.epilogue == Epilogue::swiglu ? 3 : 4;
}

// log2 of the distance, in rows of the weight, from a tile to the next tile of its block. With RoPE
// a tile has 8 rows of the first half of a head above the matching 8 rows of its second half. So a
// lane gets both elements of the pairs that RoPE rotates.
template <bool kRope>
__device__ __forceinline__ int tile_step_log2(const LinearParams& p) {
  return kRope ? 3 : tile_outputs_log2(p);
}

// The number of blocks of outputs, of kM tiles each, in a part.
template <int kM>
MISTRAL_HOST_DEVICE int blocks_of_part(const LinearParams& p, int part) {
  static_assert(kM == 1 || kM == 2);
  const int log2 = tile_outputs_log2(p) + kM - 1;
  return static_cast<int>((p.parts[part].rows + (1 << log2) - 1) >> log2);
}

// The number of blocks of outputs in all parts.
template <int kM>
MISTRAL_HOST_DEVICE int blocks_of_all(const LinearParams& p) {
  int blocks = blocks_of_part<kM>(p, 0);  // with SwiGLU a block has rows of both parts
  if (p.epilogue == Epilogue::swiglu) return blocks;
  for (int part = 1; part < p.num_parts; ++part) blocks += blocks_of_part<kM>(p, part);
  return blocks;
}

// A block of outputs. A thread block computes one at a time. Without SwiGLU and RoPE, its rows of
// the weight are neighbours in one part. With SwiGLU, it has the same rows of both parts. With
// RoPE, half of its rows are neighbours in the first half of a head, and the others lie D/2
// further.
template <bool kRope>
struct OutputBlock {
  int part;
  int count;   // how many rows from `first` on exist; with RoPE all rows exist, and this is D
  int first;   // first row in the part
  int column;  // first column in the output
  bool swiglu;
  int half_head;  // D/2 with RoPE, else 0

  template <int kM>
  static __device__ __forceinline__ OutputBlock at(const LinearParams& p, int index) {
    OutputBlock block = {};
    block.swiglu = !kRope && p.epilogue == Epilogue::swiglu;
    if (!block.swiglu) {
      while (index >= blocks_of_part<kM>(p, block.part)) {
        index -= blocks_of_part<kM>(p, block.part);
        block.column += static_cast<int>(p.parts[block.part].rows);
        ++block.part;
      }
    }
    const int log2 = tile_outputs_log2(p) + kM - 1;
    if constexpr (kRope) {
      const int head_dim = static_cast<int>(p.head_dim), of_head = head_dim >> log2;
      block.first = index / of_head * head_dim + index % of_head * (8 * kM);
      block.count = head_dim;  // no row of the block lies outside its head
      block.half_head = head_dim / 2;
    } else {
      block.first = index << log2;
      block.count = static_cast<int>(min(1 << log2, p.parts[block.part].rows - block.first));
    }
    block.column += block.first;
    return block;
  }

  // A tile has an upper half (0) and a lower half (1), of 8 rows each. part_of(half) is the part to
  // which a half belongs. row_of(output, 0) is the row of output number `output` of the block.
  // row_of(output, 1) is the row that stands 8 rows lower in the tile. Rows are counted from
  // `first`.
  __device__ __forceinline__ int part_of(int half) const { return swiglu ? half : part; }
  __device__ __forceinline__ int row_of(int output, int half) const {
    if constexpr (kRope) return output + half * half_head;
    return swiglu ? output : output + 8 * half;
  }
};

// ---- Scales of groups. They are copied in words of 4 bytes. If the scales of a chunk begin in the
// middle of a word, the scale before them in memory is copied too.

// The number of bytes that the scales of `values` values of a row take.
template <class W>
__device__ __forceinline__ int scale_bytes(const LinearParams& p, int values) {
  return (values >> W::group_log2(p)) * kGroupBytes<typename W::Scales>;
}

// The number of words of shared memory for the scales of a chunk of one row. They are enough for
// groups of the smallest size, plus one word. This word has room for the scale that is copied too,
// and makes rows begin in different banks.
template <class W>
constexpr int kScaleWords = W::kValues / W::kLeastGroup * kGroupBytes<typename W::Scales> / 4 + 1;
template <class W>
constexpr int kTileScaleBytes = kTileRows * kScaleWords<W> * 4;

// Returns by how many bytes `begin` exceeds a multiple of 4. `begin` is the address of the first
// scale of a row or of a chunk. All chunks of a row have the same result, because the scales of a
// chunk take a whole number of words.
template <class W>
__device__ __forceinline__ int skipped_bytes(const void* begin) {
  if constexpr (kGroupBytes<typename W::Scales> % 4 == 0) {
    return 0;
  } else {
    return static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 4);
  }
}

// The shared memory of a thread block for the stages of all its warps. A stage is a buffer for one
// chunk of each row of kM tiles, and for the scales of these chunks (kValueBytes and kScaleBytes).
template <class W, int kM>
struct StageLayout {
  // The stages of a warp hold 4 tiles in all. If tiles have further bits, they are larger, so the
  // stages hold 3: on some devices a block has only 99 KB of shared memory.
  static constexpr int kStages = W::kFurtherBytes > 0 ? 3 : 4 / kM;
  static constexpr int kValueBytes = kM * WeightTile<W>::kBytes;
  static constexpr int kScaleBytes = W::kGrouped ? kM * kTileScaleBytes<W> : 0;
  static constexpr int kBytes = kLinearWarps * kStages * (kValueBytes + kScaleBytes);
};

// Copies to shared memory the chunks of weights (formats.cuh) that a warp multiplies. First come
// all chunks of the warp for a block of outputs, then those for the next block. The stages
// (StageLayout) are filled in turn: one is in use while the others are being filled.
template <class W, int kM, bool kRope>
class WeightStream {
  using Layout = StageLayout<W, kM>;
  // The bytes of a chunk of one row, with its further bits.
  static constexpr int kRowChunk = kChunkBytes + W::kFurtherBytes;

 public:
  // `shared` has Layout::kBytes bytes: the values of all warps and stages, then their scales.
  __device__ WeightStream(const LinearParams& p, char* shared, int blocks, int chunks)
      : p_(p), blocks_(blocks), chunks_(chunks), row_bytes_(static_cast<int>(W::bytes(p.inputs))) {
    const int warp = threadIdx.x / kWarp;
    values_ = shared + warp * Layout::kStages * Layout::kValueBytes;
    scales_ = shared + kLinearWarps * Layout::kStages * Layout::kValueBytes +
              warp * Layout::kStages * Layout::kScaleBytes;
    // A warp without a chunk never copies.
    block_ = warp < chunks ? static_cast<int>(blockIdx.x) : blocks;
    if (block_ < blocks_) begin_block();
#pragma unroll
    for (int i = 0; i < Layout::kStages - 1; ++i) copy_next();
  }

  // Waits for the copies of the next chunk, and makes its stage current. Then starts to copy a
  // later chunk into the stage that was current before.
  __device__ __forceinline__ void advance() {
    cp_async_wait<Layout::kStages - 2>();
    __syncwarp();  // the copies of all lanes have arrived; no lane uses the old stage any more
    current_ = next_of(current_);
    copy_next();
  }

  __device__ __forceinline__ WeightTile<W> tile(int m) const {
    return {values_ + current_ * Layout::kValueBytes + m * WeightTile<W>::kBytes};
  }
  // The address of the scales of the current chunk in row `row` of tile m. `skipped` is
  // skipped_bytes of this row: the bytes of an earlier scale that lie before this address.
  __device__ __forceinline__ const char* scales(int m, int row, int skipped) const {
    return scales_ + current_ * Layout::kScaleBytes + m * kTileScaleBytes<W> +
           row * kScaleWords<W> * 4 + skipped;
  }

 private:
  static __device__ __forceinline__ int next_of(int stage) {
    return stage + 1 == Layout::kStages ? 0 : stage + 1;
  }

  __device__ __forceinline__ void begin_block() {
    const int lane = threadIdx.x % kWarp;
    const auto block = OutputBlock<kRope>::template at<kM>(p_, block_);
    const int tile_step = 1 << tile_step_log2<kRope>(p_);
    chunk_ = threadIdx.x / kWarp;
    const int offset = chunk_ * kRowChunk + 16 * (lane % 8);
    bytes_left_ = row_bytes_ - offset;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block.row_of(lane / 8, half);
      rows_left_[half] = block.count - row;
      rows_[half] = static_cast<const char*>(p_.parts[block.part_of(half)].values) +
                    int64_t{block.first + row} * row_bytes_ + offset;
    }
    if constexpr (W::kFurtherBytes > 0) {
#pragma unroll
      for (int i = 0; i < kFurtherCopies; ++i) {
        const int tile_row = further_row(i), row = block.row_of(tile_row % 8, tile_row / 8);
        further_left_[i] = block.count - row;
        further_rows_[i] = static_cast<const char*>(p_.parts[block.part_of(tile_row / 8)].values) +
                           int64_t{block.first + row} * row_bytes_ + chunk_ * kRowChunk +
                           kChunkBytes + 16 * (lane % kFurtherPieces);
      }
    }
    if constexpr (W::kGrouped) {
      const int first = scale_bytes<W>(p_, chunk_ * W::kValues), half = lane / 16;
      const int row_bytes = scale_bytes<W>(p_, static_cast<int>(p_.inputs));
      scale_bytes_left_ = row_bytes - first;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int row = block.row_of(tile_step * m + lane / 2 % 8, half);
        const auto* const of_part = static_cast<const char*>(p_.parts[block.part_of(half)].scales);
        const char* const begin = of_part + int64_t{block.first + row} * row_bytes + first;
        skipped_[m] = skipped_bytes<W>(begin);
        scale_rows_[m] = kRope || row < block.count ? begin - skipped_[m] : nullptr;
      }
    }
  }

  // Starts the copy of the next chunk into stage `filled_`, if there is another chunk.
  __device__ __forceinline__ void copy_next() {
    const int stage = filled_;
    filled_ = next_of(filled_);
    if (block_ < blocks_) {
      copy_values(values_ + stage * Layout::kValueBytes);
      if constexpr (W::kFurtherBytes > 0) copy_further(values_ + stage * Layout::kValueBytes);
      if constexpr (W::kGrouped) copy_scales(scales_ + stage * Layout::kScaleBytes);
      chunk_ += kLinearWarps;
      if (chunk_ >= chunks_) {
        block_ += gridDim.x;
        if (block_ < blocks_) begin_block();
      }
    }
    cp_async_commit();
  }

  // 8 lanes copy the 128 bytes of a row, 16 bytes each. So one instruction of the warp copies 4
  // rows.
  __device__ __forceinline__ void copy_values(char* to) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, row = (m << tile_step_log2<kRope>(p_)) + 4 * (i % 2);
        const WeightTile<W> tile = {to + m * WeightTile<W>::kBytes};
        // With RoPE both halves are in the same part, so one pointer and an offset are enough.
        const char* const begin =
            kRope ? rows_[0] + half * (p_.head_dim / 2 * row_bytes_) : rows_[half];
        cp_async_16(tile.piece(4 * i + lane / 8, lane % 8), begin + int64_t{row} * row_bytes_,
                    bytes_left_ > 0 && (kRope || row < rows_left_[half]));
      }
    }
    rows_[0] += kLinearWarps * kRowChunk;
    rows_[1] += kLinearWarps * kRowChunk;
    bytes_left_ -= kLinearWarps * kRowChunk;
  }

  // The row of a tile from which the lane takes further bits in its copy i.
  static __device__ __forceinline__ int further_row(int i) {
    return (static_cast<int>(threadIdx.x) % kWarp + kWarp * i) / kFurtherPieces;
  }
  __device__ __forceinline__ void copy_further(char* to) {
    static_assert(!kRope);
#pragma unroll
    for (int i = 0; i < kFurtherCopies; ++i) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int row = m << tile_step_log2<kRope>(p_);
        const WeightTile<W> tile = {to + m * WeightTile<W>::kBytes};
        cp_async_16(tile.further_piece(further_row(i), threadIdx.x % kFurtherPieces),
                    further_rows_[i] + int64_t{row} * row_bytes_, row < further_left_[i]);
      }
      further_rows_[i] += kLinearWarps * kRowChunk;
    }
  }

  // Lanes 2 r and 2 r + 1 copy the scales of row r of each tile, in alternate words.
  __device__ __forceinline__ void copy_scales(char* to) {
    const int lane = threadIdx.x % kWarp, bytes = scale_bytes<W>(p_, W::kValues);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int words = (bytes + skipped_[m] + 3) / 4;
      const int left = scale_rows_[m] ? scale_bytes_left_ + skipped_[m] : 0;
#pragma unroll
      for (int i = 0; i < (kScaleWords<W> + 1) / 2; ++i) {
        const int word = lane % 2 + 2 * i;
        if (word >= words) continue;
        const int from_here = left - 4 * word;
        cp_async_4(to + m * kTileScaleBytes<W> + 4 * (lane / 2 * kScaleWords<W> + word),
                   scale_rows_[m] + 4 * word,
                   from_here >= 4  ? 4
                   : from_here > 0 ? from_here
                                   : 0);
      }
      if (scale_rows_[m]) scale_rows_[m] += kLinearWarps * bytes;
    }
    scale_bytes_left_ -= kLinearWarps * bytes;
  }

  const LinearParams& p_;
  const int blocks_, chunks_, row_bytes_;
  char* values_;  // the stages of this warp
  char* scales_;
  int filled_ = 0;                     // the next stage to fill
  int current_ = Layout::kStages - 1;  // the stage in use

  // The block of outputs and the chunk that are copied next.
  int block_;
  int chunk_ = 0;
  // In each half of a tile, this lane copies from rows lane / 8 and lane / 8 + 4 (copy_values).
  // The next members are for row lane / 8 of the upper half [0] and of the lower half [1] of the
  // first tile. copy_values adds offsets for the other rows.
  const char* rows_[2];  // the lane's 16 bytes of the next chunk in these rows
  int rows_left_[2];     // the number of rows of the block from these rows on
  int bytes_left_;       // the number of bytes from rows_ to the end of a row
  // The addresses of the further bits that this lane copies next: kFurtherCopies pieces of the
  // first tile. further_left_ is for them what rows_left_ is for rows_.
  static constexpr int kFurtherPieces =
      W::kFurtherBytes > 0 ? W::kFurtherBytes / 16 : 1;  // 16-byte pieces in a chunk of one row
  static constexpr int kFurtherCopies = W::kFurtherBytes > 0 ? kFurtherPieces / 2 : 1;
  const char* further_rows_[kFurtherCopies];
  int further_left_[kFurtherCopies];
  // The addresses of the scales that this lane copies next, in each tile.
  const char* scale_rows_[kM];  // multiples of 4; null: the row does not exist
  int skipped_[kM];             // skipped_bytes of the rows
  int scale_bytes_left_;        // the number of bytes of scales left in a row
};

}  // namespace mistral::cuda
