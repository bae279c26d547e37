"""`qattn certify`: the certificate of causality of anybody's model.

A target is the name of an attention, a checkpoint or the folder of a run, `package.module:factory`, or a causal
language model of Hugging Face. The exit status is 0 for a causal model, 1 for one that leaks or is undecided.
"""

import argparse
import importlib
import json
import math
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from lightning_modules.checkpoints import resolve
from lightning_modules.cli import COMMANDS, FAILURE, Parser, add_trust
from lightning_modules.files import atomic_write
from lightning_modules.guard import say_if_leaking
from lightning_modules.language_model import LanguageModel
from lightning_modules.progress import following
from pennylane_qattn import ATTENTION, causality
from pennylane_qattn.extras import install

#: Sizes of an attention that is asked for by name.
SIZES = {"embed_dim": 16, "num_heads": 2, "block_size": 16}
HUB = "hf:"
#: What torch says of tensors that are too large.
_TOO_LARGE = re.compile("can't allocate memory|out of memory|calculation overflowed|Overflow when unpacking")


def certify(argv: list[str]) -> int:
    """`qattn certify`."""
    options = _options(argv)
    names = ("length", "vocab_size", "embed_dim", "batch_size", "run_batch_size", "modes", "time_limit", "seed")
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        target = find(options)
        with following(f"certifying {target.name}"):
            certificate = causality.certify(target.module, name=target.name, **asked)
    except (MemoryError, RuntimeError, TypeError) as error:
        sizes = {name: value for name, value in vars(options).items() if name in SIZES or name in names[:5]}
        given = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
        if not given or not _TOO_LARGE.search(str(error)):
            raise
        raise ValueError(f"{given:.200}: tensors of that size do not fit in memory; give smaller sizes") from error
    if options.json is not None:
        text = json.dumps(certificate.to_plain(), indent=1, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            with atomic_write(options.json, "w") as file:
                file.write(text)
    if options.json != "-":
        print(certificate)
    return 0 if certificate.passes else FAILURE


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="qattn certify",
        description="Looks for a leak in a model: an output that depends on a later token, or on another row of the "
        "batch. TARGET is the name of an attention, a .ckpt file or the folder of a run (its best one), "
        "package.module:factory, which gives any torch module, or a causal language model of Hugging Face: a folder "
        "with its config.json, or hf:NAME. package.module:factory is imported and called, so name only what you trust; "
        "no checkpoint or folder is. Exit status: 0 if the model is causal, 1 if it leaks or it is undecided.",
        epilog=f"example: {COMMANDS['certify'].example}",
        allow_abbrev=False,
    )
    add_trust(parser)
    add = parser.add_argument
    add("target", metavar="TARGET", help=f"what to certify; attentions: {', '.join(ATTENTION)}")
    group = parser.add_argument_group("an attention by its name").add_argument
    size = f"width of the embedding (default: {SIZES['embed_dim']}); also for a module that is given embeddings"
    group("--embed_dim", type=int, metavar="N", help=size)
    group("--num_heads", type=int, metavar="N", help=f"(default: {SIZES['num_heads']})")
    group("--block_size", type=int, metavar="N", help=f"longest sequence (default: {SIZES['block_size']})")
    group("--option", action="append", default=[], metavar="NAME=VALUE", help="of it; may be given several times")
    group = parser.add_argument_group("what is examined").add_argument
    group("--length", type=int, metavar="N", help="tokens in a sequence (default: as many as the model says)")
    group("--vocab_size", type=int, metavar="N", help="number of tokens (default: as many as the model says)")
    group("--batch_size", type=int, metavar="N", help="sequences in a batch")
    run = "sequences in a batch of a run: some futures are looked at in calls of that size too (default: 2 sequences)"
    group("--run_batch_size", type=int, metavar="N", help=run)
    group("--modes", type=_modes, metavar="M", help="eval, train, or both with a comma (default: eval,train)")
    group("--time_limit", type=float, metavar="S", help="seconds, after which it is undecided")
    group("--seed", type=int, metavar="N", help="of the inputs")
    add("--json", nargs="?", const="-", metavar="F", help="write JSON to this file; without F to stdout, and only that")
    options = parser.parse_args(argv)
    leasts = {"length": 2, "vocab_size": 2, "batch_size": 1, "run_batch_size": 1, "seed": 0, **dict.fromkeys(SIZES, 1)}
    for name, least in leasts.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if options.time_limit is not None and not 0 < options.time_limit < math.inf:
        raise ValueError(f"time_limit must be positive and finite, in seconds; got {options.time_limit}")
    return options


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(modes) <= {"eval", "train"}:
        raise argparse.ArgumentTypeError(f"modes are eval and train; got {text!r}")
    return modes


# --- targets ----------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A module to certify, and what it is called."""

    module: nn.Module
    name: str


def find(options: argparse.Namespace) -> Target:
    """The module that a target means.

    Raises:
        ValueError: one line, if there is none.
    """
    target = options.target
    if target in ATTENTION:
        return _attention(options)
    given = [f"--{name}" for name in ("num_heads", "block_size", "option") if getattr(options, name)]
    if given:
        raise ValueError(f"{given[0]} is for an attention by its name; {target!r} is none of {', '.join(ATTENTION)}")
    if target.startswith(HUB):
        return _hugging_face(target.removeprefix(HUB), target)
    path = Path(target).expanduser()
    if (path / "config.json").is_file():
        return _hugging_face(str(path), target)
    if path.exists() or path.suffix == ".ckpt":
        return _checkpoint(target)
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", target):
        return _factory(*target.split(":"))
    raise ValueError(
        f"cannot certify {target!r}: it is no file or folder, and no attention ({', '.join(ATTENTION)}); give a module "
        f"of yours as package.module:factory, one of the Hugging Face Hub as {HUB}NAME"
    )


def _attention(options: argparse.Namespace) -> Target:
    sizes = {name: default if (value := getattr(options, name)) is None else value for name, default in SIZES.items()}
    mechanism = ATTENTION.build(options.target, **dict(map(_named_value, options.option)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed or 0)
        attention = mechanism(**sizes)
    return Target(attention, options.target)


def _named_value(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"an option is written NAME=VALUE, as in values=linear; got {text!r}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"the value of option {name} cannot be read: {value!r}") from None


def _checkpoint(target: str) -> Target:
    file = resolve(target)
    if file.is_dir():
        raise ValueError(
            f"the folder {target!r} holds neither a checkpoint that qattn fit wrote nor the config.json of a Hugging "
            "Face model; name one that does"
        )
    model = LanguageModel.load_from_checkpoint(file)
    say_if_leaking(model, target)
    return Target(model.gpt, str(file))


def _factory(module: str, path: str) -> Target:
    """What `module:path` names, called if it is no module itself; modules in the current folder are found."""
    target = f"{module}:{path}"
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    found: Any = _try(lambda: importlib.import_module(module), f"cannot import {module!r}")
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{module!r} has no {path!r}; check the name")
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{target} is a {type(found).__name__}; name a torch module, or what gives one if called")
        found = _try(found, f"{target}() failed")
    if not isinstance(found, nn.Module):
        raise ValueError(f"{target}() gave a {type(found).__name__}; it must give a torch module")
    return Target(found, target)


def _try(function: Callable[[], Any], what: str) -> Any:
    """What a user's code gives; what it raises becomes a line that says where."""
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error} (QATTN_DEBUG=1 shows where)") from error


def _hugging_face(name: str, target: str) -> Target:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"{target!r} is a Hugging Face model, which needs transformers; install it with: {install('hf')}"
        ) from None
    if not name:
        raise ValueError(f"{HUB} needs a name behind it, as in {HUB}gpt2")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        # Else transformers asks on the terminal whether to run the code that came with the weights.
        model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    except pickle.UnpicklingError as error:
        reason = "its weights are no plain data, and reading them would run code; give it with safetensors"
        raise ValueError(f"refused {target!r}: {reason}") from error
    except Exception as error:  # of many kinds, over many lines
        (line, *_) = str(error).splitlines() or [""]
        if "custom code" in line:
            line = "it brings code of its own; import that yourself, and name it as package.module:factory"
            raise ValueError(f"refused {target!r}: {line}") from error
        remedy = "" if Path(name).is_dir() else f"; without a network give one that is on disk, {HUB}FOLDER"
        raise ValueError(f"cannot load {target!r}: {type(error).__name__}: {line}{remedy}") from error
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
    return Target(model.eval(), target)
