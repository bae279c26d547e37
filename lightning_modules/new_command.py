"""`qattn new`: a config for `qattn fit` with a comment above every line.

Defaults and comments come from the parser of `qattn fit` and from the mechanism's class, the choices from the
registries, so nothing is written here that could become wrong there.
"""

import argparse
import dataclasses
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

import pennylane_qattn
from lightning_modules import trust
from lightning_modules.cli import COMMANDS, Parser, add_trust, parser_of
from lightning_modules.corpora import CORPORA
from lightning_modules.files import atomic_write
from lightning_modules.gpt import PRESETS, GPTConfig, preset
from lightning_modules.labels import LEAKS, with_label
from lightning_modules.option_names import names_of
from lightning_modules.training_cli import STEPS
from pennylane_qattn import ATTENTION, Mechanism

#: The options that a config shows, in its order; `attention` stands for all of the mechanism's.
OPTIONS = (
    *("run", "seed_everything"),
    *("model.preset", "model.attention", "model.num_layers", "model.num_heads", "model.embed_dim", "model.block_size"),
    *("model.dropout", "model.learning_rate", "model.weight_decay", "model.warmup_steps", "model.schedule"),
    *("model.final_learning_rate", "model.execution.executor", "model.execution.device"),
    *("model.execution.diff_method", "model.execution.shots"),
    *("data.corpus", "data.tokenizer", "data.bpe_vocab_size", "data.batch_size", "data.train_fraction"),
    *("data.val_fraction", "data.shuffle", "data.eval_windows"),
    *("trainer.max_steps", "trainer.val_check_interval", "trainer.log_every_n_steps", "trainer.gradient_clip_val"),
    *("trainer.accelerator", "checkpoint_every", "early_stopping", "watch", "allow_noncausal"),
)
#: What is said of options that Lightning explains at length, or for other cases.
COMMENTS = {
    "seed_everything": "Seed of the weights that the model begins with, and of dropout.",
    "trainer.max_steps": "Optimizer steps; -1 for no limit, with max_epochs or max_time to end the run.",
    "trainer.val_check_interval": "Batches from one validation to the next; best.ckpt is of the lowest val_loss.",
    "trainer.log_every_n_steps": "Steps from one row of metrics.csv to the next.",
    "trainer.gradient_clip_val": "Longest gradient, as a norm: longer ones are scaled down. null: as they are.",
    "trainer.accelerator": "Where the model is trained: auto, cpu, gpu, mps.",
}
HEADER = """\
# A config for qattn fit, written by qattn new.
#
#   {fit}
#   {fit} --ckpt_path last    goes on with a run that was stopped
#   qattn test --ckpt_path {folder}{trusted}
#
# A line that is taken out has its default; qattn fit --help lists all options there are, with their defaults.
"""


def new(argv: list[str]) -> None:
    """`qattn new`."""
    options = _parser().parse_args(argv)
    mechanism = ATTENTION.lookup(options.attention)
    config = preset(options.preset)
    if options.corpus.partition(":")[0] not in CORPORA and not Path(options.corpus).expanduser().is_file():
        raise ValueError(
            f"unknown corpus {options.corpus!r}: there is no such file; choose from {', '.join(CORPORA)}, or give the "
            "path of a UTF-8 text file"
        )
    path = Path(options.output or f"{options.attention}-{options.preset}.yaml")
    if path.exists() and not options.overwrite:
        raise ValueError(f"{str(path)!r} is there already; choose another --output, or replace it with --overwrite")
    chosen = {
        "run": path.stem,
        "model.preset": options.preset,
        "model.attention": mechanism,
        "data.corpus": options.corpus,
        "trainer.max_steps": STEPS,
        "allow_noncausal": mechanism.is_published,
    }
    text = config_text(chosen, config, path)
    with atomic_write(path, "w") as file:
        file.write(text)
    label = LEAKS if mechanism.is_published else ""
    print(with_label(f"written: {path}; go on with", label))
    print(_fit(path, mechanism))


def _parser() -> Parser:
    parser = Parser(
        prog="qattn new",
        description="Writes a config for qattn fit with a comment above every line: what it does, what else it may be.",
        epilog=f"example: {COMMANDS['new'].example}",
        allow_abbrev=False,
    )
    add_trust(parser)
    add = parser.add_argument
    add("--preset", default="qisa-16", metavar="NAME", help=f"{', '.join(PRESETS)} (default: %(default)s)")
    add("--attention", default="qisa", metavar="NAME", help=f"{', '.join(ATTENTION)} (default: %(default)s)")
    corpora = f"{', '.join(CORPORA)}, or the path of a text (default: %(default)s)"
    add("--corpus", default="pydoc", metavar="NAME", help=corpora)
    add("--output", metavar="FILE", help="the config; the run has its name (default: ATTENTION-PRESET.yaml)")
    add("--overwrite", action="store_true", help="replace the file if it is there")
    return parser


def _fit(path: Path, mechanism: type[Mechanism]) -> str:
    return f"qattn fit --config {shlex.quote(str(path))}{_trusted(mechanism)}"


def _trusted(mechanism: type[Mechanism]) -> str:
    """The option that commands need for a mechanism of the user's own."""
    package = mechanism.__module__.partition(".")[0]
    return "" if package in trust.OWN else f" {trust.OPTION} {package}"


def config_text(chosen: dict[str, Any], config: GPTConfig, path: Path) -> str:
    """The config as commented YAML.

    Args:
        chosen: values of options that have another than the parser's default, among them `model.attention`, a class.
        config: of the preset, to say what its sizes are.
        path: of the file, for the commands in its head.
    """
    parser = parser_of("fit")
    helps = {action.dest: action.help for action in parser._actions}
    mechanism = chosen["model.attention"]
    fit, trusted = _fit(path, mechanism), _trusted(mechanism)
    lines = HEADER.format(fit=fit, trusted=trusted, folder=shlex.quote(f"runs/{chosen['run']}")).splitlines()
    above: list[str] = []
    for option in OPTIONS:
        *groups, name = option.split(".")
        for depth, group in enumerate(groups):
            if above[: depth + 1] != groups[: depth + 1]:
                lines.append(f"{'  ' * depth}{group}:")
        above, indent = groups, "  " * len(groups)
        note = ""
        value = chosen[option] if option in chosen else parser.get_default(option)
        if option.startswith("model.") and value is None and hasattr(config, name):
            note = f"Here that is {getattr(config, name)}."
        lines += _comment(option, COMMENTS.get(option) or _sentence(helps[option]), note, indent)
        if option == "model.attention":
            lines += _mechanism(value, indent)
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _mechanism(mechanism: type[Mechanism], indent: str) -> Iterator[str]:
    """The class of a mechanism and its options, those that YAML can hold."""
    is_exported = getattr(pennylane_qattn, mechanism.__name__, None) is mechanism
    module = "pennylane_qattn" if is_exported else mechanism.__module__
    yield f"{indent}attention:"
    yield f"{indent}  class_path: {module}.{mechanism.__qualname__}"
    parser = ArgumentParser()
    parser.add_class_arguments(mechanism, "options")
    helps = {action.dest.removeprefix("options."): action.help for action in parser._actions}
    shown = [
        f for f in dataclasses.fields(mechanism) if f.init and isinstance(f.default, bool | int | float | str | None)
    ]
    if shown:
        yield f"{indent}  init_args:"
    for option in shown:
        yield from _comment(option.name, _sentence(helps[option.name]), "", f"{indent}    ")
        yield f"{indent}    {option.name}: {_scalar(option.default)}"


def _comment(option: str, text: str, note: str, indent: str) -> list[str]:
    """The lines above an option: what it does, the names that it takes if that leaves any out, and a note."""
    names = names_of(option)
    listed = "" if all(name in text for name in names) else f"There are: {', '.join(names)}."
    start = f"{indent}# "
    text = " ".join(filter(None, (text, listed, note)))
    return textwrap.wrap(text, 120, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _sentence(help: str | None) -> str:
    """A docstring's words about an option, as a config's reader meets them."""
    if not help or help == argparse.SUPPRESS:
        return ""
    words = re.sub(r'`+"?(.*?)"?`+', r"\1", " ".join(help.split()))
    for ours, theirs in (("None", "null"), ("True", "true"), ("False", "false")):
        words = re.sub(rf"\b{ours}\b", theirs, words)
    return words.rstrip(".") + "."


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, width=1000).removesuffix("...\n").strip()
