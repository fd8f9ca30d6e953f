"""The GPU recipe's own stages at toy size, on a CPU, through the whole runner: killed in the middle, and resumed."""

import functools
import shutil
from dataclasses import replace

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers.processes import kill_tree  # noqa: E402
from helpers.recipes import STEPS, held, losses, start, toy_recipe, wait_for_step, write_inputs  # noqa: E402
from helpers.waits import PATIENCE  # noqa: E402

from hylo_megatron.config import Plan  # noqa: E402
from hylo_megatron.config.layout import ParallelLayout  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.recipes import smollm2  # noqa: E402
from hylo_megatron.recipes.smollm2 import (  # noqa: E402
    smollm2_cpu,
    smollm2_cpu_window,
    smollm2_gpu,
    smollm2_gpu_window,
    with_batches,
    with_tokens,
)
from hylo_megatron.run import training_process  # noqa: E402
from hylo_megatron.run.background import Background  # noqa: E402
from hylo_megatron.run.launch import Processes  # noqa: E402
from hylo_megatron.run.recipe_run import Run  # noqa: E402


def test_every_stage_of_the_gpu_recipe_and_a_kill(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write_inputs(whole)
    process = start(whole)
    printed = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, printed[-3000:]
    names = [stage.name for stage in toy_recipe().stages]
    assert [name for name in names if f"after {name}" in printed] == names
    assert "| needles found | 256 |" in printed
    assert "| perplexity, prose |" in (whole / "hf-distill-32k" / "README.md").read_text()
    assert {"evaluation.md", "evaluation.json", "run.md"} <= {path.name for path in (whole / "report").iterdir()}

    # the same again, its third stage killed after the checkpoint at step 3
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns(
        "distill-8k", "distill-32k", "hf-distill-*k", "eval-distill-*k.json", "sample.json", "report"
    ))  # fmt: skip
    shutil.copytree(whole / "hf-distill-2k", killed / "hf-distill-2k")
    shutil.copy(whole / "eval-distill-2k.json", killed)
    process = start(killed, **held("distill-8k", 4))
    wait_for_step(killed / "distill-8k" / "train_log.jsonl", 4, process)
    kill_tree(process)
    process = start(killed)
    printed = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, printed[-3000:]
    assert "distill-2k: done before" in printed
    for name in names:
        assert losses(killed, name) == losses(whole, name), name
        assert [line[0] for line in losses(whole, name)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
def test_work_in_the_background(tmp_path, beside):
    background = Background(tmp_path, beside)
    background.start("good", functools.partial(print, "done"))
    background.wait()
    assert (tmp_path / "good.log").read_text() == "done\n"
    error, message = (HyLoError, "bad failed: ZeroDivisionError") if beside else (ZeroDivisionError, "by zero")
    with pytest.raises(error, match=message):
        background.start("bad", functools.partial(divmod, 1, 0))
        background.wait("bad")


def test_recipes_are_declared_as_the_readme_says():
    gpu, cpu = smollm2_gpu(), smollm2_cpu()
    assert sum(stage.tokens for stage in gpu.stages) <= 30e6
    assert [stage.seq_length for stage in gpu.stages] == [2048, 2048, 8192, 32768]
    assert [stage.kind for stage in cpu.stages] == ["ild", "distill"]
    for recipe in (gpu, cpu):
        for stage in recipe.stages:
            assert not stage.mix or sum(share for _, share in stage.mix) == pytest.approx(1)
            assert stage.global_batch % stage.micro_batch == 0


def test_the_window_recipe_is_the_best_one_known_and_takes_its_tokens_at_2k():
    """docs/experiments.md has it as E23."""
    recipe = smollm2_gpu_window()
    assert [stage.global_batch for stage in recipe.stages] == [16, 16, 4, 4]
    assert [stage.steps for stage in recipe.stages] == [300, 5024, 280, 140]
    assert [stage.mla_rope for stage in recipe.stages] == [None, False, None, None]
    assert sum(stage.tokens for stage in recipe.stages) == 201_981_952
    assert Plan.parse(recipe.layers, recipe.plan, recipe.linear).name == "6MLA24GDN"
    assert (recipe.window, recipe.text, recipe.linear_rope) == ("256+4:all", "prose", True)
    for gpus in (1, 2, 4):
        assert all(Processes(dp=gpus).fit(stage).micro_batch for stage in recipe.stages)
    recipe, short = with_tokens(recipe, 100_000_000), recipe.stages[1]
    batch = short.global_batch * short.seq_length
    assert 100_000_000 - batch < sum(stage.tokens for stage in recipe.stages) <= 100_000_000
    with pytest.raises(HyLoError, match="--tokens 10,000,000: the stages beside distill-2k take 14,090,240"):
        with_tokens(smollm2_gpu(), 10_000_000)
    mamba2 = smollm2_gpu_window(linear="mamba2")  # without positions in linear layers, MLA keeps its own
    assert (mamba2.window, mamba2.linear_rope) == ("256+4:all", False)
    assert [stage.rope for stage in mamba2.stages] == [stage.rope for stage in smollm2_gpu().stages]
    assert all(stage.mla_rope is None for stage in mamba2.stages)
    linear = smollm2_gpu_window("none")  # linear layers have their positions at every length as they began
    assert (linear.window, linear.linear_rope) == ("256+4", True)
    assert all(stage.rope is None and stage.mla_rope is None for stage in linear.stages)


def test_settings_of_layers_that_a_plan_lacks_are_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_execute_alone", lambda run: pytest.fail(f"{run.out} has begun"))
    smollm2_gpu_window("none", "gdn").check_positions()  # its first distillation would turn RoPE of MLA off
    bare, stage = smollm2_cpu("none", "gdn"), smollm2_cpu().stages[1]
    cases = {
        "window": replace(smollm2_gpu("all", "gdn"), window="256+4"),
        "stage distill: mla_rope": replace(bare, stages=(replace(stage, mla_rope=False),)),
        "stage distill: log_scale": replace(bare, stages=(replace(stage, log_scale="600"),)),
    }
    cases["linear_rope"] = replace(smollm2_gpu("all", "gdn"), linear_rope=True)
    smollm2_gpu_window("all", "gdn").check_positions()
    for what, recipe in cases.items():
        with pytest.raises(HyLoError, match=f"^{what} is set, but the plan (all|none) has no (MLA|linear) layers"):
            Run(recipe, tmp_path / "run", Processes()).execute()
        recipe.as_control().check_positions()
    assert not (tmp_path / "run").exists()
    replace(bare, stages=(replace(stage, mla_rope=True, log_scale="off"),)).check_positions()


def test_a_layout_that_smollm2_does_not_divide_by_is_refused_before_a_fetch(tmp_path, monkeypatch, capsys):
    """Only layouts of --tp and --pp are named: the recipe has no context parallelism."""
    monkeypatch.setattr(Run, "execute", lambda run: pytest.fail(f"{run.out} has begun"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(SystemExit):
        smollm2.main(["--tp", "2", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "TP 2 PP 1 does not fit: student: TP = 2 does not divide 9 attention heads" in error
    assert error.endswith("nearest layouts that fit: TP 1 PP 1; TP 1 PP 2\n")


def test_a_plan_that_smollm2_cannot_have_is_refused_under_its_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "execute", lambda run: pytest.fail(f"{run.out} has begun"))
    with pytest.raises(SystemExit):
        smollm2.main(["--plan", "30", "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.startswith("error: --plan '30': numbers must differ and lie in 0..29")


def test_a_folder_of_another_recipe_is_refused_with_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_execute", lambda run: None)
    recipe = smollm2_cpu_window()
    earlier = replace(recipe, plan="6MLA24GDN", window="256+4")  # what this recipe was before
    Run(earlier, tmp_path, Processes()).execute()
    Run(earlier, tmp_path, Processes()).execute()
    with pytest.raises(HyLoError, match=r"holds a run with other settings \(.*recipe\.json: plan, window\); choose "):
        Run(recipe, tmp_path, Processes()).execute()


def test_several_gpus_share_a_batch(tmp_path):
    stages = smollm2_gpu().stages
    four = Processes(dp=4)
    assert [four.fit(stage).micro_batch for stage in stages[:2]] == [2, 2]
    with pytest.raises(HyLoError, match="stage distill-8k: 4 copies .* a batch of 2 .* --batch-factor 4"):
        Run(smollm2_gpu(), tmp_path / "run", four).execute()  # 4, for the stage of single sequences after this one
    for copies, times in ((3, 3), (6, 3), (8, 2)):
        with pytest.raises(HyLoError, match=f"{copies} copies .* {times} times the batch: --batch-factor {times} "):
            Processes(dp=copies).fit_all(smollm2_gpu_window().stages)
        Processes(dp=copies).fit_all(with_batches(smollm2_gpu_window(), times).stages)
    larger = with_batches(smollm2_gpu(), 4).stages
    assert [four.fit(stage).micro_batch for stage in larger] == [8, 8, 2, 1]
    assert [stage.tokens for stage in larger] == [4 * stage.tokens for stage in stages]
    assert all(Processes().fit(stage) == stage for stage in stages)


def test_a_step_is_one_graph_where_each_gpu_has_the_model_or_as_asked():
    shared = ParallelLayout(cp=2)
    assert Processes().one_graph and not Processes(cuda_graph=False).one_graph
    assert Processes(dp=2).one_graph and not Processes(dp=2, cuda_graph=False).one_graph
    assert not Processes(layout=shared).one_graph
    with pytest.raises(HyLoError, match=r"--cuda-graph: not where ranks share a model \(TP 1 PP 1 CP 2 DP 1\)"):
        Processes(layout=shared, cuda_graph=True)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_graph_that_was_asked_for_is_not_left_out(monkeypatch, gpu):
    monkeypatch.setattr(training_process.torch.cuda, "is_available", lambda: gpu)
    asked, moved = Processes(cuda_graph=True), ["--hylo-offload-optimizer"]
    assert training_process.in_one_graph([], Processes()) == gpu
    assert not training_process.in_one_graph(moved, Processes())
    with pytest.raises(HyLoError, match="^--cuda-graph: needs a GPU, and works without --hylo-offload"):
        training_process.in_one_graph(moved if gpu else [], asked)
