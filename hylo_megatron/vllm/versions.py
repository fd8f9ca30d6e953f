"""What differs between the versions of vLLM that this plugin runs with (0.26 and 0.32), and what older ones lack."""

from vllm.platforms import current_platform


def sound_chunk_scan() -> None:
    """Takes from Mamba-2's scan the tilings that Triton miscompiles on Hopper, which give rows of NaN.

    vLLM 0.32 leaves them out itself; 0.26 tries them and may find one of them fastest. With whole warp groups and
    64 rows or more the product runs as wgmma on registers, which the next iteration of a pipelined loop overwrites.
    """
    from vllm.model_executor.layers.mamba.ops import ssd_chunk_scan

    if hasattr(ssd_chunk_scan, "_drop_racy_wgmma_configs") or not current_platform.is_device_capability(90):
        return
    tuner = ssd_chunk_scan._chunk_scan_fwd_kernel
    tuner.configs = [c for c in tuner.configs if c.num_stages == 1 or c.num_warps % 4 or c.kwargs["BLOCK_SIZE_M"] % 64]
