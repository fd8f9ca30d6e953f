"""The register of replaced names: every target is there as expected, and no import replaces anything."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
from helpers.paths import ROOT

from hylo_megatron.engine import register
from hylo_megatron.engine.patch import MISSING, Patch, describe, instead
from hylo_megatron.engine.register import entry_lines, package_lines
from hylo_megatron.errors import HyLoError
from hylo_megatron.packages import has

SERVING = ("vllm", "vllm model")  # see tests/serve/test_targets.py
HERE = [name for name in register.GROUPS if name not in SERVING]
needs_megatron = pytest.mark.skipif(not has("megatron-core"), reason="megatron-core is not installed")

# Prints what each target of the groups is, in a process in which nothing is installed.
TARGETS = """
import json, sys
sys.argv[0] = "hylo"
from hylo_megatron.engine.patch import describe
from hylo_megatron.engine.register import patches
found = {}
for patch in patches(*json.loads(sys.argv[1])):
    try:
        value = patch.place().get()
        found[patch.target] = describe(value), patch.fits(value) or not patch.needed()
    except (ImportError, AttributeError, KeyError) as error:
        found[patch.target] = repr(error), False
print(json.dumps(found))
"""
# Prints which targets are other objects after the imports of sys.argv than before. Imports of the targets' modules do
# not count, and come first. Registering with transformers is what `import hylo_megatron` is for.
IDENTITY = """
import importlib, json, sys
sys.argv[0] = "hylo"
from hylo_megatron.engine.register import GROUPS, patches
chosen = [patch for patch in patches(*json.loads(sys.argv[1])) if patch.group != "transformers"]
before = {patch: patch.place().get() for patch in chosen if "sys:modules" not in patch.target}
finders = list(sys.meta_path)
for module in sys.argv[2:]:
    importlib.import_module(module)
assert sys.meta_path == finders
print(json.dumps([patch.target for patch, value in before.items() if patch.place().get() is not value]))
"""


def python(code: str, *arguments: str):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_FORCE")}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def entry(**changes) -> Patch:
    values = dict(group="cpu", target="made_up:value", replacement=instead(2), why="a test", package="torch",
                  versions=">=2.11", expects="int")  # fmt: skip
    return Patch(**values | changes)


@pytest.fixture
def made_up(monkeypatch):
    """A module ``made_up`` and a way to set the entries of group ``cpu``; nothing stays installed."""
    module = types.ModuleType("made_up")
    module.value, module.table = 1, {}
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setattr(register, "_installed", {})
    monkeypatch.setattr(register, "_groups", set())
    monkeypatch.setattr(register, "_warned", set())

    def choose(*patches: Patch):
        monkeypatch.setattr(register, "patches", lambda *groups: [p for p in patches if p.group in groups])
        return module

    return choose


@needs_megatron
def test_every_target_is_as_expected():
    """An upgrade of a package fails here first: the message has what each target is now."""
    found = python(TARGETS, json.dumps(HERE))
    wrong = {target: what for target, (what, fits) in found.items() if not fits}
    assert not wrong


@needs_megatron
def test_imports_replace_nothing():
    modules = ("hylo_megatron", "hylo_megatron.layers.model", "hylo_megatron.distill.model", "hylo_megatron.hf",
               "hylo_megatron.mixers", "hylo_megatron.kernels", "hylo_megatron.train")  # fmt: skip
    assert python(IDENTITY, json.dumps(HERE), *modules) == []


def test_targets_are_named_once_and_have_reasons():
    patches = register.patches()
    assert len({patch.target for patch in patches}) == len(patches)
    assert all(patch.why and patch.expects and patch.versions for patch in patches)
    assert {patch.group for patch in patches} == set(register.GROUPS)


def test_installing_twice_is_harmless(made_up):
    wrapped = entry(replacement=lambda original, run: (original, run), expects="int")
    module = made_up(wrapped)
    register.install("cpu")
    first = module.value
    register.install("cpu")
    assert module.value is first == (1, None)
    register.install("cpu", "a run")  # wraps the original, not what was there
    assert module.value == (1, "a run") and register.original("made_up:value") == 1
    register.uninstall("cpu")
    assert module.value == 1


def test_keys_and_inherited_attributes_are_put_back(made_up):
    class Base:
        def method(self):
            return "base"

    class Derived(Base):
        pass

    module = made_up(
        entry(target="made_up:table[a.key]", expects="missing"),
        entry(target="made_up:Derived.method", replacement=lambda method, run: lambda self: method(self) + "!"),
    )
    module.Derived = Derived
    with register.installed("cpu"):
        assert module.table == {"a.key": 2} and Derived().method() == "base!"
    assert module.table == {} and "method" not in vars(Derived) and Derived().method() == "base"


def test_another_version_is_refused_in_one_line(made_up, monkeypatch, capsys):
    module = made_up(entry(versions="==1.0"), entry(target="made_up:table[a]", expects="missing"))
    with pytest.raises(HyLoError) as refusal:
        register.install("cpu")
    message = str(refusal.value)
    assert "\n" not in message and module.value == 1 and module.table == {}
    assert all(word in message for word in ("torch 2", "made_up:value", "torch==1.0", register.ALLOW))
    monkeypatch.setenv(register.ALLOW, "1")
    register.install("cpu")
    assert module.value == 2
    warned = capsys.readouterr().err
    assert warned.startswith("warning: torch 2") and warned.count("\n") == 1


@pytest.mark.parametrize("target", ["made_up:nothing", "made_up:nothing.value", "no_such_module:value"])
def test_a_target_that_is_gone_is_refused_in_one_line(made_up, target):
    made_up(entry(target=target))
    with pytest.raises(HyLoError, match=r"^torch 2.*: .* is not there") as refusal:
        register.install("cpu")
    assert target in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_model_needs_the_fixes_of_megatron(made_up):
    made_up(entry(needed=lambda: False))
    with pytest.raises(HyLoError, match='register.install."cpu"'):
        register.check_installed("cpu")
    with register.installed("cpu"):
        register.check_installed("cpu")
    with pytest.raises(HyLoError):
        register.check_installed("cpu")


def test_what_is_not_needed_stays(made_up):
    module = made_up(entry(needed=lambda: False))
    register.install("cpu")
    assert module.value == 1


def test_no_entry_sees_the_replacement_of_another(made_up):
    def is_original() -> bool:
        return made_up_module.value == 1

    first = entry(replacement=lambda original, run: run or 2, needed=is_original)
    second = entry(target="made_up:table[a]", expects="missing", needed=is_original)
    made_up_module = made_up(first, second)
    register.install("cpu")
    assert made_up_module.value == 2 and made_up_module.table == {"a": 2}
    register.install("cpu", 3)  # for another run: an entry that was needed is still needed
    assert made_up_module.value == 3
    register.uninstall("cpu")
    assert made_up_module.value == 1 and made_up_module.table == {}


def test_descriptions_show_a_changed_signature():
    def long(alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota, kappa, lamda):
        """Has more parameters than a line shows."""

    def longer(alpha, beta, gamma, delta, epsilon, zeta, eta, theta, iota, kappa, lamda, mu):
        """Has one more."""

    assert describe(lambda a, *b, c=1, **d: 0) == "(a, *b, c, **d)"
    assert describe(MISSING) == "missing" and describe(int) == "class" and describe(True) == "bool"
    assert describe(long) != describe(longer) and "... 11, " in describe(long)
    assert replace(entry(), expects="NoneType or int").fits(None)


def test_the_doctor_prints_the_register():
    short, full = package_lines(), "\n".join(entry_lines())
    assert any(line.startswith("megatron-core") and "==0.19.2" in line for line in short)
    assert all(patch.target in full and patch.why in full for patch in register.patches())
