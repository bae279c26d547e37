"""`qattn grover`: what Grover search would do for attention, on a trained model or on random instances."""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

import torch
from rich.console import Console

from lightning_modules import grover_report as report
from lightning_modules import grover_study as study
from lightning_modules.checkpoints import resolve
from lightning_modules.cli import COMMANDS, Parser, add_trust
from lightning_modules.data import Windows
from lightning_modules.executions import say
from lightning_modules.labels import with_label
from lightning_modules.language_model import LanguageModel
from lightning_modules.progress import following
from lightning_modules.training_cli import TrainingCLI, check_writable
from pennylane_qattn import Grover
from pennylane_qattn.extras import install

#: Thresholds to try are these quantiles of all scores.
SHARES = (0.5, 0.75, 0.9, 0.97)


def grover(argv: list[str]) -> None:
    """`qattn grover`."""
    options = _options(argv)
    folder = Path(options.output)
    check_writable(folder, "output")
    with_index = importlib.util.find_spec("sklearn") is not None
    if not with_index and options.index is not False:
        missing = f"the index needs scikit-learn, which is not here: {install('index')}"
        if options.index:
            raise ValueError(f"{missing}; or leave --index out")
        say(f"without an index: {missing}")
        options.index = False
    elif options.index is None:
        options.index = True
    if options.checkpoint is None:
        title, tables, sections = "Grover search on random rows", *_random(options)
        figures = {
            "queries.png": report.query_figure(tables),
            "errors.png": report.error_figure(tables),
            "resources.png": report.resource_figure(tables),
        }
    else:
        title, tables, sections = _model(options)
        figures = {"sparsity.png": report.sparsity_figure(tables), "success.png": report.success_figure(tables)}
    console = Console(width=None if sys.stdout.isatty() else 120)
    report.print_sections(sections, console)
    with following("drawing"):
        path = report.write_sections(folder, title, sections, figures)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def _random(options: argparse.Namespace) -> tuple[dict, list[report.Section]]:
    queries = study.query_counts(options.n, options.k, options.repeats, options.seed)
    if not queries:
        raise ValueError(f"every k is above every n; got k {options.k} and n {options.n}")
    large = [row for row in queries if row["n"] >= 256] or queries
    k = options.k[len(options.k) // 2]
    searched = [n for n in options.n if k * options.rows <= n <= options.most_keys]
    tables = {
        "queries": queries,
        "scaling": study.scaling(large),
        "finders": study.finder_costs(
            searched, k, options.dim, options.instance_tau, options.eta[0], options.rows, options.seed, options.index
        ),
        "causal": study.causal_costs(options.causal_keys, options.share, options.seed, options.index),
        "errors": study.error_table(64, 4, options.dim, options.instance_tau, options.eta, options.seed),
        "resources": study.resource_table([10**p for p in range(3, 10)], options.dim, options.bits, k),
    }
    return tables, report.random_sections(tables)


def _model(options: argparse.Namespace) -> tuple[str, dict, list[report.Section]]:
    model, windows = _subject(options)
    if options.keep and max(options.keep) > (longest := model.gpt.config.block_size):
        raise ValueError(f"keep must be at most {longest}, the keys of the longest row; got {max(options.keep)}")
    tokens = windows[torch.arange(min(len(windows), options.searched))][0]
    tables: dict[str, list] = {}
    if isinstance(model.attention, Grover):
        tables["amplification"] = study.amplification_table(model, tokens)
    tables["goodness"] = study.goodness_of_model(model, tokens, options.tau, options.share)
    tables["costs"] = study.search_costs_of_model(
        model, tokens, options.tau, options.share, options.seed, options.index
    )
    if not isinstance(model.attention, Grover):
        block = model.gpt.config.block_size
        ks = options.keep or [2**p for p in range(block.bit_length()) if 2**p <= block]
        tables["sparsity"] = study.sparsity_table(model, windows, ks)
        every = torch.cat([study.visible_scores(scores) for scores in study.dot_product_scores(model, tokens)])
        taus = [options.tau] if options.tau is not None else every.quantile(torch.tensor(SHARES).double()).tolist()
        tables["thresholds"] = study.threshold_table(model, windows, taus)
        refusals = (row["refused"] for row in (*tables["sparsity"], *tables["thresholds"]))
        for refused in filter(None, dict.fromkeys(refusals)):
            say(f"background 1 + x: {refused}")
    title = with_label(f"Grover search on {model.attention.name} attention, {options.checkpoint}", model.label)
    return title, tables, report.model_sections(tables)


def _subject(options: argparse.Namespace) -> tuple[LanguageModel, Windows]:
    """The model of the checkpoint, in float64, and windows of the test text."""
    own = {"ckpt_path": resolve(options.checkpoint), "data.eval_windows": options.windows}
    own |= {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.enable_progress_bar": "false"}
    if options.text is not None:
        own["data.corpus"] = options.text
    setup = TrainingCLI("test", [f"--{name}={value}" for name, value in own.items()])
    return setup.model.double().eval(), setup.datamodule.splits["test"]


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="qattn grover",
        description="Counts what Grover search would do for attention: calls against a classical scan and an index, "
        "success probabilities, errors against their bounds, and the logical resources that it would take. On random "
        "rows, or with --checkpoint on a trained model and its test text. Everything is simulated, and nothing timed.",
        epilog=f"example: {COMMANDS['grover'].example}",
        allow_abbrev=False,
    )
    add_trust(parser)
    add = parser.add_argument
    add("--checkpoint", metavar="F", help="the .ckpt file, or the folder of a run (its best one)")
    add("--output", default="runs/grover", metavar="FOLDER", help="where the report goes (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of all random draws (default: %(default)s)")
    add("--share", type=float, default=0.15, metavar="P", help="part of the visible scores to mark (default: 0.15)")
    add(
        "--index",
        action=argparse.BooleanOptionalAction,
        help="compare with an exact index, scikit-learn's ball tree (default: if it is installed)",
    )
    group = parser.add_argument_group("a trained model").add_argument
    group("--text", metavar="F", help="another text than the checkpoint's, of the same vocabulary")
    group("--windows", type=int, default=512, metavar="N", help="windows to evaluate on (default: %(default)s)")
    group("--searched", type=int, default=8, metavar="N", help="windows whose rows are searched (default: %(default)s)")
    group("--tau", type=float, metavar="X", help="threshold on the scores (default: the one that --share reaches)")
    group("--keep", type=int, nargs="+", metavar="K", help="keys that a row keeps (default: powers of two)")
    group = parser.add_argument_group("random rows").add_argument
    powers = [2**p for p in range(4, 21, 2)]
    group("--n", type=int, nargs="+", default=powers, metavar="N", help="keys of a row (default: 16 to 1,048,576)")
    group("--k", type=int, nargs="+", default=[1, 4, 16], metavar="K", help="marked keys (default: 1 4 16)")
    group("--repeats", type=int, default=200, metavar="N", help="searches of each size (default: %(default)s)")
    group("--rows", type=int, default=8, metavar="N", help="rows of an instance with vectors (default: %(default)s)")
    group("--most_keys", type=int, default=2**14, metavar="N", help="longest row with vectors (default: 16,384)")
    group("--causal_keys", type=int, default=96, metavar="N", help="rows of the causal matrix (default: %(default)s)")
    group("--dim", type=int, default=64, metavar="D", help="dimension of queries and keys (default: %(default)s)")
    group("--bits", type=int, default=8, metavar="B", help="bits of a coordinate in an oracle (default: %(default)s)")
    group("--eta", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 0.9, 1.5], metavar="X", help="flatness")
    group("--instance_tau", type=float, default=3.0, metavar="X", help="threshold of instances (default: %(default)s)")
    options = parser.parse_args(argv)
    at_least = {"seed": 0, "windows": 1, "searched": 1, "repeats": 1, "rows": 1, "causal_keys": 2, "dim": 1, "bits": 1}
    for name, least in {**at_least, "most_keys": 1}.items():
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    for name in ("n", "k", "keep"):
        if (values := getattr(options, name)) and min(values) < 1:
            raise ValueError(f"{name} must be at least 1; got {min(values)}")
    if not 0 < options.share < 1:
        raise ValueError(f"share must lie between 0 and 1; got {options.share}")
    if any(not 0 < eta < options.instance_tau for eta in options.eta):
        raise ValueError(f"eta must be positive and below instance_tau {options.instance_tau}; got {options.eta}")
    if options.tau is not None and math.isnan(options.tau):
        raise ValueError("tau must be a number; got nan")
    if not options.instance_tau < math.inf:
        raise ValueError(f"instance_tau must be finite; got {options.instance_tau}")
    if options.text is not None and options.checkpoint is None:
        raise ValueError("text goes with a trained model; give --checkpoint too")
    return options
