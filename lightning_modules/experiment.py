"""`qattn compare`: the same GPT, data, batches and optimizer with several attentions, side by side in one report."""

import csv
import json
import math
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_modules.arguments import Parser, parse
from lightning_modules.checkpoints import CHECKPOINTS, LAST
from lightning_modules.inspection import attention_maps, circuit_drawing, is_causal
from lightning_modules.language_model import LanguageModel, batches_per_epoch, planned_steps
from lightning_modules.report import RunResult, print_comparison, write_report
from lightning_modules.training_cli import TrainingCLI, check_writable
from pennylane_qattn import ATTENTION


def compare(argv: list[str]) -> None:
    """`qattn compare`: trains a model per mechanism and seed, then prints tables and writes a report.

    A comparison that was stopped goes on where it was; with `overwrite` it begins anew.
    """
    options = Namespace(**parse(_parser(), argv).as_dict())
    _check(options)
    plan = [(name, seed) for name in options.mechanisms for seed in options.seeds]
    for name, seed in plan:  # all of them before the first is trained
        _check_run(_run(name, seed, options), options)
    console = Console(width=None if sys.stdout.isatty() else 100)
    results: dict[str, list[RunResult]] = {}
    for name, seed in plan:
        training = _run(name, seed, options)
        training.fit()
        results.setdefault(name, []).append(_examine(training, options))
    runs = [run for of_mechanism in results.values() for run in of_mechanism]
    print_comparison(runs, console)
    if len(options.seeds) > 1:
        console.print(_spread(results))
    else:
        for run in runs:
            console.print(Panel(Text(run.sample.strip("\n")), title=f"{run.title} writes", title_align="left"))
    path = write_report(options.output, runs, options.title, notes=options.notes)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog="qattn compare",
        description="Trains the same GPT with several attentions on the same batches and compares them.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with these options, for example configs/quickstart.yaml")
    add("--title", type=str, default="Attention, compared", help="heading of the report")
    add("--output", type=str, default="runs/comparison", help="folder of the runs and the report")
    add("--mechanisms", type=dict[str, Any], default={}, help="name: attention, as `model.attention` of `qattn fit`")
    add(
        "--seeds", type=list[int], default=[0], help="one run of each mechanism per seed: of weights, words and batches"
    )
    add(
        "--fit",
        type=dict[str, Any] | str,
        default={},
        help="options of `qattn fit`, the same for all, or a config of it",
    )
    add("--evaluate", type=Literal["best", "last"], default="best", help="which checkpoint of a run counts")
    add("--overwrite", type=bool, default=False, help="train anew what is there already")
    add("--prompt", type=str, default="The ", help="what the samples continue")
    add("--sample_length", type=int, default=300, help="tokens of a sample")
    add("--temperature", type=float, default=0.8, help="of the samples")
    add("--sentence", type=str, default="The value of the expression is", help="whose attention is drawn")
    add("--notes", type=list[str], default=[], help="remarks for the foot of the report")
    return parser


def _seeded(mechanism: Any, seed: int) -> dict[str, Any]:
    """A mechanism as the config of `qattn fit` has it, with its Pauli words drawn from that seed."""
    if isinstance(mechanism, str):
        cls = ATTENTION.lookup(mechanism)
        mechanism = {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
    options = mechanism.get("init_args", {}) if isinstance(mechanism, Mapping) else None
    if not isinstance(options, Mapping) or "class_path" not in mechanism:
        raise ValueError(f"a mechanism is a name or has a class_path, with init_args or without; got {mechanism!r}")
    return {**mechanism, "init_args": {"seed": seed, **options}}


def _check(options: Namespace) -> None:
    if not options.mechanisms or not options.seeds:
        raise ValueError("there is nothing to compare; give mechanisms and seeds, as in configs/quickstart.yaml")
    for name in options.mechanisms:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"the name of a mechanism is a folder's name; got {name!r}")
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"each seed is one run, so no two may be the same; got {options.seeds}")
    check_writable(Path(options.output), "output")
    if options.sample_length < 1:
        raise ValueError(f"sample_length must be at least 1; got {options.sample_length}")


def _check_run(training: TrainingCLI, options: Namespace) -> None:
    """Refuses a run that could not be examined after its training."""
    for name in ("prompt", "sentence"):
        try:
            tokens = training.model.tokenizer.encode(getattr(options, name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if not tokens:
            raise ValueError(f"{name} is empty; give at least one token")
    training.model.generate([options.prompt], 0, temperature=options.temperature)  # refuses a wrong temperature
    trainer = training.trainer
    if trainer.fast_dev_run:
        raise ValueError("fast_dev_run leaves no checkpoint to compare; leave it out")
    steps = planned_steps(trainer, training.datamodule.train_dataloader)
    if options.evaluate == "best" and _first_validation(training) > steps * trainer.accumulate_grad_batches:
        raise ValueError(
            f"a run of {steps} steps would not be validated and have no best checkpoint; lower val_check_interval "
            f"({trainer.val_check_interval}) or check_val_every_n_epoch, raise limit_val_batches "
            f"({trainer.limit_val_batches}), or give evaluate: last"
        )


def _first_validation(training: TrainingCLI) -> float:
    """The batches of training before the first validation, at least."""
    trainer, interval = training.trainer, training.config.trainer.val_check_interval
    if not trainer.limit_val_batches:
        return math.inf
    if not isinstance(interval, int | float | None):
        return 0  # a time
    epochs = trainer.check_val_every_n_epoch
    if epochs is None:
        return interval
    batches = batches_per_epoch(trainer, training.datamodule.train_dataloader)
    return (epochs - 1) * batches + (interval if isinstance(interval, int) else int(batches * (interval or 1.0)))


def _run(name: str, seed: int, options: Namespace) -> TrainingCLI:
    """The `qattn fit` of one model, which begins it or goes on where it was stopped."""
    run = name if len(options.seeds) == 1 else f"{name}-seed{seed}"
    common = options.fit if isinstance(options.fit, str) else json.dumps(options.fit)
    own = {
        "run": run,
        "seed_everything": seed,
        "model": {"attention": _seeded(options.mechanisms[name], seed)},
        "data": {"seed": seed},
        "trainer": {"default_root_dir": options.output},
    }
    arguments = ["--config", common, "--config", json.dumps(own)]
    if options.overwrite:
        arguments += ["--overwrite"]
    elif (Path(options.output) / run / CHECKPOINTS / LAST).is_file():
        arguments += ["--ckpt_path", "last"]
    return TrainingCLI("fit", arguments)


def _examine(training: TrainingCLI, options: Namespace) -> RunResult:
    """Evaluates the model of a run, lets it write, and looks into it."""
    folder, data = training.run_folder, training.datamodule
    run, checkpoint = folder.name, folder / CHECKPOINTS / f"{options.evaluate}.ckpt"
    if not checkpoint.is_file():
        raise ValueError(
            f"the run {run!r} has no {options.evaluate} checkpoint, as no validation gave a finite val_loss; give "
            "evaluate: last"
        )
    model = LanguageModel.load_from_checkpoint(checkpoint)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    stage = "test" if "test" in data.splits else "val"
    (metrics,) = (trainer.test if stage == "test" else trainer.validate)(model, datamodule=data, verbose=False)
    metrics = {key.removeprefix(f"{stage}_"): value for key, value in metrics.items()}
    metrics["cross_entropy"] = metrics.pop("loss")
    history = _history(folder)
    begun = time.perf_counter()
    (sample,) = model.generate([options.prompt], options.sample_length, temperature=options.temperature, seed=0)
    seconds = time.perf_counter() - begun
    maps, labels = attention_maps(model, options.sentence)
    speeds = [row["train_characters_per_second"] for row in history if "train_characters_per_second" in row]
    return RunResult(
        name=run,
        title=f"{run} GPT",
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        metrics=metrics,
        per_position=model.cross_entropy_per_position[stage].tolist(),
        train_characters_per_second=statistics.median(speeds) if speeds else math.nan,
        generation_characters_per_second=(len(sample) - len(options.prompt)) / seconds,
        causal=is_causal(model.gpt),
        sample=sample,
        history=history,
        attention_maps=maps,
        attention_labels=labels,
        circuit=circuit_drawing(model),
        settings={
            "attention": model.attention.to_plain(),
            "gpt": model.gpt.config.to_plain(),
            "data": _data(training),
            "evaluated": f"{options.evaluate} checkpoint on the {'test' if stage == 'test' else 'validation'} text",
        },
    )


def _spread(results: dict[str, list[RunResult]]) -> Table:
    """Cross-entropy of each mechanism over its seeds."""
    table = Table("mechanism", "seeds", "mean", "standard deviation", "lowest", "highest", title="cross-entropy, nats")
    for name, runs in results.items():
        values = [run.metrics["cross_entropy"] for run in runs]
        numbers = (statistics.mean(values), statistics.stdev(values), min(values), max(values))
        table.add_row(name, str(len(values)), *(f"{number:.4f}" for number in numbers))
    return table


def _data(training: TrainingCLI) -> Mapping[str, Any]:
    return {k: v for k, v in training.config.data.as_dict().items() if isinstance(v, int | float | str | None)}


def _history(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, numbers only."""
    table = Path(folder) / "metrics.csv"
    if not table.is_file():
        return []  # of a run that logged nothing
    with open(table, encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
