"""megatron-core's Gated DeltaNet and Mamba-2 without fla and mamba-ssm: torch references take the kernels' place."""

from functools import cache
from importlib import import_module

from hylo_megatron.engine.cpu import without_cuda
from hylo_megatron.engine.patch import around, entries, instead
from hylo_megatron.engine.register import original

_GDN, _MAMBA = "megatron.core.ssm.gated_delta_net", "megatron.core.ssm.mamba_mixer"
_NO_GPU, _NO_MAMBA = "fla's kernels need a GPU", "mamba-ssm is not installed"


def _reference(name: str):
    """Return the replacement that puts ``hylo_megatron.kernels``'s function of this name there."""
    return lambda original, run: getattr(import_module("hylo_megatron.kernels"), name)


@around
def convolve(original, run, x, weight, bias=None, activation=None, initial_state=None, output_final_state=False, **_):
    """Compute the short convolution of Gated DeltaNet under fla's signature."""
    from hylo_megatron.kernels import causal_conv1d

    return causal_conv1d(x, weight, bias, activation)


@cache
def sharded_norm() -> type:
    """Return the gated norm with megatron-core's sharded checkpoint: one weight, split over tensor-parallel ranks."""
    from megatron.core.ssm import mamba_mixer

    from hylo_megatron.kernels import RMSNormGated

    class ShardedRMSNormGated(RMSNormGated):
        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            return mamba_mixer.make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
                tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
            )  # fmt: skip

    return ShardedRMSNormGated


PATCHES = entries(
    "megatron", "megatron-core",
    (f"{_GDN}.common:HAVE_FLA", instead(True), "bool", _NO_GPU),
    (f"{_GDN}.common:l2norm", _reference("l2norm"), "NoneType or (x, eps, output_dtype)", _NO_GPU),
    (f"{_GDN}.gdn:causal_conv1d", convolve,
     "NoneType or (x, weight, bias, residual, initial_state, ... 13, dd467e87)", _NO_GPU),
    (f"{_GDN}.gdn:chunk_gated_delta_rule",  # named at construction; the layer of this product replaces it
     _reference("chunk_gated_delta_rule"),
     "NoneType or (q, k, v, g, beta, scale, initial_state, output_final_state, ... 17, 9cba1fbc)", _NO_GPU),
    needed=without_cuda,
) + entries(
    "megatron", "megatron-core",
    (f"{_MAMBA}:HAVE_MAMBA_SSM", instead(True), "bool", _NO_MAMBA),
    (f"{_MAMBA}:mamba_split_conv1d_scan_combined", _reference("mamba_split_conv1d_scan_combined"), "NoneType",
     _NO_MAMBA),
    *((f"{_MAMBA}:{name}", lambda original, run: sharded_norm(), "NoneType or (*args, **kwargs)", _NO_MAMBA)
      for name in ("RMSNormGated", "ExtendedRMSNorm")),
    needed=lambda: not original(f"{_MAMBA}:HAVE_MAMBA_SSM"),
)  # fmt: skip
