"""Checkpoints and exports of earlier code: what they held, and that training goes on from them."""

import json
import subprocess
import sys

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import golden_runs as golden  # noqa: E402
from helpers import old_files as old  # noqa: E402
from helpers import train as helpers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import hylo_megatron.convert.megatron_to_hf  # noqa: E402

each_kind = pytest.mark.parametrize("kind", sorted(path.name for path in old.OLD.iterdir()))

# A program that never imports the package: transformers finds it by the loader in the folder.
STRANGER = """
import json, sys, torch, transformers
assert not any(name.startswith("hylo_megatron") for name in sys.modules)
folder, prompt = sys.argv[1], json.loads(sys.argv[2])
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(folder, dtype=torch.float32, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
assert tokenizer("w5 w6", add_special_tokens=False)["input_ids"] == [5, 6]
with torch.no_grad():
    print(json.dumps(model(torch.tensor([prompt])).logits[0].tolist()))
"""


def expected(kind: str) -> dict:
    return json.loads((old.OLD / kind / "expected.json").read_text())


def same_logits(found: list, kind: str) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected(kind)["logits"]), rtol=1e-5, atol=1e-5)


@each_kind
def test_an_old_checkpoint_is_exported(kind, tmp_path):
    hylo_megatron.convert.megatron_to_hf.convert(old.OLD / kind / "checkpoint", tmp_path / "hf")
    same_logits(old.logits(tmp_path / "hf"), kind)
    files = [folder / "model.safetensors" for folder in (tmp_path / "hf", old.OLD / kind / "export")]
    found, before = map(load_file, files)
    assert found.keys() == before.keys()
    for key, tensor in before.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@each_kind
def test_an_old_export_loads(kind):
    same_logits(old.logits(old.OLD / kind / "export"), kind)


def test_an_old_export_loads_where_the_package_is_not_imported(tmp_path):
    argv = [sys.executable, "-c", STRANGER, str(old.OLD / "gdn" / "export"), json.dumps(old.PROMPT)]
    done = subprocess.run(
        argv, capture_output=True, text=True, env=helpers.environment(HF_HOME=str(tmp_path), HYLO_REGISTER="1")
    )
    assert done.returncode == 0, done.stderr
    same_logits(json.loads(done.stdout.splitlines()[-1]), "gdn")


@each_kind
def test_training_goes_on_from_an_old_checkpoint(kind, tmp_path):
    """A new run from upcycle's, which is GDN's; the run itself with its optimizer from the trained one, Mamba-2's."""
    world = old.write_world(tmp_path, kind)
    steps = old.next_step(world, old.OLD / kind / "checkpoint", tmp_path / "run")
    wrong = golden.differences(steps, [expected(kind)["step"]])
    assert not wrong, "\n".join(wrong)
