"""``HyLoForCausalLM``: pre-norm decoder layers with a mixer of the registry and a SwiGLU MLP.

Start here; each mixer is in ``mixers/<name>/hf_module.py``.

Legend: B batch, S new positions, T all positions, D model.
"""

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple

from hylo_megatron import kernels
from hylo_megatron.config.positions import has_window
from hylo_megatron.hf import inputs
from hylo_megatron.hf.cache import HyLoCache
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.hf.packing import Documents, document_starts, restarted
from hylo_megatron.mixers import LINEAR, MIXERS
from hylo_megatron.mixers.hf_layers import HyLoRMSNorm, Rotation, real_tokens
from hylo_megatron.mixers.hf_linear import LinearMixer
from hylo_megatron.mixers.hf_window import HyLoWindow

_FP32 = sorted({rf"{MIXERS[kind].module}\.{name}$" for kind in LINEAR for name in MIXERS[kind].fp32})
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


class HyLoMLP(nn.Module):
    def __init__(self, config: HyLoConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(kernels.ops_for(x).swiglu(self.gate_proj(x), self.up_proj(x)))


class HyLoDecoderLayer(GradientCheckpointingLayer):
    """A mixer, named ``self_attn`` or ``mixer``, and an MLP."""

    def __init__(self, config: HyLoConfig, layer: int):
        super().__init__()
        entry = MIXERS[config.mixers[layer]]
        self.mixer_name = entry.module
        mixer = entry.part("hf_module").LAYER(config, layer)
        if has_window(config.window, entry.name):
            mixer.window = HyLoWindow(config, layer)
        setattr(self, entry.module, mixer)
        self.mlp = HyLoMLP(config)
        self.input_layernorm = HyLoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HyLoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BSD, angles, allowed, real_BS1, cache, documents=None) -> torch.Tensor:
        mix = getattr(self, self.mixer_name)
        beside = (angles, allowed, real_BS1, cache)
        normed = self.input_layernorm(x_BSD)
        x_BSD = x_BSD + (mix(normed, *beside) if documents is None else documents.apply(mix, normed))
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class HyLoPreTrainedModel(PreTrainedModel):
    config_class = HyLoConfig
    config: HyLoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyLoDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = _FP32
    _supports_sdpa = True
    _is_stateful = True  # generate refuses assisted decoding: states cannot be rolled back

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Do nothing, as ``HyLoConfig`` does."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearMixer):
            module.initial_values()


class HyLoModel(HyLoPreTrainedModel):
    def __init__(self, config: HyLoConfig):
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyLoDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HyLoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotation = Rotation(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: HyLoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """``attention_mask`` [B,T]: 1 for real tokens, cached ones included.

        ``position_ids`` that restart at 0, ``cu_seq_lens_q`` or ``seq_idx`` [B,S] separate packed documents.
        """
        x_BSD = self._embedded(input_ids, inputs_embeds)
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        inputs.refuse_unknown({**kwargs, "output_attentions": attentions})
        cache = self._cache(past_key_values, use_cache, len(x_BSD))
        past = 0 if cache is None else cache.length
        mask = inputs.checked_mask(attention_mask, len(x_BSD), past + x_BSD.shape[1])
        inputs.check_positions(position_ids, *x_BSD.shape[:2])
        real_BS = None if mask is None else mask[:, past:]
        starts_BS = document_starts(x_BSD.shape[:2], position_ids, real_BS, (cu_seq_lens_q, cu_seq_lens_k), seq_idx)
        if starts_BS is None:
            inputs.refuse_holes(mask)
        else:
            inputs.refuse_cache(use_cache, past_key_values)
            cache = None
        *beside, documents = self._beside(x_BSD, mask, position_ids, cache, starts_BS)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = []
        for layer in self.layers:
            if wanted:
                states.append(x_BSD)
            x_BSD = layer(x_BSD, *beside, cache, documents)
        if cache is not None:
            cache.length += x_BSD.shape[1]
        x_BSD = self.norm(x_BSD)
        return BaseModelOutputWithPast(x_BSD, cache, (*states, x_BSD) if wanted else None)

    def _embedded(self, input_ids, inputs_embeds) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("HyLoModel: give either input_ids or inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _beside(self, x_BSD, mask, position_ids, cache: HyLoCache | None, starts_BS):
        """Return what layers need besides ``x_BSD``: angles, what each query sees, real tokens, packed
        documents.
        """
        past, length, device = 0 if cache is None else cache.length, x_BSD.shape[1], x_BSD.device
        if starts_BS is not None:
            angles = self.rotation(restarted(starts_BS))
            return angles, None, None, Documents(starts_BS, angles)
        angles = self.rotation(self._positions(x_BSD, mask, position_ids, cache))
        if past and self.config.qk_norm:
            key_cos, key_sin = self.rotation.of_mla(cache.positions(mask, past + length, device))
            angles = angles._replace(key_cos=key_cos, key_sin=key_sin)
        real_BS1 = real_tokens(None if mask is None else mask[:, past:])
        return angles, inputs.allowed(mask, past, length, device), real_BS1, None

    def _positions(self, x_BSD, mask, position_ids, cache: HyLoCache | None) -> torch.Tensor:
        """Return the positions of the tokens, and let ``cache`` know them if they are not counted from 0 plainly."""
        (batch, length), device = x_BSD.shape[:2], x_BSD.device
        past, rows = (0, None) if cache is None else (cache.length, cache.rows)
        if mask is None and position_ids is None and rows is None:
            return torch.arange(past, past + length, device=device).unsqueeze(0)
        rows = rows or inputs.Rows.plain(batch, past, device)
        if past:
            rows.check(mask, position_ids, past)
        new_BS = x_BSD.new_ones(batch, length, dtype=torch.bool) if mask is None else mask[:, past:]
        positions = rows.positions(new_BS) if position_ids is None else position_ids
        if cache is not None:
            cache.rows = rows.after(positions, new_BS)
        return positions

    def _cache(self, given, use_cache: bool | None, batch: int) -> HyLoCache | None:
        """Return the cache that this call reads and writes, or None."""
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if given is None:
            use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
            return HyLoCache(len(self.layers)) if use_cache and not checkpointed else None
        if not isinstance(given, HyLoCache):
            raise ValueError(f"HyLoModel: past_key_values is a {type(given).__name__}, expected None or a HyLoCache")
        if checkpointed:
            raise ValueError(
                "HyLoModel: past_key_values cannot be used with gradient checkpointing: call model.eval()"
            )
        given.check_fits(len(self.layers), batch)
        return given


class HyLoForCausalLM(HyLoPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HyLoConfig):
        super().__init__(config)
        self.model = HyLoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *_, **__) -> None:
        """Give ``generate`` its cache. transformers' caches, including static ones, do not have these states."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f"HyLoForCausalLM: cache_implementation {kind!r} is not supported: leave it out")
        if generation_config.prefill_chunk_size and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("HyLoForCausalLM: prefill_chunk_size splits input_ids only: give no inputs_embeds")
        mask = model_kwargs.get("attention_mask")
        if mask is not None and (mask[:, -1] == 0).any():
            raise ValueError(
                "HyLoForCausalLM: attention_mask ends in padding, after which no token can be generated: "
                "set tokenizer.padding_side to 'left'"
            )
        if generation_config.is_assistant:
            raise ValueError("HyLoForCausalLM cannot be an assistant_model: its states cannot be rolled back")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HyLoCache(self.config.num_hidden_layers)

    def init_continuous_batching(self, *_, **__):
        raise ValueError("HyLoForCausalLM: continuous batching in transformers is not supported: serve with vLLM")

    @can_return_tuple
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
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with ``labels`` the loss.

        ``kwargs``: arguments of ``HyLoModel.forward`` and of the loss function.
        """
        for_loss = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **for_loss)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states)


AutoModel.register(HyLoConfig, HyLoModel, exist_ok=True)
AutoModelForCausalLM.register(HyLoConfig, HyLoForCausalLM, exist_ok=True)
