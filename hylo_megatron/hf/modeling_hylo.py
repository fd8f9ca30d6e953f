"""``HyLoForCausalLM``: pre-norm decoder layers with an MLA, Gated DeltaNet or Mamba-2 mixer and a SwiGLU MLP.

Start here; the mixers are in mla.py, gdn.py and mamba2.py. Legend: B batch, S new positions, T all positions, D model.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from hylo_megatron import kernels
from hylo_megatron.hf.cache import HyLoCache
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.hf.gdn import HyLoGatedDeltaNet
from hylo_megatron.hf.layers import HyLoRMSNorm, Rotation, real_tokens
from hylo_megatron.hf.mamba2 import HyLoMamba2
from hylo_megatron.hf.mla import HyLoMLA


class HyLoMLP(nn.Module):
    def __init__(self, config: HyLoConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(kernels.ops_for(x).swiglu(self.gate_proj(x), self.up_proj(x)))


class HyLoDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: HyLoConfig, layer: int):
        super().__init__()
        self.is_mla = config.mixers[layer] == "mla"
        if self.is_mla:
            self.self_attn = HyLoMLA(config, layer)
        else:
            self.mixer = {"gdn": HyLoGatedDeltaNet, "mamba2": HyLoMamba2}[config.mixers[layer]](config, layer)
        self.mlp = HyLoMLP(config)
        self.input_layernorm = HyLoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HyLoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BSD, rotation, allowed, real_BS1, cache) -> torch.Tensor:
        normed = self.input_layernorm(x_BSD)
        if self.is_mla:
            x_BSD = x_BSD + self.self_attn(normed, rotation, allowed, cache)
        else:
            x_BSD = x_BSD + self.mixer(normed, real_BS1, cache)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class HyLoPreTrainedModel(PreTrainedModel):
    config_class = HyLoConfig
    config: HyLoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyLoDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", r"mixer\.D$"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HyLoGatedDeltaNet | HyLoMamba2):
            init.copy_(module.A_log, torch.empty(module.A_log.shape).uniform_(1, 16).log_())
        if isinstance(module, HyLoGatedDeltaNet):
            init.ones_(module.dt_bias)
        elif isinstance(module, HyLoMamba2):
            dt = torch.empty(module.dt_bias.shape).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
            init.ones_(module.D)


class HyLoModel(HyLoPreTrainedModel):
    def __init__(self, config: HyLoConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyLoDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HyLoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotation = Rotation(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: HyLoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_,
    ) -> BaseModelOutputWithPast:
        """``attention_mask`` [B,T]: 1 for real tokens, cached ones included."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("HyLoModel: give either input_ids or inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache and not (self.gradient_checkpointing and self.training):
            cache = HyLoCache(len(self.layers))
        if cache is not None and not isinstance(cache, HyLoCache):
            raise ValueError(f"HyLoModel: past_key_values is a {type(cache).__name__}, expected None or a HyLoCache")
        past, length = cache.length if cache is not None else 0, x_BSD.shape[1]
        attention_mask = _checked_mask(attention_mask, past + length)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, length, x_BSD.device)
        rotation = self.rotation(position_ids)
        allowed = _allowed(attention_mask, past, length, x_BSD.device)
        real_BS1 = real_tokens(attention_mask, length)
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x_BSD)
            x_BSD = layer(x_BSD, rotation, allowed, real_BS1, cache)
        if cache is not None:
            cache.length += length
        x_BSD = self.norm(x_BSD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BSD,
            past_key_values=cache,
            hidden_states=(*states, x_BSD) if output_hidden_states else None,
        )


def _checked_mask(mask: torch.Tensor | None, total: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != total:
        raise ValueError(f"HyLoModel: attention_mask has shape {tuple(mask.shape)}, expected [batch, {total}]")
    return None if mask.bool().all() else mask


def _positions(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor:
    """[B,S]; the first real token of a row has position 0."""
    if mask is None:
        return torch.arange(past, past + length, device=device).unsqueeze(0)
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _allowed(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor | None:
    """[B or 1,1,S,T] bool, or None where nothing but order limits what is seen: a whole sequence, or its last token.

    Padding sees itself, so that no row is empty.
    """
    if mask is None and (past == 0 or length == 1):
        return None
    rows = torch.arange(past, past + length, device=device).unsqueeze(1)
    columns = torch.arange(past + length, device=device)
    causal = columns <= rows
    if mask is None:
        return causal[None, None]
    return (causal & mask.bool()[:, None, None, :]) | (columns == rows)


class HyLoForCausalLM(HyLoPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HyLoConfig):
        super().__init__(config)
        self.model = HyLoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """``generate`` makes no cache of its own; the first forward makes a ``HyLoCache``."""
        return False

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: HyLoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states)
        return result.to_tuple() if return_dict is False else result


AutoModel.register(HyLoConfig, HyLoModel, exist_ok=True)
AutoModelForCausalLM.register(HyLoConfig, HyLoForCausalLM, exist_ok=True)
