"""Random hybrids as exported folders, and what transformers says of them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry
from hylo_megatron.hf import HyLoConfig, HyLoForCausalLM
from hylo_megatron.mixers.kda.geometry import KDAGeometry

CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}<s>assistant\n"
SMALL = dict(hidden_size=128, intermediate_size=192, num_attention_heads=4, max_position_embeddings=32768)
# Every published geometry, and the native one (arXiv 2604.24715, appendix), at its own head sizes and fewer heads.
GEOMETRIES = {
    "native": Geometry(
        MLAGeometry(256, 64, 64, 64), GDNGeometry(2, 4, 64, 64), Mamba2Geometry(4, 64, 64, 4), KDAGeometry(4, 64)
    ),
    "native-100": Geometry(MLAGeometry(256, 50, 50, 100), GDNGeometry(2, 4, 100, 100), Mamba2Geometry(4, 100, 100, 4)),
    "split": Geometry(MLAGeometry(128, 64, 32, 64), GDNGeometry(2, 4, 64, 64), Mamba2Geometry(4, 64, 64, 4)),
    "llama-1b": Geometry(
        MLAGeometry(128, 32, 32, 64, q_lora_rank=96), GDNGeometry(2, 2, 256, 512), Mamba2Geometry(4, 64, 64, 4)
    ),
    "llama-3b": Geometry(
        MLAGeometry(128, 64, 64, 128, q_lora_rank=96), GDNGeometry(2, 2, 256, 512), Mamba2Geometry(2, 128, 128, 2)
    ),
    "qwen3-1.7b": Geometry(
        MLAGeometry(256, 64, 64, 128, q_lora_rank=96), GDNGeometry(2, 2, 256, 512), Mamba2Geometry(2, 128, 128, 2)
    ),
}


def write_tokenizer(folder: Path) -> int:
    """A token a byte, and three special ones."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "chat_template": CHAT,
    }))  # fmt: skip
    return len(vocabulary)


def write_folder(
    folder: Path, geometry: str, linear: str, qk_norm: bool = False, dtype=torch.float32, seed: int = 0, **changes
) -> Path:
    """Three linear blocks of ``linear`` and two MLA layers; weights large enough for every layer to matter."""
    folder.mkdir(parents=True)
    config = HyLoConfig(
        vocab_size=write_tokenizer(folder), qk_norm=qk_norm,
        bos_token_id=1, eos_token_id=2, architectures=["HyLoForCausalLM"], initializer_range=0.12, **SMALL,
        **sizes(GEOMETRIES[geometry]), rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        **{"mixers": [linear, "mla", linear, linear, "mla"]} | changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = HyLoForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith(("weight", "_proj.bias")):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder)
    return folder


def sizes(geometry: Geometry) -> dict:
    mla, gdn, mamba2, kda = geometry.mla, geometry.gdn, geometry.mamba2, geometry.kda
    later = dict(kda_num_heads=kda.num_heads, kda_head_dim=kda.head_dim) if kda else {}
    return later | dict(
        q_lora_rank=mla.q_lora_rank, kv_lora_rank=mla.kv_lora_rank, qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim, v_head_dim=mla.v_head_dim, linear_num_key_heads=gdn.num_key_heads,
        linear_num_value_heads=gdn.num_value_heads, linear_key_head_dim=gdn.key_head_dim,
        linear_value_head_dim=gdn.value_head_dim, mamba_num_heads=mamba2.num_heads, mamba_head_dim=mamba2.head_dim,
        mamba_state_size=mamba2.state_size, mamba_num_groups=mamba2.num_groups,
    )  # fmt: skip


def prompt(length: int, salt: int = 0) -> list[int]:
    return [1] + [3 + (17 * i * i + 29 * i + 31 * salt) % 250 for i in range(length - 1)]


@torch.no_grad()
def log_probabilities(model: HyLoForCausalLM, tokens: list[int], last: int) -> torch.Tensor:
    """``[last, vocabulary]`` of the ``last`` positions that predict ``tokens``' last ones."""
    logits = model(torch.tensor([tokens[:-1]], device=model.device), use_cache=False, logits_to_keep=last).logits[0]
    return logits.float().log_softmax(-1)
