"""Text token by token, as `qattn generate` writes it: with a key/value cache, and with the window computed anew."""

import argparse
import contextlib
from collections.abc import Iterator

import torch

from lightning_modules.benchmarks import machine
from lightning_modules.benchmarks.checks import TOLERANCES, check_model
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
    spread_note,
    synchronize_of,
)
from lightning_modules.benchmarks.references import kernels_left_out
from lightning_modules.benchmarks.result import CheckFailed, Column, Result, Target
from lightning_modules.generation import generate, stream
from lightning_modules.gpt import GPT, GPTConfig
from lightning_modules.progress import shown
from lightning_modules.timing import quotients, seconds_of
from pennylane_qattn import ATTENTION

#: Characters of Tiny Shakespeare, as in the presets.
VOCABULARY = 65
#: With a cache a token is to cost no more than this over classical attention's.
CACHED = Target(1.2)
#: Computing the window anew is to cost at least so many times as much, in a block of 256 tokens.
RECOMPUTING = Target(20, at_least=True)
BLOCK = 256
#: Sizes that are usual here; others stand in the name of a result.
SIZES = {"embed_dim": 64, "num_heads": 4, "num_layers": 4, "block": BLOCK, "batch": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `benchmark.py generate`."""
    add_common(parser, rounds=9)
    add_mechanisms(parser)
    add = parser.add_argument
    add("--embed_dim", type=positive, metavar="D", help="width of the embedding (default: %(default)s)")
    add("--num_heads", type=positive, metavar="H", help="heads (default: %(default)s)")
    add("--num_layers", type=positive, metavar="N", help="blocks (default: %(default)s)")
    add("--block", type=positive, metavar="T", help="tokens of the window (default: %(default)s)")
    add("--batch", type=positive, metavar="N", help="texts that are written at once (default: %(default)s)")
    parser.set_defaults(**SIZES)
    add("--tokens", type=positive, default=16, metavar="N", help="the last N of the block are timed (default: 16)")


def run(options: argparse.Namespace) -> list[Result]:
    """Time per token at the end of the block, of each mechanism."""
    if options.tokens >= options.block:
        raise ValueError(
            f"tokens must be fewer than block={options.block}, as a prompt comes first; got {options.tokens}"
        )
    config = GPTConfig(
        vocab_size=VOCABULARY,
        block_size=options.block,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        embed_dim=options.embed_dim,
    )
    variants = mechanisms_of(options)
    for variant in variants:
        if variant.mechanism.is_published:
            raise ValueError(f"{variant.label} has no key/value cache to be timed; leave it out")
    models = {v.label: Setup(config, v.mechanism, options.batch, options.device).model() for v in variants}
    reference = Setup(config, ATTENTION.build(BASELINE), options.batch, options.device)
    baseline, prompts = reference.model(), reference.tokens()[:, : options.block - options.tokens].tolist()
    for variant in variants:  # whatever is wrong is found before anything is timed
        check(variant, models[variant.label], baseline, reference, prompts, options.tokens)
    rows = [_row(variant, models[variant.label], baseline, prompts, options) for variant in variants]
    setting = (
        f"{counted(options.num_layers, 'layer')}, {counted(options.num_heads, 'head')}, width "
        f"{options.embed_dim}, tokens {options.block - options.tokens + 1} to {options.block} of a block of "
        f"{options.block}, batch {options.batch}"
    )
    notes = (
        f"{spread_note(options.rounds)}; in a round the mechanism, with a cache "
        "and without one, and classical attention with a cache take turns. The latter is torch's own, whose calls the "
        "kernels of this package leave alone; the row of classical attention is a second model of its kind, with "
        "whatever kernels there are. Greedy texts with and without a cache are the same.",
    )
    columns = (
        Column("mechanism", "mechanism"),
        Column("milliseconds", "with a cache, ms per token"),
        Column("over_classical", "with a cache, over classical", targets=(CACHED,), drawn=True),
        Column(
            "recomputing",
            "computing the window anew, over with a cache",
            targets=(RECOMPUTING,) if options.block == BLOCK else (),
            drawn=True,
        ),
    )
    replaced = [f"{key}-{getattr(options, key)}" for key, usual in SIZES.items() if getattr(options, key) != usual]
    name = name_on("-".join(["generate", *replaced]), options.device)
    described = machine.describe(options.device)
    title = f"A token of text, width {options.embed_dim}, {counted(options.batch, 'text')} at once"
    return [Result(name, title, setting, options.command_line, described, columns, tuple(rows), notes)]


def check(variant: Variant, model: GPT, baseline: GPT, setup: Setup, prompts: list[list[int]], tokens: int) -> None:
    """The model is one like the baseline, and has the same logits and writes the same text with a cache and without.

    Raises:
        CheckFailed: if not.
    """
    windows = setup.tokens()
    check_model(variant.label, model, baseline, windows)
    # a greedy text alone would say little: that of an untrained model hardly changes with its attention
    caches = model.new_caches(len(windows))
    with torch.no_grad():
        logits = model(windows[:, :-1])
        begun = model(windows[:, : -tokens - 1], caches=caches)
        steps = [model(windows[:, t : t + 1], caches=caches) for t in range(begun.shape[1], logits.shape[1])]
    moved = (torch.cat([begun, *steps], dim=1) - logits).abs().max()
    if moved > TOLERANCES[torch.float32] * logits.abs().max():
        raise CheckFailed(f"{variant.label} has other logits with a cache than without one: they move by {moved:.2g}")
    texts = [generate(model, prompts, tokens, temperature=0, use_cache=cached) for cached in (True, False)]
    if texts[0] != texts[1]:
        raise CheckFailed(f"{variant.label} writes another text with a cache than without one")


def _row(variant: Variant, model: GPT, baseline: GPT, prompts: list[list[int]], options: argparse.Namespace) -> dict:
    contestants = {"classical": (baseline, True), "cached": (model, True), "anew": (model, False)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in shown(range(options.rounds + 1), variant.label):
        for name, (of, use_cache) in contestants.items():
            steps = _after_the_prompt(of, prompts, options.tokens, use_cache)
            plain = kernels_left_out() if name == "classical" else contextlib.nullcontext()
            with plain:
                spent = seconds_of(lambda steps=steps: list(steps), synchronize_of(options.device))
            if number:  # the first round warms up
                seconds[name].append(spent)
    return {
        "mechanism": variant.label,
        "milliseconds": [1000 * spent / options.tokens for spent in seconds["cached"]],
        "over_classical": quotients(seconds["cached"], seconds["classical"]),
        "recomputing": quotients(seconds["anew"], seconds["cached"]),
    }


def _after_the_prompt(model: GPT, prompts: list[list[int]], tokens: int, use_cache: bool) -> Iterator[list[int]]:
    """The steps of `stream` behind the first one, which reads the prompt and fills the cache."""
    steps = stream(model, prompts, tokens + 1, temperature=0, use_cache=use_cache)
    next(steps)
    if model.head.weight.device.type == "cuda":
        torch.cuda.synchronize()  # what the prompt takes is not to be timed
    return steps
