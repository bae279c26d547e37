"""Every mechanism against classical attention on torch's fused kernels, inside the same GPT, on the same batch: time of
inference and of a training step, and memory.

Ratios in float32 have targets at the sizes they are meant for: those of the published models, gpt1 with windows of 128
tokens, and any with longer windows for Gaussian scores. The peak of memory has one everywhere.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lightning_modules.benchmarks import machine
from lightning_modules.benchmarks.checks import check_compiled, check_fused, check_model
from lightning_modules.benchmarks.memory import peak_bytes
from lightning_modules.benchmarks.models import Setup
from lightning_modules.benchmarks.options import (
    BASELINE,
    Variant,
    add_common,
    add_mechanisms,
    counted,
    mechanisms_of,
    name_on,
    positive,
    positive_number,
    spread_note,
    synchronize_of,
    two_or_more,
)
from lightning_modules.benchmarks.result import Cell, Column, Result, Target
from lightning_modules.gpt import GPT, PRESETS, GPTConfig, preset
from lightning_modules.labels import LEAKS
from lightning_modules.language_model import COMPILE_MODES
from lightning_modules.progress import following, shown
from lightning_modules.timing import activation_bytes, inference, interleaved_seconds, quotients, training_step
from pennylane_qattn import ATTENTION, Mechanism

#: Windows in a batch by preset: those of its config in `configs`, and for `gpt1` what a CPU can hold.
BATCHES = {"qisa-16": 1024, "qisa-128": 128, "gpt1-tiny": 16, "gpt1": 1}
#: Fields of the GPT that options replace.
OVERRIDES = {"length": "block_size", "num_heads": "num_heads", "embed_dim": "embed_dim", "num_layers": "num_layers"}
#: What is told as ratios to classical attention, by key; each may have a target.
RATIOS = {"inference": "inference", "training": "training step", "peak": "peak memory", "activations": "activations"}
MIB = 2**20
#: Sizes of the targets: width, heads and tokens as published (arXiv 2603.03318), and of `gpt1` with short windows.
PUBLISHED_SIZES, GPT1_SIZE = ((16, 1, 16), (128, 1, 16)), (768, 12, 128)
#: Tokens from which Gaussian scores are to cost hardly more than the fused kernels that they run on.
LONG = 128
#: The largest peak memory of a training step, of every mechanism at every size.
PEAK = 1.3
#: Calls of a compiled model before it is timed: one compiles, one records its kernels as a graph of CUDA.
COMPILED_CALLS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py attention`."""
    add_common(parser, rounds=21)
    add_mechanisms(parser)
    add = parser.add_argument
    add("--preset", default="qisa-16", choices=sorted(PRESETS), help="the GPT (default: %(default)s)")
    batches = ", ".join(f"{name} {batch:,}" for name, batch in BATCHES.items())
    add("--batch", type=positive, metavar="N", help=f"windows in a batch (default: {batches})")
    add("--length", type=two_or_more, metavar="T", help="tokens of a window (default: the preset's)")
    add("--num_heads", type=positive, metavar="H", help="heads (default: the preset's)")
    add("--embed_dim", type=positive, metavar="D", help="width of the embedding (default: the preset's)")
    add("--num_layers", type=positive, metavar="N", help="blocks (default: the preset's)")
    help = "float32, or bfloat16 by autocast (default: %(default)s)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=help)
    help = "compile all models by torch.compile, in this mode (default: not at all; without a mode: default)"
    add("--compile", nargs="?", const="default", choices=COMPILE_MODES, metavar="MODE", help=help)
    help = (
        "a ratio that NAME is to keep at most, shown with the result, in addition to those of its size or in place of "
        f"one; WHAT is one of {', '.join(RATIOS)}"
    )
    add("--target", nargs=3, action="append", default=[], metavar=("NAME", "WHAT", "RATIO"), help=help)
    help = f"leave out the targets that come with sizes in float32, and that of peak memory, {PEAK}"
    add("--no_targets", action="store_true", help=help)


def run(options: argparse.Namespace) -> list[Result]:
    """Inference, training step and memory of each mechanism as ratios to the classical one."""
    replaced = {name: value for name in OVERRIDES if (value := getattr(options, name)) is not None}
    config = preset(options.preset, **{OVERRIDES[name]: value for name, value in replaced.items()})
    batch = options.batch or BATCHES[options.preset]
    variants = mechanisms_of(options)
    targets = {} if options.no_targets else targets_of(variants, config, options.dtype)
    columns = _columns(targets | _asked_for(options.target, variants))
    reference = Setup(config, ATTENTION.build(BASELINE), batch, options.device, options.dtype)
    baseline = reference.model()  # what is checked is not compiled yet, since it would be compiled for another batch
    with reference.precision():  # whatever is wrong is found before anything is timed
        check_fused(baseline, reference.tokens())
        for variant in variants:
            model = replace(reference, mechanism=variant.mechanism).model()
            leaks = variant.mechanism.is_published
            check_model(variant.label, model, baseline, reference.tokens(), leaks)
    reference = replace(reference, compile=options.compile)
    baseline = _compiled(BASELINE, reference)
    own, notes = _memory(reference, baseline)
    rows, seconds = [], []
    for variant in variants:
        setup = replace(reference, mechanism=variant.mechanism)
        row, of_baseline, more = _row(variant, setup, baseline, own, options.rounds)
        rows.append(row)
        seconds.append(of_baseline)
        notes += more
    how = [options.dtype] if options.dtype != "float32" else []
    how += [f"compiled-{options.compile}"] if options.compile else []
    name = "-".join(["attention", options.preset, *(f"{key}-{value}" for key, value in replaced.items()), *how])
    usual = _in_words(PRESETS[options.preset], BATCHES[options.preset])
    setting = _in_words(config, batch, options.dtype, options.compile)
    other = [part for part in setting if part not in usual]
    return [
        Result(
            name_on(name, options.device),
            f"Time and memory over classical attention, {options.preset}" + (f": {', '.join(other)}" if other else ""),
            ", ".join(setting),
            options.command_line,
            machine.describe(options.device),
            columns,
            tuple(rows),
            (*_explanations(options, own, seconds, variants), *dict.fromkeys(notes)),
        )
    ]


def _in_words(config: GPTConfig, batch: int, dtype: str = "float32", compile: str | None = None) -> list[str]:
    """What is measured, part by part."""
    return [
        counted(config.num_layers, "layer"),
        counted(config.num_heads, "head"),
        f"width {config.embed_dim}",
        f"{config.block_size:,} tokens",
        f"batch {batch:,}",
        dtype,
        *([f"compiled by torch.compile(mode={compile!r})"] if compile else []),
    ]


# --- targets ----------------------------------------------------------------------------------------------------

#: Bounds of ratios, by the label of a row and the key of a column.
Targets = dict[tuple[str, str], float]


def targets_of(variants: Sequence[Variant], config: GPTConfig, dtype: str) -> Targets:
    """The targets that come with a size, on every device: of time in float32, and of peak memory."""
    size = config.embed_dim, config.num_heads, config.block_size
    found: Targets = {(variant.title, "peak"): PEAK for variant in variants}
    for variant in variants if dtype == "float32" else ():
        bounds = _bounds(variant.mechanism, size)
        if bounds is not None:
            found |= {
                (variant.title, what): bound for what, bound in zip(("inference", "training"), bounds, strict=True)
            }
    return found


def _bounds(mechanism: Mechanism, size: tuple[int, int, int]) -> tuple[float, float] | None:
    """The bounds of inference and of a training step."""
    if mechanism == ATTENTION.build("qisa") and size in PUBLISHED_SIZES:
        return 1.2, 1.5
    if mechanism == ATTENTION.build("qisa", split=True) and size == GPT1_SIZE:
        return 1.0, 1.2
    if mechanism == ATTENTION.build("gaussian", values="linear"):
        if size in PUBLISHED_SIZES:
            return 1.25, 1.25
        if size[2] >= LONG:
            return 1.05, 1.05
    return None


def _asked_for(targets: list[list[str]], variants: Sequence[Variant]) -> Targets:
    """The targets of the command line."""
    titles = {variant.label: variant.title for variant in variants}
    found: Targets = {}
    for name, what, ratio in targets:
        if name not in titles:
            raise ValueError(f"a target is for one of the mechanisms {', '.join(titles)}; got {name!r}")
        if what not in RATIOS:
            raise ValueError(f"a target is for one of {', '.join(RATIOS)}; got {what!r}")
        try:
            found[titles[name], what] = positive_number(ratio)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"the target of {name} {error}") from None
    return found


def _columns(targets: Targets) -> tuple[Column, ...]:
    """The columns with their targets."""

    def of(key: str) -> tuple[Target, ...]:
        rows: dict[float, list[str]] = {}
        for (title, what), bound in targets.items():
            if what == key:
                rows.setdefault(bound, []).append(title)
        return tuple(Target(bound, rows=tuple(titles)) for bound, titles in rows.items())

    drawn = [Column(key, head, targets=of(key), drawn=key != "activations") for key, head in RATIOS.items()]
    return (Column("mechanism", "mechanism"), Column("parameters", "parameters"), *drawn)


# --- measurements -----------------------------------------------------------------------------------------------

Memory = dict[str, int | None]


def _memory(setup: Setup, model: GPT) -> tuple[Memory, list[str]]:
    """The bytes of a training step, and what is to be said of them."""
    with following(f"{setup.mechanism.name}: peak memory"):
        peak, why_not = peak_bytes(setup)
    with setup.precision():  # what a compiled model keeps is not seen
        kept = None if setup.compile else activation_bytes(model, setup.tokens())
    rise, whole = peak or (None, None)
    return {"peak": rise, "activations": kept, "whole": whole}, [why_not] if why_not else []


def _compiled(name: str, setup: Setup) -> GPT:
    """The model, which does what it would do without being compiled, where it is."""
    model = setup.model()
    if setup.compile:
        with setup.precision(), following(f"{name}: compiling"):
            check_compiled(name, model, replace(setup, compile=None).model(), setup.tokens())
    return model


def _row(
    variant: Variant, setup: Setup, baseline: GPT, of_baseline: Memory, rounds: int
) -> tuple[dict[str, Cell], dict[str, list[float]], list[str]]:
    """The row of a mechanism, the seconds of classical attention beside it, and notes."""
    model, tokens = _compiled(variant.label, setup), setup.tokens()
    memory, notes = _memory(setup, model)
    row: dict[str, Cell] = {
        "mechanism": variant.title,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    for key, own in memory.items():
        row[f"{key.removesuffix('s')}_bytes"] = own
        if key in RATIOS:
            row[key] = own / of_baseline[key] if own is not None and of_baseline[key] else None
    seconds_of_baseline = {}
    contestants = {BASELINE: baseline, "own": model}
    for kind, functions in _functions(contestants, tokens).items():
        with setup.precision():
            for function in functions.values() if setup.compile else ():
                for _ in range(COMPILED_CALLS):
                    function()
            seconds = interleaved_seconds(
                functions, shown(range(rounds), f"{variant.label}: {RATIOS[kind]}"), synchronize_of(setup.device)
            )
        row[kind], row[f"{kind}_seconds"] = quotients(seconds["own"], seconds[BASELINE]), seconds["own"]
        seconds_of_baseline[kind] = seconds[BASELINE]
    return row, seconds_of_baseline, notes


def _functions(models: dict[str, GPT], tokens: torch.Tensor) -> dict[str, dict[str, Callable[[], None]]]:
    """What is timed, by kind and model."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-3) for name, model in models.items()}
    return {
        "inference": {name: lambda m=model: inference(m, tokens) for name, model in models.items()},
        "training": {
            name: lambda m=model, o=optimizers[name]: training_step(m, o, tokens) for name, model in models.items()
        },
    }


def _explanations(
    options: argparse.Namespace, own: Memory, seconds: list[dict[str, list[float]]], variants: list[Variant]
) -> list[str]:
    def milliseconds(kind: str) -> str:
        medians = [1000 * statistics.median(each[kind]) for each in seconds]
        return f"{statistics.median(medians):.3g} ms"

    names = {
        "peak": "of peak memory",
        "activations": "of activations",
        "whole": "of memory in all, with weights, gradients, the optimizer's state and the program itself",
    }
    sizes = [f"{value / MIB:,.1f} MiB {names[key]}" for key, value in own.items() if value is not None]
    takes = [f"{milliseconds('inference')} for inference", f"{milliseconds('training')} for a training step", *sizes]
    texts = [
        f"{spread_note(options.rounds)}; in a round the mechanism and classical "
        "attention take turns. The row of classical attention is a second model of its kind: how far its ratios are "
        "from 1 is what the machine adds.",
        f"Classical attention takes {', '.join(takes[:-1])} and {takes[-1]}.",
        "Peak memory: by how much a training step exceeds what is there before it. Activations: what is kept for the "
        "backward pass.",
    ]
    if any(variant.mechanism.is_published for variant in variants):
        texts.append(f"{LEAKS}: the published form, in which a token sees its future; it is no rival.")
    return texts
