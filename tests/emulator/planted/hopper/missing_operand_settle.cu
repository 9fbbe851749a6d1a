// Loads fragments of a into registers and does not call wgmma_settle before wgmma_fence: the
// compiler may set them after the fence.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void missing_operand_settle(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    if (threadIdx.x == kMultiplying) produce(in, stages);
    return;
  }
  float d[32] = {};
  const int row = threadIdx.x / 32 * 16 + threadIdx.x / 4 % 8, column = threadIdx.x % 4 * 2;
  for (int k = 0; k < kTile * kTiles; k += 16) {
    const int tile = k / kTile, stage = tile % kStages;
    if (k % kTile == 0) mbarrier_wait(&stages.full[stage], tile / kStages % 2);
    uint32_t a[1][4];
    for (int i = 0; i < 4; ++i) {
      const int at = (row + i % 2 * 8) * kTile * kTiles + k + column + i / 2 * 8;
      a[0][i] = ld_global(reinterpret_cast<const uint32_t*>(in.a + at));
    }
    if (kCorrect) wgmma_settle(a);
    wgmma_settle(d);
    wgmma_fence();
    wgmma_m64<__nv_bfloat16, 64, false>(
        d, a[0], wgmma_descriptor(stages.b[stage] + k % kTile, 0, 1024), true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
    if (k % kTile == kTile - 16) mbarrier_arrive(&stages.empty[stage]);
  }
  store(out, d);
}

}  // namespace

cudaError_t run_missing_operand_settle(const Arguments& a) {
  return run_planted(missing_operand_settle<false>, missing_operand_settle<true>, 160, a);
}

}  // namespace mistral::cuda
