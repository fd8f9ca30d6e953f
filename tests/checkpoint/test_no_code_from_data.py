"""A checkpoint from a stranger never runs the stranger's code: refused by the name of the class, at every door."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import groups, planted, tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from torch.distributed.checkpoint import metadata as names  # noqa: E402

from hylo_megatron.checkpoint import safe_pickles  # noqa: E402
from hylo_megatron.convert import assemble, megatron_to_hf  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.init.upcycle import upcycle  # noqa: E402

PLAN = ("mla", "gdn", "gdn", "mla")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    hybrid = tiny.hybrid()
    kinds = {"teacher": hybrid.as_teacher(), "hybrid": hybrid}
    kinds |= {kind: tiny.hybrid(plan=(kind,) * 4) for kind in ("mla", "gdn")}
    for name, arch in kinds.items():
        tiny.write_hybrid(folder / name, arch)
    return folder


def load(checkpoint):
    from hylo_megatron.layers.load import load_model

    with groups.one_rank():
        load_model(checkpoint)


DOORS = {  # what is planted, and what is done with it: (checkpoint, sources, out)
    "export": ("hybrid", lambda checkpoint, sources, out: megatron_to_hf.convert(checkpoint, out)),
    "upcycle": ("teacher", lambda checkpoint, sources, out: upcycle(checkpoint, out, PLAN, init="svd", log=str)),
    "assemble": ("gdn", lambda checkpoint, sources, out: assemble.assemble(sources / "mla", checkpoint, PLAN, out)),
    "load": ("hybrid", lambda checkpoint, sources, out: load(checkpoint)),
}


@pytest.mark.parametrize("kind", planted.KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_planted_code_does_not_run(door, kind, sources, tmp_path):
    source, action = DOORS[door]
    if door == "assemble" and kind == "in_a_tensor":
        source, action = (
            "mla",
            lambda checkpoint, sources, out: assemble.assemble(checkpoint, sources / "gdn", PLAN, out),
        )
    marker = tmp_path / "ran"
    checkpoint = planted.plant(sources / source, tmp_path / "checkpoint", kind, marker)
    with pytest.raises(HyLoError) as refusal:
        action(checkpoint, sources, tmp_path / "out")
    expected = "cannot be read" if kind == "in_plain_pickle" else planted.NAMED
    assert expected in str(refusal.value) and str(checkpoint) in str(refusal.value)
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_the_plants_would_run(sources, tmp_path):
    """What the tests above are worth: plain pickle and torch run each of them."""
    for kind in planted.KINDS:
        marker = tmp_path / kind
        checkpoint = planted.plant(sources / "hybrid", tmp_path / f"{kind}-checkpoint", kind, marker) / "release"
        pickle.loads((checkpoint / ".metadata").read_bytes())
        if (checkpoint / "common.pt").exists():
            torch_load_unsafely((checkpoint / "common.pt").read_bytes())
        elif not marker.exists():
            data = (checkpoint / "__0_0.distcp").read_bytes()
            info = list(planted.read(checkpoint).storage_data.values())
            last = max(info, key=lambda place: place.offset)
            torch_load_unsafely(data[last.offset : last.offset + last.length])
        assert marker.exists(), kind


def torch_load_unsafely(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RuntimeError):  # no tensor came out of it
        patch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        torch.load(io.BytesIO(data), weights_only=False)


def test_training_never_runs_it(tmp_path):
    """From a planted student, with a planted teacher, and from a planted checkpoint of the run itself."""
    world, marker = helpers.random_world(tmp_path), tmp_path / "ran"

    def run(save, refusal=None, **flags):
        done = helpers.train(*helpers.train_flags(world, "distill", tmp_path / save, save_interval=2, **flags))
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == (2 if refusal else 0), (save, done.returncode, done.stderr[-1000:])
        assert len(lines) == bool(refusal) and (not refusal or refusal in lines[0]), (save, done.stderr[-1000:])

    def plant(source, kind):
        world[f"{source}-{kind}"] = target = tmp_path / f"{source}-{kind}"
        planted.plant(world.get(source, tmp_path / source), target, kind, marker)
        return target

    run("run")
    run("resumed", load=tmp_path / "run", ckpt_step=2)  # what is not planted goes on as before
    for kind in ("in_metadata", "in_a_tensor"):
        plant("student", kind)
        run(f"from-{kind}", planted.NAMED, student=f"student-{kind}")
    plant("teacher", "in_common_state")
    run("taught", planted.NAMED, teacher="teacher-in_common_state")
    for kind in ("in_random_state", "in_legacy_common"):
        run(f"resumed-{kind}", planted.NAMED, load=plant("run", kind))
    assert not marker.exists()


def opcodes(*parts: bytes) -> io.BytesIO:
    return io.BytesIO(b"\x80\x02" + b"".join(parts) + b".")


METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
TRICKS = {
    "getattr": (opcodes(b"cbuiltins\ngetattr\n"), "builtins.getattr"),
    "a dotted name": (io.BytesIO(b"\x80\x04\x8c\x05torch\x8c\x0bstorage.sys\x93."), "torch.storage.sys"),
    "loading within loading": (opcodes(b"ctorch.storage\n_load_from_bytes\n"), "torch.storage._load_from_bytes"),
    "copyreg": (opcodes(b"ccopyreg\n_reconstructor\n"), "copyreg._reconstructor"),
    "an old name": (opcodes(b"c__builtin__\neval\n"), "__builtin__.eval"),
    "an attribute of a class": (opcodes(METADATA, b"N}\x8c\x01aK\x01s\x86b"), "Metadata"),
    "a persistent object": (opcodes(b"K\x01Q"), "damaged"),
    "something else": (io.BytesIO(pickle.dumps([1])), "expected torch's Metadata"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_of_pickles(trick):
    file, word = TRICKS[trick]
    file.seek(0)
    with pytest.raises(HyLoError, match="^here: .*") as refusal:
        safe_pickles.load_metadata(file, "here")
    assert word in str(refusal.value)
    assert not hasattr(names.Metadata, "a")


def test_caches_of_sample_indices_hold_no_pickles(tmp_path):
    import megatron.core.datasets.blended_dataset as blended
    import megatron.core.datasets.gpt_dataset as gpt

    np.save(tmp_path / "good.npy", np.arange(5))
    (tmp_path / "bad.npy").write_bytes(pickle.dumps(planted.Touch(tmp_path / "ran")))
    np.save(tmp_path / "objects.npy", np.array([planted.Touch(tmp_path / "ran")]))
    for module in (gpt, blended):
        good = module.safe_numpy_load(tmp_path / "good.npy", allow_pickle=True, mmap_mode="r")
        assert good.tolist() == list(range(5))
        for name in ("bad.npy", "objects.npy"):
            with pytest.raises(HyLoError, match=name):
                module.safe_numpy_load(tmp_path / name, allow_pickle=True, mmap_mode="r")
    assert not (tmp_path / "ran").exists()


def test_caches_of_sample_indices_are_written_whole(tmp_path, monkeypatch):
    """Another training may look at the cache at any time; a training that is killed leaves no half file there."""
    import megatron.core.datasets.blended_dataset as blended
    import megatron.core.datasets.gpt_dataset as gpt

    seen = []

    def interrupted(file, array, **how):
        file.write(b"half")
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise KeyboardInterrupt

    for module in (gpt, blended):
        module.numpy.save(tmp_path / "index.npy", np.arange(5), allow_pickle=True)
        assert np.load(tmp_path / "index.npy").tolist() == list(range(5))
        with monkeypatch.context() as patch:
            patch.setattr(np, "save", interrupted)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    module.numpy.save(tmp_path / "new.npy", np.arange(5), allow_pickle=True)
        assert [path.name for path in tmp_path.iterdir()] == ["index.npy"]
    scratch = [name for names in seen for name in names if name != "index.npy"]
    assert len(set(scratch)) == 4 and "new.npy" not in scratch


def test_the_engine_reads_weights_only(tmp_path):
    """Whatever a caller asks for, also of the few places that do not pass our check first."""
    with pytest.raises(pickle.UnpicklingError, match=planted.NAMED):
        torch.load(io.BytesIO(planted.saved(planted.Touch(tmp_path / "ran"))), weights_only=False)
    planted.write(tmp_path, planted.Touch(tmp_path / "ran"))
    with pytest.raises(HyLoError, match=planted.NAMED):
        torch.distributed.checkpoint.FileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()
