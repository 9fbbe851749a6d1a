// How weights come to a warp: from global memory through stages of shared memory of its own,
// without a barrier of the block.
#pragma once

#include <ptx.cuh>

#include "linear_formats.cuh"

namespace mistral::cuda {

// The 8 warps of a block share out the chunks of its rows: warp w takes chunks w, w + 8, ... Which
// sums are added in which order then depends on K alone.
constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = kLinearWarps * kWarp;

// Outputs of a tile of 16 rows: with SwiGLU it has 8 rows of gate above 8 of up, so that a lane
// gets both products of an output.
__device__ __forceinline__ int outputs_of_tile(const LinearParams& p) {
  return p.epilogue == Epilogue::swiglu ? kTileRows / 2 : kTileRows;
}

// What a block works on at a time: neighbouring outputs of one part.
struct OutputBlock {
  int part;
  int count;
  int64_t first;   // in the part
  int64_t column;  // in the output

  __device__ OutputBlock(const LinearParams& p, int size, int64_t index) : part(0), column(0) {
    while (part + 1 < p.num_parts && index >= ceil_div(p.parts[part].rows, size)) {
      if (p.epilogue == Epilogue::swiglu) break;
      index -= ceil_div(p.parts[part].rows, size);
      column += p.parts[part].rows;
      ++part;
    }
    first = index * size;
    column += first;
    count = static_cast<int>(min(size, p.parts[part].rows - first));
  }

  // The part of the upper or lower half of a tile, and its first row there, of a tile whose first
  // output is `output` of this block.
  __device__ __forceinline__ int part_of(const LinearParams& p, int half) const {
    return p.epilogue == Epilogue::swiglu ? half : part;
  }
  __device__ __forceinline__ int row_of(const LinearParams& p, int output, int half) const {
    return p.epilogue == Epilogue::swiglu ? output : output + 8 * half;
  }
};

// int4: the scales of a chunk of one row in shared memory. Rows of scales may begin at any multiple
// of 2 bytes and are copied by words of 4, which begin at the scale before if need be.
constexpr int kScaleWords = 128 / 32 + 1;  // for the smallest groups
constexpr int kTileScaleBytes = kTileRows * kScaleWords * 4;

// Scales before `begin` in its word. (Chunks begin where a word does, if the row does.)
__device__ __forceinline__ int skipped_scales(const bf16* begin) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(begin) / 2 % 2);
}

template <WeightFormat format, int kM>
struct StageLayout {
  static constexpr int kStages = 4 / kM;
  static constexpr int kValueBytes = kM * kTileBytes;
  static constexpr int kScaleBytes = format == WeightFormat::int4 ? kM * kTileScaleBytes : 0;
  static constexpr int kBytes = kLinearWarps * kStages * (kValueBytes + kScaleBytes);
};

// The chunks of a warp, of one block of outputs after the other: with kM tiles of 16 rows each.
template <class W, int kM>
class WeightStream {
  using Layout = StageLayout<W::kFormat, kM>;

 public:
  // `shared`: Layout::kBytes, all values before all scales.
  __device__ WeightStream(const LinearParams& p, char* shared, int64_t blocks, int chunks)
      : p_(p), blocks_(blocks), chunks_(chunks) {
    const int warp = threadIdx.x / kWarp;
    values_ = shared + warp * Layout::kStages * Layout::kValueBytes;
    scales_ = shared + kLinearWarps * Layout::kStages * Layout::kValueBytes +
              warp * Layout::kStages * Layout::kScaleBytes;
    chunk_ = warp;
    // A warp for which there is no chunk never copies.
    block_ = warp < chunks ? blockIdx.x : blocks;
    if (block_ < blocks_) begin_block();
#pragma unroll
    for (int i = 0; i < Layout::kStages - 1; ++i) copy_next();
  }

  // Makes the next chunk's stage the current one, and starts the copy of the chunk after those that
  // are under way into the stage that was.
  __device__ __forceinline__ void advance() {
    cp_async_wait<Layout::kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all lanes are done with the stage before
    current_ = next_of(current_);
    copy_next();
  }

  __device__ __forceinline__ WeightTile tile(int m) const {
    return {values_ + current_ * Layout::kValueBytes + m * kTileBytes};
  }
  // int4: scale `index` of the chunk, in row `row` of tile m.
  __device__ __forceinline__ float scale(int m, int row, int skipped, int index) const {
    const auto* words = reinterpret_cast<const bf16*>(scales_ + current_ * Layout::kScaleBytes +
                                                      m * kTileScaleBytes + row * kScaleWords * 4);
    return to_float(words[skipped + index]);
  }

 private:
  static __device__ __forceinline__ int next_of(int stage) {
    return stage + 1 == Layout::kStages ? 0 : stage + 1;
  }
  __device__ void begin_block() {
    const int lane = threadIdx.x % kWarp;
    const OutputBlock block(p_, outputs_of_tile(p_) * kM, block_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block.row_of(p_, lane / 8, half);
      left_[half] = block.count - row;
      rows_[half] = static_cast<const char*>(p_.parts[block.part_of(p_, half)].values) +
                    (block.first + row) * row_bytes() + 16 * (lane % 8);
    }
    if constexpr (W::kFormat == WeightFormat::int4) {
      const int64_t groups = p_.inputs / p_.group;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int half = lane / 16;
        const int row = block.row_of(p_, outputs_of_tile(p_) * m + lane / 2 % 8, half);
        scale_rows_[m] = row < block.count ? p_.parts[block.part_of(p_, half)].scales +
                                                 (block.first + row) * groups
                                           : nullptr;
      }
    }
  }

  __device__ __forceinline__ int64_t row_bytes() const {
    return p_.inputs * kChunkBytes / W::kValues;
  }

  // Into the stage before the current one.
  __device__ __forceinline__ void copy_next() {
    const int stage = filled_;
    filled_ = next_of(filled_);
    if (block_ < blocks_) {
      copy_values(values_ + stage * Layout::kValueBytes);
      if constexpr (W::kFormat == WeightFormat::int4) {
        copy_scales(scales_ + stage * Layout::kScaleBytes);
      }
      chunk_ += kLinearWarps;
      if (chunk_ >= chunks_) {
        chunk_ = threadIdx.x / kWarp;
        block_ += gridDim.x;
        if (block_ < blocks_) begin_block();
      }
    }
    cp_async_commit();
  }

  // 8 lanes copy the 128 bytes of a row: whole cache lines, of 4 rows in an instruction.
  __device__ __forceinline__ void copy_values(char* to) {
    const int lane = threadIdx.x % kWarp, piece = lane % 8;
    const int64_t bytes = row_bytes(), offset = int64_t{chunk_} * kChunkBytes;
    const bool inside = offset + 16 * piece < bytes;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, row = outputs_of_tile(p_) * m + 4 * (i % 2);
        const WeightTile tile = {to + m * kTileBytes};
        cp_async_16(tile.piece(4 * i + lane / 8, piece), rows_[half] + row * bytes + offset,
                    inside && row < left_[half]);
      }
    }
  }

  // 2 lanes copy the scales of a row.
  __device__ __forceinline__ void copy_scales(char* to) {
    const int lane = threadIdx.x % kWarp;
    const int64_t first = int64_t{chunk_} * W::kValues / p_.group;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const bf16* const begin = scale_rows_[m];
      const int skipped = skipped_scales(begin), words = static_cast<int>(128 / p_.group) + skipped;
      const bf16* const aligned = begin + first - skipped;
      const int left = begin ? static_cast<int>(begin + p_.inputs / p_.group - aligned) : 0;
#pragma unroll
      for (int i = 0; i < (kScaleWords + 1) / 2; ++i) {
        const int word = lane % 2 + 2 * i;
        if (word >= words) continue;
        cp_async_4(to + m * kTileScaleBytes + 4 * (lane / 2 * kScaleWords + word),
                   aligned + 2 * word, static_cast<int>(max(0, min(2, left - 2 * word))) * 2);
      }
    }
  }

  const LinearParams& p_;
  const int64_t blocks_;
  const int chunks_;
  char* values_;  // this warp's stages
  char* scales_;
  int current_ = StageLayout<W::kFormat, kM>::kStages - 1;  // the stage that is worked on
  int filled_ = 0;                                          // that is filled next

  // What is copied next.
  int64_t block_;
  int chunk_;
  const char* rows_[2];         // of the lane: in the upper and the lower half of a tile
  int left_[2];                 // outputs of the block from that row on
  const bf16* scale_rows_[kM];  // of the lane, in each tile; null: none
};

}  // namespace mistral::cuda
