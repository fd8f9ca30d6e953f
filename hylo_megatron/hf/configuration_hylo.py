"""``HyLoConfig``: the description of a hybrid that its checkpoint carries as ``config.json``."""

import shutil
from pathlib import Path

from transformers.configuration_utils import PretrainedConfig

from hylo_megatron.config import Architecture, GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry
from hylo_megatron.config.architecture import misfit
from hylo_megatron.config.rope import checked_rope
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf.config_values import DEFAULT_ROPE, MIXERS, check_complete, check_values

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HyLoConfig(PretrainedConfig):
    """``mixers`` names each layer's mixer; ``layer_types`` is derived from it for transformers and vLLM.

    ``rope_parameters``, ``rms_norm_eps`` and the MLP sizes are the base model's. ``qk_norm``: per-head RMSNorm on
    MLA's queries and keys. ``linear_norm_eps``: of Gated DeltaNet's output norm, if another than ``rms_norm_eps``.
    ``base_*``, ``num_key_value_heads``, ``head_dim`` and ``attention_bias`` describe the base model's attention and
    ``architecture_extra`` belongs to training; nothing here computes with them.
    """

    model_type = "hylo"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 576,
        intermediate_size: int = 1536,
        num_hidden_layers: int | None = None,
        num_attention_heads: int = 9,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 8192,
        rope_parameters: dict = DEFAULT_ROPE,  # null in a file is refused
        tie_word_embeddings: bool = False,
        mixers: list[str] | None = None,
        linear_type: str | None = None,
        # MLA
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 256,
        qk_nope_head_dim: int = 64,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 64,
        qk_norm: bool = False,
        # Gated DeltaNet
        linear_num_key_heads: int = 9,
        linear_num_value_heads: int = 18,
        linear_key_head_dim: int = 64,
        linear_value_head_dim: int = 64,
        linear_conv_kernel_dim: int = 4,
        linear_norm_eps: float | None = None,
        # Mamba-2
        mamba_num_heads: int = 9,
        mamba_head_dim: int = 64,
        mamba_state_size: int = 64,
        mamba_num_groups: int = 9,
        mamba_conv_kernel: int = 4,
        # The base model
        base_model_type: str = "llama",
        base_qk_norm: bool = False,
        attention_bias: bool = False,
        architecture_extra: dict | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs,
    ):
        check_values({name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")})
        mixers = list(mixers or ["mla" if i % 4 == 0 else "gdn" for i in range(num_hidden_layers or 4)])
        if num_hidden_layers not in (None, len(mixers)):
            raise HyLoError(f"config.json: num_hidden_layers is {num_hidden_layers}, mixers has {len(mixers)} entries")
        kinds = set(mixers) - {"mla"}
        if len(kinds) > 1:
            raise HyLoError("config.json: mixers has both gdn and mamba2 layers; use one linear kind in a model")
        if hidden_act != "silu":
            raise HyLoError(f"config.json: hidden_act {hidden_act!r} is not supported, expected silu")
        kwargs.pop("layer_types", None)
        values = dict(locals())
        for name in ("self", "kwargs", "kinds", "mixers", "linear_type", "num_hidden_layers", "__class__"):
            values.pop(name, None)
        for name, value in values.items():
            setattr(self, name, value)
        self.mixers, self.num_hidden_layers = mixers, len(mixers)
        self.linear_type = kinds.pop() if kinds else linear_type or "gdn"
        self.layer_types = ["full_attention" if kind == "mla" else "linear_attention" for kind in mixers]
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rope_parameters = checked_rope(rope_parameters, max_position_embeddings, "config.json: rope_parameters")
        self.architecture_extra = dict(architecture_extra or {})
        if reason := misfit(self.to_architecture()):
            raise HyLoError(f"config.json: {reason}")
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """What ``from_pretrained`` calls: a file says everything that the model computes with."""
        try:
            check_complete(config_dict)
            return super().from_dict(config_dict, **kwargs)
        except HyLoError as error:
            said = str(error)
        except Exception as error:  # from transformers' own fields, such as id2label
            said = f"config.json: transformers cannot read it ({type(error).__name__}: {str(error)[:200]!r})"
        folder = kwargs.get("name_or_path")  # given by transformers' Auto classes
        raise HyLoError(f"{folder}/{said}" if folder else said)

    @classmethod
    def from_architecture(cls, arch: Architecture, **kwargs) -> "HyLoConfig":
        """Config of a hybrid; token ids come from ``arch.extra`` where it has them."""
        if not all(kind in MIXERS for kind in arch.plan) or arch.geometry is None:
            raise HyLoError("only hybrids have a HyLoConfig: this architecture still has attention layers")
        mla, gdn, mamba2 = arch.geometry.mla, arch.geometry.gdn, arch.geometry.mamba2
        tokens = {name: arch.extra[name] for name in _TOKENS if name in arch.extra}
        shared = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        shared += ("head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings")
        return cls(
            **{name: getattr(arch, name) for name in shared},
            mixers=list(arch.plan),
            linear_type=arch.linear_kind,
            q_lora_rank=mla.q_lora_rank,
            kv_lora_rank=mla.kv_lora_rank,
            qk_nope_head_dim=mla.qk_nope_head_dim,
            qk_rope_head_dim=mla.qk_rope_head_dim,
            v_head_dim=mla.v_head_dim,
            qk_norm=arch.mla_qk_norm,
            linear_num_key_heads=gdn.num_key_heads,
            linear_num_value_heads=gdn.num_value_heads,
            linear_key_head_dim=gdn.key_head_dim,
            linear_value_head_dim=gdn.value_head_dim,
            linear_conv_kernel_dim=gdn.conv_kernel,
            linear_norm_eps=gdn.norm_eps,
            mamba_num_heads=mamba2.num_heads,
            mamba_head_dim=mamba2.head_dim,
            mamba_state_size=mamba2.state_size,
            mamba_num_groups=mamba2.num_groups,
            mamba_conv_kernel=mamba2.conv_kernel,
            base_model_type=arch.model_type,
            base_qk_norm=arch.qk_norm,
            attention_bias=arch.attention_bias,
            architecture_extra=arch.extra,
            **{**tokens, "architectures": ["HyLoForCausalLM"], **kwargs},
        )

    def geometry(self) -> Geometry:
        return Geometry(
            MLAGeometry(
                self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.q_lora_rank
            ),
            GDNGeometry(
                self.linear_num_key_heads,
                self.linear_num_value_heads,
                self.linear_key_head_dim,
                self.linear_value_head_dim,
                self.linear_conv_kernel_dim,
                self.linear_norm_eps,
            ),
            Mamba2Geometry(
                self.mamba_num_heads,
                self.mamba_head_dim,
                self.mamba_state_size,
                self.mamba_num_groups,
                self.mamba_conv_kernel,
            ),
        )

    def to_architecture(self) -> Architecture:
        return Architecture(
            model_type=self.base_model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),
            tie_word_embeddings=self.tie_word_embeddings,
            plan=tuple(self.mixers),
            attention_bias=self.attention_bias,
            qk_norm=self.base_qk_norm,
            mla_qk_norm=self.qk_norm,
            geometry=self.geometry(),
            extra=dict(self.architecture_extra),
        )

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Writes ``config.json`` and the file that it names for processes that do not know ``model_type: hylo``."""
        classes = {"AutoConfig": "HyLoConfig", "AutoModel": "HyLoModel", "AutoModelForCausalLM": "HyLoForCausalLM"}
        self.auto_map = {auto: f"hylo_megatron_loader.{name}" for auto, name in classes.items()}
        super().save_pretrained(save_directory, **kwargs)
        shutil.copyfile(Path(__file__).with_name("in_folder.py"), Path(save_directory) / "hylo_megatron_loader.py")

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing: ``save_pretrained`` writes the loader, where transformers would copy this module."""
