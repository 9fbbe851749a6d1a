// gemv: products of up to 64 tokens. Their speed is limited by reading the weights once.
//
// Template parameters: W has the traits of the weight's format (formats.cuh), kM is the number of
// tiles of 16 rows of the weight in a block of outputs, and kN the number of octets of tokens (8
// tokens each).
//
// Grid: as many thread blocks as run at the same time, or fewer. A thread block computes one block
// of 16 kM outputs (8 kM with SwiGLU) after another, gridDim.x apart. Its 8 warps divide each row
// of the weight among them, in chunks of 128 bytes. Each warp copies its chunks to buffers of its
// own in shared memory (stages, weight_stream.cuh), multiplies 16 rows by 8 tokens at a time on the
// tensor cores, and keeps the sums in registers. At the end of a block of outputs, the sums of the
// warps are added through shared memory, in the order of the warps. Meanwhile the first chunks of
// the next block of outputs are copied, so the stream has no gap.
//
// Bytes under way: to read 4.3 TB/s with a latency of about 1.2 us under load, an H200 needs 5 MB
// under way. That is 40 KB for each of its 132 multiprocessors. In each warp one stage is in use,
// and the others are under way. So with most formats, a thread block has 8 warps * 3 stages * 2 KB
// = 48 KB under way if kM = 1, and 8 * 1 * 4 KB = 32 KB if kM = 2. With kM = 1 and kN <= 2, two
// thread blocks fit on a multiprocessor, unless normalised rows of x take the room: 16 rows of 4096
// elements are 129 KB with their padding.
//
// Why normalised rows of x are in shared memory (by reasoning, not by measurement): every 16
// outputs need all of x. With 16 tokens, x has as many bytes as 16 rows of weights of 16 bits, and
// four times as many as 16 rows of weights of 4 bits. L1 is too small for it, and reads of x from
// L2 would compete with the weights.
//
// K is not divided among thread blocks, so there are no partial sums in global memory. There are
// enough outputs without that. If the weights of Mistral 7B have one format, even its smallest
// launches have 256 blocks of 16 outputs, nearly two for each of 132 multiprocessors. If some
// multiprocessors have fewer blocks than others, this costs little: half of the multiprocessors,
// with two thread blocks each, have enough bytes under way for the full bandwidth of the memory.
//
// The bits of a product depend only on the token's row of x and the row of the weight, not on the
// other tokens, the other parts, or the GPU.
#pragma once

#include <launch.cuh>
#include <ptx.cuh>

#include "gemv_argmax.cuh"
#include "gemv_norm.cuh"
#include "gemv_rope.cuh"
#include "gemv_rows.cuh"
#include "gemv_store.cuh"
#include "group_sums.cuh"
#include "weight_stream.cuh"

namespace mistral::cuda {

// The number of octets of tokens whose sums are added up in one round of `reduce`.
template <int kN>
constexpr int kRound = kN == 1 ? 1 : 2;

// The number of thread blocks for which the registers of a multiprocessor must be enough. It limits
// the registers of a thread.
template <int kM, int kN>
constexpr int kBlocksAtOnce = kM == 1 && kN <= 2 ? 2 : 1;

// ---- Sizes of shared memory

// The floats that hold the sums of one round of `reduce`.
template <int kN>
constexpr int kRoundSums = kRound<kN> * kLinearWarps * kTileRows * 8;

// The bytes of the stages and of the sums of two rounds.
template <class W, int kM, int kN>
constexpr int kFixedShared = StageLayout<W, kM>::kBytes + 2 * kRoundSums<kN> * 4;

// The bytes of the stages, of the sums and, with kNorm, of the normalised rows of x.
template <class W, int kM, int kN, bool kNorm>
MISTRAL_HOST_DEVICE int64_t shared_bytes_of_product(const LinearParams& p) {
  if (!kNorm) return kFixedShared<W, kM, kN>;
  return kFixedShared<W, kM, kN> +
         p.tokens * normalised_row<W>(p.inputs) * int64_t{sizeof(typename W::Element)};
}

// All bytes of a thread block: those above and, with RoPE, those of the tables of RopeFinish.
template <class W, int kM, int kN, bool kNorm>
int64_t linear_shared_bytes(const LinearParams& p) {
  const int64_t of_rope = p.epilogue == Epilogue::rope ? RopeFinish<W>::shared_bytes(p) : 0;
  return shared_bytes_of_product<W, kM, kN, kNorm>(p) + of_rope;
}

// Numbers that all phases of a product use. They are computed once. Otherwise the compiler would
// load them from p again after each asm statement of ptx.cuh that may change memory.
struct Work {
  int warp;
  int inputs;     // K
  int blocks;     // the number of blocks of outputs
  int chunks;     // the number of chunks of a row
  int tile_step;  // the distance from a tile to the next, in rows of the weight
};

template <class W, int kM, bool kRope>
__device__ __forceinline__ Work work_of(const LinearParams& p, int warp) {
  Work work;
  work.warp = warp;
  work.inputs = static_cast<int>(p.inputs);
  work.blocks = blocks_of_all<kM>(p);
  work.chunks = (work.inputs + W::kValues - 1) / W::kValues;
  work.tile_step = 1 << tile_step_log2<kRope>(p);
  return work;
}

// How many steps of a chunk (formats.cuh) a warp unrolls, and for how many it loads x at once. The
// registers limit both.
template <class W, int kM, int kN, bool kRope>
struct StepPlan {
  static constexpr int kSteps = W::kUnits * W::kUnitSteps;
  // Whether the kernel needs more registers than most.
  static constexpr bool kScarce =
      W::kOffset || W::kFurtherBytes > 0 || (W::kGrouped && kRope && kM == 1 && kN == 2);
  // The most operands of x that a lane loads together.
  static constexpr int kLoads = W::kFurtherBytes > 0 && kN == 1 ? 2 : kScarce ? 4 : 8;
  // The number of steps in a batch. The x of these steps is loaded together.
  static constexpr int kBatch = kSteps * kN <= kLoads ? kSteps : kLoads / kN;
  // The number of units that are unrolled. These are all units of a chunk, or fewer if the
  // registers do not hold the operands of all units.
  static constexpr int kUnits = kScarce ? max(1, kBatch / W::kUnitSteps)
                                : kBatch < kSteps && W::kUnitSteps % kBatch == 0 ? 1
                                                                                 : W::kUnits;
};

// Scales are copied to shared memory in words of 4 bytes. For the lane's two rows in each tile,
// computes how many bytes of the first word lie before the row's own scales.
template <class W, int kM, bool kRope>
__device__ __forceinline__ void find_skipped(int (&skipped)[kM][2], const LinearParams& p,
                                             const OutputBlock<kRope>& block, const Work& work,
                                             int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = block.first + block.row_of(work.tile_step * m + lane / 4, half);
      const auto* const of_part = static_cast<const char*>(p.parts[block.part_of(half)].scales);
      const int row_bytes = scale_bytes<W>(p, work.inputs);
      skipped[m][half] = skipped_bytes<W>(of_part + row * row_bytes);
    }
  }
}

// Makes the Scales of the stream's current chunk, for the lane's two rows in each tile.
template <class W, int kM, bool kRope>
__device__ __forceinline__ void take_scales(typename W::Scales (&scales)[kM][2],
                                            const WeightStream<W, kM, kRope>& stream,
                                            const int (&skipped)[kM][2], int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      scales[m][half] = typename W::Scales(stream.scales(m, row, skipped[m][half]));
    }
  }
}

// Multiplies step `step` of a chunk by x. `a` has the operands of all steps of a unit for each
// tile, and this is step i of the unit. `x` has the operands of this step for each 8 tokens.
//
// In grouped formats, the products of 2^steps_log2 steps share a Scaling. (With W::kHalfSteps each
// of the two products of a step has its own.) After the last product that shares a Scaling, the sum
// of these products is scaled and added to `sums`.
template <class W, int kM, int kN>
__device__ __forceinline__ void multiply_step(float (&sums)[kM][kN][4], GroupSums<W, kM, kN>& group,
                                              typename W::Scales (&scales)[kM][2],
                                              const StepOperands (&a)[kM][W::kUnitSteps], int i,
                                              const uint4 (&x)[kN], int step, int steps_log2) {
  // How many of the two products of a step share a Scaling.
  constexpr int kTogether = W::kHalfSteps ? 1 : 2;
#pragma unroll
  for (int product = 0; product < 2; product += kTogether) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint4 words = x[n];
      const uint32_t x_of[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        float (&d)[4] = W::kGrouped ? group.sums[m][n] : sums[m][n];
#pragma unroll
        for (int j = product; j < product + kTogether; ++j) {
          mma_m16n8k16<typename W::Element>(d, a[m][i][j], x_of[j]);
        }
      }
      if constexpr (W::kOffset) group.add_x(n, x_of);
    }
    if constexpr (W::kGrouped) {
      if ((step + 1) & ((1 << steps_log2) - 1)) continue;
      group.add_to(sums, scales, 2 / kTogether * step + product);
    }
  }
}

// The main loop. Multiplies this warp's chunks of one block of outputs, and adds the products to
// `sums`.
template <class W, int kM, int kN, bool kNorm, bool kRope>
__device__ __forceinline__ void multiply_chunks(float (&sums)[kM][kN][4], const LinearParams& p,
                                                const OutputBlock<kRope>& block,
                                                WeightStream<W, kM, kRope>& stream,
                                                const LaneRows<W, kN, kNorm>& x, const Work& work,
                                                int lane, int steps_log2) {
  using Plan = StepPlan<W, kM, kN, kRope>;
  constexpr int kBatch = Plan::kBatch;
  int skipped[kM][2];
  if constexpr (W::kGrouped) find_skipped<W>(skipped, p, block, work, lane);

  GroupSums<W, kM, kN> group;
  for (int chunk = work.warp; chunk < work.chunks; chunk += kLinearWarps) {
    uint4 b[kBatch][kN];
    x.load(b, chunk, 0);
    stream.advance();
    typename W::Scales scales[kM][2];
    if constexpr (W::kGrouped) take_scales<W>(scales, stream, skipped, lane);
#pragma unroll Plan::kUnits
    for (int unit = 0; unit < W::kUnits; ++unit) {
      StepOperands a[kM][W::kUnitSteps];
#pragma unroll
      for (int m = 0; m < kM; ++m) W::take(a[m], stream.tile(m), unit);
#pragma unroll
      for (int i = 0; i < W::kUnitSteps; ++i) {
        const int step = unit * W::kUnitSteps + i;
        if (step > 0 && step % kBatch == 0) x.load(b, chunk, step);
        multiply_step<W>(sums, group, scales, a, i, b[step % kBatch], step, steps_log2);
      }
    }
  }
}

// Adds up the sums of the warps and finishes the outputs. A round does this for one tile and kRound
// octets of tokens. Every warp stores its sums to shared memory. Then kRound warps, one for each
// octet, add them up. The warps take turns at that. `round` counts the rounds of this thread block.
// Two buffers in `partial_sums` alternate, so that a round needs only one barrier.
template <class W, int kM, int kN, class Finish>
__device__ __forceinline__ void reduce(const float (&sums)[kM][kN][4], const LinearParams& p,
                                       const OutputBlock<Finish::kRope>& block,
                                       const Finish& finish, float* partial_sums, int& round,
                                       const Work& work) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; n += kRound<kN>) {
      float* const of_round = partial_sums + round % 2 * kRoundSums<kN>;
      const int turn = (work.warp + round * kRound<kN>) % kLinearWarps;
      const auto place = [&](int i, int w) {
        return of_round + ((i * kLinearWarps + w) * kWarp + lane) * 4;
      };
      const bool adds = turn < kRound<kN>;
      const auto mine = finish.outputs(block, work.tile_step * m, adds ? 8 * (n + turn) : p.tokens);
#pragma unroll
      for (int i = 0; i < kRound<kN>; ++i) {
        const float (&s)[4] = sums[m][n + i];
        store_shared16(place(i, work.warp), Vec16<float>{{s[0], s[1], s[2], s[3]}});
      }
      __syncthreads();
      ++round;
      if (!adds) continue;
      float total[4] = {};
#pragma unroll
      for (int w = 0; w < kLinearWarps; ++w) {
        const Vec16<float> s = load_shared16(place(turn, w));
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] += s[j];
      }
      mine.store(total);
    }
  }
}

// Computes all outputs of this thread block. First starts the stream of weights and prepares x.
// Then, for each block of outputs, the warps multiply their chunks, and the sums of the warps are
// added up.
template <class W, int kM, int kN, bool kNorm, class Finish>
__device__ __forceinline__ void multiply(const LinearParams& p, Finish finish) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Work work = work_of<W, kM, Finish::kRope>(p, warp);
  char* const shared = dynamic_shared<char>();
  auto* const partial_sums = reinterpret_cast<float*>(shared + StageLayout<W, kM>::kBytes);
  WeightStream<W, kM, Finish::kRope> stream(p, shared, work.blocks, work.chunks);
  // No kernel writes weights. So the stream above may start its first copies before earlier kernels
  // have written x.
  wait_for_earlier_kernels();
  let_later_kernels_begin();
  finish.begin(shared + shared_bytes_of_product<W, kM, kN, kNorm>(p));
  LaneRows<W, kN, kNorm> x(p, work.inputs, lane);
  if constexpr (kNorm) {
    static_assert(8 * kN <= kNormTokens);
    auto* const rows = reinterpret_cast<typename W::Element*>(shared + kFixedShared<W, kM, kN>);
    normalise_x<W, kN>(p, rows, partial_sums, work.chunks);
    x.use_normalised(p, rows, lane);
  }
  if constexpr (kNorm || Finish::kRope) __syncthreads();

  int steps_log2 = 0;  // 2^steps_log2 steps share a Scaling
  if constexpr (W::kGrouped && !W::kHalfSteps) steps_log2 = W::scaled_log2(p) - 5;
  int round = 0;
  for (int index = blockIdx.x; index < work.blocks; index += gridDim.x) {
    const auto block = OutputBlock<Finish::kRope>::template at<kM>(p, index);
    float sums[kM][kN][4] = {};
    multiply_chunks(sums, p, block, stream, x, work, lane, steps_log2);
    reduce<W>(sums, p, block, finish, partial_sums, round, work);
  }
  cp_async_wait<0>();
}

template <class W, int kM, int kN, bool kNorm>
__global__ void __launch_bounds__(kLinearThreads, kBlocksAtOnce<kM, kN>)
    linear_kernel(const __grid_constant__ LinearParams p) {
  multiply<W, kM, kN, kNorm>(p, StoreFinish<W>{p});
  if (p.epilogue == Epilogue::argmax) choose_tokens(p);
}

template <class W, int kM, int kN, bool kNorm>
__global__ void __launch_bounds__(kLinearThreads, kBlocksAtOnce<kM, kN>)
    linear_rope_kernel(const __grid_constant__ LinearParams p,
                       const __grid_constant__ RopeParams rope) {
  multiply<W, kM, kN, kNorm>(p, RopeFinish<W>{p, rope, nullptr, nullptr});
}

}  // namespace mistral::cuda
