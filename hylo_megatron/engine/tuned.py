"""Candidates of Triton kernels that were among the fastest wherever all candidates were timed, card by card.

Source of the rows for ``cuda 90``: Triton's timings of every candidate on H100s (80 GB), torch 2.11, triton 3.6, fla
0.6.0, on 25 and 26 November 2026. The shapes were those of SmolLM2 with GDN (heads of 64; training, sampling and
evaluation), of KDA (heads of 64, 96 and 128, values as wide or twice as wide), and of Llama-3.2-1B with the published
GDN (six heads of 256, values of 512; 65,536 tokens). At none of them is the best candidate of a row slower than the
best of all by more than 1 µs or 2.4 %. ``tools/bench/tuned_table.py`` prints such rows.
"""

# Card, as Triton names it -> a kernel's module and name -> how many candidates the library offers, the widest head
# that was timed (0: the kernel knows no heads), and the candidates worth timing (w: warps, s: stages). Another number
# of candidates is another version of the kernel.
KNOWN = {
    "cuda 90": {
        "fla.modules.activations.ops.swiglu_fwd_kernel":
            (30, 0, "B=1024 w8 s3", "B=2048 w16 s3", "B=512 w2 s3"),
        "fla.modules.causal_conv1d.ops.causal_conv1d_fwd_kernel":
            (16, 0, "BD=32 w4 s3", "BD=64 w4 s3", "BD=128 w8 s3"),
        "fla.modules.norm.fused_norm_gate.layer_norm_gated_bwd_kernel":
            (9, 512, "BT=16 w16 s3", "BT=64 w16 s3", "BT=32 w8 s3", "BT=16 w8 s3"),
        "fla.modules.norm.fused_norm_gate.layer_norm_gated_fwd_kernel":
            (9, 512, "BT=16 w4 s3", "BT=16 w8 s3", "BT=64 w16 s3"),
        "fla.modules.norm.l2norm.l2norm_bwd_kernel":
            (25, 256, "BT=16 w4 s3", "BT=16 w8 s3", "BT=8 w4 s3"),
        "fla.modules.norm.l2norm.l2norm_fwd_kernel":
            (25, 256, "BT=8 w1 s3", "BT=8 w2 s3", "BT=32 w8 s3"),
        "fla.ops.common.chunk_delta_h.chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64":
            (12, 256, "BV=32 w2 s2", "BV=32 w4 s2", "BV=32 w4 s3", "BV=64 w4 s3"),
        "fla.ops.common.chunk_delta_h.chunk_gated_delta_rule_fwd_kernel_h_blockdim64":
            (12, 256, "BV=64 w4 s2", "BV=64 w4 s3", "BV=32 w4 s3"),
        "fla.ops.common.chunk_o.chunk_bwd_kernel_dv_local":
            (6, 256, "w2 s3", "w4 s2", "w4 s3"),
        "fla.ops.common.chunk_o.chunk_fwd_kernel_o":
            (3, 256, "BK=64 BV=64 w4 s3", "BK=128 BV=128 w8 s3"),
        "fla.ops.gated_delta_rule.chunk_fwd.chunk_gated_delta_rule_fwd_kkt_solve_kernel":
            (6, 256, "BK=64 w1 s3", "BK=32 w1 s3", "BK=64 w2 s3"),
        "fla.ops.gated_delta_rule.wy_fast.prepare_wy_repr_bwd_kernel":
            (6, 256, "w4 s2", "w4 s3"),
        "fla.ops.gated_delta_rule.wy_fast.recompute_w_u_fwd_kernel":
            (9, 256, "w4 s3", "w4 s4", "w8 s3"),
        "fla.ops.gla.chunk.chunk_gla_fwd_kernel_o":
            (36, 128, "BK=64 BV=64 w4 s2", "BK=64 BV=64 w8 s2", "BK=64 BV=128 w4 s2"),
        "fla.ops.kda.chunk_bwd.chunk_kda_bwd_kernel_dAv":
            (6, 128, "w4 s2", "w4 s3", "w4 s4"),
        "fla.ops.kda.chunk_intra.chunk_kda_bwd_kernel_intra":
            (12, 128, "w2 s2", "w4 s4"),
        "fla.ops.kda.chunk_intra.chunk_kda_fwd_kernel_inter_solve_fused":
            (6, 128, "BK=32 w1 s3", "BK=64 w1 s3"),
        "fla.ops.kda.chunk_intra_token_parallel.chunk_kda_fwd_kernel_intra_token_parallel":
            (16, 128, "BH=2 w1 s3", "BH=4 w1 s3", "BH=4 w2 s3"),
        "fla.ops.kda.gate.kda_gate_bwd_kernel":
            (8, 0, "w4 s2", "w8 s2"),
        "fla.ops.kda.gate.kda_gate_chunk_cumsum_vector_kernel":
            (6, 0, "BS=32 w2 s3", "BS=64 w4 s3"),
        "fla.ops.kda.wy_fast.recompute_w_u_fwd_kda_kernel":
            (9, 128, "w4 s3", "w4 s4", "w8 s3"),
        "fla.ops.utils.cumsum.chunk_local_cumsum_scalar_kernel":
            (4, 0, "w1 s3", "w2 s3"),
        "fla.ops.utils.cumsum.chunk_local_cumsum_vector_kernel":
            (6, 0, "BS=32 w2 s3", "BS=32 w8 s3", "BS=64 w4 s3"),
    }
}  # fmt: skip
