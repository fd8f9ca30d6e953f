"""The exported model in transformers' ``Trainer`` and under FSDP."""

import copy

import pytest
import torch
from helpers.hf import HYBRIDS, model_of, numbers, packed

pytest.importorskip("accelerate")


def trained(model, tmp_path, **options):
    """The losses of two steps of ``Trainer``, each of two micro-batches, and the parameters after them."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in numbers(4, 12)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", logging_steps=1, learning_rate=1e-3, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["gdn", "mamba2"])
def test_trainer_with_and_without_gradient_checkpointing(kind, tmp_path):
    ids = numbers(4, 12)
    want = model_of(**HYBRIDS[kind])(ids, labels=ids).loss.item()
    plain, parameters = trained(model_of(**HYBRIDS[kind]), tmp_path)
    again, others = trained(model_of(**HYBRIDS[kind]), tmp_path, gradient_checkpointing=True)
    assert plain == again and plain[1] < plain[0] and plain[0] == pytest.approx(want, rel=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, others[name])
    smoothed, _ = trained(model_of(**HYBRIDS[kind]), tmp_path, label_smoothing_factor=0.1)
    log_p = model_of(**HYBRIDS[kind])(ids).logits[:, :-1].log_softmax(-1)
    want = 0.9 * want - 0.1 * log_p.mean().item()
    assert smoothed[0] == pytest.approx(want, rel=1e-4), "labels are shifted"
    mixed, kept = trained(model_of(**HYBRIDS[kind]), tmp_path, bf16=True)
    assert mixed == pytest.approx(plain, rel=0.02) and {p.dtype for p in kept.values()} == {torch.float32}


def test_a_cache_under_gradient_checkpointing_is_refused():
    model, ids = model_of(("mla", "gdn")), numbers(1, 6)
    past = model(ids, use_cache=True).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, past_key_values=past)
    during_training = model.generate(ids, max_new_tokens=4, do_sample=False)  # without gradients nothing is recomputed
    assert torch.equal(during_training, model.eval().generate(ids, max_new_tokens=4, do_sample=False))


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def fsdp1(model, mixed: bool):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    precision = MixedPrecision(torch.bfloat16, torch.float32, torch.bfloat16) if mixed else None
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, mixed_precision=precision, device_id=torch.device("cpu")
    )


def fsdp2(model, mixed: bool):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@pytest.mark.parametrize("kind", ["gdn", "mamba2"])
@pytest.mark.parametrize("wrap", [fsdp1, fsdp2])
def test_one_step_under_fsdp(kind, wrap, one_process):
    """Loaded in fp32, as for mixed precision; ``A_log``, ``dt_bias`` and ``D`` are fp32 in every other dtype too."""
    ids = numbers(2, 12)
    for mixed, checkpointed in ((False, False), (False, True), (True, False)):
        reference = model_of(**HYBRIDS[kind]).train()
        model = wrap(copy.deepcopy(reference), mixed)
        if checkpointed:
            getattr(model, "module", model).gradient_checkpointing_enable()
        losses = []
        for each in (reference, model):
            optimizer = torch.optim.SGD(each.parameters(), 1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                loss = each(ids, labels=ids, position_ids=packed([5, 7]).expand(2, -1)).loss
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
        assert losses[2:] == pytest.approx(losses[:2], rel=0.02 if mixed else 1e-5) and losses[1] < losses[0]
    with pytest.raises((ValueError, AssertionError), match="uniform"):
        wrap(model_of(**HYBRIDS[kind]).bfloat16().train(), False)(ids)


def test_lora_on_bf16_weights_under_fsdp2(one_process):
    """FSDP2 wants one dtype among the trained parameters only."""
    peft = pytest.importorskip("peft")
    model, ids = model_of(("gdn", "mla", "mla")).bfloat16(), numbers(2, 12)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).train()
    want = model(input_ids=ids, labels=ids).loss.item()
    fsdp2(model.base_model.model, False)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-4)
