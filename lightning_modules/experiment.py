"""`qattn compare`: the same GPT, data, batches and optimizer with several attentions, side by side in one report.

What is compared is a product: mechanisms (with twins and ablations, see `variants.py`) x seeds x sizes x corpora; the
runs themselves are in `study.py`, and the report is made from their rows alone (`comparison_report.py`).
"""

import contextlib
import math
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lightning_modules import trust
from lightning_modules.arguments import Parser, parse
from lightning_modules.comparison_report import print_summary, write_comparison
from lightning_modules.comparison_rows import read_timings
from lightning_modules.executions import say
from lightning_modules.files import locked
from lightning_modules.progress import following
from lightning_modules.report import print_comparison, write_report
from lightning_modules.study import Study
from lightning_modules.training_cli import check_writable
from lightning_modules.variants import ABLATIONS, MATCHING, Matching

#: Of a folder, in bytes: what is put behind it, such as a seed, must fit in too.
LONGEST_NAME = 200


def compare(argv: list[str]) -> None:
    """`qattn compare`: trains a model per mechanism, seed, size and corpus, then prints tables and writes a report.

    A comparison that was stopped goes on where it was; with `overwrite` it begins anew.
    """
    options = read_options(argv)
    with contextlib.nullcontext() if options.dry_run else locked(options.output):
        _compare(options)


def read_options(argv: list[str]) -> Namespace:
    """The options of `qattn compare`; `ValueError` where they make no comparison."""
    parser = _parser()
    argv, single = _single_options(argv)
    options = Namespace(**parse(parser, argv).as_dict())
    for name, default in parser.get_defaults().items():
        if default is not None and getattr(options, name) is None:
            raise ValueError(f"{name} is null; give a value, or leave it out for {default!r}")
    if single and not isinstance(options.fit, dict):
        raise ValueError(
            f"--fit.{'.'.join(single[0][0])} changes options that stand in the config itself, and fit is the file "
            f"{options.fit!r}; change that file, or write its options under fit"
        )
    for path, value in single:
        _put(options.fit, path, value)
    _check(options)
    return options


def _single_options(argv: list[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """The arguments without those like `--fit.trainer.max_steps 100`, and these, as path and value.

    They are of options that the parser does not know one by one: it would put each in the place of all of its group.
    """
    rest: list[str] = []
    found: list[tuple[list[str], Any]] = []
    given = iter(argv)
    for argument in given:
        name, equals, value = argument.partition("=")
        if not re.fullmatch(r"--fit(\.\w+){2,}", name):
            rest.append(argument)
            continue
        value = value if equals else next(given, None)
        if value is None:
            raise ValueError(f"{name} needs a value")
        try:
            found.append((name.split(".")[1:], yaml.safe_load(value)))
        except yaml.YAMLError:
            raise ValueError(f"{name} cannot be read as YAML; quote it; got {value!r:.80}") from None
    return rest, found


def _put(group: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets one option of a nested group, and leaves the others as they are."""
    *inner, last = path
    for name in inner:
        if group.get(name) is None:
            group[name] = {}
        group = group[name]
        if not isinstance(group, dict):
            raise ValueError(f"--fit.{'.'.join(path)}: {name} is {group!r} and holds no options")
    group[last] = value


def _compare(options: Namespace) -> None:
    study = Study(options)
    console = Console(width=None if sys.stdout.isatty() else 100)
    study.print_budget(console)
    if options.dry_run:
        return
    study.train()
    if options.shard is not None:
        say(f"shard {options.shard} is done; join the parts: qattn merge PART... --output FOLDER")
        if options.timing_rounds:
            say(
                "a part measures no times, since all variants take turns; once the parts are joined, qattn compare "
                "with these options, --output FOLDER and no --shard does, and trains nothing"
            )
        return
    study.measure_times()
    rows = study.rows()
    timings = read_timings(study.folder, rows)
    if study.is_shown_singly:
        runs = study.examine()
        print_comparison(runs, console)
        if len(options.seeds) == 1:
            for run in runs:
                console.print(Panel(Text(run.sample.strip("\n")), title=f"{run.title} writes", title_align="left"))
        with following("drawing the report"):
            path = write_report(options.output, runs, options.title, notes=options.notes)
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
    if len(rows) > len(options.mechanisms) or not study.is_shown_singly:
        print_summary(rows, timings, console)
    with following("drawing the comparison"):
        path = write_comparison(options.output, rows, timings, options.title, options.notes)
    console.print(f"comparison: {path}", highlight=False, soft_wrap=True)


def _parser() -> Parser:
    parser = Parser(
        prog="qattn compare",
        description="Trains the same GPT with several attentions on the same batches and compares them.",
    )
    add = parser.add_argument
    add("--config", action="config", help="YAML file with these options, for example configs/quickstart.yaml")
    trust.add_option(parser)
    add("--title", type=str, default="Attention, compared", help="heading of the report")
    add("--output", type=str, default="runs/comparison", help="folder of the runs and the report")
    add(
        "--mechanisms",
        type=dict[str, Any],
        default={},
        help="name: attention, a name or a class, as `model.attention` of `qattn fit`",
    )
    add(
        "--seeds", type=list[int], default=[0], help="one run of each mechanism per seed: of weights, words and batches"
    )
    add(
        "--sizes",
        type=dict[str, dict[str, Any]],
        default={},
        help="name: options under `model` of `qattn fit`, for models of several sizes",
    )
    add(
        "--corpora",
        type=dict[str, dict[str, Any]],
        default={},
        help="name: options under `data` of `qattn fit`, for several corpora",
    )
    add("--twins", type=bool, default=False, help="add for each mechanism classical attention of as many parameters")
    matched = "what is changed first to make a twin: the size of its heads, or its width; mechanism: way for some alone"
    add("--matched_by", type=Matching | dict[str, Matching], default=MATCHING[0], help=matched)
    add("--ablations", type=list[str], default=[], help=f"add each mechanism without a part: {', '.join(ABLATIONS)}")
    add("--ablate", type=list[str] | None, default=None, help="the mechanisms to do so with; by default all of them")
    add("--fit", type=dict[str, Any] | str, default={}, help="options of `qattn fit` for all runs, or a config of it")
    add(
        "--learning_rates",
        type=list[float],
        default=[],
        help="tune each variant: take the one with the lowest validation cross-entropy after tuning_steps",
    )
    add("--tuning_steps", type=int, default=300, help="steps of a tuning run")
    add("--tuning_seed", type=int, default=1000, help="seed of the tuning runs")
    add("--evaluate", type=Literal["best", "last"], default="best", help="which checkpoint of a run counts")
    add(
        "--split",
        type=Literal["test", "validation"] | None,
        default=None,
        help="the text to evaluate on; by default test, where there is one",
    )
    add(
        "--allow_noncausal",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="train what sees the future too; it is labelled LEAKS",
    )
    add("--timing_rounds", type=int, default=0, help="at the end, time all variants by turns, so many rounds")
    add("--shard", type=str | None, default=None, help="i/n: do part i of n only, to use several machines or cores")
    add("--dry_run", type=bool, default=False, help="print what would be done and what it would take, and stop")
    add("--overwrite", type=bool, default=False, help="train anew what is there already")
    add("--prompt", type=str | None, default=None, help="what the samples continue; by default a window of the text")
    add("--sample_length", type=int, default=300, help="tokens of a sample")
    add("--temperature", type=float, default=0.8, help="of the samples")
    add("--sentence", type=str | None, default=None, help="whose attention is drawn; by default a window of the text")
    add("--notes", type=list[str], default=[], help="remarks for the report")
    return parser


def _check(options: Namespace) -> None:
    if not options.mechanisms or not options.seeds:
        raise ValueError("there is nothing to compare; give mechanisms and seeds, as in configs/quickstart.yaml")
    for kind, names in (("mechanism", options.mechanisms), ("size", options.sizes), ("corpus", options.corpora)):
        for name in names:
            if Path(name).name != name or name in ("", "..") or "\0" in name or len(name.encode()) > LONGEST_NAME:
                rule = f"of {LONGEST_NAME} bytes at most" if len(name) > LONGEST_NAME // 4 else "without slashes"
                raise ValueError(f"the name of a {kind} is a folder's name, {rule}; got {name!r:.80}")
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"each seed is one run, so no two may be the same; got {options.seeds}")
    for name in options.ablations:
        if name not in ABLATIONS:
            raise ValueError(f"unknown ablation {name!r}; choose from {', '.join(ABLATIONS)}")
    for name in options.ablate or []:
        if name not in options.mechanisms:
            raise ValueError(f"ablate names {name!r}; choose from the mechanisms: {', '.join(options.mechanisms)}")
    for name in options.matched_by if isinstance(options.matched_by, dict) else ():
        if name not in options.mechanisms:
            raise ValueError(f"matched_by names {name!r}; choose from the mechanisms: {', '.join(options.mechanisms)}")
    if any(not 0 < rate < math.inf for rate in options.learning_rates):
        raise ValueError(f"learning_rates must be positive and finite; got {options.learning_rates}")
    for name, least in (("tuning_steps", 1), ("tuning_seed", 0), ("timing_rounds", 0), ("sample_length", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(options, name)}")
    if options.shard is not None:
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", options.shard)
        if not found or int(found[1]) > int(found[2]):
            raise ValueError(f"shard must be i/n, as 1/3, 2/3 and 3/3; got {options.shard!r}")
    check_writable(Path(options.output), "output")
