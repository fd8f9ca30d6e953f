"""Write the model card (``README.md``) of an exported folder, or put an evaluation's figures into it.

The export writes the card. ``hylo card`` replaces only the text between the two markers of the figures, so that what a
person wrote into the file stays.
"""

import json
import re
from pathlib import Path

from hylo_megatron.config import Architecture, positions
from hylo_megatron.convert.card_records import Origin
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_text
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.json_file import read_json
from hylo_megatron.markdown import table
from hylo_megatron.mixers import MIXERS
from hylo_megatron.planner.pages import row_bytes
from hylo_megatron.serve.refused import served

NAME = "README.md"
PLAIN = re.compile(r"[A-Za-z]\w*[./-][\w./-]*")  # of YAML's own words, such as no and null, none has such a mark
BEGIN, END = "<!-- figures: hylo card replaces the text up to the next marker -->", "<!-- end of the figures -->"
NO_FIGURES = "Not measured yet. `hylo evaluate` measures a folder, and `hylo card` puts the figures here."


def write_card(folder: Path, arch: Architecture, origin: Origin, with_code: bool) -> None:
    """Write the card of a folder that has none."""
    rows = figures(origin.evaluation, arch) if origin.evaluation else NO_FIGURES
    parts = [
        _front_matter(arch, origin),
        f"# {arch.plan.name}: {_what(arch)}, made with hylo-megatron",
        _summary(arch, origin),
        "## Use",
        "\n".join([_WITH_CODE if with_code else _WITH_LOADER, _LM_EVAL, *_serving(arch)]),
        "## Architecture",
        table(_architecture(arch)),
        *_training(origin),
        *_data(origin),
        "## Figures",
        f"{BEGIN}\n\n{rows}\n\n{END}",
        "## Limits",
        _limits(arch, origin),
    ]
    write_text(folder / NAME, "\n\n".join(parts) + "\n")


def put_figures(folder: Path, evaluation: Path) -> None:
    """Replace the figures in the card of ``folder`` by those of ``evaluation``. Raises ``HyLoError``."""
    from hylo_megatron.hf import HyLoConfig

    config = folder / "config.json"
    if read_json(config, advice="expected a folder that hylo export wrote").get("model_type") != "hylo":
        raise HyLoError(f"{config}: model_type is not hylo; expected a folder of a hybrid that hylo export wrote")
    rows = figures(evaluation, HyLoConfig.from_pretrained(folder).to_architecture())
    path = folder / NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise HyLoError(
            f"{path}: no place for figures, expected the lines {BEGIN!r} and {END!r}; add both where figures belong"
        )
    write_text(path, f"{before}{BEGIN}\n\n{rows}\n\n{END}{behind}")


def figures(path: Path, arch: Architecture) -> str:
    """Return the tables of an ``evaluation.json``. Raises ``HyLoError`` if it describes another plan."""
    from hylo_megatron.evaluate.report import comparison_rows

    report = read_json(path, advice="expected the evaluation.json of hylo evaluate")
    try:
        plan, rows = tuple(report["model"]["plan"]), comparison_rows(report)
        settings, device = report["settings"], f"{report['dtype']} on {report['device']}"
        context, seed = settings["context"], settings["seed"]
    except (KeyError, TypeError, AttributeError) as error:
        raise HyLoError(f"{path}: field {error} is missing; expected the evaluation.json of hylo evaluate") from None
    if plan != tuple(arch.plan):
        raise HyLoError(f"{path}: describes another model (its plan is {', '.join(plan)}); evaluate this one")
    note = f"Documents are cut to {context:,} tokens. Needles: accuracy with its 95 % interval. Seed {seed}; {device}."
    return f"{table(rows)}\n\n{note}"


def _has_linear(arch: Architecture) -> bool:
    return any(MIXERS[kind].linear for kind in arch.plan)


def _has_cache(arch: Architecture) -> bool:
    return not all(MIXERS[kind].linear for kind in arch.plan)


def _what(arch: Architecture) -> str:
    if _has_linear(arch) and _has_cache(arch):
        return "a hybrid of MLA and linear attention"
    return "a model with linear attention only" if _has_linear(arch) else "a model with MLA only"


def _yaml(text: str) -> str:
    """Return a text as a value of YAML. A JSON string is one; names do without quotes.

    YAML does not read JSON's two halves of a character such as an emoji. Such characters stay as they are.
    """
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=not text.isprintable())


def _front_matter(arch: Architecture, origin: Origin) -> str:
    kinds = [MIXERS[kind].title.lower().replace(" ", "-") for kind in dict.fromkeys(arch.plan)]
    linear, hybrid = _has_linear(arch), _has_linear(arch) and _has_cache(arch)
    tags = ["hylo-megatron", *["hybrid"] * hybrid, *["linear-attention"] * linear, *kinds]
    tags += ["distillation"] if origin.stages else []
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"license: {_yaml(origin.licence)}"] if origin.licence else []
    lines += [f"base_model: {_yaml(origin.base_model)}"] if origin.base_model else []
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _summary(arch: Architecture, origin: Origin) -> str:
    base = origin.base_model or f"a Transformer of type {arch.model_type}"
    cache, before = arch.kv_bytes_per_token(), arch.as_teacher().kv_bytes_per_token()
    counts = " and ".join(f"{arch.plan.count(kind)} {MIXERS[kind].title}" for kind in dict.fromkeys(arch.plan))
    size = arch.window_bytes()
    windows = f" Windows take {size:,} bytes a request more, as {size / before:,.0f} tokens of the base model do."
    windows = windows if size else ""
    licence = "" if origin.licence else " Its licence is that of the base model and of the training text."
    return (
        f"The attention layers of {base} became {counts} layers. A token takes {cache:,} bytes of KV cache in bf16;"
        f" in the base model it takes {before:,} ({cache / before:.1%} are left).{windows}{licence}"
    )


_WITH_CODE = """The model's code is in `hylo_code/`. It needs torch, transformers >= 5.6.2 and pydantic. On a GPU it
uses flash-linear-attention if this package is installed. Load the folder in one of these ways:

- In Python: `transformers.AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)`.
- In programs such as `pipeline` and TRL: pass `trust_remote_code=True`."""
_WITH_LOADER = """The code of this model is in the Python package hylo-megatron. Install it from its repository
(`pip install -e .` in a clone), then load this folder in one of these ways:

- In Python: `import hylo_megatron`, then `transformers.AutoModelForCausalLM.from_pretrained("FOLDER")`.
- In programs that never import the package, such as `pipeline` and TRL: pass `trust_remote_code=True`.
  `hylo_megatron_loader.py` in this folder then imports the package. It holds no other code."""
_LM_EVAL = "- In lm-eval: `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks TASKS`."
_SERVE = """- To serve{where}: `vllm serve FOLDER`, in an environment with vLLM and hylo-megatron
  (`pip install -e '.[{extra}]'` in a clone of its repository).{but}"""


def _serving(arch: Architecture) -> list[str]:
    """Return how to serve the model with vLLM, what its GPU kernels change, and what vLLM refuses."""
    try:
        served(arch, on_gpu=False)
    except HyLoError as error:
        return [f"- vLLM does not serve this model ({error})."]
    try:
        notes = served(arch, on_gpu=True).notes
    except HyLoError as error:
        but = f"\n  vLLM does not serve this model on a GPU ({error})."
        return [_SERVE.format(where=" on a CPU", extra="serve-cpu", but=but)]
    return [_SERVE.format(where="", extra="serve", but=""), *(f"- In vLLM on a GPU, {note}." for note in notes)]


def _architecture(arch: Architecture) -> list[list[str]]:
    cached = ", ".join(str(layer) for layer, kind in enumerate(arch.plan) if not MIXERS[kind].linear)
    rows = [
        ["", "value"],
        ["layers", str(arch.num_layers)],
        ["layers with a KV cache", cached or "none"],
        ["hidden size, MLP size", f"{arch.hidden_size}, {arch.intermediate_size}"],
        ["heads, vocabulary", f"{arch.num_attention_heads}, {arch.vocab_size:,}"],
        ["KV cache of a token, bf16", f"{arch.kv_bytes_per_token():,} bytes"],
    ]
    if (in_vllm := _bytes_in_vllm(arch)) not in (None, arch.kv_bytes_per_token()):
        rows.append(["KV cache of a token in vLLM on a GPU, bf16", f"{in_vllm:,} bytes"])
    for kind in dict.fromkeys(arch.plan):
        sizes = vars(getattr(arch.geometry, kind))
        rows.append([MIXERS[kind].title, ", ".join(f"{name} {value}" for name, value in sizes.items() if value)])
    rope = ", ".join(f"{name} {value}" for name, value in arch.rope_parameters.items())
    settings = [(name, getattr(arch, name), default) for name, default in positions.FIELDS.items()]
    rows += [[f"`{name}` (`config.json`)", str(value)] for name, value, default in settings if value != default]
    turns = ("mla" in arch.plan and arch.mla_rope) or arch.linear_rope or arch.window
    rows += [["rotary embedding", rope]] if turns else []
    return [*rows, ["maximum length", f"{arch.max_position_embeddings:,} tokens"]]


def _bytes_in_vllm(arch: Architecture) -> int | None:
    """Return the bytes of a token's cache in vLLM on a GPU, which pads some sizes; None where no kernel runs them."""
    try:
        sizes = served(arch, on_gpu=True)
    except HyLoError:
        return None
    return row_bytes(sizes, arch.num_attention_heads) * sum(not MIXERS[kind].linear for kind in arch.plan)


def _training(origin: Origin) -> list[str]:
    if not origin.stages:
        return ["## Training", "The exported checkpoint has no record of a training."]
    rows, total = [["stage", "kind", "steps", "tokens", "length", "mix"]], sum(s.tokens for s in origin.stages)
    for stage in origin.stages:
        length = f"{stage.length:,}" if stage.length else ""
        rows.append([stage.name, stage.kind, f"{stage.steps:,}", f"{stage.tokens:,}", length, stage.mix])
    text = f"The model was distilled on {total:,} tokens. Kind `ild` trains layer by layer, `distill` end to end."
    if origin.recipe:
        text = f"Recipe `{origin.recipe}`, initialised with `--init {origin.init}`. {text}"
    else:
        text += " Trainings before the last one are not recorded and not counted."
    return ["## Training", text, table(rows)]


def _data(origin: Origin) -> list[str]:
    if not origin.texts:
        return []
    rows = [["text", "package", "licence"]]
    rows += [[text.name, text.package or "–", text.licence or "not recorded"] for text in origin.texts]
    return ["## Data", table(rows)]


def _limits(arch: Architecture, origin: Origin) -> str:
    longest = max((stage.length or 0 for stage in origin.stages), default=0)
    trained = f"sequences of up to {longest:,} tokens" if longest else "an unrecorded length"
    lines = [
        f"- The training saw {trained}. Beyond this length only the figures above say how the model does.",
        "- The model has the knowledge, the errors and the biases of its base model, and may do worse than it.",
    ]
    states = "The states of linear layers cannot be rolled back. " if _has_linear(arch) else ""
    refused = "transformers' assisted decoding, static caches and continuous batching are refused with a message."
    return "\n".join([*lines, f"- {states}{refused}"])


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder that hylo export wrote")
    parser.add_argument("--evaluation", type=Path, help="default: evaluation.json in the folder")
    options = parser.parse_args(argv)
    put_figures(options.model, options.evaluation or options.model / "evaluation.json")
    print(f"{options.model / NAME}: figures written")
