#!/usr/bin/env python
"""Times every attention of the registry against the classical one, inside the same GPT, on the same batch.

    python scripts/benchmark.py attention --preset qisa-16 --batch 1024

Models take turns, and what is printed is the median over the rounds of the time each took, divided by what the
classical model took in the same round, so that a machine whose speed drifts slows all alike.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_modules.gpt import GPT, PRESETS, preset
from pennylane_qattn import ATTENTION

BASELINE = "classical"


def attention(options: argparse.Namespace) -> None:
    """Prints inference and training step of each mechanism as ratios to the classical one."""
    config = preset(options.preset)
    names = [BASELINE, *(name for name in options.mechanisms or ATTENTION if name != BASELINE)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (options.batch, config.block_size + 1), generator=generator)
    tokens = tokens.to(options.device)
    runs: dict[str, dict[str, Callable[[], None]]] = {"inference": {}, "training step": {}}
    for name in names:
        torch.manual_seed(0)
        model = GPT(config, ATTENTION.build(name)).to(options.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        runs["inference"][name] = lambda model=model: _inference(model, tokens)
        runs["training step"][name] = lambda model=model, optimizer=optimizer: _step(model, optimizer, tokens)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    table = Table(
        "mechanism",
        "inference",
        "training step",
        title=f"time over classical, {options.preset}, batch {options.batch}, {where}, torch {torch.__version__}",
        caption=f"median of {options.rounds} rounds (lowest to highest); {platform.processor() or platform.machine()}",
    )
    ratios = {kind: _ratios(functions, options) for kind, functions in runs.items()}
    for name in names:
        table.add_row(name, *(_spread(ratios[kind][name]) for kind in runs))
    Console(width=100).print(table)


def _inference(model: GPT, tokens: torch.Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(tokens[:, :-1])


def _step(model: GPT, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    model.train()
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _ratios(functions: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """The time of each function over the baseline's, once per round."""
    ratios: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in track(range(options.rounds), transient=True):
        seconds = {name: _seconds(function, options.device) for name, function in functions.items()}
        for name, value in seconds.items():
            ratios[name].append(value / seconds[BASELINE])
    return ratios


def _seconds(function: Callable[[], None], device: str) -> float:
    begun = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("attention", help="every mechanism against classical attention").add_argument
    add("--preset", default="qisa-16", choices=sorted(PRESETS), help="the GPT (default: %(default)s)")
    add("--batch", type=int, default=1024, help="windows in a batch (default: %(default)s, as published)")
    add("--mechanisms", nargs="*", choices=sorted(ATTENTION), help="which ones (default: all)")
    add("--rounds", type=int, default=21, help="how often each is timed (default: %(default)s)")
    add("--threads", type=int, help="torch's threads (default: torch's own choice)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    {"attention": attention}[options.command](options)


if __name__ == "__main__":
    main()
