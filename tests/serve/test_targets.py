"""What the register replaces in vLLM is there as expected, in a process in which nothing is replaced yet.

The kernel of "vllm model" exists on a Hopper GPU only, and is checked there.
"""

import json
import subprocess
import sys

from helpers.paths import ROOT

TARGETS = """
import json, sys
sys.argv[0] = "hylo"
from vllm import ModelRegistry  # some of vLLM's modules do not import first
from hylo_megatron.engine.patch import describe
from hylo_megatron.engine.register import patches
places = {patch: patch.place().get() for patch in patches("transformers", "vllm", "vllm model")}
wrong = [patch for patch, value in places.items() if patch.needed() and not patch.fits(value)]
print(json.dumps({patch.target: describe(places[patch]) for patch in wrong}))
"""


def test_every_target_is_as_expected():
    done = subprocess.run([sys.executable, "-c", TARGETS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}
