"""The page about the published results of QISA: what is claimed, what the published form does, and what is causal.

Made from the rows of `qattn compare --config configs/reproduce_qisa.yaml` by `scripts/reproduce_qisa.py`. Every number
on the page is either quoted from the paper, arXiv 2603.03318 (tables 1 to 3 and its repository's README), or in a row.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lightning_modules.comparison_report import position_picture, write_rows
from lightning_modules.files import atomic_write
from lightning_modules.timing import describe_spread
from lightning_modules.variants import ROLES

#: How many times better than classical attention the paper has QISA, and how many times slower.
CLAIMS = {"cer": 15.5, "wer": 4.7, "cross_entropy": 13.0, "inference": 2.6}
#: What the mechanisms are called in the paper and in its code.
NAMES = {"qsann": "v1", "qsann-multi": "v2", "qisa": "v3, QISA-A", "qisa-absorbed": "QISA"}
PAGE, PICTURE, ROWS = "reproduction.md", "reproduction-positions.png", "reproduction-rows.csv"


def write_page(folder: Path, rows: Sequence[Mapping[str, Any]], timing: Mapping[str, Any] | None) -> Path:
    """Writes the page, its picture and its rows.

    Args:
        folder: where they go, for example `docs`.
        rows: of a comparison on one corpus and of one size that has `classical`; of several seeds the means are shown.
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
    times = {kind: _times(timing, kind) for kind in ("inference", "training")}
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        classical=variants["classical"],
        variants=list(variants.values()),
        leaking=[v for v in variants.values() if v["leaks"]],
        causal=[v for v in variants.values() if not v["leaks"] and v["name"] != "classical"],
        claims=CLAIMS,
        times=times,
        timing=timing,
        picture=PICTURE,
        table=ROWS,
        seeds=sorted({row["seed"] for row in rows}),
        first=rows[0],
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
        per_position = [_mean(values) for values in zip(*(run["per_position"] for run in runs), strict=True)]
        variants[name] = {
            "name": name,
            "published": NAMES.get(name.removesuffix("-published"), ""),
            "leaks": any(run["causality"] == "LEAKS" for run in runs),
            "certificate": runs[0]["causality"],
            "leak": runs[0]["certificate"].get("leak"),
            "parameters": runs[0]["parameters"],
            **means,
            "prefix": _mean(run["prefix_cross_entropy"] for run in runs),
            "first": per_position[0],
            "before_last": max(per_position[:-1]),
            "last": per_position[-1],
            "generated_cer": _mean(run["generation"]["cer"] for run in runs),
            "generated_bleu": _mean(run["generation"]["bleu"] for run in runs),
            "sample": runs[0]["sample"],
        }
    reference = variants.get("classical")
    for variant in variants.values() if reference else ():
        variant["gain"] = {k: reference[k] / variant[k] for k in ("cross_entropy", "cer", "wer") if variant[k]}
    return variants


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _times(timing: Mapping[str, Any] | None, kind: str) -> dict[str, str]:
    return {} if timing is None else {name: describe_spread(ratios) for name, ratios in timing[kind].items()}
