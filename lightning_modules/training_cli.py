"""`qattn fit|validate|test|predict`: Lightning's CLI over `LanguageModel` and `TextDataModule`.

All that belongs to a run lies in one folder, `<trainer.default_root_dir>/<run>`: config.yaml, metrics.csv, the
cross-entropy per position, tensorboard/ and checkpoints/.
"""

import argparse
import json
import logging
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pennylane
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console
from rich.table import Table

from lightning_modules import checkpoints, cli
from lightning_modules.callbacks import PlainProgress, RandomState, RichProgress, RunCheckpoint
from lightning_modules.checkpoints import BEST, CHECKPOINTS, LAST, PlainCheckpointIO, first_difference, read_checkpoint
from lightning_modules.data import TextDataModule
from lightning_modules.files import atomic_write
from lightning_modules.gpt import GPTConfig
from lightning_modules.language_model import LanguageModel, model_config
from lightning_modules.loggers import RunCSVLogger
from lightning_modules.metrics import describe_bleu
from pennylane_qattn import ATTENTION, Mechanism
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

#: What a run leaves in its folder, and `--overwrite` removes.
RUN_FILES = (
    "config.yaml",
    "metrics.csv",
    "val_cross_entropy_per_position.csv",
    "tensorboard",
    f"{CHECKPOINTS}/{LAST}",
    f"{CHECKPOINTS}/{BEST}",
)

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
    TrainingCLI("fit", argv).fit()


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
    """

    def __init__(self, command: str, argv: list[str]):
        quiet()
        self.command = command
        self.saved: dict[str, Any] | None = None  # the checkpoint, weights apart where they are not needed yet
        description = f"{cli.COMMANDS[command].help.capitalize()}."
        if command == "fit":
            description += f" Without max_steps, max_epochs or max_time of the trainer, for {STEPS} steps."
        super().__init__(
            LanguageModel,
            TextDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": f"qattn {command}", "description": description, "exit_on_error": False},
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
        add("--overwrite", "fit", "Replace the run that the folder holds.", action="store_true")
        add("--checkpoint_every", "fit", "Optimizer steps from one last.ckpt to the next.", type=int, default=200)
        add("--early_stopping", "fit", "Stop after so many validations without a lower val_loss.", type=int | None)
        add(
            "--output",
            "predict",
            "File for the predictions, one JSON object per line; by default stdout.",
            type=str | None,
        )
        parser.set_defaults({"data.block_size": None})  # the model's
        # A name, as the options of a default instance would go over to whatever mechanism is asked for instead.
        parser.set_defaults({"model.attention": "qisa"})
        if self.command == "fit":
            parser.link_arguments("data.tokenizer", "model.tokenizer", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        args = list(_with_class_paths(args))
        if self.command == "fit":  # what `--model.attention.split true` without a mechanism means
            self.config = parser.parse_args(["--model.attention", "pennylane_qattn.QISA", *args])
            return
        self.config = parser.parse_args(args)
        if self.config.ckpt_path is None:
            raise ValueError(f"qattn {self.command} needs a checkpoint; give --ckpt_path F")
        self.saved = read_checkpoint(self.checkpoint, map_location="meta")
        # What the model was trained on is what it is evaluated on, unless told otherwise.
        parser.set_defaults({f"data.{name}": value for name, value in _data_options(self.saved.get("data")).items()})
        self.config = parser.parse_args(args)

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
            block_size = _model_config(config.model, vocab_size=1).block_size
        else:
            self.model = LanguageModel.load_from_checkpoint(self.checkpoint)
            self._check_described_model()
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
        if checkpoint is not None:
            self.saved = read_checkpoint(checkpoint, map_location="meta")
        if self.config.trainer.fast_dev_run:
            return
        if self._continues():
            if self.config.overwrite:
                raise ValueError("overwrite replaces the run and ckpt_path continues it; give one of them")
        elif not self.config.overwrite and any((folder / name).exists() for name in RUN_FILES):
            raise ValueError(
                f"{str(folder)!r} holds a run already; continue it with --ckpt_path last, choose another name with "
                "--run, or replace it with --overwrite"
            )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(L.Trainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
        if self.command == "fit":
            parser.add_lightning_class_args(LanguageModel, "model")
        else:  # it comes from the checkpoint; what a config says of it is compared with that
            parser.add_class_arguments(LanguageModel, "model", instantiate=False, skip={"tokenizer"}, sub_configs=True)
        parser.add_lightning_class_args(TextDataModule, "data")

    def instantiate_classes(self) -> None:
        if self.command != "fit":
            self.config.data.tokenizer = self.model.tokenizer
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self.config_init.data
        if self.command == "fit":
            self.model = self.config_init.model
        self.trainer = self.instantiate_trainer()

    def _check_described_model(self) -> None:
        """Refuses a config that describes another model than the checkpoint's."""
        given = self.config.model
        if given == self.parser.get_defaults().model:
            return
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--attention", type=Mechanism | str)
        attention = parser.instantiate(Namespace(attention=given.attention)).attention
        saved = self.model.to_plain()
        described = {
            "attention": ATTENTION.build(attention).to_plain(),
            "gpt": _model_config(given, self.model.tokenizer.vocab_size).to_plain(),
        }
        if found := first_difference({kind: saved[kind] for kind in described}, described):
            raise ValueError(
                f"the config describes another model than the checkpoint: {found}; leave the model's options out, as "
                "they come from the checkpoint"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        options = self.config_init.trainer
        callbacks = _listed(options.callbacks)
        if options.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgress() if sys.stderr.isatty() else PlainProgress())
        if self.command != "fit":
            return L.Trainer(**{**options, "callbacks": callbacks, "logger": False, **kwargs})
        callbacks += self._callbacks_of_a_run()
        plugins = [*_listed(options.plugins), PlainCheckpointIO()]
        logger = self._loggers() if options.logger in (None, True) else options.logger
        return L.Trainer(**{**options, "callbacks": callbacks, "plugins": plugins, "logger": logger, **kwargs})

    def _callbacks_of_a_run(self) -> list[Callback]:
        config, folder = self.config, self.run_folder / CHECKPOINTS
        data = _data_options(config.data.as_dict())
        callbacks = [_SaveConfig(self), RandomState(), RunCheckpoint(folder, config.checkpoint_every, data=data)]
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

    def fit(self) -> None:
        """Trains, and leaves all that belongs to the run in its folder."""
        trainer, config, folder = self.trainer, self.config, self.run_folder
        if config.overwrite and not trainer.fast_dev_run:
            _remove_run(folder)
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        _say(f"{self.model.attention.name} GPT, {parameters:,} parameters, on {self.datamodule.corpus.name}: {folder}")
        trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
        if trainer.fast_dev_run:
            return
        if self.saved is not None and trainer.global_step == self.saved["global_step"]:
            _say(f"nothing was left to do at step {trainer.global_step}; raise trainer.max_steps to train on")
        saved = trainer.checkpoint_callback
        if saved.best_model_path:
            _say(f"step {trainer.global_step}, lowest val_loss {saved.best_score:.4f}: {saved.best_model_path}")

    def save_config(self) -> None:
        """Writes config.yaml: all options, so that `--config` with it makes the same run again."""
        config = self.config.clone()
        for name in ("config", "ckpt_path", "overwrite", "output"):
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
        (metrics,) = run(self.model, datamodule=self.datamodule, verbose=False)
        table = Table("metric", "value")
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4f}")
        stage = "val" if self.command == "validate" else "test"
        positions = self.model.cross_entropy_per_position[stage].tolist()
        print(f"{self.checkpoint} on {self.datamodule.corpus.name}:", flush=True)
        console = Console()
        console.print(table)
        console.print(f"cross-entropy by position: {' '.join(f'{value:.3f}' for value in positions)}", highlight=False)
        console.print(describe_bleu(), highlight=False)

    def predict(self) -> None:
        """Writes one JSON object per window."""
        batches = self.trainer.predict(self.model, datamodule=self.datamodule)
        lines = (json.dumps(window, ensure_ascii=False) for batch in batches for window in batch)
        if self.config.output is None:
            for line in lines:
                print(line)
            return
        with atomic_write(self.config.output, "w") as file:
            file.writelines(f"{line}\n" for line in lines)


class _SaveConfig(Callback):
    """Writes the config when training starts, so not for a run that cannot be continued."""

    def __init__(self, cli: TrainingCLI):
        self._cli = cli

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._cli.save_config()


def _model_config(given: Namespace, vocab_size: int) -> GPTConfig:
    """The config of the GPT that the options of `LanguageModel` describe."""
    preset = given.preset if isinstance(given.preset, str) else GPTConfig(**given.preset.as_dict())
    names = ("num_layers", "num_heads", "embed_dim", "block_size", "dropout")
    return model_config(preset, vocab_size=vocab_size, **{name: given[name] for name in names})


def _data_options(options: Any) -> dict[str, Any]:
    """Those of a data module that do not belong to the model, and name no class that reading them would import."""
    if not isinstance(options, dict):
        return {}
    plain = {name: value for name, value in options.items() if isinstance(value, str | int | float | None)}
    return {name: value for name, value in plain.items() if name not in ("tokenizer", "block_size")}


def _remove_run(folder: Path) -> None:
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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


def _say(text: str) -> None:
    print(f"qattn: {text}", file=sys.stderr)
