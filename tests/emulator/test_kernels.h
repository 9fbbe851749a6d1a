// Kernels that are here only to test the emulator: one per primitive (primitives.cu) and one per
// planted bug (planted/), each with what it needs to be launched from Python.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mistral::cuda {

struct Arguments {
  const void* in;
  void* out;
  int64_t n;  // the kernel says of what
};

// Primitives: one warp, unless the kernel says otherwise.
cudaError_t run_mma_bf16(const Arguments& a);
cudaError_t run_mma_f16(const Arguments& a);
cudaError_t run_ldmatrix(const Arguments& a);
cudaError_t run_ldmatrix_transposed(const Arguments& a);
cudaError_t run_shuffles(const Arguments& a);
cudaError_t run_votes(const Arguments& a);
cudaError_t run_cp_async(const Arguments& a);
cudaError_t run_cp_async_words(const Arguments& a);
cudaError_t run_one_lane_more(const Arguments& a);
cudaError_t run_bits(const Arguments& a);
cudaError_t run_pipeline(const Arguments& a);
cudaError_t run_atomics(const Arguments& a);
cudaError_t run_indices(const Arguments& a);
cudaError_t run_strided_copy(const Arguments& a);
cudaError_t run_shared_stride(const Arguments& a);
cudaError_t run_shared_stride_8(const Arguments& a);
cudaError_t run_uninitialised(const Arguments& a);
cudaError_t run_shape(const Arguments& a);
cudaError_t run_order_of_overlap(const Arguments& a);

// Primitives of Hopper, primitives_sm90.cu.
cudaError_t run_tma_2d(const Arguments& a);
cudaError_t run_tma_3d(const Arguments& a);
cudaError_t run_tensor_map(const Arguments& a);
cudaError_t run_wgmma(const Arguments& a);
cudaError_t run_wgmma_groups(const Arguments& a);
cudaError_t run_mbarrier(const Arguments& a);
cudaError_t run_cp_async_barrier(const Arguments& a);
cudaError_t run_named_barriers(const Arguments& a);
cudaError_t run_registers(const Arguments& a);
cudaError_t run_misuse(const Arguments& a);

// Planted bugs: with n = 0 the kernel has its bug, with n = 1 it is correct. `in` is
// float [256], `out` is float [257]: in doubled, and a zero for the kernel's own use.
cudaError_t run_began_too_early(const Arguments& a);
cudaError_t run_copied_too_early(const Arguments& a);
cudaError_t run_divergent_barrier(const Arguments& a);
cudaError_t run_divergent_shuffle(const Arguments& a);
cudaError_t run_exited_lane(const Arguments& a);
cudaError_t run_exited_thread(const Arguments& a);
cudaError_t run_looked_up_too_early(const Arguments& a);
cudaError_t run_misaligned(const Arguments& a);
cudaError_t run_misaligned_part(const Arguments& a);
cudaError_t run_missing_barrier(const Arguments& a);
cudaError_t run_missing_copy_barrier(const Arguments& a);
cudaError_t run_missing_fence(const Arguments& a);
cudaError_t run_missing_fence_after(const Arguments& a);
cudaError_t run_missing_refill_barrier(const Arguments& a);
cudaError_t run_missing_syncwarp(const Arguments& a);
cudaError_t run_missing_wait(const Arguments& a);
cudaError_t run_never_waits(const Arguments& a);
cudaError_t run_out_of_bounds_read(const Arguments& a);
cudaError_t run_out_of_bounds_shared(const Arguments& a);
cudaError_t run_out_of_bounds_write(const Arguments& a);
cudaError_t run_outside_of_tensors(const Arguments& a);
cudaError_t run_past_shared(const Arguments& a);
cudaError_t run_reused_too_early(const Arguments& a);
cudaError_t run_row_outside(const Arguments& a);
cudaError_t run_unshared_store(const Arguments& a);
cudaError_t run_written_constant(const Arguments& a);
cudaError_t run_wrong_mask(const Arguments& a);
cudaError_t run_wrong_row(const Arguments& a);
cudaError_t run_wrong_wait(const Arguments& a);

// Those of Hopper, the same with the product that planted/hopper/planted.h describes.
cudaError_t run_changed_operand(const Arguments& a);
cudaError_t run_early_proxy_fence(const Arguments& a);
cudaError_t run_loaded_too_early(const Arguments& a);
cudaError_t run_lone_arrival(const Arguments& a);
cudaError_t run_lone_release(const Arguments& a);
cudaError_t run_missing_expect(const Arguments& a);
cudaError_t run_missing_init_fence(const Arguments& a);
cudaError_t run_missing_operand_settle(const Arguments& a);
cudaError_t run_missing_proxy_fence(const Arguments& a);
cudaError_t run_missing_reader_fence(const Arguments& a);
cudaError_t run_missing_settle(const Arguments& a);
cudaError_t run_missing_settle_before(const Arguments& a);
cudaError_t run_missing_warp(const Arguments& a);
cudaError_t run_missing_warpgroup_barrier(const Arguments& a);
cudaError_t run_missing_wgmma_fence(const Arguments& a);
cudaError_t run_missing_wgmma_wait(const Arguments& a);
cudaError_t run_released_too_early(const Arguments& a);
cudaError_t run_too_many_registers(const Arguments& a);
cudaError_t run_touched_accumulators(const Arguments& a);
cudaError_t run_wrong_bytes(const Arguments& a);
cudaError_t run_wrong_count(const Arguments& a);
cudaError_t run_wrong_parity(const Arguments& a);
cudaError_t run_wrong_stride(const Arguments& a);

}  // namespace mistral::cuda
