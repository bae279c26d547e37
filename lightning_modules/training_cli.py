"""`qattn fit|validate|test|predict`: Lightning's CLI over `LanguageModel` and `TextDataModule`.

All that belongs to a run lies in one folder, `<trainer.default_root_dir>/<run>`: config.yaml, metrics.csv, the
cross-entropy per position, report.html, tensorboard/ and checkpoints/.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import platform
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pennylane
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_modules import arguments, checkpoints, cli, training_state, trust
from lightning_modules.callbacks import RandomState, RunCheckpoint
from lightning_modules.checkpoints import (
    BEST,
    CHECKPOINTS,
    LAST,
    PlainCheckpointIO,
    first_difference,
    read_checkpoint,
    read_state,
)
from lightning_modules.data import TextDataModule
from lightning_modules.executions import Executions, say
from lightning_modules.files import atomic_write, locked, remove_partial
from lightning_modules.gpt import GPT, GPTConfig
from lightning_modules.guard import CausalityGuard, NonCausalError, say_if_leaking
from lightning_modules.labels import labelling, with_label
from lightning_modules.language_model import LanguageModel, model_config, planned_steps
from lightning_modules.loggers import RunCSVLogger, without_tracebacks_of_threads
from lightning_modules.metrics import describe_bleu
from lightning_modules.processes import as_lost, end_others, gather, in_turns
from lightning_modules.progress import PlainProgress, RichProgress
from lightning_modules.watching import MAPS, Watcher, watchers
from pennylane_qattn import ATTENTION, Certificate, Classical, Execution, Mechanism
from pennylane_qattn.registry import Registry

#: Length of a run that is given no other end.
STEPS = 1500

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "val_check_interval": 250,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "deterministic": True,
    "enable_model_summary": False,
}

#: What a run leaves in its folder, and `--overwrite` replaces.
RUN_FILES = (
    "config.yaml",
    "metrics.csv",
    "val_cross_entropy_per_position.csv",
    "report.html",
    "tensorboard",
    MAPS,
    f"{CHECKPOINTS}/{LAST}",
    f"{CHECKPOINTS}/{BEST}",
)

#: The least that these options may be; without a word, training would do nothing or Lightning divide by zero.
LEAST = {
    "seed_everything": 0,
    "checkpoint_every": 1,
    "early_stopping": 1,
    "trainer.max_steps": 1,
    "trainer.max_epochs": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 1e-9,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.limit_train_batches": 1e-9,
}

#: Warnings of Lightning, torch and jsonargparse that are wrong or of no use here, by the beginning of their text.
IRRELEVANT_WARNINGS = (
    r".*does not have many workers",  # gathering windows takes microseconds
    r".*is smaller than the logging interval",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # within Lightning
    r".*instantiate_classes",  # within Lightning
    r"You are using a CUDA device .* that has Tensor Cores",  # reduced precision is the user's choice
)


def fit(argv: list[str]) -> None:
    """`qattn fit`."""
    TrainingCLI("fit", argv).fit(reports=True)


def validate(argv: list[str]) -> None:
    """`qattn validate`."""
    TrainingCLI("validate", argv).evaluate()


def test(argv: list[str]) -> None:
    """`qattn test`."""
    TrainingCLI("test", argv).evaluate()


def predict(argv: list[str]) -> None:
    """`qattn predict`."""
    TrainingCLI("predict", argv).predict()


def quiet() -> None:
    """Silences Lightning's tips and the warnings that say nothing about the user's run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


class TrainingCLI(LightningCLI):
    """Parses the arguments of one command and builds model, data and trainer.

    Args:
        command: fit, validate, test or predict.
        argv: the arguments behind it.
        only_to_look: nothing will be trained, so a leak that is allowed is not reported.
    """

    def __init__(self, command: str, argv: list[str], only_to_look: bool = False):
        quiet()
        self.command, self.only_to_look = command, only_to_look
        self.pretrained: GPT | None = None
        self.saved: dict[str, Any] | None = None  # the checkpoint, weights apart where they are not needed yet
        description = f"{cli.COMMANDS[command].help.capitalize()}."
        if command == "fit":
            description += f" Without max_steps, max_epochs or max_time of the trainer, for {STEPS} steps."
        super().__init__(
            LanguageModel,
            TextDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=arguments.Parser,
            parser_kwargs={"prog": f"qattn {command}", "description": description},
            args=argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # --- arguments ----------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        def add(option: str, commands: str, help: str, **options: Any) -> None:
            # One config serves all commands, so each accepts all options and lists its own.
            help = help if self.command in commands.split() else argparse.SUPPRESS
            parser.add_argument(option, help=help, **options)

        evaluations = "validate test predict"
        add("--run", f"fit {evaluations}", "Name of the run's folder; by default the config's.", type=str | None)
        add(
            "--ckpt_path",
            f"fit {evaluations}",
            "Checkpoint to continue from: last or best (of this run), or a file."
            if self.command == "fit"
            else "Checkpoint: a file, a run folder, or last or best (of --run). Model and vocabulary come from it.",
            type=str | None,
        )
        add(
            "--pretrained",
            "fit",
            "Folder of OpenAIGPTLMHeadModel of transformers, as GPT-1: the run begins with its weights and tokenizer.",
            type=str | None,
        )
        add("--overwrite", "fit", "Replace the run that the folder holds.", action="store_true")
        add("--checkpoint_every", "fit", "Optimizer steps from one last.ckpt to the next.", type=int, default=200)
        add(
            "--watch",
            "fit validate",
            "What to log besides, any of gradients, entanglement, entropy, maps, with commas between.",
            type=list[str] | str | None,
        )
        add("--report", "fit", "Write report.html, the page of the run, at its end.", type=bool, default=True)
        add("--early_stopping", "fit", "Stop after so many validations without a lower val_loss.", type=int | None)
        add(
            "--allow_noncausal",
            "fit",
            "Train a model that sees later tokens; all that comes of it carries the word LEAKS.",
            type=bool,
            nargs="?",
            const=True,
            default=False,
        )
        add(
            "--output",
            "predict",
            "File for the predictions, one JSON object per line; by default stdout.",
            type=str | None,
        )
        trust.add_option(parser)
        parser.set_defaults({"data.block_size": None})  # the model's
        # A name, as the options of a default instance would go over to whatever mechanism is asked for instead.
        parser.set_defaults({"model.attention": "qisa"})
        if self.command == "fit":
            parser.link_arguments("data.tokenizer", "model.tokenizer", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        trust.only(trust.split(args)[1])  # before any name is looked up
        args = list(_with_class_paths(args))
        if self.command != "fit":
            self.config = arguments.parse(parser, args)
        else:  # what `--model.attention.split true` without a mechanism means
            self.config = arguments.parse(parser, ["--model.attention", "pennylane_qattn.QISA", *args])
            if self.config.pretrained is not None:
                self.config = arguments.parse(parser, [*self._pretrained_options(parser), *args])
        self._check_options()
        if self.command == "fit":
            return
        if self.config.ckpt_path is None:
            raise ValueError(f"qattn {self.command} needs a checkpoint; give --ckpt_path F")
        self.saved = read_checkpoint(self.checkpoint, map_location="meta")
        # What the model was trained on is what it is evaluated on, unless told otherwise.
        parser.set_defaults({f"data.{name}": value for name, value in _data_options(self.saved.get("data")).items()})
        self.config = arguments.parse(parser, args)
        self.described = arguments.parse(parser, args, defaults=False).get("model", Namespace())

    def _pretrained_options(self, parser: LightningArgumentParser) -> list[str]:
        """Reads the model to begin with; what stands for its shape, attention and tokenizer where no option does."""
        from lightning_modules.interchange import load_pretrained  # here, since it needs the extra `hf`

        self.pretrained = load_pretrained(self.config.pretrained)
        parser.set_defaults({"model.preset": self.pretrained.config.to_plain()})
        dropout = self.pretrained.blocks[0].attention.dropout
        attention = ["--model.attention.bias", "true", "--model.attention.dropout", str(dropout)]
        tokenizer = ["--data.tokenizer", str(Path(self.config.pretrained).expanduser())]
        return ["--model.attention", "pennylane_qattn.Classical", *attention, *tokenizer]

    def _take_pretrained(self, pretrained: GPT) -> None:
        """Gives the model the weights to begin with; dropout is the run's own choice."""
        folder = self.config.pretrained
        theirs, ours = pretrained.config, self.model.gpt.config
        theirs = dataclasses.replace(theirs, dropout=ours.dropout, embed_dropout=ours.embed_dropout)
        wanted = (theirs.to_plain(), Classical(bias=True).to_plain())
        attention = self.model.attention
        if isinstance(attention, Classical):
            attention = dataclasses.replace(attention, dropout=0.0)
        for then, now in zip(wanted, (ours.to_plain(), attention.to_plain()), strict=True):
            if name := next((name for name in then if then[name] != now.get(name)), None):
                raise ValueError(
                    f"the model in {folder!r} has {name} {then[name]!r}, and the options say {now.get(name)!r}; leave "
                    "sizes, attention and tokenizer out, as they come from the folder"
                )
        checkpoints.load_weights(self.model.gpt, pretrained.state_dict())

    def _check_options(self) -> None:
        """Refuses values that parse and yet make no run."""
        for name in ("run", "ckpt_path", "output"):
            if self.config[name] == "":
                raise ValueError(f"{name} is empty; give a name, or leave it out")
        limit = {"validate": "val", "test": "test", "predict": "predict"}.get(self.command)
        least = LEAST if limit is None else {"seed_everything": 0, f"trainer.limit_{limit}_batches": 1e-9}
        for name, smallest in least.items():
            value = self.config[name]
            if not isinstance(value, int | float) or value >= smallest:
                continue
            rule = f"at least {smallest}" if isinstance(smallest, int) else "positive"
            if name in ("trainer.max_steps", "trainer.max_epochs"):
                if value == -1:
                    continue
                rule += ", or -1 for no limit"
            raise ValueError(f"{name} must be {rule}; got {value:g}")

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.trainer.default_root_dir).expanduser() / (self.config.run or self._run_name())

    def _run_name(self) -> str:
        if self.config.config:
            return Path(str(self.config.config[0])).stem
        attention, preset = self.config.model.attention, self.config.model.preset
        if not isinstance(attention, str):
            last = attention.class_path.rsplit(".", 1)[-1]
            attention = next((name for name, mechanism in ATTENTION.items() if mechanism.__name__ == last), last)
        return f"{attention}-{preset}" if isinstance(preset, str) else attention

    @property
    def checkpoint(self) -> Path | None:
        """The file that `ckpt_path` means."""
        path = self.config.ckpt_path
        if path not in ("last", "best"):
            return None if path is None else checkpoints.resolve(path)
        file = self.run_folder / CHECKPOINTS / f"{path}.ckpt"
        if not file.is_file():
            raise ValueError(
                f"there is no {path} checkpoint of the run {str(self.run_folder)!r}; name the run with --run, or give "
                "the path of a checkpoint"
            )
        return file

    # --- model, data, trainer -----------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config
        trainer = config.trainer
        trainer.default_root_dir = trainer.default_root_dir or "."
        if trainer.max_steps == -1 and trainer.max_epochs is None and trainer.max_time is None:
            trainer.max_steps = STEPS
        if self.command == "fit":
            config.run = config.run or self._run_name()
            self._prepare_folder()
            block_size = _model_config(config.model).block_size
        else:
            if config.output is not None:
                check_writable(Path(config.output).parent, "output")
            self.model = LanguageModel.load_from_checkpoint(self.checkpoint)
            say_if_leaking(self.model, self.checkpoint)
            self._check_described_model()
            self.model.set_execution(Execution.from_plain(config.model.execution.as_dict()))
            block_size = self.model.gpt.config.block_size
        data = config.data
        if data.block_size is None:
            data.block_size = block_size
        elif self.command == "fit" and data.block_size != block_size or data.block_size > block_size:
            raise ValueError(
                f"data.block_size is {data.block_size} and the model's is {block_size}; leave data.block_size out, or "
                "give both the same"
            )

    def _prepare_folder(self) -> None:
        """Finds the checkpoint to continue from, or makes sure that no other run is mixed with this one."""
        folder, checkpoint = self.run_folder, self.checkpoint
        self._found = _stamp(folder / CHECKPOINTS / LAST)
        if checkpoint is not None:
            self.saved = read_state(checkpoint, map_location="meta")
        if self.config.trainer.fast_dev_run:
            return
        check_writable(folder, "trainer.default_root_dir")
        if self._continues():
            if self.config.overwrite:
                raise ValueError("overwrite replaces the run and ckpt_path continues it; give one of them")
        elif not self.config.overwrite and any((folder / name).exists() for name in RUN_FILES):
            remedy = "continue it with --ckpt_path last, " if (folder / CHECKPOINTS / LAST).is_file() else ""
            raise ValueError(
                f"{str(folder)!r} holds a run already; {remedy}choose another name with --run, or replace it with "
                "--overwrite"
            )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(L.Trainer, "trainer")
        arguments.try_integers_first(parser)
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
        if self.command == "fit":
            parser.add_lightning_class_args(LanguageModel, "model")
        else:  # it comes from the checkpoint; what a config says of it is compared with that
            parser.add_class_arguments(LanguageModel, "model", instantiate=False, skip={"tokenizer"}, sub_configs=True)
        parser.add_lightning_class_args(TextDataModule, "data")

    def instantiate_classes(self) -> None:
        if self.command != "fit":
            self.config.data.tokenizer = self.model.tokenizer
        self.config_init = arguments.instantiate(self.parser, self.config)
        self.datamodule = self.config_init.data
        if self.command == "fit":
            self.model = self.config_init.model
            if self.pretrained is not None:
                self._take_pretrained(self.pretrained)
                self.pretrained = None
            if self.saved is not None:
                self.model.on_load_checkpoint(self.saved)  # refuses another model's before anything is written
        self.trainer = self.instantiate_trainer()
        self.datamodule.trainer = self.trainer  # which knows how many processes share an epoch
        if self.command == "fit" and self.saved is not None:
            training_state.check(self.saved, self.trainer)

    def _check_described_model(self) -> None:
        """Refuses a config that describes another model than the checkpoint's."""
        given, saved = self.described, self.model.to_plain()
        described = {"gpt": _model_config(given, self.model.gpt.config, self.model.gpt.config.vocab_size).to_plain()}
        if "attention" in given:
            parser = ArgumentParser(exit_on_error=False)
            parser.add_argument("--attention", type=Mechanism | str)
            attention = parser.instantiate(Namespace(attention=self.config.model.attention)).attention
            described["attention"] = ATTENTION.build(attention).to_plain()
        if found := first_difference({kind: saved[kind] for kind in described}, described):
            raise ValueError(
                f"the config describes another model than the checkpoint: {found}; leave the model's options out, as "
                "they come from the checkpoint"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        options = self.config_init.trainer
        callbacks = _listed(options.callbacks)
        callbacks += watchers(self.config.watch, besides=callbacks)
        if options.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgress() if sys.stderr.isatty() else PlainProgress())
        callbacks.append(Executions())
        if self.command != "fit":
            return _trainer(**{**options, "callbacks": callbacks, "logger": False, **kwargs})
        for watcher in (c for c in callbacks if isinstance(c, Watcher)):
            watcher.check(self.model)  # before anything is written
        self.guard = next((c for c in callbacks if isinstance(c, CausalityGuard)), None) or CausalityGuard()
        self.guard.allow_noncausal |= self.config.allow_noncausal
        if rank_zero_only.rank == 0:  # it tells the others when training starts
            show = not (self.only_to_look and self.guard.allow_noncausal)
            self.guard.check(self.model, self.datamodule.batch_size, show)
        callbacks += [c for c in (self.guard, *self._callbacks_of_a_run()) if c not in callbacks]
        plugins = [*_listed(options.plugins), _RunIO(self)]
        logger = self._loggers() if options.logger in (None, True) else options.logger
        return _trainer(**{**options, "callbacks": callbacks, "plugins": plugins, "logger": logger, **kwargs})

    def _callbacks_of_a_run(self) -> list[Callback]:
        config, folder = self.config, self.run_folder / CHECKPOINTS
        data = _data_options(config.data.as_dict())
        callbacks = [RandomState(), RunCheckpoint(folder, config.checkpoint_every, data=data)]
        if config.early_stopping is not None:
            callbacks.append(EarlyStopping("val_loss", patience=config.early_stopping))
        return callbacks

    def _loggers(self) -> list[Logger]:
        folder, step = self.run_folder, self.saved["global_step"] if self._continues() else None
        board = TensorBoardLogger(
            str(folder.parent),
            name="",
            version=folder.name,
            sub_dir="tensorboard",
            default_hp_metric=False,
            purge_step=step,
        )
        return [RunCSVLogger(folder, step), board]

    def _continues(self) -> bool:
        """Whether the run in this folder goes on, rather than a new one begins."""
        return self.checkpoint is not None and self.run_folder.resolve() in self.checkpoint.resolve().parents

    # --- the commands -------------------------------------------------------------------------------------------

    def fit(self, reports: bool = False) -> None:
        """Trains, and leaves all that belongs to the run in its folder; with `reports`, report.html unless told not to.

        The runs of a comparison have one report together.
        """
        is_alone = contextlib.nullcontext() if self._writes_nothing else locked(self.run_folder)
        with labelling(lambda: self.model.label), is_alone:
            if not self._writes_nothing:
                self._take_over()
            self._fit()
            if reports and self.config.report and not self._writes_nothing:
                from lightning_modules.run_report import report_of  # here, since it draws

                say(f"report: {report_of(self.run_folder)}")

    @property
    def _writes_nothing(self) -> bool:
        return bool(self.trainer.fast_dev_run) or not self.trainer.is_global_zero

    def _take_over(self) -> None:
        """Makes sure that the folder, now ours alone, is as it was found, and clears what a kill has left."""
        folder = self.run_folder
        if _stamp(folder / CHECKPOINTS / LAST) != self._found:
            raise ValueError(f"another process has written to {str(folder)!r} since this one began; start it again")
        for inner in (folder, folder / CHECKPOINTS, folder / MAPS):
            remove_partial(inner)

    def _fit(self) -> None:
        trainer, folder, last = self.trainer, self.run_folder, self.run_folder / CHECKPOINTS / LAST
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        say(f"{self.model.attention.name} GPT, {parameters:,} parameters, on {self.datamodule.corpus.name}: {folder}")
        if (processes := trainer.world_size) > 1:
            size = self.datamodule.batch_size
            say(f"{processes} processes, each with batches of {size} windows: {processes * size} windows together")
        self._announce_schedule()
        before = _stamp(last)
        with without_tracebacks_of_threads(), self._unchanged_by_a_failed_start(), self._ending_together():
            try:
                trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
            except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
                if self._is_of_the_checkpoint(error):
                    reason = f"its state does not fit ({type(error).__name__}: {error}); give another checkpoint"
                    raise ValueError(f"cannot go on from {str(self.checkpoint)!r}: {reason}") from error
                raise
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        saved, step = trainer.checkpoint_callback, trainer.global_step
        if _stamp(last) == before and self.saved is None:
            raise ValueError("the run ended before its first step; give it more time with trainer.max_time")
        if self.saved is not None and step == self.saved["global_step"]:
            say(f"nothing was left to do at step {step}; raise trainer.max_steps to train on")
        if saved.best_model_path:
            say(f"step {step}, lowest val_loss {saved.best_score:.4f}: {saved.best_model_path}")
        elif saved.last_model_path:
            say(f"step {step}, without a validation that found a best checkpoint: {saved.last_model_path}")

    def _is_of_the_checkpoint(self, error: Exception) -> bool:
        """Whether an error came of what was read, before or in the first step that it was read for."""
        if self.saved is None or isinstance(error, RuntimeError) and "state_dict" not in str(error):
            return False
        trace = traceback.extract_tb(error.__traceback__)
        reading = ("restore", "load_state_dict", "on_load_checkpoint", "_optimizer_to_device", "reset_on_restart")
        return any(name in frame.name for frame in trace for name in reading)

    @contextlib.contextmanager
    def _ending_together(self) -> Iterator[None]:
        """An error of one process, which the others would wait for, ends all of them."""
        try:
            yield
        except BaseException as error:
            if not getattr(error, "of_all_processes", False):
                end_others(self.trainer)
                if lost := as_lost(error, self.trainer):
                    raise lost from error
            raise

    def _announce_schedule(self) -> None:
        """Says so where a continued run keeps a schedule that ends elsewhere than the run."""
        options = self.model.optimisation
        if self.saved is None or options.schedule == "constant" or options.schedule_steps is not None:
            return
        end = self.saved.get("schedule_steps")
        if end is not None and end != planned_steps(self.trainer, self.datamodule.train_dataloader):
            say(f"the cosine schedule still ends at step {end}, as when the run began")

    @contextlib.contextmanager
    def _unchanged_by_a_failed_start(self) -> Iterator[None]:
        """Takes away what a run leaves that ends before its first step or checkpoint, so that it can be begun again."""
        folder, last = self.run_folder, self.run_folder / CHECKPOINTS / LAST
        self._files_before, stamp = set(_files_of_run(folder)), _stamp(last)
        step = self.saved["global_step"] if self.saved else 0
        folders = (*(folder / name for name in RUN_FILES), last.parent, folder, *folder.parents)
        missing = [path for path in folders if not path.exists()]
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(folder)
            raise
        finally:
            if self.trainer.is_global_zero and self.trainer.global_step <= step and _stamp(last) == stamp:
                for path in set(_files_of_run(folder)) - self._files_before:
                    path.unlink(missing_ok=True)
                for path in missing:
                    with contextlib.suppress(OSError):
                        path.rmdir()

    def begin(self) -> None:
        """At the first checkpoint: the run takes the place of the one that it overwrites."""
        if self.config.overwrite:
            for path in self._files_before - {self.run_folder / CHECKPOINTS / LAST}:
                path.unlink(missing_ok=True)
        self.save_config()

    def save_config(self) -> None:
        """Writes config.yaml: all options, so that `--config` with it makes the same run again."""
        config = self.config.clone()
        for name in ("config", "ckpt_path", "overwrite", "output", "trust"):
            config.pop(name)
        versions = ", ".join(
            f"{name} {version}"
            for name, version in (
                ("qattn", cli.version()),
                ("python", platform.python_version()),
                ("torch", torch.__version__),
                ("lightning", L.__version__),
                ("pennylane", pennylane.__version__),
            )
        )
        with atomic_write(self.run_folder / "config.yaml", "w") as file:
            file.write(f"# {versions}\n")
            file.write(self.parser.dump(config, skip_unset=False))

    def evaluate(self) -> None:
        """Prints the metrics of the validation or test text."""
        run = self.trainer.validate if self.command == "validate" else self.trainer.test
        before = self.model.label
        with self._ending_together():
            (metrics,) = run(self.model, datamodule=self.datamodule, verbose=False)
        if not self.trainer.is_global_zero:
            return
        label = self.model.label
        table = Table("metric", "value", title=with_label("the model sees later tokens", label) if label else None)
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4f}")
        stage = "val" if self.command == "validate" else "test"
        positions = self.model.cross_entropy_per_position[stage].tolist()
        print(with_label(f"{self.checkpoint} on {self.datamodule.corpus.name}:", label), flush=True)
        console = Console()
        console.print(table)
        line = f"cross-entropy by position: {' '.join(f'{value:.3f}' for value in positions)}"
        console.print(with_label(line, label), highlight=False)
        console.print(describe_bleu(), highlight=False)
        if label and not before:
            found = Certificate.from_plain(self.model.causality)
            raise NonCausalError(f"{found.summary()}; {self.checkpoint} itself has no label", self.model.causality)

    def predict(self) -> None:
        """Writes one JSON object per window."""
        with self._ending_together():
            shares = gather(self.trainer.predict(self.model, datamodule=self.datamodule))
        if not self.trainer.is_global_zero:
            return
        windows = (window for batches in zip(*shares, strict=True) for window in in_turns(batches))
        lines = (json.dumps(window, ensure_ascii=False) for window in windows)
        if self.config.output is None:
            for line in lines:
                print(line)
            return
        with atomic_write(self.config.output, "w") as file:
            file.writelines(f"{line}\n" for line in lines)


class _RunIO(PlainCheckpointIO):
    """Tells the run of its first `last.ckpt`. Until then the folder is that of the run before, and can stay so."""

    def __init__(self, cli: TrainingCLI):
        super().__init__()
        self._cli, self._has_begun = cli, False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        if not self._has_begun and Path(path) == self._cli.run_folder / CHECKPOINTS / LAST:
            self._has_begun = True
            self._cli.begin()


def _trainer(**options: Any) -> L.Trainer:
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, TypeError, ValueError) as error:
        if not re.search("accelerator|device|backend", str(error)):
            raise
        given = ", ".join(f"trainer.{name} is {options[name]!r}" for name in ("accelerator", "devices"))
        here = ", ".join(name for name, kind in AcceleratorRegistry.items() if kind["accelerator"].is_available())
        raise ValueError(f"{error} ({given}; accelerators here: {here})") from error


def _model_config(given: Namespace, preset: GPTConfig | None = None, vocab_size: int | None = None) -> GPTConfig:
    """The config of the GPT that options of `LanguageModel` describe, from that preset unless they name one."""
    preset = given.get("preset", preset)
    preset = GPTConfig(**preset.as_dict()) if isinstance(preset, Namespace) else preset
    names = ("num_layers", "num_heads", "embed_dim", "block_size", "dropout")
    return model_config(preset, vocab_size=vocab_size, **{name: given.get(name) for name in names})


def _data_options(options: Any) -> dict[str, Any]:
    """Those of a data module that do not belong to the model, and name no class that reading them would import."""
    if not isinstance(options, dict):
        return {}
    plain = {name: value for name, value in options.items() if isinstance(value, str | int | float | None)}
    return {name: value for name, value in plain.items() if name not in ("tokenizer", "block_size")}


def _files_of_run(folder: Path) -> Iterator[Path]:
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            yield from (inner for inner in path.rglob("*") if not inner.is_dir())
        elif path.exists():
            yield path


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is written; files are replaced as a whole."""
    status = path.stat() if path.exists() else None
    return status and (status.st_ino, status.st_mtime_ns)


def check_writable(folder: Path, option: str) -> None:
    """Refuses a folder in which nothing can be made, before any work is done for it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"cannot write to {str(folder)!r}: {there}: {error.strerror.lower()}; choose another one with --{option}"
        ) from None


def _with_class_paths(args: list[str]) -> Iterator[str]:
    """Replaces registry names, `--model.attention qisa`, by class paths, which may have further options behind them."""
    key = ""
    for argument in args:
        if argument.startswith("--"):
            key, separator, value = argument.partition("=")
            yield f"{key}={_class_path(key, value)}" if separator else argument
        else:
            yield _class_path(key, argument)
            key = ""


def _class_path(option: str, value: str) -> str:
    registry = Registry.all.get(option.removesuffix(".help").rsplit(".", 1)[-1])
    if registry is None or not re.fullmatch(r"[\w-]+", value) or value in {cls.__name__ for cls in registry.values()}:
        return value
    found = registry.lookup(value)
    return f"{found.__module__}.{found.__qualname__}"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
