// Loads the next fragments of a into registers that a product still reads.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void changed_operand(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32] = {};
  const int row = threadIdx.x / 32 * 16 + threadIdx.x / 4 % 8, column = threadIdx.x % 4 * 2;
  const auto fragment = [&](uint32_t (&a)[1][4], int k) {
    for (int i = 0; i < 4; ++i) {
      const int at = (row + i % 2 * 8) * kTile * kTiles + k + column + i / 2 * 8;
      a[0][i] = ld_global(reinterpret_cast<const uint32_t*>(in.a + at));
    }
  };
  uint32_t a[1][4];
  for (int k = 0; k < kTile * kTiles; k += 16) {
    const int tile = k / kTile, stage = tile % kStages;
    if (k % kTile == 0) mbarrier_wait(&stages.full[stage], tile / kStages % 2);
    fragment(a, k);
    wgmma_settle(d);
    wgmma_settle(a);
    wgmma_fence();
    wgmma_m64<__nv_bfloat16, 64, false>(
        d, a[0], wgmma_descriptor(stages.b[stage] + k % kTile, 0, 1024), true);
    wgmma_commit();
    if (!kCorrect) fragment(a, k + 16 < kTile * kTiles ? k + 16 : 0);
    wgmma_wait<0>();
    wgmma_settle(d);
    if (k % kTile == kTile - 16) mbarrier_arrive(&stages.empty[stage]);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_changed_operand(const Arguments& a) {
  return run_planted(changed_operand<false>, changed_operand<true>, 160, a);
}

}  // namespace mistral::cuda
