"""One mixer of the exported model that runs on activations, from a dictionary of its weights."""

import torch
from torch import Tensor, nn

from hylo_megatron.config import Architecture
from hylo_megatron.mixers import MIXERS


class MixerRunner:
    """``features`` returns what the mixer's output projection sees, ``[B, S, F]``, computed one row at a time."""

    def __init__(self, arch: Architecture, layer: int, device: torch.device):
        from hylo_megatron.hf import HyLoConfig
        from hylo_megatron.mixers.hf_layers import Rotation

        config, entry = HyLoConfig.from_architecture(arch), MIXERS[arch.plan[layer]]
        self.rotation = Rotation(config)
        self.mixer: nn.Module = entry.part("hf_module").LAYER(config, layer).to(device).float().eval()
        self.projection = entry.part("initialise").OUTPUT_PROJECTION.split(".")[1]

    def load(self, weights: dict[str, Tensor]) -> None:
        state = {key.split(".", 1)[1]: tensor for key, tensor in weights.items()}
        self.mixer.load_state_dict(state)

    @torch.no_grad()
    def features(self, x_BSD: Tensor) -> Tensor:
        captured = []
        projection = self.mixer.get_submodule(self.projection)
        hook = projection.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        positions = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        angles = self.rotation(positions)
        try:
            for row in x_BSD:
                self.mixer(row[None], angles)
        finally:
            hook.remove()
        return torch.cat(captured)
