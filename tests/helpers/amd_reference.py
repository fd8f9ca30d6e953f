"""Tiny releases in the layout of AMD's HyLo models, and what they compute: plain torch in fp64, one sequence, token by
token, nothing from hylo_megatron.

Written from ``Zebra-Llama/hybrid`` in github.com/AMD-AGI/AMD-Hybrid-Models (MLA, Mamba-2) and fla's ``GatedDeltaNet``.
Legend: S sequence, H heads, K key dim, V value dim, P head dim, N state.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

VOCAB = 300


def config_files(kind: str) -> tuple[dict, dict]:
    """``(config.json, hybrid_config.json)`` of a published geometry with every width divided; linear layers Mamba-2
    if ``kind`` ends in m2."""
    name, linear = kind.split("-")
    hidden, heads, rank, gdn_dim, mla = {
        "llama1b": (128, 8, 84, 16, [1]), "llama3b": (96, 6, 48, 8, [0, 2]), "qwen1p7b": (64, 4, 42, 8, [1, 3]),
    }[name]  # fmt: skip
    eps, theta = (1e-6, 1e6) if name == "qwen1p7b" else (1e-5, 5e5)
    base = dict(
        model_type="qwen3" if name == "qwen1p7b" else "llama", vocab_size=VOCAB, hidden_size=hidden,
        intermediate_size=56, num_hidden_layers=4, num_attention_heads=heads, num_key_value_heads=2, head_dim=16,
        rms_norm_eps=eps, rope_theta=theta, max_position_embeddings=131072, tie_word_embeddings=True,
        hidden_act="silu", attention_bias=False, bos_token_id=1, eos_token_id=[2, 3], architectures=["XForCausalLM"],
    )  # fmt: skip
    rope = {"llama1b": (4.0, 2048), "llama3b": (32.0, 2048), "qwen1p7b": (2.0 if linear == "m2" else 1.0, 32768)}[name]
    hybrid = dict(
        hidden_size=hidden, intermediate_size=56, hidden_act="silu", n_layer=4, mla_layers=mla, rms_norm_eps=eps,
        num_attention_heads=heads, num_key_value_heads=2, kv_lora_rank=24, q_lora_rank=rank, use_lora_layer_norm=False,
        use_full_kv_head=False, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8, qkv_rank_divisor=8,
        max_position_embeddings=131072, rope_theta=theta, attention_bias=False, attention_dropout=0.0,
        rope_scaling=dict(factor=rope[0], original_max_position_embeddings=rope[1], rope_type="yarn"),
        rope_type="yarn", d_model=hidden, d_inner=16 * heads, d_xb=32, gdn_num_heads=9 if name == "llama3b" else 6,
        gdn_head_dim=gdn_dim,
        ssm_cfg=dict(expand=1, ngroups=heads, d_state=16, repeat_kv_before_conv=False),
    )  # fmt: skip
    return base, hybrid


def shapes(base: dict, c: dict, linear: str) -> dict[str, tuple[int, ...]]:
    """Their tensors."""
    d, heads, head = c["hidden_size"], c["num_attention_heads"], c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    kv_heads = heads if c["use_full_kv_head"] else c["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (base["vocab_size"], d), "model.norm.weight": (d,),
             "lm_head.weight": (base["vocab_size"], d)}  # fmt: skip
    mla = {
        "q_a_proj": (c["q_lora_rank"], d), "q_b_proj": (heads * head, c["q_lora_rank"]),
        "kv_a_proj_with_mqa": (c["kv_lora_rank"] + c["qk_rope_head_dim"], d),
        "kv_b_proj": (kv_heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]),
        "out_proj": (d, heads * c["v_head_dim"]),
    } | ({"q_norm": (head,), "k_norm": (head,)} if base["model_type"] == "qwen3" else {})  # fmt: skip
    keys = c["gdn_num_heads"] * c["gdn_head_dim"]
    rows = {"q": keys, "k": keys, "v": 2 * keys, "g": 2 * keys, "a": c["gdn_num_heads"], "b": c["gdn_num_heads"]}
    gdn = {f"{n}_proj.weight": (size, d) for n, size in rows.items()} | {
        f"{n}_conv1d.weight": (rows[n], 1, 4) for n in "qkv"
    }  # fmt: skip
    gdn |= {"A_log": (rows["a"],), "dt_bias": (rows["a"],), "o_norm.weight": (2 * c["gdn_head_dim"],),
            "o_proj.weight": (d, 2 * keys)}  # fmt: skip
    inner, xb, groups = c["d_inner"], c["d_xb"], c["ssm_cfg"]["ngroups"]
    conv = 3 * inner if c["ssm_cfg"]["repeat_kv_before_conv"] else inner + 2 * xb
    mamba = {
        "in_proj.weight": (2 * inner + 2 * xb + groups, d), "conv1d.weight": (conv, 1, 4), "conv1d.bias": (conv,),
        "A_log": (groups,), "D": (groups,), "dt_bias": (groups,), "norm.weight": (inner,),
        "out_proj.weight": (d, inner),
    }  # fmt: skip
    for i in range(c["n_layer"]):
        if i in c["mla_layers"]:
            mixer = {f"mla.{name}.weight": shape for name, shape in mla.items()}
        else:
            mixer = (
                {f"mamba.{n}": s for n, s in mamba.items()}
                if linear == "m2"
                else {f"gdn.{n}": s for n, s in gdn.items()}
            )
        wide = c["intermediate_size"]
        block = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "mlp.gate_proj": (wide, d),
                 "mlp.up_proj": (wide, d), "mlp.down_proj": (d, wide)}  # fmt: skip
        layer = mixer | {f"{name}.weight": shape for name, shape in block.items()}
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def random_tensors(base: dict, hybrid: dict, linear: str, seed: int = 0) -> dict[str, Tensor]:
    """fp32, large enough that every tensor shows in the logits."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(base, hybrid, linear).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("A_log", "dt_bias", ".D")):
            noise = noise.clamp(-1.5, 1.5) * 0.7
        elif "norm" in name:
            noise = (0.3 if name == "model.norm.weight" else 1) * (1 + 0.3 * noise)
        elif "conv1d" in name:
            noise = noise * 0.5
        else:
            noise = noise * (0.3 if "embed" in name else 0.8 * shape[-1] ** -0.5)
        state[name] = noise
    if base["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    return state


@dataclass
class TinyRelease:
    folder: Path
    base: dict
    hybrid: dict
    state: dict[str, Tensor]

    def logits(self, tokens_S: Tensor, interleaved: bool = True) -> Tensor:
        return logits(self.base, self.hybrid, self.state, tokens_S, interleaved)


def write(folder: Path, kind: str, base: dict | None = None, hybrid: dict | None = None) -> TinyRelease:
    """A release's folder without a tokenizer. ``base``, ``hybrid``: fields to change."""
    config, hybrid_config = config_files(kind)
    config, hybrid_config = config | (base or {}), hybrid_config | (hybrid or {})
    state = random_tensors(config, hybrid_config, kind.split("-")[1])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hybrid_config.json").write_text(json.dumps(hybrid_config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return TinyRelease(folder, config, hybrid_config, state)


# ---- the forward pass ----


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def frequencies(c: dict) -> tuple[Tensor, float]:
    """Angle per position of each pair, and what the rotated vector is scaled by."""
    size, theta, scaling = c["qk_rope_head_dim"], c["rope_theta"], c["rope_scaling"]
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    if scaling is None:
        return plain, 1.0
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"], 1.0
    window = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return size * math.log(window / (times * 2 * math.pi)) / (2 * math.log(theta))

    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    low, high = max(math.floor(pair_that_turns(fast)), 0), min(math.ceil(pair_that_turns(slow)), size - 1)
    ramp = ((torch.arange(size // 2) - low) / (high - low if high > low else 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / scaling["factor"] * ramp, 1 + 0.1 * math.log(scaling["factor"])


def turned(x_SP: Tensor, c: dict, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, each times its rotation; the order of the result does not matter to a product."""
    angles, scale = frequencies(c)
    pairs = x_SP.view(len(x_SP), -1, 2) if interleaved else x_SP.view(len(x_SP), 2, -1).mT
    steps = torch.arange(len(x_SP))[:, None] * angles
    return torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(scale + 0 * steps, steps)
    ).flatten(1)


def mla(x: Tensor, w: dict, c: dict, eps: float, interleaved: bool) -> Tensor:
    heads, nope, out = c["num_attention_heads"], c["qk_nope_head_dim"], []
    q = (x @ w["q_a_proj.weight"].T @ w["q_b_proj.weight"].T).view(len(x), heads, -1)
    latent, k_rope = (x @ w["kv_a_proj_with_mqa.weight"].T).split([c["kv_lora_rank"], c["qk_rope_head_dim"]], -1)
    kv = (latent @ w["kv_b_proj.weight"].T).view(len(x), -1, nope + c["v_head_dim"])
    future = torch.ones(len(x), len(x)).triu(1).bool()
    for h in range(heads):
        of_head = kv[:, h // (heads // kv.shape[1])]
        query, key = q[:, h], torch.cat([of_head[:, :nope], k_rope], -1)
        if "q_norm.weight" in w:
            query, key = rms(query, eps) * w["q_norm.weight"], rms(key, eps) * w["k_norm.weight"]
        scores = query[:, :nope] @ key[:, :nope].T
        scores = scores + turned(query[:, nope:], c, interleaved) @ turned(key[:, nope:], c, interleaved).T
        weights = (scores / query.shape[1] ** 0.5).masked_fill(future, -math.inf).softmax(-1)
        out.append(weights @ of_head[:, nope:])
    return torch.cat(out, -1) @ w["out_proj.weight"].T


def convolved(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Depthwise, causal, SiLU; token by token."""
    before = torch.cat([x.new_zeros(weight.shape[-1] - 1, x.shape[1]), x])
    return torch.stack(
        [F.silu((before[t : t + weight.shape[-1]].T * weight[:, 0]).sum(1) + bias) for t in range(len(x))]
    )


def mamba(x: Tensor, w: dict, c: dict) -> Tensor:
    inner, xb, heads, size = c["d_inner"], c["d_xb"], c["ssm_cfg"]["ngroups"], c["ssm_cfg"]["d_state"]
    z, x_in, B, C, dt = (x @ w["in_proj.weight"].T).split([inner, xb, xb, inner, heads], -1)
    if c["ssm_cfg"]["repeat_kv_before_conv"]:
        x_in, B = (t.view(len(x), -1, size).repeat_interleave(inner // xb, 1).flatten(1) for t in (x_in, B))
    seen = convolved(torch.cat([x_in, B, C], -1), w["conv1d.weight"], w["conv1d.bias"])
    x_in, B, C = (t.view(len(x), -1, size) for t in seen.split([x_in.shape[1], B.shape[1], inner], -1))
    shared = heads // x_in.shape[1]  # heads that read one head of x and B
    dt, A, out = F.softplus(dt + w["dt_bias"]), -w["A_log"].exp(), []
    state = x.new_zeros(heads, size, size)
    for t in range(len(x)):
        y = x.new_zeros(heads, size)
        for h in range(heads):
            value, write = x_in[t, h // shared], B[t, h // shared]
            state[h] = state[h] * (dt[t, h] * A[h]).exp() + dt[t, h] * torch.outer(value, write)
            y[h] = state[h] @ C[t, h] + w["D"][h] * value
        out.append(rms(y * F.silu(z[t].view(heads, size)), 1e-5).flatten())
    return torch.stack(out) * w["norm.weight"] @ w["out_proj.weight"].T


def gdn(x: Tensor, w: dict, c: dict) -> Tensor:
    heads, size = c["gdn_num_heads"], c["gdn_head_dim"]
    q, k, v = (convolved(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]).view(len(x), heads, -1) for n in "qkv")
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    decay = (-w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])).exp()
    beta, gate, out = torch.sigmoid(x @ w["b_proj.weight"].T), x @ w["g_proj.weight"].T, []
    state = x.new_zeros(heads, size, 2 * size)
    for t in range(len(x)):
        y = x.new_zeros(heads, 2 * size)
        for h in range(heads):
            state[h] = state[h] * decay[t, h]
            state[h] = state[h] + torch.outer(k[t, h], beta[t, h] * (v[t, h] - k[t, h] @ state[h]))
            y[h] = q[t, h] @ state[h] * size**-0.5
        out.append((rms(y, 1e-5) * w["o_norm.weight"] * F.silu(gate[t].view(heads, -1))).flatten())
    return torch.stack(out) @ w["o_proj.weight"].T


def logits(base: dict, c: dict, state: dict[str, Tensor], tokens_S: Tensor, interleaved: bool = True) -> Tensor:
    """[S, vocabulary], fp64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    x, eps = state["model.embed_tokens.weight"][tokens_S], base["rms_norm_eps"]
    for i in range(c["n_layer"]):
        layer = {
            n.removeprefix(f"model.layers.{i}."): t for n, t in state.items() if n.startswith(f"model.layers.{i}.")
        }
        mixers = {part: {n.removeprefix(part): t for n, t in layer.items() if n.startswith(part)}
                  for part in ("mla.", "mamba.", "gdn.")}  # fmt: skip
        normed = rms(x, eps) * layer["input_layernorm.weight"]
        if i in c["mla_layers"]:
            x = x + mla(normed, mixers["mla."], c, eps, interleaved)
        elif mixers["mamba."]:
            x = x + mamba(normed, mixers["mamba."], c)
        else:
            x = x + gdn(normed, mixers["gdn."], c)
        normed = rms(x, eps) * layer["post_attention_layernorm.weight"]
        wide = F.silu(normed @ layer["mlp.gate_proj.weight"].T) * (normed @ layer["mlp.up_proj.weight"].T)
        x = x + wide @ layer["mlp.down_proj.weight"].T
    return rms(x, eps) * state["model.norm.weight"] @ state["lm_head.weight"].T
