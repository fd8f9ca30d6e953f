"""Runs one mixer of the exported model on activations, from a dictionary of its weights."""

import torch
from torch import Tensor, nn

from hylo_megatron.config import Architecture

OUTPUT_PROJECTION = {"mla": "self_attn.o_proj.weight", "gdn": "mixer.o_proj.weight", "mamba2": "mixer.out_proj.weight"}


class MixerRunner:
    """``features [B, S, F]`` are what the mixer's output projection sees; computed row by row of the batch."""

    def __init__(self, arch: Architecture, layer: int, device: torch.device):
        from hylo_megatron.hf import HyLoConfig
        from hylo_megatron.hf.modeling_hylo import HyLoDecoderLayer
        from hylo_megatron.mixers.hf_layers import Rotation

        config = HyLoConfig.from_architecture(arch)
        self.kind, self.rotation = arch.plan[layer], Rotation(config)
        block = HyLoDecoderLayer(config, layer)
        self.mixer: nn.Module = (block.self_attn if self.kind == "mla" else block.mixer).to(device).float().eval()

    def load(self, weights: dict[str, Tensor]) -> None:
        state = {key.split(".", 1)[1]: tensor for key, tensor in weights.items()}
        self.mixer.load_state_dict(state)

    @torch.no_grad()
    def features(self, x_BSD: Tensor) -> Tensor:
        captured = []
        projection = self.mixer.get_submodule(OUTPUT_PROJECTION[self.kind].split(".")[1])
        hook = projection.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        try:
            for row in x_BSD:
                self._forward(row[None])
        finally:
            hook.remove()
        return torch.cat(captured)

    def _forward(self, x_BSD: Tensor) -> Tensor:
        if self.kind != "mla":
            return self.mixer(x_BSD)
        positions = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        return self.mixer(x_BSD, self.rotation(positions), None)
