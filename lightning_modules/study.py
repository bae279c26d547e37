"""All runs of a comparison: each variant (`variant_runs.py`) on each corpus, of each size, with each seed.

A study that was stopped goes on from its rows and checkpoints; parts of it that were trained elsewhere are rows like
any other (`comparison_rows.py`).
"""

import itertools
import json
import platform
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules import comparison_rows as rows
from lightning_modules import timing
from lightning_modules.checkpoints import CHECKPOINTS, LAST
from lightning_modules.comparison_report import write_rows
from lightning_modules.executions import say
from lightning_modules.progress import duration, shown
from lightning_modules.report import RunResult
from lightning_modules.training_cli import TrainingCLI
from lightning_modules.trust import OPTION
from lightning_modules.variant_runs import VariantRuns
from lightning_modules.variants import Variant, ablations_of, count_parameters, twins_of, without_equals
from pennylane_qattn import ATTENTION

#: So many runs at most are shown one by one, with attention maps and circuits.
SHOWN_SINGLY = 6


class Study:
    """All runs of a comparison. Everything is built and checked at construction, before anything is trained.

    Args:
        options: those of `qattn compare`.

    Attributes:
        units: the variants, on every corpus and of every size.
        own: those that this shard trains.
    """

    def __init__(self, options: Namespace):
        self.options, self.folder = options, Path(options.output)
        self.fit = options.fit if isinstance(options.fit, str) else json.dumps(options.fit)
        corpora, sizes = options.corpora or {"": {}}, options.sizes or {"": {}}
        cells = [
            Cell(self, corpus, corpora[corpus], size, sizes[size]) for corpus, size in itertools.product(corpora, sizes)
        ]
        named = shown(cells, "building variants")
        self.units = [VariantRuns(cell, variant) for cell in named for variant in cell.variants()]
        index, count = map(int, (options.shard or "1/1").split("/"))
        self.own = self.units[index - 1 :: count]
        for unit in shown(self.own, "checking variants"):
            unit.check()

    @property
    def is_shown_singly(self) -> bool:
        """The runs are few enough to be looked at one by one, and their models are here."""
        few = len(self.units) * len(self.options.seeds) <= SHOWN_SINGLY
        return few and all(unit.can_be_examined(seed) for unit in self.units for seed in self.options.seeds)

    def print_budget(self, console: Console) -> None:
        """What is still to be done, and about what it takes."""
        table = Table("variant", "parameters", "twin", "runs", "steps", "tokens", "about", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        seconds = runs = steps = 0
        cell = None
        for unit in self.own:
            if unit.cell is not cell:
                cell = unit.cell
                if str(cell):
                    table.add_row(f"[bold]{cell}[/]")
            variant, budget = unit.variant, unit.budget()
            twin = "" if variant.twin_mismatch is None else f"{variant.twin} {variant.twin_mismatch:+.1%}"
            numbers = (str(budget.runs), f"{budget.steps:,}", f"{budget.tokens:,}", duration(budget.seconds))
            title = Text(variant.title)
            if unit.label:
                title.append(f" {unit.label}", "bold red")
            table.add_row(title, f"{variant.parameters:,}", twin, *numbers)
            seconds, runs, steps = seconds + budget.seconds, runs + budget.runs, steps + budget.steps
        console.print(table)
        shard = "" if self.options.shard is None else f" in shard {self.options.shard}"
        console.print(
            f"{runs} runs of training to do{shard}, {steps:,} steps: about {duration(seconds)} with "
            f"{torch.get_num_threads()} threads, evaluation apart",
            highlight=False,
        )

    def train(self) -> None:
        """Does the runs of this shard that are not done yet."""
        options = self.options
        if options.overwrite:
            for unit in self.own:
                unit.forget()
        rows.write_description(self.folder, options.title, options.notes, self._runs())
        # Seeds outside: a sweep that is stopped has compared everything, with fewer seeds.
        for seed in options.seeds:
            for unit in self.own:
                unit.run(seed)
                write_rows(self.folder, self.rows())

    def _runs(self) -> list[str]:
        folders = (unit.folder(seed) for unit in self.units for seed in self.options.seeds)
        return [folder.relative_to(self.folder).as_posix() for folder in folders]

    def rows(self) -> list[dict[str, Any]]:
        """The rows that are there, in the order of the plan."""
        found = (unit.row(seed) for unit in self.units for seed in self.options.seeds)
        return [row for row in found if row is not None]

    def measure_times(self) -> None:
        """Times all variants of a corpus and size by turns, where that has not been done with all of them."""
        if not self.options.timing_rounds:
            return
        for cell, found in itertools.groupby(self.units, lambda unit: unit.cell):
            units, path = list(found), cell.folder / rows.TIMES
            timed = None if self.options.overwrite else rows.read_json(path)
            if timed is None or not {unit.variant.name for unit in units} <= timed["inference"].keys():
                rows.write_json(path, cell.times(units))

    def examine(self) -> list[RunResult]:
        """Every run by itself."""
        runs = shown(list(itertools.product(self.units, self.options.seeds)), "looking at runs")
        return [unit.examine(seed) for unit, seed in runs]


@dataclass(eq=False)
class Cell:
    """A corpus and a size of model, in which variants are compared with each other.

    Attributes:
        corpus, size: their names; empty where there is but one.
        data, model: options of `qattn fit` that belong to them.
    """

    study: Study
    corpus: str
    data: Mapping[str, Any]
    size: str
    model: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.corpus, self.size)))

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return self.study.folder / self.corpus / self.size

    def variants(self) -> list[Variant]:
        """The mechanisms, with the ablations and twins that are asked for."""
        options, found, config = self.study.options, [], None
        for name, mechanism in options.mechanisms.items():
            attention = _config_of(mechanism)
            training = self.training(name, options.seeds[0], {"attention": attention}, only_to_look=True)
            if (processes := training.trainer.world_size) > 1:
                raise ValueError(
                    f"a comparison trains each run in one process, and fit.trainer asks for {processes}; "
                    "leave its devices at 1, and use several processes by --shard"
                )
            config = training.model.gpt.config
            own_seed = "seed" in attention.get("init_args", {})
            variant = Variant(name, training.model.attention, title=name, own_seed=own_seed)
            found.append(variant)
            if options.ablate is None or name in options.ablate:
                found += ablations_of(variant, config, options.ablations)
        found = without_equals(found, config)
        names = [variant.name for variant in found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is a mechanism and an ablation of another one; rename the mechanism")
        found = [replace(variant, parameters=count_parameters(config, variant.mechanism)) for variant in found]
        return twins_of(found, config, options.matched_by) if options.twins else found

    def settings(self, seed: int, model: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `qattn fit` of one run."""
        return {
            "seed_everything": seed,
            "model": {**self.model, **model},
            "data": {**self.data, "seed": seed},
            "trainer": dict(trainer),
            **({"allow_noncausal": True} if self.study.options.allow_noncausal else {}),
        }

    def training(
        self,
        run: str,
        seed: int,
        model: Mapping[str, Any],
        trainer: Mapping[str, Any] | None = None,
        only_to_look: bool = False,
    ) -> TrainingCLI:
        """The `qattn fit` of a run, which begins it or goes on where it was stopped.

        With `only_to_look` its folder may hold anything; it is not to be trained then.
        """
        own = {**self.settings(seed, model, trainer or {}), "run": run}
        own["trainer"]["default_root_dir"] = str(self.folder)
        arguments = ["--config", self.study.fit, "--config", json.dumps(own)]
        arguments += [f"{OPTION}={prefix}" for prefix in self.study.options.trust]
        if self.study.options.overwrite or only_to_look:
            arguments += ["--overwrite"]
        elif (self.folder / run / CHECKPOINTS / LAST).is_file():
            arguments += ["--ckpt_path", "last"]
        return TrainingCLI("fit", arguments, only_to_look)

    def times(self, units: list[VariantRuns]) -> dict[str, Any]:
        """Inference and training step of all variants as ratios to the first classical one, measured by turns."""
        names = [unit.variant.name for unit in units]
        baseline = "classical" if "classical" in names else names[0]
        say(f"timing {len(units)} variants by turns{f' ({self})' if str(self) else ''}")
        models = {unit.variant.name: unit.look() for unit in shown(units, "building variants")}
        data = models[baseline].datamodule
        tokens = torch.randint(data.vocab_size, (data.batch_size, data.block_size + 1))
        functions: dict[str, dict[str, Any]] = {"inference": {}, "training": {}}
        for name, training in models.items():
            gpt = training.model.gpt
            optimizer = torch.optim.AdamW(gpt.parameters())
            functions["inference"][name] = lambda gpt=gpt: timing.inference(gpt, tokens)
            functions["training"][name] = lambda gpt=gpt, o=optimizer: timing.training_step(gpt, o, tokens)
        rounds = self.study.options.timing_rounds
        ratios = {
            kind: timing.interleaved_ratios(each, baseline, shown(range(rounds), f"timing {kind}"))
            for kind, each in functions.items()
        }
        return {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "batch_size": data.batch_size,
            "rounds": rounds,
            "baseline": baseline,
            **ratios,
        }


def _config_of(mechanism: Any) -> Mapping[str, Any]:
    """A mechanism as the config of `qattn fit` has it; a text is a name, or a class as `--model.attention` takes it."""
    if isinstance(mechanism, str):
        is_class = "." in mechanism or mechanism in {cls.__name__ for cls in ATTENTION.values()}
        if not is_class:
            cls = ATTENTION.lookup(mechanism)
            mechanism = f"{cls.__module__}.{cls.__qualname__}"
        mechanism = {"class_path": mechanism}
    options = mechanism.get("init_args", {}) if isinstance(mechanism, Mapping) else None
    if not isinstance(options, Mapping) or "class_path" not in mechanism:
        raise ValueError(
            "a mechanism is a name, the path of a class, or has a class_path, with init_args or without; got "
            f"{mechanism!r}"
        )
    return mechanism
