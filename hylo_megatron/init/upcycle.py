"""Teacher checkpoint -> hybrid student checkpoint: new mixers initialised, everything else copied bit for bit."""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hylo_megatron.checkpoint.folder import LazyTensor, check_empty, write_checkpoint
from hylo_megatron.config import Architecture, Geometry, Plan, positions
from hylo_megatron.config.geometry import GEOMETRY_HELP
from hylo_megatron.config.positions import has_window
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.config.student import student_architecture
from hylo_megatron.convert.hf_folder import save_tensors
from hylo_megatron.convert.hf_to_megatron import megatron_tensors
from hylo_megatron.convert.tables import mappings
from hylo_megatron.convert.tokenizer_files import check_tokenizer, copy_companions
from hylo_megatron.data.formats import add_format
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import only_writer
from hylo_megatron.flags import Parser, command_line, count, size
from hylo_megatron.init.calibration import calibration_tokens
from hylo_megatron.init.linear_algebra import relative_error, ridge_corrections
from hylo_megatron.init.mixer_forward import MixerRunner
from hylo_megatron.init.teacher import BaseModel
from hylo_megatron.init.window import window_beside
from hylo_megatron.mixers import FP32_SUFFIXES, LINEAR, MIXERS
from hylo_megatron.mixers.initialise import ATTENTION
from hylo_megatron.progress import peak_memory_gib

REPORT = "init_report.json"
# Strengths that the output projection's fit tries. MLA beside a window has those of "attention" for both.
RIDGES = {"data": (0.02,), "attention": (0.02, 0.1, 0.5, 2.0)}
INITS = (*RIDGES, "svd")
CALIBRATION_LENGTH = 1024


def initial_mixer(layer, arch: Architecture, how: str, frequencies, generator) -> dict[str, Tensor]:
    """Return the weights of layer ``layer.index``'s new mixer, Hugging Face names without the layer's prefix.

    MLA beside a window adds nothing until its output projection is fitted, as it is made for the complete layer.
    """
    entry = MIXERS[arch.plan[layer.index]]
    mixer = entry.part("initialise")
    if how == "svd":
        weights = mixer.from_rows(layer, arch, generator)
    elif how == "attention" and entry.linear:
        weights = mixer.calibrated(layer.first(layer.fitted_rows), arch, frequencies, ATTENTION)
    else:
        weights = mixer.calibrated(layer, arch, frequencies)
    if not mixer.REFIT and has_window(arch.window, entry.name):
        weights |= {mixer.OUTPUT_PROJECTION: torch.zeros_like(weights[mixer.OUTPUT_PROJECTION])}
    return {key: tensor.float().cpu().contiguous() for key, tensor in weights.items()}


def _ridges(arch: Architecture, kind: str, init: str, ridge: bool) -> tuple[float, ...]:
    """Return the strengths that the fit of a layer's output projection tries. ``ridge``: fit linear blocks."""
    if MIXERS[kind].part("initialise").REFIT:
        return RIDGES.get(init, ()) if ridge else ()
    return RIDGES["attention"] if init in RIDGES and has_window(arch.window, kind) else ()


def _fit_and_measure(
    layer, arch, weights, device, ridges: tuple[float, ...], beside=0.0
) -> tuple[dict[str, Tensor], dict]:
    """Refit the output projection where that helps on held-out rows; return weights and relative errors.

    ``layer`` is what a window leaves over, ``beside`` [B,S,D] the window's output.
    """
    mixer, rows = MIXERS[arch.plan[layer.index]].part("initialise"), len(layer.inputs_BSD)
    fit = layer.fitted_rows
    held = slice(fit, None) if rows > 1 else slice(None)
    runner, name = MixerRunner(arch, layer.index, device), mixer.OUTPUT_PROJECTION
    runner.load(weights)
    features, target = runner.features(layer.inputs_BSD), layer.output_BSD
    whole = target + beside

    def error(projection: Tensor) -> float:
        return relative_error((features @ projection.T + beside)[held], whole[held])

    projection = weights[name].to(device)
    errors = {"error": error(projection)}
    if ridges and rows > 1:
        fits = ridge_corrections(features[:fit].flatten(0, 1), target[:fit].flatten(0, 1), projection, ridges)
        best, ridge, fitted = min(((error(fitted), ridge, fitted) for fitted, ridge in zip(fits, ridges, strict=True)),
                                  key=lambda found: found[0])  # fmt: skip
        errors |= {"error_transferred": errors["error"], "error_ridge": best, "ridge": ridge}
        if best < errors["error"]:
            weights, errors["error"] = weights | {name: fitted.cpu()}, best
    return weights, errors


class _StudentWeights:
    """Weights of the student with the interface of ``HFWeights``: new mixers from files in ``scratch``, all others
    from the teacher. ``mixer_keys``: the layer of each key of a new mixer."""

    def __init__(self, base: BaseModel, arch: Architecture, scratch: Path, mixer_keys: dict[str, int]):
        self.base, self.expected = base, hf_shapes(arch)
        self.scratch, self.mixer_keys = scratch, mixer_keys

    def dtype(self, key: str) -> torch.dtype:
        if key.endswith(FP32_SUFFIXES):
            return torch.float32
        return self.base.reader.dtype("embedding.word_embeddings.weight")

    def __getitem__(self, key: str) -> Tensor:
        if key in self.mixer_keys:
            with safe_open(self.scratch / f"{self.mixer_keys[key]}.safetensors", framework="pt") as file:
                return file.get_tensor(key)
        return self.base.stored(key)


def _line(entry: dict) -> str:
    ridge = f"  (before ridge {entry['error_transferred']:.3f})" if "error_ridge" in entry else ""
    error = f"{entry['error']:.3f}" if "error" in entry else "not measured"
    return f"layer {entry['layer']:3d} {entry['kind']:7s} relative error {error}{ridge}"


def _initialise(base: BaseModel, arch: Architecture, scratch: Path, tokens_BS: Tensor | None, *, init: str,
                ridge: bool, seed: int, log) -> tuple[list[dict], dict[str, int]]:  # fmt: skip
    """Write each layer's new mixer into ``scratch``; return the report's entries, and the layer of each key."""
    generator, report, mixer_keys = torch.Generator().manual_seed(seed), [], {}
    for layer in base.layers(tokens_BS):
        found = window_beside(base, layer, arch)
        weights = initial_mixer(found.rest, arch, init, base.frequencies, generator)
        entry = {"layer": layer.index, "kind": arch.plan[layer.index]}
        if tokens_BS is not None:
            ridges = _ridges(arch, arch.plan[layer.index], init, ridge)
            weights, errors = _fit_and_measure(found.rest, arch, weights, base.device, ridges, found.output_BSD)
            output_norm = layer.output_BSD.norm(dim=-1).mean().item()
            entry |= errors | {"output_norm": output_norm, "update_norm": layer.update_norm}
        weights |= found.weights
        prefixed = {f"model.layers.{layer.index}.{key}": tensor for key, tensor in weights.items()}
        save_tensors(prefixed, scratch / f"{layer.index}.safetensors")
        mixer_keys |= dict.fromkeys(prefixed, layer.index)
        report.append(entry)
        log(_line(entry))
    return report, mixer_keys


@contextlib.contextmanager
def _mixers_of(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` for the new mixers. It is removed when the block ends."""
    scratch = out.with_name(out.name + ".mixers")
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out.with_name(f".{scratch.name}"), str(out)):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def upcycle(teacher: str | Path, out: str | Path, plan: tuple[str, ...], *, init: str = "data",
            geometry: str | Geometry = "native", qk_norm: bool = False, tokens_BS: Tensor | None = None,
            ridge: bool = True, seed: int = 0, device: str | torch.device = "cpu", log=print,
            **settings) -> dict:  # fmt: skip
    """Write student checkpoint ``out``; return the report, which is saved in it too. Raises ``HyLoError``."""
    out = Path(out)
    check_empty(out)
    base = BaseModel(teacher, torch.device(device))
    base.reader.finite = "convert it again from sound weights"
    if base.arch.is_hybrid:
        raise HyLoError(f"{teacher} is already a hybrid ({base.arch.plan.name}); give the Transformer it came from")
    arch = student_architecture(base.arch, plan, geometry, qk_norm, **settings)
    check_tokenizer(Path(teacher) / "hf", arch.vocab_size)
    if init not in INITS:
        raise HyLoError(f"init {init!r}: expected one of {', '.join(INITS)}")
    if init != "svd" and tokens_BS is None:
        raise HyLoError(f"--init {init} needs --calibration TEXT: a text file similar to the intended use")
    with _mixers_of(out) as scratch:
        report, mixer_keys = _initialise(base, arch, scratch, tokens_BS, init=init, ridge=ridge, seed=seed, log=log)
        arch.extra["ild_norms"] = [[e.get("output_norm", 1.0), e.get("update_norm", 1.0)] for e in report]
        result = {
            "plan": arch.plan.name,
            "init": init,
            "geometry": geometry if isinstance(geometry, str) else geometry.to_dict(),
            "seed": seed,
            "layers": report,
        }
        _write(base, arch, scratch, mixer_keys, out, Path(teacher), result)
    return result


def _write(base, arch, scratch, mixer_keys, out: Path, teacher: Path, report: dict) -> None:
    tensors = megatron_tensors(arch, _StudentWeights(base, arch, scratch, mixer_keys))
    for mapping in mappings(arch):  # what is not a mixer is copied under Megatron's own name, bit for bit
        if not any(key in mixer_keys for key in mapping.hf):
            for key in mapping.megatron:
                if key in base.reader:  # Mamba-2 has another name for the norm before it
                    load = functools.partial(base.reader.__getitem__, key)
                    tensors[key] = LazyTensor(base.reader.shape(key), base.reader.dtype(key), load)

    def companions(folder: Path) -> None:
        copy_companions(teacher / "hf", folder)
        (folder.parent / REPORT).write_text(json.dumps(report, indent=1))

    write_checkpoint(out, arch, tensors, companions)


def summary(report: dict) -> str:
    """Return the mean relative error of each kind of mixer."""
    kinds = {}
    for entry in report["layers"]:
        if "error" in entry:
            kinds.setdefault(entry["kind"], []).append(entry["error"])
    return ", ".join(f"{kind} {sum(v) / len(v):.3f} ({len(v)} layers)" for kind, v in kinds.items()) or "not measured"


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="checkpoint of the base Transformer (hylo convert)")
    add("--out", required=True, help="student checkpoint to write")
    layers = "1,5,10,14 | uniform:K | all | none | a name such as 4MLA12GDN | plan.json of hylo select-layers"
    add("--mla-layers", required=True, help=layers)
    add("--linear", choices=LINEAR, help=f"what the other layers become (default: {LINEAR[0]}, or the plan's name)")
    add("--init", default="data", choices=INITS,
        help="data: calibrated on text; attention: the same with betas, gates and ridge fitted too (in Mamba-2 the"
        " ridge only); svd: the paper's")  # fmt: skip
    add("--geometry", default="native", metavar="PRESET[:RANK+ROPE]",
        help=f"dimensions of the new mixers: {GEOMETRY_HELP}")  # fmt: skip
    add("--calibration", help="text file as for hylo prepare-data, or tokens; with svd they only measure errors")
    add_format(add, "the file of --calibration")
    add("--calibration-tokens", type=size, default=16384)
    longest = f"tokens per row (default {CALIBRATION_LENGTH}, or the base model's maximum if that is less)"
    add("--calibration-length", type=size, help=longest)
    add("--no-ridge", action="store_true", help="keep the transferred output projections of linear blocks")
    add("--mla-qk-norm", action="store_true", help="keep Qwen3's per-head norms in MLA layers (published form)")
    positions.add_flags(add)
    positions.add_window(add)
    add("--seed", type=count, default=0)
    options = parser.parse_args(argv)
    start = time.time()
    arch = Architecture.load(options.teacher)
    if options.mla_qk_norm and not (arch.qk_norm and options.init == "svd"):
        raise HyLoError("--mla-qk-norm: needs a base model with per-head norms (Qwen3) and --init svd")
    check_empty(Path(options.out))
    longest = arch.max_position_embeddings
    length = options.calibration_length or min(CALIBRATION_LENGTH, longest)
    if length > longest:
        raise HyLoError(f"--calibration-length {length}: the base model was made for {longest} tokens; use no more")
    plan = Plan.parse(arch.num_layers, options.mla_layers, options.linear, options.geometry, "--mla-layers")
    tokens = None
    if options.form and not options.calibration:
        raise HyLoError(f"--format {options.form}: is that of --calibration, which is not given; leave it out")
    if options.calibration:
        tokens = calibration_tokens(
            options.calibration, Path(options.teacher) / "hf", options.calibration_tokens, length, form=options.form
        )
    report = upcycle(
        options.teacher, options.out, plan, init=options.init, geometry=options.geometry, qk_norm=options.mla_qk_norm,
        tokens_BS=tokens, ridge=not options.no_ridge, seed=options.seed,
        device="cuda" if torch.cuda.is_available() else "cpu", **positions.given(options),
    )  # fmt: skip
    print(f"relative error of the new mixers, mean: {summary(report)}")
    print(f"{plan.name} -> {options.out}  {time.time() - start:.1f} s, peak memory {peak_memory_gib():.2f} GiB")
