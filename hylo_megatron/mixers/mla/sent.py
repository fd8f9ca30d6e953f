"""What the ranks that share an MLA layer send each other. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.sent import Exchange, softmax


def exchange(arch: Architecture, at: Share) -> Exchange:
    """Context-parallel ranks exchange latents, so the up-projection of latents gathers nothing then."""
    g, d = arch.geometry.mla, arch.hidden_size
    latent, key, query = g.kv_lora_rank, g.qk_rope_head_dim, g.q_lora_rank or d
    if at.layout.cp == 1:
        return Exchange(columns=query + latent, whole=key, rows=d)
    return Exchange(columns=query, whole=latent + key, rows=d, **softmax(at, latent + key))
