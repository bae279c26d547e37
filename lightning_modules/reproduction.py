"""The page about the published results of QISA: what is claimed, what the published form does, and what is causal.

Made from the rows of `qattn compare --config configs/reproduce_qisa.yaml` by `scripts/reproduce_qisa.py`. Every number
on the page is either quoted from the paper, arXiv 2603.03318 (tables 1 to 3 and its repository's README), or in a row.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lightning_modules import experiment
from lightning_modules.cli import Parser
from lightning_modules.comparison import Spread
from lightning_modules.comparison_report import NOTHING, position_picture, write_rows
from lightning_modules.comparison_rows import read_rows, read_timings
from lightning_modules.files import atomic_write
from lightning_modules.labels import LEAKS
from lightning_modules.metrics import describe_bleu
from lightning_modules.progress import following
from lightning_modules.timing import describe_spread
from lightning_modules.variants import ROLES

#: How many times better than classical attention the paper has QISA, and how many times slower.
CLAIMS = {"cer": 15.5, "wer": 4.7, "cross_entropy": 13.0, "inference": 2.6}
#: Times over classical inference in the README of its code, on a T4 GPU.
README_TIMES = {"v3, precomputed": 2.1, "v3": 8.9, "v2": 46.7}
#: What the mechanisms are called in the paper and in its code.
NAMES = {"qsann": "v1", "qsann-multi": "v2", "qisa": "v3, QISA-A", "qisa-absorbed": "QISA"}
PAGE, PICTURE, ROWS = "reproduction.md", "reproduction-positions.png", "reproduction-rows.csv"


def reproduce(argv: Sequence[str], config: str | Path, description: str | None = None) -> None:
    """`scripts/reproduce_qisa.py`: the comparison, and then the page, once all runs are there.

    Args:
        argv: options of the script, and of `qattn compare`.
        config: what is compared, unless `argv` names another one.
        description: for `--help`.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("reproduce_qisa.py", description=description, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--config", default=str(config), help="what is compared (default: %(default)s)")
    parser.add_argument("--output", default="runs/reproduce-qisa", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--page", help="folder of the page (default: that of the runs)")
    own, further = parser.parse_known_args(argv)
    arguments = ["--config", own.config, "--output", own.output, *further]
    options = experiment.read_options(arguments)
    experiment.compare(arguments)
    if options.dry_run or options.shard is not None:
        part = "a dry run has no rows" if options.dry_run else f"shard {options.shard} has a part of the rows only"
        print(f"no page: {part}")
        return
    rows = read_rows(Path(options.output))
    timings = read_timings(Path(options.output), rows)
    with following("drawing the page"):
        page = write_page(Path(own.page or options.output), rows, next(iter(timings.values()), None))
    print(f"page: {page}")


def write_page(folder: Path, rows: Sequence[Mapping[str, Any]], timing: Mapping[str, Any] | None) -> Path:
    """Writes the page, its picture and its rows.

    Args:
        folder: where they go, for example `docs`.
        rows: of a comparison on one corpus and of one size that has `classical`; of several seeds the means are shown.
            A run that diverged has no numbers, and its line says so.
        timing: what the comparison measured of times, if it did.

    Raises:
        ValueError: if the rows are of several corpora or sizes, or have no `classical`.
    """
    cells = {(row["corpus"], row["size"]) for row in rows}
    if len(cells) != 1:
        raise ValueError(f"the page is about one corpus and one size; got rows of {len(cells)}")
    variants = _variants(rows)
    if "classical" not in variants:
        raise ValueError("the page compares with classical attention, and there is no row of it; add `classical`")
    template = Path(__file__).parent / "templates" / PAGE
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["number"] = _number
    times = {kind: _times(timing, kind) for kind in ("inference", "training")}
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        classical=variants["classical"],
        variants=list(variants.values()),
        leaking=[v for v in variants.values() if v["leaks"]],
        causal=[v for v in variants.values() if not v["leaks"] and v["name"] != "classical"],
        claims=CLAIMS,
        readme_times=README_TIMES,
        bleu=describe_bleu(),
        times=times,
        medians=_medians(timing),
        nan=math.nan,
        timing=timing,
        picture=PICTURE,
        table=ROWS,
        seeds=sorted({row["seed"] for row in rows}),
        first=next((row for row in rows if not row["failure"]), rows[0]),
    )
    write_rows(folder, rows, ROWS)
    with atomic_write(folder / PICTURE) as file:
        file.write(position_picture(rows))
    with atomic_write(folder / PAGE, "w") as file:
        file.write(text)
    return folder / PAGE


def _variants(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the page says of each variant: means over the seeds, and how many times better than classical."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["role"] == ROLES[0]:
            found.setdefault(row["variant"], []).append(row)
    variants = {}
    for name, runs in found.items():
        means = {key: _mean(run[key] for run in runs) for key in ("cross_entropy", "cer", "wer", "bleu")}
        lists = [run["per_position"] for run in runs if run["per_position"]]
        per_position = [_mean(values) for values in zip(*lists, strict=True)] or [math.nan]
        generated = [run["generation"] or {} for run in runs]  # none where the text is too short
        leaks = any(run["causality"] == LEAKS for run in runs)
        failed = sum(bool(run["failure"]) for run in runs)
        labels = [LEAKS] * leaks + [f"DIVERGED ({failed} of {len(runs)} runs)"] * bool(failed)
        variants[name] = {
            "name": name,
            "title": " ".join((f"`{name}`", *labels)),
            "published": NAMES.get(name.removesuffix("-published"), ""),
            "leaks": leaks,
            "certificate": runs[0]["causality"],
            "parameters": runs[0]["parameters"],
            **means,
            "prefix": _mean(run["prefix_cross_entropy"] for run in runs),
            "first": per_position[0],
            "before_last": max(per_position[:-1], default=math.nan),
            "last": per_position[-1],
            "generated_cer": _mean(numbers.get("cer") for numbers in generated),
            "generated_bleu": _mean(numbers.get("bleu") for numbers in generated),
            "sample": next((run["sample"] for run in runs if run["sample"]), ""),
        }
    reference = variants.get("classical")
    for variant in variants.values() if reference else ():
        variant["gain"] = {k: _over(reference[k], variant[k]) for k in ("cross_entropy", "cer", "wer")}
    return variants


def _mean(values: Iterable[Any]) -> float:
    """Of those that are there; NaN if none is."""
    return Spread.of(list(values)).mean


def _over(value: float, other: float) -> float:
    return value / other if other else math.nan


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else NOTHING


def _medians(timing: Mapping[str, Any] | None) -> dict[str, float]:
    """Of inference."""
    return {} if timing is None else {name: statistics.median(ratios) for name, ratios in timing["inference"].items()}


def _times(timing: Mapping[str, Any] | None, kind: str) -> dict[str, str]:
    return {} if timing is None else {name: describe_spread(ratios) for name, ratios in timing[kind].items()}
