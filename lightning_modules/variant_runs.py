"""A variant of a comparison on one corpus and of one size: its tuning, its runs, and what is measured of each.

A run leaves one row, a file of its own, written once the model has been trained and evaluated.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lightning_modules import comparison_rows as rows
from lightning_modules import timing
from lightning_modules.checkpoints import CHECKPOINTS, LAST
from lightning_modules.data import TextDataModule, Windows
from lightning_modules.evaluation import evaluate, finite, window_losses, write_sample
from lightning_modules.executions import say
from lightning_modules.inspection import attention_maps, circuit_drawing
from lightning_modules.labels import LEAKS
from lightning_modules.language_model import LanguageModel, batches_per_epoch, planned_steps
from lightning_modules.metrics import Excess, below_optimum
from lightning_modules.progress import following
from lightning_modules.report import RunResult
from lightning_modules.training_cli import TrainingCLI
from lightning_modules.variants import Variant
from pennylane_qattn.causality import certify

if TYPE_CHECKING:
    from lightning_modules.study import Cell

#: Seconds that the certificate of an evaluated model may take.
TIME_LIMIT = 30.0
#: What a run that diverged has no number for.
NUMBERS = (
    *("cross_entropy", "bits_per_character", "perplexity", "cer", "wer", "bleu", "per_position"),
    *("prefix_per_position", "prefix_cross_entropy", "generation", "sample"),
    *("optimum", "excess", "excess_error", "optimum_per_position"),
    *("train_seconds", "train_characters_per_second", "generation_characters_per_second", "activation_bytes"),
)


@dataclass(frozen=True)
class Budget:
    """What is left to do: runs, optimizer steps, tokens trained on, and seconds, about."""

    runs: int
    steps: int
    tokens: int
    seconds: float


class VariantRuns:
    """A variant in its cell, with the runs of all seeds.

    Attributes:
        label: `"LEAKS"`, or `""`; known once it has been checked.
    """

    def __init__(self, cell: "Cell", variant: Variant):
        self.cell, self.variant, self.options = cell, variant, cell.study.options
        self.label = ""

    def name(self, seed: int) -> str:
        """What a run and its folder are called."""
        return self.variant.name if len(self.options.seeds) == 1 else f"{self.variant.name}-seed{seed}"

    def folder(self, seed: int) -> Path:
        """The folder of a run."""
        return self.cell.folder / self.name(seed)

    @property
    def _tuning_folder(self) -> Path:
        return self.cell.folder / "tuning" / self.variant.name

    def _model(self, seed: int, rate: float | None = None) -> dict[str, Any]:
        options = {**self.variant.model, "attention": self.variant.attention(seed)}
        return options if rate is None else {**options, "learning_rate": rate}

    def look(self) -> TrainingCLI:
        """The training of the first seed, only to look at model and data."""
        seed = self.options.seeds[0]
        return self.cell.training(self.name(seed), seed, self._model(seed), only_to_look=True)

    # --- before anything is trained ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuses what could not be trained or evaluated."""
        self._left = [seed for seed in self.options.seeds if self.options.overwrite or self.row(seed) is None]
        if not self._left:
            found = {row["causality"] for seed in self.options.seeds if (row := self.row(seed)) is not None}
            self.label = LEAKS if LEAKS in found else ""
            return
        training = self.look()
        self.label = training.guard.label
        trainer, data, model = training.trainer, training.datamodule, training.model
        if trainer.fast_dev_run:
            raise ValueError("fast_dev_run leaves no checkpoint to compare; leave it out")
        _, windows = _windows(data, self.options.split)
        self._prompt(model, windows)
        self._sentence(model, windows)
        model.generate([model.tokenizer.decode([0])], 0, temperature=self.options.temperature)  # refuses a wrong one
        self._steps = planned_steps(trainer, data.train_dataloader)
        if self._steps == math.inf:
            raise ValueError("a comparison needs an end of its runs; give trainer.max_steps or trainer.max_epochs")
        batches = self._steps * trainer.accumulate_grad_batches
        if self.options.evaluate == "best" and _first_validation(training) > batches:
            raise ValueError(
                f"a run of {self._steps} steps would not be validated and have no best checkpoint; lower "
                f"val_check_interval ({trainer.val_check_interval}) or check_val_every_n_epoch, raise "
                f"limit_val_batches ({trainer.limit_val_batches:g}), or give evaluate: last"
            )
        self._tokens = data.batch_size * data.block_size * trainer.accumulate_grad_batches
        self._seconds = trainer.accumulate_grad_batches * _seconds_of_a_step(model, data)

    def budget(self) -> Budget:
        """What is left to do."""
        runs = len(self._left)
        if not runs:
            return Budget(0, 0, 0, 0.0)
        rates = self.options.learning_rates
        tuning = len(rates) if self.options.overwrite or self._tuned() is None else 0
        steps = int(runs * self._steps + tuning * self.options.tuning_steps)
        return Budget(runs + tuning, steps, steps * self._tokens, steps * self._seconds)

    def _prompt(self, model: LanguageModel, windows: Windows) -> str:
        return self._text("prompt", model, windows, max(1, windows.block_size // 2))

    def _sentence(self, model: LanguageModel, windows: Windows) -> str:
        return self._text("sentence", model, windows, windows.block_size)

    def _text(self, name: str, model: LanguageModel, windows: Windows, length: int) -> str:
        text = getattr(self.options, name)
        if text is None:
            return model.tokenizer.decode(windows.tokens[:length].tolist())
        try:
            tokens = model.tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if not tokens:
            raise ValueError(f"{name} is empty; give at least one token")
        return text

    # --- tuning -----------------------------------------------------------------------------------------------------

    def _tuned(self) -> list[tuple[float, float]] | None:
        """The learning rates that were tried, with the cross-entropy on the validation text."""
        found = rows.read_json(self._tuning_folder / rows.TUNING)
        if found is None:
            return None
        self._must_be_of(found["settings"], self._digest(self.options.tuning_seed), self._tuning_folder)
        return [(rate, math.inf if loss is None else loss) for rate, loss in found["tried"]]

    def tune(self) -> list[tuple[float, float]]:
        """Tries the learning rates, each in a short run with the same seed, unless that was done."""
        options, tried = self.options, self._tuned()
        if tried is not None or not options.learning_rates:
            return tried or []
        tried = []
        for rate in options.learning_rates:
            run = f"tuning/{self.variant.name}/{rate:g}"
            model = self._model(options.tuning_seed, rate)
            trainer = {"max_steps": options.tuning_steps, "max_epochs": None, "limit_val_batches": 0}
            training = self.cell.training(run, options.tuning_seed, model, trainer)
            try:
                training.fit()
            except FloatingPointError as error:  # a rate at which it diverges is tried, and not taken
                say(f"learning rate {rate:g}: {error}")
                tried.append((rate, math.inf))
                continue
            saved = LanguageModel.load_from_checkpoint(training.run_folder / CHECKPOINTS / LAST)
            tried.append((rate, float(window_losses(saved, training.datamodule.splits["validation"]).mean())))
        if not any(math.isfinite(loss) for _, loss in tried):
            raise ValueError(f"{self.variant.name} diverges at every learning rate: {options.learning_rates}")
        content = {"settings": self._digest(options.tuning_seed), "tried": finite(tried)}
        rows.write_json(self._tuning_folder / rows.TUNING, content)
        return tried

    # --- runs -------------------------------------------------------------------------------------------------------

    def row(self, seed: int) -> dict[str, Any] | None:
        """The row of a run that is done."""
        found = rows.read_json(self.folder(seed) / rows.ROW)
        if found is not None and not self.options.overwrite:
            self._must_be_of(found.get("settings"), self._digest(seed), self.folder(seed))
        return found

    def forget(self) -> None:
        """Takes away the rows that are to be overwritten; the checkpoints stay until new ones take their place."""
        for path in (self._tuning_folder / rows.TUNING, *(self.folder(seed) / rows.ROW for seed in self.options.seeds)):
            path.unlink(missing_ok=True)

    def _digest(self, seed: int) -> str:
        """Stands for everything that a row depends on."""
        options = self.options
        fit = yaml.safe_load(Path(options.fit).read_text("utf-8")) if isinstance(options.fit, str) else options.fit
        tuning = (options.learning_rates, options.tuning_steps, options.tuning_seed) if options.learning_rates else ()
        settings = {
            "fit": fit,
            "run": self.cell.settings(seed, self._model(seed), {}),
            "evaluated": (options.evaluate, options.split),
            "tuning": tuning,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def _must_be_of(self, then: str | None, now: str, folder: Path) -> None:
        if then != now:
            raise ValueError(
                f"{str(folder)!r} belongs to a comparison with other settings; choose another output, or replace it "
                "with overwrite: true"
            )

    def run(self, seed: int) -> None:
        """Trains and evaluates the model of one seed, and writes its row, unless that was done.

        What a row says of the other variants follows the plan, which may have more of them than when it was written.
        """
        done = rows.read_json(self.folder(seed) / rows.ROW)
        if done is not None:
            if (now := done | self._relations()) != done:
                rows.write_json(self.folder(seed) / rows.ROW, now)
            return
        tried = self.tune()
        rate = min(tried, key=lambda pair: pair[1])[0] if tried else None
        training = self.cell.training(self.name(seed), seed, self._model(seed, rate))
        row = self._description(training, seed, tried)
        try:
            training.fit()
        except FloatingPointError as error:  # a fact about the variant, and no reason to lose the other runs
            say(f"{self.name(seed)} diverged, and has no numbers: {error}")
            row |= {**dict.fromkeys(NUMBERS), "failure": str(error), "steps": training.trainer.global_step}
        else:
            row |= self._measured(training, seed)
        rows.write_json(self.folder(seed) / rows.ROW, finite(row))

    def _relations(self) -> dict[str, Any]:
        """What the variant is among the others."""
        variant = self.variant
        names = {"title": variant.title, "role": variant.role, "of": ",".join(variant.of)}
        return {**names, "twin": variant.twin, "twin_mismatch": variant.twin_mismatch}

    def _description(self, training: TrainingCLI, seed: int, tried: list[tuple[float, float]]) -> dict[str, Any]:
        """What is known of a run before it is trained."""
        data, variant = training.datamodule, self.variant
        return {
            "settings": self._digest(seed),
            "cell": self.cell.folder.relative_to(self.cell.study.folder).as_posix(),
            "corpus": self.cell.corpus or data.corpus.name,
            "size": self.cell.size,
            "variant": variant.name,
            **self._relations(),
            "seed": seed,
            "parameters": variant.parameters,
            "learning_rate": training.model.optimisation.learning_rate,
            "learning_rates_tried": tried,
            "batch_size": data.batch_size,
            "split": _windows(data, self.options.split)[0],
            "causality": training.guard.certificate.verdict,
            "certificate": training.guard.certificate.to_plain(),
            "failure": "",
            "attention": training.model.attention.to_plain(),
            "gpt": training.model.gpt.config.to_plain(),
            "data": _plain_options(training),
        }

    def _measured(self, training: TrainingCLI, seed: int) -> dict[str, Any]:
        """What is found out about a run that has been trained."""
        data, variant = training.datamodule, self.variant
        _, windows = _windows(data, self.options.split)
        model = self.load(seed)
        with following(f"certifying {variant.title}"):
            certificate = certify(model.gpt, name=variant.title, time_limit=TIME_LIMIT)
        measured = evaluate(model, windows)
        optimum = _optimum(model, data, windows)
        verdict = LEAKS if model.label else certificate.verdict
        excess, error = optimum["excess"], optimum["excess_error"]
        if excess is not None and below_optimum(excess, error, windows=len(windows)):
            say(f"{variant.title} is better than the best there can be by {-excess:.4f} nats: LEAKS")
            verdict = LEAKS
        speed = rows.training_speed(rows.read_history(self.folder(seed)))
        steps = training.trainer.global_step
        inputs, targets = next(iter(data.train_dataloader()))
        prompt = self._prompt(model, windows)
        sample, written = write_sample(model, prompt, self.options.sample_length, self.options.temperature)
        characters = len(data.tokenizer.decode(targets.flatten().tolist())) / targets.numel()
        return {
            "steps": steps,
            **measured,
            **optimum,
            "sample": sample,
            "causality": verdict,
            "certificate": certificate.to_plain(),
            "train_seconds": steps * self._tokens * characters / speed,
            "train_characters_per_second": speed,
            "generation_characters_per_second": written,
            "activation_bytes": timing.activation_bytes(model.gpt, torch.cat((inputs, targets[:, -1:]), dim=1)),
        }

    def checkpoint(self, seed: int) -> Path:
        """The file of the model that counts."""
        return self.folder(seed) / CHECKPOINTS / f"{self.options.evaluate}.ckpt"

    def can_be_examined(self, seed: int) -> bool:
        """The run has numbers, and its model is here."""
        row = self.row(seed)
        return row is not None and not row["failure"] and self.checkpoint(seed).is_file()

    def load(self, seed: int) -> LanguageModel:
        """The trained model of a run."""
        checkpoint = self.checkpoint(seed)
        if not checkpoint.is_file():
            raise ValueError(
                f"the run {self.name(seed)!r} has no {self.options.evaluate} checkpoint, as no validation gave a "
                "finite val_loss; give evaluate: last"
            )
        return LanguageModel.load_from_checkpoint(checkpoint)

    def examine(self, seed: int) -> RunResult:
        """A run that is done, with its attention and its circuit."""
        row, model = self.row(seed), self.load(seed)
        _, windows = _windows(self.look().datamodule, self.options.split)
        maps, labels = attention_maps(model, self._sentence(model, windows))
        scalars = ("cross_entropy", "bits_per_character", "perplexity", "cer", "wer", "bleu", "prefix_cross_entropy")
        known = ("optimum", "excess", "excess_error")
        metrics = {name: row[name] for name in (*scalars, *known) if row[name] is not None}
        name = "-".join(filter(None, (self.cell.corpus, self.cell.size, self.name(seed))))
        return RunResult(
            name=name,
            title=f"{name} GPT",
            parameters=row["parameters"],
            metrics=metrics,
            per_position=row["per_position"],
            train_characters_per_second=_number(row["train_characters_per_second"]),
            generation_characters_per_second=_number(row["generation_characters_per_second"]),
            causal={"causal": True, LEAKS: False}.get(row["causality"]),
            sample=row["sample"],
            history=rows.read_history(self.folder(seed)),
            attention_maps=maps,
            attention_labels=labels,
            circuit=circuit_drawing(model),
            settings={
                "attention": row["attention"],
                "gpt": row["gpt"],
                "data": row["data"],
                "evaluated": f"{self.options.evaluate} checkpoint on the {row['split']} text",
            },
        )


def _windows(data: TextDataModule, split: str | None) -> tuple[str, Windows]:
    """The split to evaluate on, and its name."""
    name = split or ("test" if "test" in data.splits else "validation")
    if name not in data.splits:
        raise ValueError("there is no test split, as train_fraction and val_fraction sum to 1; make them smaller")
    return name, data.splits[name]


def _optimum(model: LanguageModel, data: TextDataModule, windows: Windows) -> dict[str, Any]:
    """How far the model is from the best there can be, where the source of the text is known."""
    if data.source is None:
        return dict.fromkeys(("optimum", "excess", "excess_error", "optimum_per_position"))
    metric = Excess()
    metric.update(window_losses(model, windows), data.source.cross_entropy(*windows[torch.arange(len(windows))]))
    values = metric.compute()
    known = {name: float(values[name]) for name in ("optimum", "excess", "excess_error")}
    return {**known, "optimum_per_position": values["optimum_per_position"].reshape(-1).tolist()}


def _seconds_of_a_step(model: LanguageModel, data: TextDataModule) -> float:
    tokens = torch.zeros(data.batch_size, data.block_size + 1, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.gpt.parameters())

    def step() -> None:
        timing.training_step(model.gpt, optimizer, tokens)

    return min(timing.seconds_of(step) for _ in range(3))  # the first one warms up


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


def _plain_options(training: TrainingCLI) -> dict[str, Any]:
    return {k: v for k, v in training.config.data.as_dict().items() if isinstance(v, int | float | str | None)}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
