"""``hylo fit-log-scale``: the base of the lowest loss, found and written."""

import pytest
from helpers.evaluation import make_prose, random_hybrid, write_lines

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import log_scale
from hylo_megatron.evaluate.perplexity import long_documents_of
from hylo_megatron.hf import HyLoConfig


def test_the_base_of_the_log_scale_is_the_one_of_the_lowest_loss(tokenizer, tmp_path, capsys):
    """No base is tried twice, none is left in the model, and the best one is written on request."""
    model = random_hybrid(tokenizer, "gdn")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = write_lines(tmp_path / "long.jsonl", [{"text": make_prose(seed, 60)} for seed in range(2)])
    flags = ["--model", str(folder), "--text", str(file), "--length", "300", "--documents", "2", "--after", "128"]
    log_scale.main([*flags, "--bases", "2,9", "--write"])
    shown = capsys.readouterr().out.splitlines()
    means = [float(x) for x in next(line for line in shown if "from 128 on" in line).split()[3:]]
    assert len(set(means)) == 3, "the scale makes no difference"
    for base, mean in zip((None, 2.0, 9.0), means, strict=True):
        model.config.log_scale = base and {"base": base, "length": 0}
        rows = long_documents_of(model, tokenizer, file, context=300, count=2)["by_position"]
        assert log_scale.mean_loss(rows, 128) == pytest.approx(mean, abs=1e-4)
    best = (None, 2.0, 9.0)[means.index(min(means))]
    written = HyLoConfig.from_pretrained(folder).log_scale
    assert written == (best and {"base": best, "length": 0})
    with pytest.raises(SystemExit):
        log_scale.main([*flags, "--bases", "0.5"])
    assert (
        "argument --bases: '0.5': expected numbers of 0 or more whose sum with --from is above 1"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        log_scale.main([*flags, "--length", "99999"])
    assert "no document of 99,999 tokens: give longer ones, or a smaller --length\n" in capsys.readouterr().err
    with pytest.raises(HyLoError, match="--after 290: the last positions are reported from 256 on"):
        log_scale.mean_loss(rows, 290)
