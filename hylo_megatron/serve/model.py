"""``HyLoForCausalLM`` for vLLM. Start here; each mixer is in ``mixers/<name>/vllm_module.py``."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsPP
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from hylo_megatron.config.positions import has_window
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers import CACHED, MIXERS, Mixer
from hylo_megatron.mixers.serving import stages, trained_geometry
from hylo_megatron.mixers.vllm_window import HyLoWindow, add_window, places
from hylo_megatron.mixers.window import holders
from hylo_megatron.serve.config import refuse
from hylo_megatron.serve.weights import Padding, check_parts, fits, served_weights


class HyLoDecoderLayer(nn.Module):
    def __init__(self, config, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        layers, number = prefix.rsplit(".", 1)
        entry = MIXERS[config.mixers[int(number)]]
        self.mixer_name, self.windowed = entry.module, has_window(config.window, entry.name)
        layer = entry.part("vllm_module").LAYER(config, vllm_config, f"{prefix}.{entry.module}")
        if self.windowed:
            holder, place = holders(config.mixers, config.window, stages(vllm_config))[int(number)]
            name = f"{layers}.{holder}.{MIXERS[config.mixers[holder]].module}"
            add_window(layer, HyLoWindow(config, vllm_config, f"{prefix}.{entry.module}", name, place))
        setattr(self, entry.module, layer)
        sizes, quant = (config.hidden_size, config.intermediate_size), vllm_config.quant_config
        self.mlp = LlamaMLP(*sizes, config.hidden_act, quant_config=quant, prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_TD: Tensor, residual_TD: Tensor | None, angles: Angles) -> tuple[Tensor, Tensor]:
        if residual_TD is None:
            normed, residual_TD = self.input_layernorm(hidden_TD), hidden_TD
        else:
            normed, residual_TD = self.input_layernorm(hidden_TD, residual_TD)
        mixer = getattr(self, self.mixer_name)
        mixed = mixer.mix(normed, angles)
        if self.windowed:
            mixed = mixed + mixer.window(normed, angles)
        normed, residual_TD = self.post_attention_layernorm(mixed, residual_TD)
        return self.mlp(normed), residual_TD


class HyLoModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        pipeline = get_pp_group()
        if pipeline.is_first_rank or (config.tie_word_embeddings and pipeline.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: HyLoDecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = norm if pipeline.is_last_rank else PPMissingLayer()
        self.rotation = MIXERS[CACHED[0]].part("vllm_module").Rotation(config)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        residual = None
        if get_pp_group().is_first_rank:
            hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        angles = self.rotation(positions)
        for layer in self.layers[self.start_layer : self.end_layer]:
            hidden, residual = layer(hidden, residual, angles)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        return self.norm(hidden, residual)[0]


if current_platform.is_cpu():
    from hylo_megatron.serve.cpu import keep_weights
else:  # our code for CPUs reads vLLM's metadata, which a compiled graph cannot
    HyLoModel = support_torch_compile(HyLoModel)


class HyLoForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsPP):
    # Without SupportsMambaPrefixCaching: its caches of all blocks' states are read by Mamba-2's layers only.
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        refuse(vllm_config)  # once more: vLLM asks no EngineSettings for a draft model
        self.config = config = vllm_config.model_config.hf_config
        self.quantized, self.dtype = vllm_config.quant_config is not None, vllm_config.model_config.dtype
        self.model = HyLoModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            sizes, where = (config.vocab_size, config.hidden_size), maybe_prefix(prefix, "lm_head")
            self.lm_head = ParallelLMHead(*sizes, quant_config=vllm_config.quant_config, prefix=where)
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        if current_platform.is_cpu():
            keep_weights(self)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    # ---- the recurrent states, as vLLM's cache keeps them ----

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig):
        cache = vllm_config.cache_config
        types = cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        found = _linear(vllm_config).part("vllm_module").state_dtypes(vllm_config.model_config.dtype, *types)
        return (*found, found[0]) if vllm_config.model_config.hf_config.window else found

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig):
        entry, tp = _linear(vllm_config), vllm_config.parallel_config.tensor_parallel_size
        config = vllm_config.model_config.hf_config
        found = entry.part("vllm_module").state_shapes(tp, entry.dimensions(config.geometry()))
        return (*found, places(vllm_config)) if config.window else found

    def get_mamba_state_copy_func(self):
        """Return how prefix caching copies each state. vLLM declares a class method, and asks the model itself."""
        copies = MambaStateCopyFuncCalculator.mamba2_state_copy_func()  # those of a convolution and of a recurrence
        return (*copies, copies[1]) if self.config.window else copies

    def get_mamba_state_copy_funcs(self, mamba_types):
        return dict.fromkeys(mamba_types, self.get_mamba_state_copy_func())

    # ---- running ----

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **_):
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a whole folder when vLLM starts, and any part of one afterwards.

        Trainers send updates tensor by tensor, in any order. vLLM calls ``eval`` after the first load.
        """
        starting, reloading = self.training, under_reload(self)
        if self.quantized and not starting and not reloading:
            raise HyLoError(
                "--quantization: tensors in the trained precision cannot be written into quantised weights one by one;"
                " start vLLM without the option, or send whole updates through its reload_weights"
            )
        loaded, parts = set(), set()
        for name, part in self._write(weights):
            loaded.add(name)
            parts.add((name, part))
        if starting:
            self._check_complete(loaded, parts)
        elif not reloading:
            self._derive(loaded)
        return loaded

    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str | int | None]]:
        """Write each tensor into its parameter, and yield the parameter's name and the part that was written."""
        config, parameters = self.config, dict(self.named_parameters())
        padding = Padding(trained=trained_geometry(config), served=config.geometry(),
                          heads=config.num_attention_heads, kinds=frozenset(config.mixers))  # fmt: skip
        head = None
        for name, tensor, part in served_weights(weights, padding):
            if is_pp_missing_parameter(name, self):
                continue
            if name == "lm_head.weight" and config.tie_word_embeddings:
                head = tensor
                continue
            if name not in parameters:
                raise HyLoError(f"{name} is in the folder, and no layer of its config.json has such a parameter")
            parameter = parameters[name]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            with fits(name, tensor):
                load(parameter, tensor, *([] if part is None else [part]))
            yield name, part
        if head is not None and self.training:
            self._check_tied(head)

    def _check_tied(self, head: Tensor) -> None:
        """Refuse a head that differs from the embedding: vLLM 0.32 unties the two before, 0.26 would drop the head."""
        rows = self.model.embed_tokens.shard_indices
        own = head[rows.org_vocab_start_index : rows.org_vocab_end_index]
        embedding = self.model.embed_tokens.weight[: len(own)]
        if not torch.equal(embedding, own.to(embedding)):
            raise HyLoError(
                "lm_head.weight differs from model.embed_tokens.weight, and config.json has tie_word_embeddings true:"
                " set it to false, or remove the tensor"
            )

    def _check_complete(self, loaded: set[str], parts: set) -> None:
        """Raise ``HyLoError`` for parameters without a tensor.

        vLLM overlooks those of its linear layers, and takes a merged parameter for loaded when one part has arrived.
        """
        check_parts(parts, self.config.mixers)
        # Quantised layers have scales that no folder of ours has.
        missing = [] if self.quantized else sorted(dict(self.named_parameters()).keys() - loaded)
        if missing:
            raise HyLoError(f"no tensor in the folder for {', '.join(missing[:5])} ({len(missing)} in all)")

    def _derive(self, loaded: set[str]) -> None:
        """Let layers compute anew what they derived from weights that are now replaced."""
        for name, module in self.named_modules():
            if hasattr(module, "derive"):
                module.derive(name, loaded, self.dtype)


def _linear(vllm_config: VllmConfig) -> Mixer:
    return MIXERS[vllm_config.model_config.hf_config.linear_type]


def under_reload(model: nn.Module) -> bool:
    """Return whether vLLM's own reload is under way, which gathers a layer's tensors and processes them at its end."""
    return any(get_layerwise_info(module).can_load() for module in model.modules())
