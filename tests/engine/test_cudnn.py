"""Which cuDNN a training loads, on a machine that may have several."""

import os
import sys

import pytest
import torch

from hylo_megatron import doctor
from hylo_megatron.engine import cudnn
from hylo_megatron.packages import capabilities


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of torch's libraries, as pip installs it: ``nvidia`` has no ``__init__``."""
    (tmp_path / "nvidia" / "cudnn" / "lib").mkdir(parents=True)
    monkeypatch.setattr(cudnn, "has", lambda name: name == "transformer-engine")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(each for each in sys.path if "site-packages" not in each)])
    for name in cudnn.WHERE:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "nvidia" / "cudnn"


@pytest.fixture
def loaded(own, monkeypatch):
    """The names of the libraries that were loaded, in their order."""
    for name in ("libcudnn.so.9", "libcudnn_graph.so.9", "libcudnn_static.a"):
        (own / "lib" / name).touch()
    names = []
    monkeypatch.setattr(cudnn.ctypes, "CDLL", lambda path: names.append(os.path.relpath(path, own)))
    return names


def test_all_of_torchs_own_libraries_are_loaded(own, loaded, monkeypatch):
    monkeypatch.setenv("CUDNN_HOME", "")
    cudnn.load_own_cudnn()
    assert os.environ["CUDNN_HOME"] == str(own)
    assert loaded == ["lib/libcudnn.so.9", "lib/libcudnn_graph.so.9"]


def test_a_library_that_does_not_load_stops_no_training(own, loaded, monkeypatch):
    def load(path):
        loaded.append(path)
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(cudnn.ctypes, "CDLL", load)
    cudnn.load_own_cudnn()
    assert len(loaded) == 2


@pytest.mark.parametrize("name", cudnn.WHERE)
def test_what_the_user_has_set_stays(name, loaded, monkeypatch):
    monkeypatch.setenv(name, "/another")
    cudnn.load_own_cudnn()
    assert {os.environ.get(each) for each in cudnn.WHERE} == {"/another", None} and not loaded


def test_without_transformer_engine_torch_loads_what_it_needs(loaded, monkeypatch):
    monkeypatch.setattr(cudnn, "has", lambda name: False)
    cudnn.load_own_cudnn()
    assert not any(os.environ.get(each) for each in cudnn.WHERE) and not loaded


def test_nothing_is_loaded_where_torch_has_no_folder_of_its_own(own, loaded):
    (own / "lib").rename(own / "elsewhere")
    cudnn.load_own_cudnn()
    assert not any(os.environ.get(each) for each in cudnn.WHERE) and not loaded


def test_an_older_cudnn_is_a_known_problem_on_hopper(monkeypatch):
    def too_old():
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against (9, 19, 0)\nbut found")

    gpus = [doctor.Device("a GPU", 80.0, (9, 0))]
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    before = doctor.known_problems(capabilities(), gpus)
    monkeypatch.setattr(torch.backends.cudnn, "version", too_old)
    (line,) = set(doctor.known_problems(capabilities(), gpus)) - set(before)
    assert "older cuDNN" in line and "first in LD_LIBRARY_PATH" in line and "\n" not in line
    assert not any(
        "older cuDNN" in each for each in doctor.known_problems(capabilities(), [gpus[0].__class__("b", 80, (8, 0))])
    )
