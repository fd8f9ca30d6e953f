"""Every mixer's folder has what the code that loops over the registry asks for."""

import pytest
from helpers import tiny

from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.mixers import LINEAR, MIXERS
from hylo_megatron.mixers.memory import Share


def architecture(kind: str):
    hybrid = tiny.hybrid(plan=(kind,) * 2) if kind != "attention" else tiny.hybrid().as_teacher()
    assert set(hybrid.plan) == {kind}
    return hybrid


@pytest.mark.parametrize("kind", MIXERS)
def test_the_mapping_names_every_tensor_once(kind):
    arch, part = architecture(kind), MIXERS[kind].part("mapping")
    hf = [key.removeprefix("model.layers.{i}.") for mapping in part.table(arch) for key in mapping.hf]
    assert sorted(hf) == sorted(["input_layernorm.weight", *part.hf_shapes(arch)])
    megatron = [key for mapping in part.table(arch) for key in mapping.megatron]
    assert len(set(megatron)) == len(megatron) and all(key.startswith("decoder.layers.{m}.") for key in megatron)


@pytest.mark.parametrize("kind", MIXERS)
def test_names_of_the_registry_are_those_of_tensors(kind):
    entry, part = MIXERS[kind], MIXERS[kind].part("mapping")
    names = {key.rpartition(".")[2] for key in part.hf_shapes(architecture(kind))}
    assert set(entry.fast) <= set(entry.fp32) <= names


@pytest.mark.parametrize("kind", MIXERS)
def test_unsplit_tensors_exist(kind):
    keys = MIXERS[kind].part("mapping").hf_shapes(tiny.hybrid(plan=(kind,), qk_norm=True, mla_qk_norm=True,
                                                              geometry=tiny.GEOMETRY_Q_LORA))  # fmt: skip
    unsplit = MIXERS[kind].part("memory").UNSPLIT
    assert set(unsplit) <= set(keys)


@pytest.mark.parametrize("kind", MIXERS)
def test_what_ranks_exchange_depends_on_how_they_share(kind):
    arch, exchange = architecture(kind), MIXERS[kind].part("sent").exchange
    alone, split, shared = (Share(ParallelLayout(tp=tp, cp=cp, sequence_parallel=True), 1, 128)
                            for tp, cp in ((1, 1), (2, 1), (1, 2)))  # fmt: skip
    for at, tensor, context in ((alone, False, False), (split, True, False), (shared, False, True)):
        found = exchange(arch, at)
        assert (found.tensor_parallel(at).forward > 0) == tensor
        assert ((found.waited + found.behind).forward > 0) == context


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind != "attention"])
def test_new_mixers_have_an_initialisation_and_bytes(kind):
    arch, entry = architecture(kind), MIXERS[kind]
    initialise = entry.part("initialise")
    assert initialise.OUTPUT_PROJECTION in entry.part("mapping").hf_shapes(arch)
    assert callable(initialise.from_rows) and callable(initialise.calibrated) and initialise.REFIT in (True, False)
    found = entry.part("memory").activations(arch, Share(ParallelLayout(), 1, 128))
    assert 0 < found.entry < found.kept
    assert entry.part("flops").mixing(arch, 128) > 0
    if kind in LINEAR:
        assert entry.part("flops").values(arch) > 0 and entry.part("flops").VALUE_COST > 0
        assert all(size > 0 for size in entry.part("memory").state(entry.dimensions(arch.geometry)))
    else:
        assert entry.part("memory").cached_values(arch) > 0
