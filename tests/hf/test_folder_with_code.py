"""Folders that ``hylo export --with-code`` writes: they load where this package is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import YARN, hybrid, write_hybrid, write_tokenizer

from hylo_megatron.convert.megatron_to_hf import convert
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf.assemble import assembled
from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

transformers = pytest.importorskip("transformers")

KINDS = {
    "gdn": {"linear_rope": True, "log_scale": {"base": 2.0, "length": 16}},
    "kda": {"tie_word_embeddings": False, "mla_rope": False},
    "mamba2": {"rope_parameters": YARN, "mla_qk_norm": True},
}
NEEDED = {"torch", "transformers", "pydantic", "typing_extensions"}  # what the folder's code may import without a try
IDS = torch.arange(3, 40)[None]


def export(folder: Path, linear: str = "gdn", with_code: bool = True) -> Path:
    arch, out = hybrid(linear, **KINDS[linear]), folder / linear
    write_hybrid(folder / f"{linear}-ckpt", arch)
    convert(folder / f"{linear}-ckpt", out, with_code=with_code)
    write_tokenizer(out, arch.vocab_size)
    return out


# ---- the assembled files ----


def imports_the_package(text: str) -> bool:
    """Whether ``text`` imports hylo_megatron, or names one of its modules in a string."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        if any(name.startswith("hylo_megatron.") or name == "hylo_megatron" for name in names):
            return True
    return False


def test_no_file_imports_the_package():
    assert not [name for name, text in assembled().items() if imports_the_package(text)]
    package = Path(sys.modules["hylo_megatron"].__file__).parent
    assert imports_the_package((package / "mixers" / "registry.py").read_text())
    assert imports_the_package((package / "hf" / "modeling_hylo.py").read_text())


def test_files_are_what_transformers_asks_for(tmp_path):
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    files = assembled()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    entry = tmp_path / "hf_modeling_hylo.py"
    assert {entry.name, *(f"{name}.py" for name in get_relative_imports(entry))} == files.keys()
    for name in files:  # transformers refuses code that imports something that is missing, except in a try
        assert set(get_imports(tmp_path / name)) <= NEEDED | set(sys.stdlib_module_names), name
    assert "    from fla.modules" in files["kernels_fused.py"]
    assert "    import triton\n" in files["kernels_triton_conv.py"]
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=E,F,B,UP", "--ignore=E501", tmp_path]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


# ---- a process without the package ----

ALONE = """
import json, sys
from pathlib import Path
import torch
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("hylo_megatron", "fla"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
own = {"trust_remote_code": True}
ids, result = torch.arange(3, 40)[None], {}
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, **own)
    assert type(AutoConfig.from_pretrained(folder, **own)) is type(model.config)
    assert type(AutoModel.from_pretrained(folder, **own)) is type(model.model)
    logits = model(ids).logits
    torch.save(logits, folder / "logits.pt")
    options = dict(max_new_tokens=6, do_sample=False)
    tokens = model.generate(ids, **options)
    assert torch.equal(tokens, model.generate(ids, **options, use_cache=False))
    text = pipeline("text-generation", model=str(folder), **own)("w5 w6", **options)[0]["generated_text"]
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **own)
    assert torch.equal(again(ids).logits, logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **own)
    kept = sorted({name.rpartition(".")[2] for name, p in half.named_parameters() if p.dtype == torch.float32})
    result[folder.name] = [type(model).__module__, tokens.tolist(), text, kept]
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as shifted
result["label smoothing"] = shifted.get("hylo")
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {linear: export(root, linear) for linear in KINDS}


def test_where_the_package_is_not_installed(folders, tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, folders.values())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["label smoothing"] == "HyLoForCausalLM"
    for linear, folder in folders.items():
        module, tokens, text, kept = result[linear]
        assert module.startswith("transformers_modules.") and module.endswith(".hf_modeling_hylo")
        model = HyLoForCausalLM.from_pretrained(folder)
        assert torch.equal(torch.load(folder / "logits.pt"), model(IDS).logits)
        options = dict(max_new_tokens=6, do_sample=False)
        assert model.generate(IDS, **options).tolist() == tokens
        assert transformers.pipeline("text-generation", str(folder))("w5 w6", **options)[0]["generated_text"] == text
        assert kept == ["A_log", "D", "dt_bias"] if linear == "mamba2" else ["A_log", "dt_bias"]


# ---- a process with the package ----


def test_the_package_comes_first_and_keeps_the_code(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["gdn"], trust_remote_code=True)
    assert type(model) is HyLoForCausalLM
    model.save_pretrained(tmp_path)
    code = {file.name: file.read_text() for file in (tmp_path / "hylo_code").iterdir()}
    assert code == assembled() and not (tmp_path / "hylo_megatron_loader.py").exists()
    assert (
        json.loads((tmp_path / "config.json").read_text())["auto_map"]
        == json.loads((folders["gdn"] / "config.json").read_text())["auto_map"]
    )


def test_without_the_flag_there_is_only_a_loader(tmp_path):
    folder = export(tmp_path, with_code=False)
    assert (folder / "hylo_megatron_loader.py").is_file() and not (folder / "hylo_code").exists()


def test_a_transformer_needs_no_code(tmp_path):
    write_hybrid(tmp_path / "ckpt", hybrid().as_teacher())
    with pytest.raises(HyLoError, match="--with-code is for hybrids"):
        convert(tmp_path / "ckpt", tmp_path / "out", with_code=True)
    assert not (tmp_path / "out").exists()
