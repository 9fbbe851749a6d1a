// One lane tells the barrier that a tile is there, which all lanes of its warp have stored: what
// the others did is not its to tell, before __syncwarp.
#include "planted.h"

namespace mistral::cuda {
namespace {

template <bool kCorrect>
__global__ void lone_arrival(const __grid_constant__ Inputs in, float* out) {
  Stages& stages = *dynamic_shared<Stages>();
  init_barriers(stages);
  if (threadIdx.x >= kMultiplying) {
    for (int tile = 0; tile < kTiles; ++tile) {
      const int stage = tile % kStages;
      mbarrier_wait(&stages.empty[stage], (tile / kStages + 1) % 2);
      for_each_chunk<32>(in, stages, stage, tile, [](__nv_bfloat16* to, const __nv_bfloat16* from) {
        st_shared_16(to, ld_global_16(from));
      });
      fence_proxy_async();
      // A vote is no barrier for memory.
      if (kCorrect) __syncwarp();
      if (__all_sync(0xffffffff, 1) && threadIdx.x == kMultiplying) {
        mbarrier_arrive(&stages.full[stage]);
      }
    }
    return;
  }
  float d[32] = {};
  for (int tile = 0; tile < kTiles; ++tile) consume(d, stages, tile);
  store(out, d);
}

}  // namespace

cudaError_t run_lone_arrival(const Arguments& a) {
  return run_planted(lone_arrival<false>, lone_arrival<true>, 160, a);
}

}  // namespace mistral::cuda
