"""megatron's Mamba-2 mixer without the mamba-ssm package: its three names point at the torch references."""


def install() -> bool:
    """Returns whether the torch references were put in place (False where mamba-ssm is installed)."""
    from megatron.core.ssm import mamba_mixer

    if mamba_mixer.HAVE_MAMBA_SSM:
        return False
    from hylo_megatron.kernels import RMSNormGated, mamba_split_conv1d_scan_combined

    class ShardedRMSNormGated(RMSNormGated):
        """Adds megatron's sharded checkpoint: one weight, split over tensor-parallel ranks."""

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            return mamba_mixer.make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
                tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
            )  # fmt: skip

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    mamba_mixer.RMSNormGated = mamba_mixer.ExtendedRMSNorm = ShardedRMSNormGated
    return True
