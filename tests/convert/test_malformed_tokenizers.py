"""Malformed tokenizer files are refused in one line by file and field."""

import json

import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from helpers.tokenizer_kinds import added

import hylo_megatron  # noqa: F401
from hylo_megatron.convert.tokenizer_files import (
    tokenizer_identity,
)
from hylo_megatron.data.tokenizers import load_tokenizer
from hylo_megatron.errors import HyLoError

BROKEN = {
    "no file": (None, "tokenizer.json not found"),
    "empty": ("", "not valid JSON"),
    "half a file": ('{"model": {"type": "BPE", "vocab": {"a": 0', "not valid JSON"),
    "an array": ("[]", "the whole is"),
    "no model": ({"model": None}, "field model is None"),
    "a negative id": ({"model.vocab.b": -1}, r"model\.vocab.*-1"),
    "a boolean id": ({"model.vocab.b": True}, r"model\.vocab.*True"),
    "a string id": ({"model.vocab.b": "1"}, r"model\.vocab.*'1'"),
    "an endless id": ({"model.vocab.b": 10**5000}, "not valid JSON"),
    "an id twice": ({"model.vocab.b": 0}, "tokens 'w0' and 'b' both have id 0"),
    "no tokens": ({"model.vocab": {}, "added_tokens": []}, "the tokenizer is empty"),
    "an unknown model": ({"model.type": "Own"}, "not a tokenizer"),
    "an unknown normalizer": ({"normalizer": {"type": "Own"}}, "not a tokenizer"),
    "an added token without id": ({"added_tokens": [{"content": "x"}]}, r"added_tokens\.0\.id"),
    "an added token without text": ({"added_tokens": [added("", 3)]}, r"added_tokens\.0\.content"),
    "an added token at a word's id": ({"added_tokens": [added("x", 3)]}, "'w3' and 'x' both have id 3"),
    "an added token far away": ({"added_tokens": [added("x", 999)]}, "gives token 'x' the id 999"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_malformed_tokenizer_is_refused_in_one_line_by_file_and_field(what, tmp_path):
    tiny.write_tokenizer(tmp_path)
    path, (content, words) = tmp_path / "tokenizer.json", BROKEN[what]
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        values = json.loads(path.read_text())
        for name, value in content.items():
            *outer, last = name.split(".")
            inner = values
            for key in outer:
                inner = inner[key]
            inner[last] = value
        text = json.dumps(values, default=str) if what != "an endless id" else None
        path.write_text(text or json.dumps(values | {"model": {"vocab": {"b": 7}}}).replace("7", "7" * 5000))
    for tool in (tokenizer_identity, lambda folder: load_tokenizer(folder, 1)):
        with pytest.raises(HyLoError, match=words if content is not None else "tokenizer.json") as caught:
            tool(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
    ("tokenizer_config.json", '{"chat_template": 3}', "field chat_template"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "field chat_template"),
    ("tokenizer_config.json", '{"tokenizer_class": []}', "field tokenizer_class"),
    ("tokenizer_config.json", '{"eos_token": 2}', "field eos_token"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "w1"}}}', "field added_tokens_decoder"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "w6"}}}', "'w6' the id 5.*gives it 6"),
    ("added_tokens.json", '{"new": 5}', "'new' the id 5"),
    ("added_tokens.json", '{"new": null}', "added_tokens.json: field new is None"),
    ("special_tokens_map.json", "[", "special_tokens_map.json"),
])  # fmt: skip
def test_malformed_files_beside_it(name, content, words, tmp_path):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(HyLoError, match=words) as caught:
        tokenizer_identity(tmp_path)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(
    key=st.sampled_from(["model", "added_tokens", "normalizer", "pre_tokenizer", "model.vocab", "model.type"]),
    value=JSON,
)
def test_any_value_in_any_place_opens_or_is_refused(key, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    tiny.write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    outer, _, inner = key.rpartition(".")
    (content[outer] if outer else content)[inner] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    try:
        identity = tokenizer_identity(folder)
    except HyLoError as error:
        assert "\n" not in str(error)
    else:
        assert identity.largest_id >= identity.size - 1 >= 0
