"""The report of a comparison: numbers by hand from made-up rows, files, pictures, and what may be missing."""

import csv
import io
import json
import math
import re
import zlib
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from rich.console import Console

from lightning_modules import comparison_report
from lightning_modules.comparison import Ratio, groups_of, signed
from lightning_modules.comparison_figures import WARN, cost_figure, gain_figure, position_figure
from lightning_modules.comparison_report import position_picture, print_summary, write_comparison, write_rows
from lightning_modules.report import INK, SERIES
from lightning_modules.statistics import paired_difference

LENGTH = 16
LEAK = {
    "test": "futures",
    "mode": "eval",
    "layer": "blocks.0.attention",
    "output": 0,
    "input": 1,
    "size": 0.31,
    "largest": 2.5,
}

SERVED = "qisa,qisa-frozen,qisa-random,qsann-multi,qisa-published,overlap,qisa-absorbed-published"
#: Name, of what, role, level (nats below classical), parameters, time of a training step.
PLAN = [
    ("classical", "", "mechanism", 0.0, 23393, 1.0),
    ("qisa", "", "mechanism", -0.045, 20585, 2.4),
    ("qisa-frozen", "qisa", "ablation", -0.049, 20513, 1.9),
    ("qisa-random", "qisa", "ablation", -0.043, 20513, 1.8),
    ("qisa-linear", "qisa", "ablation", -0.03, 24641, 1.2),
    ("gaussian-quadratic", "", "mechanism", 0.02, 24937, 1.5),
    ("gaussian-quadratic-random", "gaussian-quadratic", "ablation", 0.012, 24937, 1.4),
    ("qsann-multi", "", "mechanism", -0.11, 20441, 5.2),
    ("overlap", "", "mechanism", -0.06, 20590, 6.8),
    ("qisa-published", "", "mechanism", 1.95, 20585, 2.5),
    ("qisa-absorbed-published", "", "mechanism", 1.9, 20900, 1.3),
    ("classical-h11", SERVED, "twin", -0.02, 20513, 0.97),
    ("classical-h18", "gaussian-quadratic,gaussian-quadratic-random,qisa-linear", "twin", 0.006, 24929, 1.02),
]
TITLES = {"frozen": "circuit frozen", "random": "random quadratic values", "linear": "linear values"}


def made_up(corpora=("shakespeare", "markov"), sizes=("d16",), seeds=range(5), plan=PLAN):
    rows = []
    for corpus in corpora:
        for size in sizes:
            for entry in plan:
                rows += [made_up_row(corpus, size, seed, plan, *entry) for seed in seeds]
    return rows


def made_up_row(corpus, size, seed, plan, name, of, role, level, parameters, _):
    floor = 1.62 if corpus == "markov" else None
    common = np.random.default_rng([zlib.crc32(corpus.encode()), seed]).normal()
    own = np.random.default_rng(zlib.crc32(f"{corpus} {size} {name} {seed}".encode())).normal()
    position = np.arange(LENGTH)
    top = 2.08 if floor is None else 1.66
    curve = top + 0.9 * np.exp(-position / 1.3) - 0.002 * position + 0.012 * common + 0.005 * own
    leaks = "published" in name
    curve = curve - (0 if leaks else level * (0.4 if floor else 1))
    prefix = curve.copy()
    if leaks:
        prefix = 3.4 + 0.12 * position + 0.1 * np.cos(position + own)
        curve = np.where(position < LENGTH - 1, 0.004, prefix[-1])
    value = float(curve.mean())
    twin = next((n for n, served, r, *_ in plan if r == "twin" and name in served.split(",")), "")
    of_first = of.split(",")[0]
    kind = name.removeprefix(f"{of_first}-")
    titles = {"ablation": f"{of_first}, {TITLES.get(kind)}", "twin": f"classical, head size {name[11:]}"}
    row = {
        "corpus": corpus,
        "size": size,
        "variant": name,
        "title": titles.get(role, name),
        "role": role,
        "of": of,
        "twin": twin,
        "twin_mismatch": next((p / parameters - 1 for n, *_, p, _ in plan if n == twin), None),
        "seed": seed,
        "parameters": parameters,
        "learning_rate": 0.003 if role != "ablation" else 0.001,
        "learning_rates_tried": [[0.001, 2.4], [0.003, 2.31], [0.01, None]],
        "steps": 1500,
        "batch_size": 256,
        "split": "test",
        "cross_entropy": value,
        "bits_per_character": value / math.log(2),
        "perplexity": math.exp(value),
        "cer": 0.046 if leaks else 0.29 * value,
        "wer": 0.1 if leaks else 0.41 * value,
        "bleu": 0.9 if leaks else 0.02,
        "per_position": curve.tolist(),
        "prefix_per_position": prefix.tolist(),
        "prefix_cross_entropy": float(prefix.mean()),
        "generation": {"cer": 0.81 + 0.01 * own, "wer": 1.02, "bleu": 0.0021},
        "sample": "KING RICHARD:\nThe ther wist of mane, and\n  sould he\n" * 3,
        "optimum": floor,
        "excess": None if floor is None else value - floor,
        "excess_error": None if floor is None else 0.003,
        "optimum_per_position": None if floor is None else (floor + 0.85 * np.exp(-position / 1.2)).tolist(),
        "causality": "LEAKS" if leaks else "causal",
        "certificate": {"verdict": "LEAKS" if leaks else "causal", "leak": LEAK if leaks else None},
        "train_seconds": 100.0,
        "train_characters_per_second": 61440.0,
        "activation_bytes": 10_000_000 + parameters * 100,
        "attention": {"kind": "mechanism", "name": name},
    }
    return row


def made_up_timings(rows, rounds=7, plan=PLAN):
    timings = {}
    for corpus, size in {(row["corpus"], row["size"]): None for row in rows}:
        rng = np.random.default_rng(3)
        times = {
            name: [1.0] * rounds if time == 1 else (time * rng.lognormal(0, 0.03, rounds)).tolist()
            for name, *_, time in plan
        }
        timings[corpus, size] = {
            "machine": "x86_64",
            "threads": 2,
            "batch_size": 256,
            "rounds": rounds,
            "inference": {name: [1 + 0.7 * (r - 1) for r in ratios] for name, ratios in times.items()},
            "training": times,
        }
    return timings


# --- numbers ------------------------------------------------------------------------------------------------------


def group_of(rows, timings=None):
    (group,) = groups_of(rows, timings)
    return group


def one_corpus(**options):
    return made_up(corpora=("shakespeare",), **options)


def value(rows, variant, seed, key="cross_entropy"):
    (row,) = [row for row in rows if (row["variant"], row["seed"]) == (variant, seed)]
    return row[key]


def test_classical_comes_first_and_what_belongs_to_a_mechanism_follows_it():
    rows = one_corpus(seeds=(0,))
    rows = rows[1:] + rows[:1]  # classical was trained last
    group = group_of(rows)
    assert list(group.entries) == [
        *("classical", "qisa", "classical-h11", "qisa-frozen", "qisa-random", "qisa-linear"),
        *("gaussian-quadratic", "classical-h18", "gaussian-quadratic-random"),
        *("qsann-multi", "overlap", "qisa-published", "qisa-absorbed-published"),
    ]
    assert [e.short_title for e in group.entries.values()][2:5] == [
        *("classical, head size 11", "circuit frozen", "random quadratic values"),
    ]
    assert group.entries["qisa-frozen"].title == "qisa, circuit frozen"


def test_the_twin_of_an_ablation_stands_with_the_mechanism():
    plan = [PLAN[0], PLAN[1], PLAN[4], PLAN[7], ("classical-h2", "qisa-linear", "twin", 0.0, 24641, 1.0)]
    assert list(group_of(one_corpus(plan=plan, seeds=(0,))).entries) == [
        *("classical", "qisa", "qisa-linear", "classical-h2", "qsann-multi"),
    ]
    orphan = [row for row in one_corpus(plan=plan, seeds=(0,)) if row["variant"] not in ("qisa", "qisa-linear")]
    assert list(group_of(orphan).entries) == ["classical", "qsann-multi", "classical-h2"]


def test_groups_stay_in_order():
    rows = made_up(sizes=("d64", "d16"), seeds=(0,))
    assert [group.title for group in groups_of(rows)] == [
        *("shakespeare, d64", "shakespeare, d16", "markov, d64", "markov, d16"),
    ]
    assert groups_of([{**rows[0], "size": ""}])[0].title == "shakespeare"
    assert groups_of([{**rows[0], "size": "", "corpus": ""}])[0].title == ""


def test_means_over_seeds():
    rows = one_corpus()
    values = [value(rows, "qisa", seed) for seed in range(5)]
    spread = group_of(rows).entries["qisa"].spread("cross_entropy")
    assert (spread.mean, spread.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (spread.count, spread.runs) == (5, 5)
    cer = [row["generation"]["cer"] for row in rows if row["variant"] == "qisa"]
    assert group_of(rows).entries["qisa"].spread("generation.cer").mean == pytest.approx(np.mean(cer))


def test_numbers_that_are_missing_are_counted():
    rows = one_corpus()
    for row in rows:
        if row["variant"] == "qisa":
            row["cer"] = {0: None, 1: math.nan, 2: math.inf}.get(row["seed"], 0.25 * row["seed"])
            row["generation"] = None if row["seed"] == 3 else row["generation"]
    entry = group_of(rows).entries["qisa"]
    spread = entry.spread("cer")
    assert (spread.mean, spread.count, spread.runs) == (0.875, 2, 5)
    assert spread.deviation == pytest.approx(math.sqrt(2) / 8)
    assert entry.spread("generation.cer").count == 4
    nothing = entry.spread("no such metric")
    assert nothing.count == 0 and math.isnan(nothing.mean) and math.isnan(nothing.deviation)


def test_gains_are_paired_by_seed_whatever_the_order():
    rows = one_corpus()
    kept = [row for row in rows if not (row["variant"] == "classical-h11" and row["seed"] == 1)]
    kept = [row for row in kept if not (row["variant"] == "qisa" and row["seed"] == 3)]
    rng = np.random.default_rng(0)
    shuffled = [kept[i] for i in rng.permutation(len(kept))]
    seeds = (0, 2, 4)
    for given in (kept, shuffled):
        entry = group_of(given).entries["qisa"]
        gain = entry.gain("classical-h11")
        assert list(entry.runs) == [0, 1, 2, 4]
        pairs = [(value(rows, "classical-h11", seed), value(rows, "qisa", seed)) for seed in seeds]
        assert gain.count == 3 and not gain.has_interval
        assert gain.mean == pytest.approx(np.mean([twin - own for twin, own in pairs]))
        assert gain.reference == pytest.approx(np.mean([twin for twin, _ in pairs]))
    full = group_of(rows).entries["qisa"].gain("classical")
    classical, own = ([value(rows, name, seed) for seed in range(5)] for name in ("classical", "qisa"))
    expected = paired_difference(own, classical)
    assert (full.mean, full.low, full.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert full.percent.mean == pytest.approx(100 * (1 - np.mean(own) / np.mean(classical)))


def test_gains_that_there_are_not():
    rows = [row for row in one_corpus() if row["variant"] != "classical-h18"]
    for row in rows:
        if row["variant"] == "overlap":
            row["seed"] += 10
        if row["variant"] == "qsann-multi" and row["seed"] > 0:
            row["cross_entropy"] = None
    entries = group_of(rows).entries
    assert entries["gaussian-quadratic"].gain("classical-h18") is None  # its twin has not been trained yet
    assert entries["overlap"].gain("classical") is None  # no seed in common
    assert entries["classical"].gain("classical") is None
    assert entries["qsann-multi"].gain("classical").count == 1


def test_one_run_that_leaks_is_enough():
    rows = one_corpus()
    entries = group_of(rows).entries
    assert [e.name for e in entries.values() if e.leaks] == ["qisa-published", "qisa-absorbed-published"]
    for row in rows:
        if row["seed"] == 3:
            row["causality"] = {"qisa": "LEAKS", "overlap": "undecided", "qsann-multi": None}.get(
                row["variant"], "causal"
            )
    entries = group_of(rows).entries
    verdicts = [entries[name].verdict for name in ("qisa", "overlap", "qsann-multi", "classical", "qisa-published")]
    assert verdicts == ["LEAKS", "undecided", "undecided", "causal", "LEAKS"]
    assert entries["qisa"].label == "qisa LEAKS" and entries["overlap"].label == "overlap"


def test_times_and_memory():
    rows = one_corpus(seeds=(0, 1))
    timings = {("shakespeare", "d16"): {"training": {"classical": [1.0] * 3, "qisa": [2.5, 9.0, 2.0, None, math.nan]}}}
    entries = group_of(rows, timings).entries
    assert entries["qisa"].time("training") == Ratio(2.5, 2.0, 9.0)
    assert entries["qisa"].time("inference") is None and entries["overlap"].time("training") is None
    assert group_of(rows).entries["qisa"].time("training") is None
    sizes = {row["variant"]: row["activation_bytes"] for row in rows}
    assert entries["qisa"].memory.mean == pytest.approx(sizes["qisa"] / sizes["classical"])
    assert (entries["qisa"].memory.count, entries["qisa"].memory.runs) == (2, 2)
    alone = group_of([row for row in rows if row["variant"] != "classical"])
    assert math.isnan(alone.entries["qisa"].memory.mean)
    apart = group_of([row for row in rows if row["variant"] != "classical" or row["seed"] == 1])
    assert (apart.entries["qisa"].memory.count, apart.entries["qisa"].memory.runs) == (1, 2)


def test_the_baseline_of_times():
    rows = one_corpus(seeds=(0,))
    assert group_of(rows).baseline == "classical"
    other = {("shakespeare", "d16"): {"training": {"qisa": [1.0], "overlap": [2.0]}}}
    assert group_of(rows, other).baseline == "qisa"
    assert group_of(rows, made_up_timings(rows)).baseline == "classical"


def test_settings_in_a_line():
    rows = one_corpus()
    assert group_of(rows).settings() == "1,500 steps, batches of 256, test text, 5 seeds"
    rows[0] |= {"steps": 3000, "split": "validation"}
    assert (
        group_of(rows[:-1]).settings() == "1,500 to 3,000 steps, batches of 256, test and validation text, 4 to 5 seeds"
    )
    assert group_of([{"corpus": "a", "size": "b", "variant": "c", "seed": 0}]).settings() == "1 seed"
    timed = group_of(rows, made_up_timings(rows)).timed()
    assert timed == "median of 7 rounds (lowest to highest), batches of 256, 2 threads, x86_64"
    assert group_of(rows).timed() == ""


def test_positions_are_means():
    rows = one_corpus(seeds=(0, 1))
    for row in rows:
        if row["variant"] == "qisa":
            row["per_position"] = {0: [1.0, 2.0, None], 1: [3.0, 4.0, 5.0]}[row["seed"]]
            row["prefix_per_position"] = None
    entry = group_of(rows).entries["qisa"]
    assert entry.positions("per_position") == [2.0, 3.0, 5.0] and entry.positions("prefix_per_position") == []


@pytest.mark.parametrize(
    "number, text",
    [(0.004, "0.00"), (-0.004, "0.00"), (0.126, "+0.13"), (-9.5, "−9.50"), (-85.16, "−85.2"), (math.inf, "+∞")],
)
def test_signed_numbers(number, text):
    assert signed(number) == text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.clear(), "at least one row; got none"),
        (lambda rows: rows[0].pop("seed"), "every row needs seed; got {"),
        (lambda rows: rows[0].update(variant=None), "every row needs variant"),
        (lambda rows: rows.append(dict(rows[3])), r"two rows are of 'classical' with seed 3 \(shakespeare, d16\)"),
    ],
    ids=["none", "seed", "variant", "twice"],
)
def test_bad_rows(change, message, tmp_path):
    rows = one_corpus()
    change(rows)
    with pytest.raises(ValueError, match=message):
        write_comparison(tmp_path, rows)
    assert not list(tmp_path.iterdir())


# --- files --------------------------------------------------------------------------------------------------------

FILES = {
    *("rows.csv", "table.csv", "ablations.csv", "table.md", "comparison.html"),
    *("differences.png", "positions.png", "cost.png"),
}
EVIL = '<b>|&"$\\frac{$ [x](y) `*_#\n'


@pytest.fixture
def no_pictures(monkeypatch):
    """What is not about pictures does without them, which takes less time."""
    monkeypatch.setattr(comparison_report, "PICTURES", {})
    for name in ("gain_figure", "position_figure", "cost_figure"):
        monkeypatch.setattr(comparison_report, name, lambda groups: None)


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_all(folder, rows=None, **options):
    rows = rows or one_corpus()
    return write_comparison(folder, rows, made_up_timings(rows), "Title", ["First.", "Second."], **options)


def test_the_files(tmp_path):
    assert write_all(tmp_path / "new") == tmp_path / "new" / "comparison.html"
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES
    for picture in (tmp_path / "new").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_rows_give_the_same_files(tmp_path):
    rows = one_corpus(seeds=range(4), plan=[*PLAN[1:3], *PLAN[-5:]])
    write_all(tmp_path / "a", rows)
    write_all(tmp_path / "b", rows)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_files_that_there_is_nothing_for_any_more_are_removed(tmp_path):
    rows = one_corpus(seeds=(0,))
    write_all(tmp_path, rows)
    (tmp_path / "other.png").touch()
    for row in rows:
        row["per_position"] = None
    write_comparison(tmp_path, [row for row in rows if row["variant"] == "qisa"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("rows.csv", "table.csv", "table.md", "comparison.html", "other.png"),
    }


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    write_comparison(tmp_path, one_corpus(seeds=(0,)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(comparison_report, "render_page", fail)
    with pytest.raises(RuntimeError):
        write_comparison(tmp_path, one_corpus(seeds=(7,)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_line_per_run(tmp_path, no_pictures):
    rows = one_corpus(seeds=(0, 1))
    rows[0]["learning_rate"] = None
    write_all(tmp_path, rows)
    lines = read_csv(tmp_path / "rows.csv")
    assert [(line["variant"], int(line["seed"])) for line in lines] == [(row["variant"], row["seed"]) for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert float(line["cross_entropy"]) == row["cross_entropy"] and line["causality"] == row["causality"]
        assert json.loads(line["per_position"]) == row["per_position"]
        assert float(line["generation_bleu"]) == row["generation"]["bleu"]
        assert not {"sample", "certificate", "attention", "generation"} & set(line)
    assert lines[0]["learning_rate"] == "" and lines[0]["excess"] == ""
    whole = (tmp_path / "rows.csv").read_bytes()
    assert write_rows(tmp_path / "else", rows) == tmp_path / "else" / "rows.csv"
    assert (tmp_path / "else" / "rows.csv").read_bytes() == whole


def test_one_line_per_variant(tmp_path, no_pictures):
    rows = made_up()
    write_all(tmp_path, rows)
    lines = {(line["corpus"], line["variant"]): line for line in read_csv(tmp_path / "table.csv")}
    assert len(lines) == 2 * len(PLAN)
    line, entry = lines["markov", "qisa-frozen"], groups_of(rows, made_up_timings(rows))[1].entries["qisa-frozen"]
    for what, reference in (("twin", "classical-h11"), ("classical", "classical")):
        gain = entry.gain(reference)
        for unit, one in (("nats", gain), ("percent", gain.percent)):
            found = [float(line[f"gain_over_{what}_{unit}{end}"]) for end in ("", "_low", "_high")]
            assert found == pytest.approx([one.mean, one.low, one.high])
        assert line[f"gain_over_{what}_n"] == "5"
    assert line["role"] == "ablation" and line["of"] == "qisa" and line["learning_rate"] == "0.001"
    spread = entry.spread("excess")
    assert [float(line[f"excess_{end}"]) for end in ("mean", "sd", "n")] == pytest.approx(
        [spread.mean, spread.deviation, 5]
    )
    ratio = entry.time("training")
    assert float(line["training_time_ratio"]) == ratio.median and float(line["training_time_ratio_high"]) == ratio.high
    assert float(line["activation_bytes_ratio"]) == pytest.approx(entry.memory.mean)
    assert lines["shakespeare", "qisa"]["excess_mean"] == lines["shakespeare", "classical"]["gain_over_twin_nats"] == ""
    assert lines["shakespeare", "qisa-published"]["causality"] == "LEAKS"


#: `qisa-linear` and the mechanism `gaussian` are ablations of two mechanisms each.
SHARED = [
    *(PLAN[0], PLAN[1], PLAN[2], ("qisa-linear", "qisa,qsann-multi", "ablation", -0.03, 24641, 1.2), PLAN[7]),
    ("gaussian", "qsann-multi,overlap", "mechanism", 0.01, 21831, 1.1),
    *(PLAN[8], PLAN[11]),
]
PAIRS = [
    *(("qisa", "qisa-frozen"), ("qisa", "qisa-linear"), ("qsann-multi", "qisa-linear")),
    *(("qsann-multi", "gaussian"), ("overlap", "gaussian")),
]


def test_one_line_per_ablation_and_mechanism(tmp_path, no_pictures):
    rows = one_corpus(plan=SHARED)
    write_all(tmp_path, rows)
    lines = read_csv(tmp_path / "ablations.csv")
    assert [(line["mechanism"], line["ablation"]) for line in lines] == PAIRS
    for line in lines:
        mechanism, ablation = line["mechanism"], line["ablation"]
        theirs, own = ([value(rows, name, seed) for seed in range(5)] for name in (mechanism, ablation))
        gain = paired_difference(own, theirs)
        found = [float(line[f"gain_over_mechanism_nats{end}"]) for end in ("", "_low", "_high")]
        assert found == pytest.approx([gain.mean, gain.low, gain.high])
        percent = [float(line[f"gain_over_mechanism_percent{end}"]) for end in ("", "_low", "_high")]
        assert percent == pytest.approx([100 * number / np.mean(theirs) for number in found])
        assert line["gain_over_mechanism_n"] == line["ablation_cross_entropy_n"] == "5"
        parameters = value(rows, mechanism, 0, "parameters"), value(rows, ablation, 0, "parameters")
        assert (float(line["mechanism_parameters"]), float(line["ablation_parameters"])) == parameters
        assert float(line["parameters_over_mechanism"]) == pytest.approx(parameters[1] / parameters[0] - 1)


def test_ablations_in_markdown(tmp_path, no_pictures):
    rows = one_corpus(plan=SHARED)
    write_all(tmp_path, rows)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    part = text[text.index("### Ablations\n") :].split("\n\n")[1].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part]
    assert [line[0] for line in cells] == [
        *("**qisa**", "↳ circuit frozen", "↳ linear values", "**qsann-multi**", "↳ qisa, linear values", "↳ gaussian"),
        *("**overlap**", "↳ gaussian"),
    ]
    for line, (mechanism, ablation) in zip([c for c in cells if "↳" in c[0]], PAIRS, strict=True):
        percent = group_of(rows).entries[ablation].gain(mechanism).percent
        assert line[1] == f"{signed(percent.mean)} [{signed(percent.low)}, {signed(percent.high)}] (5)"
        more = value(rows, ablation, 0, "parameters") / value(rows, mechanism, 0, "parameters") - 1
        assert line[3:] == [f"{value(rows, ablation, 0, 'parameters'):,} (5)", f"{signed(100 * more)} (5)"]
    assert cells[0][1] == cells[0][4] == "–" and cells[0][3] == "20,585 (5)"
    assert [line for line in text.splitlines() if line.startswith("| **gaussian**")]  # in the other tables, by itself


def test_a_table_has_its_title_and_notes(tmp_path, no_pictures):
    write_all(tmp_path)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[:6] == ["# Title", "", "First.", "", "Second.", ""] and lines[6].startswith("## ")


def markdown_rows(text, heading):
    """The cells of a table by the first of them."""
    part = text[text.index(f"### {heading}\n") :].split("\n\n")[1]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()]
    assert len({len(line) for line in [lines[0], *lines[2:]]}) == 1
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_every_cell_says_how_many_seeds_it_has(tmp_path, no_pictures):
    rows = [row for row in one_corpus() if row["variant"] != "qisa" or row["seed"] < 3]
    rows[0]["cer"] = rows[0]["parameters"] = rows[0]["activation_bytes"] = None
    rows[1]["causality"] = "undecided"
    write_all(tmp_path, rows)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    table = markdown_rows(text, "Cross-entropy")
    values = [value(rows, "qisa", seed) for seed in range(3)]
    qisa = table["**qisa**"]
    assert qisa["cross-entropy, nats per token"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} (3)"
    assert qisa["gain over twin, %"].endswith(" [–] (3)")
    full = table["**gaussian-quadratic**"]["gain over twin, %"]
    assert re.fullmatch(r"\+0\.\d\d \[\+0\.\d\d, \+\d\.\d\d\] \(5\)", full)
    part = text[text.index("### Ablations\n") :].split("\n\n")[1]
    assert len(re.findall(r"\| ↳ circuit frozen \| \S+ \[–\] \(3\) \| .* \(5\) \|", part)) == 1
    texts = markdown_rows(text, "Text")
    assert texts["**classical**"]["CER"].endswith("(4 of 5)") and texts["**qisa**"]["CER"].endswith("(3)")
    beyond, cost = markdown_rows(text, "Without the future"), markdown_rows(text, "Cost")
    assert beyond["**classical**"]["certificate"] == "undecided (1 of 5)"
    assert beyond["**qisa-published** **LEAKS**"]["certificate"] == "LEAKS (5)"
    assert cost["**classical**"]["parameters, trainable"] == "23,393 (4 of 5)"
    assert cost["**overlap**"]["activations, memory"].endswith("(4 of 5)")
    assert cost["**qisa**"]["parameters, trainable"].endswith("(3)")
    for cells in (*table.values(), *texts.values(), *beyond.values(), *cost.values()):
        assert all(cell == "–" or re.search(r"\(\d( of \d)?\)$", cell) for cell in list(cells.values())[1:])
    assert "4 seeds needed" in text and "3 to 5 seeds" in text


def test_costs_in_markdown(tmp_path, no_pictures):
    rows = one_corpus()
    write_all(tmp_path, rows)
    cost = markdown_rows((tmp_path / "table.md").read_text(encoding="utf-8"), "Cost")
    ratio = group_of(rows, made_up_timings(rows)).entries["qisa"].time("training")
    assert cost["**qisa**"] == {
        "variant": "**qisa**",
        "parameters, trainable": "20,585 (5)",
        "twin, and its mismatch": "classical, head size 11 (−0.35 %) (5)",
        "learning rate, chosen": "0.003 (5)",
        "inference, time": cost["**qisa**"]["inference, time"],
        "training step, time": f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f}) (1)",
        "activations, memory": "0.98 (5)",
    }
    assert cost["**classical**"]["training step, time"] == "1.00 (1)"


def test_what_is_known_of_nobody_has_no_column(tmp_path, no_pictures):
    rows = [{key: row[key] for key in ("corpus", "size", "variant", "seed", "cross_entropy")} for row in one_corpus()]
    write_comparison(tmp_path, rows)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "### Text" not in text and "twin" not in markdown_rows(text, "Cross-entropy")["**qisa**"]
    assert set(markdown_rows(text, "Without the future")["**qisa**"]) == {"variant", "certificate"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects them and the texts of some."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.elements, self.texts = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append((tag, []))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        for _, texts in self.open:
            texts.append(data)

    def handle_endtag(self, tag):
        opened, texts = self.open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"
        self.texts.append((tag, "".join(texts)))

    def all_texts(self, tag):
        return [text for name, text in self.texts if name == tag]


def test_the_page_is_self_contained(tmp_path):
    page = Page(write_all(tmp_path, made_up()))
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    assert tags.count("svg") == 1 + 2 * 2 and tags.count("details") == 2
    references = [v for _, a in page.elements for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert references and all(reference.startswith("#") for reference in references)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {reference[1:] for reference in references} <= set(ids)
    assert "prefers-color-scheme: dark" in page.source and "width=device-width" in page.source
    assert (
        "var(--warn)" in page.source[page.source.index("<body>") :] and "#b3261e" not in page.source.split("<body>")[1]
    )
    assert page.all_texts("h2") == ["shakespeare, d16", "markov, d16"] and page.all_texts("h1") == ["Title"]
    assert ["First.", "Second."] == page.all_texts("p")[:2]


def test_the_page_holds_the_tables(tmp_path, no_pictures):
    rows = one_corpus()
    page = Page(write_all(tmp_path, rows))
    cells = [" ".join(text.split()) for text in page.all_texts("td")]
    for line in markdown_rows((tmp_path / "table.md").read_text(encoding="utf-8"), "Cross-entropy").values():
        for cell in list(line.values())[1:]:
            assert cell in cells
    spans = [attributes["class"] for tag, attributes in page.elements if tag == "span" and "class" in attributes]
    tones = [cls for cls in spans if cls in ("better", "worse")]
    gains = [
        entry.gain(reference)
        for entry in group_of(rows).entries.values()
        if not entry.leaks
        for reference in (entry.twin, "classical", entry.of[0] if entry.role == "ablation" else "")
    ]
    found = [gain for gain in gains if gain is not None and gain.excludes_zero]
    assert sorted(tones) == sorted("better" if gain.mean > 0 else "worse" for gain in found) and len(set(tones)) == 2
    assert "in blocks.0.attention, output 0 depends on input 1" in page.source
    assert page.all_texts("pre") == [rows[0]["sample"]] * len(PLAN)


def test_a_leak_that_no_certificate_found(tmp_path, no_pictures):
    rows = made_up(corpora=("markov",))
    for row in rows:
        row["certificate"] = None
    assert "better than the best there can be" in "".join(Page(write_all(tmp_path, rows)).all_texts("p")[2:])


def test_leaks_are_marked_everywhere(tmp_path):
    rows = one_corpus()
    page = Page(write_all(tmp_path, rows))
    headings = [" ".join(text.split()) for text in page.all_texts("th")]
    leaking = ["qisa-published LEAKS", "qisa-absorbed-published LEAKS"]
    assert [heading for heading in headings if "published" in heading] == leaking * 4
    drawn = [text for text in page.all_texts("text") if "published" in text or "LEAKS" in text]
    assert [text for text in drawn if text in leaking] == leaking  # the picture of positions
    assert sum(text.startswith("LEAKS") and "(5)" in text for text in drawn) == 2  # of gains
    assert "LEAKS: far below" in drawn  # of times
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("| **qisa-published") or line.startswith("| **qisa-absorbed-published"):
            assert "**LEAKS**" in line.split(" | ")[0]
    for name in ("rows.csv", "table.csv"):
        assert {line["causality"] for line in read_csv(tmp_path / name) if "published" in line["variant"]} == {"LEAKS"}
    for line in printed(rows).splitlines():
        if line.startswith("qisa-published"):
            assert line.startswith("qisa-published LEAKS")


def test_text_is_text(tmp_path):
    plan = [PLAN[0], PLAN[1], PLAN[11]]
    rows = made_up(corpora=("[red]a/b[/]",), sizes=(EVIL,), plan=plan)
    for row in rows:
        row["title"] = EVIL + row["variant"]
        row["sample"] = EVIL
    page = Page(write_comparison(tmp_path, rows, made_up_timings(rows), EVIL, EVIL))
    assert page.all_texts("h1") == [EVIL] and set(page.all_texts("pre")) == {EVIL}
    assert "b" not in {tag for tag, _ in page.elements}
    assert page.all_texts("th").count(EVIL + "qisa") >= 3
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    (line, *_) = [line for line in lines if "qisa**" in line]
    assert line.startswith('| **\\<b\\>\\|&"\\$\\\\frac{\\$ [x](y) \\`\\*\\_\\# qisa** |')
    assert read_csv(tmp_path / "table.csv")[0]["title"] == EVIL + "classical"
    assert "↳" in "".join(markdown_rows("\n".join(lines), "Cost"))  # where the title is that of a twin, too
    assert "[red]a/b[/]" in printed(rows) and printed(rows).count("[x](y)") > 2 * len(plan)


# --- terminal -----------------------------------------------------------------------------------------------------


def printed(rows, timings=None, width=None):
    file = io.StringIO()
    print_summary(rows, timings, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("seeds", [range(1), range(3), range(5)], ids=["1", "3", "5"])
def test_the_summary_fits_100_columns(seeds):
    rows = made_up(seeds=seeds)
    text = printed(rows, made_up_timings(rows))
    assert "\x1b" not in text and 80 < max(map(len, text.splitlines())) <= 100 and "…" not in text
    entry = groups_of(rows)[0].entries["qisa"]
    lines = [line for line in text.splitlines() if line.startswith("qisa  ")]
    assert len(lines) == 10  # five tables of two corpora
    assert f"{entry.spread('cross_entropy').mean:.4f}" in lines[0] and f"({len(seeds)})" in lines[0]
    assert signed(entry.gain("classical-h11").percent.mean) in lines[0]
    assert ("[–]" in lines[0]) == (len(seeds) < 4)
    assert "20,585" in lines[1] and f"{entry.spread('cer').mean:.3f}" in lines[2] and "causal" in lines[3]
    assert "20,585" in lines[4] and "−0.35 %" in lines[4]
    for words in ("1,500 steps", "markov, d16", "4 seeds needed", "7 rounds", "LEAKS", "Time: ratio to classical"):
        assert words in text
    assert "Time" not in printed(rows)


def test_a_terminal_is_not_widened():
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    print_summary(one_corpus(), None, console)
    assert max(map(len, file.getvalue().splitlines())) <= 80


NULLS = (
    *("cross_entropy", "cer", "per_position", "generation", "optimum_per_position", "learning_rate", "twin_mismatch"),
    *("activation_bytes", "certificate"),
)
MISSING = {
    "bare": [{"corpus": "a", "size": "", "variant": "x", "seed": 0}],
    "nulls": [{**row, **dict.fromkeys(NULLS)} for row in made_up(seeds=(0,), plan=PLAN[1:2])],
    "a leak alone": [row for row in made_up(seeds=(0,)) if row["variant"] == "qisa-published"],
    "no mechanism": [row for row in made_up(seeds=(0, 1)) if row["role"] != "mechanism"],
    "in progress": [row for row in made_up() if row["seed"] < 4 or row["variant"] == "qisa"],
    "no reference": [
        {**row, "cross_entropy": None} if row["variant"].startswith("classical") else row for row in made_up(seeds=(0,))
    ],
    "many sizes": made_up(corpora=("a",), sizes=tuple("bcde"), seeds=(0,), plan=PLAN[:2]),
}


@pytest.mark.parametrize("rows", MISSING.values(), ids=MISSING)
def test_what_is_missing_does_not_matter(rows, tmp_path):
    partly = {(rows[0]["corpus"], rows[0]["size"]): {"training": {rows[0]["variant"]: [2.0, None], "qisa": []}}}
    for number, timings in enumerate((None, partly)):
        Page(write_comparison(tmp_path / str(number), rows, timings))
        assert max(map(len, printed(rows, timings).splitlines())) <= 100


# --- pictures -----------------------------------------------------------------------------------------------------


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def names_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_gains_with_their_intervals():
    rows = made_up()
    groups = groups_of(rows)
    figure = gain_figure(groups)
    assert len(figure.axes) == 2 and [axes.get_title("left") for axes in figure.axes] == [g.title for g in groups]
    assert names_of(figure.axes[0]) == [
        *("qisa", "circuit frozen", "random quadratic values", "linear values"),
        *("gaussian-quadratic", "random quadratic values"),
        *("qsann-multi", "overlap", "qisa-published", "qisa-absorbed-published"),
    ]
    assert set(names_of(figure.axes[1])) == {""}
    axes = figure.axes[1]
    at = axes.get_yticks()[1]
    entry = groups[1].entries["qisa-frozen"]
    percent = entry.gain("classical-h11").percent
    lines = [line for line in axes.lines if set(line.get_ydata()) == {at}]
    assert list(lines[0].get_xdata()) == [percent.low, percent.high]
    markov = [row for row in rows if row["corpus"] == "markov"]
    twins, own = ([value(markov, name, seed) for seed in range(5)] for name in ("classical-h11", "qisa-frozen"))
    singles = [100 * (a - b) / np.mean(twins) for a, b in zip(twins, own, strict=True)]
    assert list(lines[1].get_xdata()) == pytest.approx(singles)
    assert list(lines[2].get_xdata()) == [percent.mean]
    texts = [text.get_text() for text in axes.texts]
    assert f"{signed(percent.mean)} (5)" in texts and sum(text.startswith("LEAKS") for text in texts) == 2
    assert "over the matched classical twin" in axes.get_xlabel()
    assert legend_of(figure) == ["mechanism", "ablation", "95 % interval", "one seed"]


def test_what_leaks_does_not_set_the_scale():
    causal = [row for row in one_corpus() if "published" not in row["variant"]]
    for draw in (gain_figure, cost_figure):
        limits = []
        for rows in (causal, one_corpus()):
            axes = draw(groups_of(rows, made_up_timings(rows))).axes[0]
            limits.append(axes.get_xlim() if draw is gain_figure else axes.get_ylim()[1])
        assert limits[0] == limits[1]
    only = [row for row in one_corpus() if "published" in row["variant"] or row["variant"] == "classical-h11"]
    assert gain_figure(groups_of(only)).axes[0].get_xlim()[1] > 80


def test_a_twin_has_no_line_of_its_own():
    rows = [row for row in one_corpus() if row["variant"] in ("classical", "classical-h11", "overlap")]
    for row in rows:
        row["twin"] = ""
    assert names_of(gain_figure(groups_of(rows)).axes[0]) == ["overlap"]


def test_an_endless_interval_stays_in_the_panel():
    rows = one_corpus(seeds=range(4), plan=[PLAN[0], PLAN[1]])
    for row in rows:
        row |= {"twin": "", "cross_entropy": 2.0 if row["variant"] == "classical" else 2.0 + 0.04 * (row["seed"] == 0)}
    assert group_of(rows).entries["qisa"].gain("classical").low == -math.inf
    figure = gain_figure(groups_of(rows))
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    assert math.isfinite(low) and low > -10 and axes.get_xlabel().startswith("gain over classical attention")
    assert [line.get_marker() for line in axes.lines].count("<") == 1
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "<"] == [low]
    assert ">" not in [line.get_marker() for line in axes.lines]


def test_without_an_interval_the_marker_is_hollow():
    figure = gain_figure(groups_of(one_corpus(seeds=range(3), plan=[PLAN[0], PLAN[1], PLAN[11]])))
    (marker,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert marker.get_markerfacecolor() == "none"
    assert legend_of(figure) == ["mechanism", "one seed", "fewer than 4 seeds: no interval"]


def test_positions():
    rows = made_up()
    groups = groups_of(rows)
    figure = position_figure(groups)
    for axes, group in zip(figure.axes, groups, strict=True):
        lines = [list(line.get_ydata()) for line in axes.lines]
        dashed = [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--"]
        for name in ("classical", "qisa", "qisa-published"):
            assert group.entries[name].positions("per_position") in lines
        assert dashed == [
            group.entries[n].positions("prefix_per_position") for n in ("qisa-published", "qisa-absorbed-published")
        ]
        assert group.entries["qisa-frozen"].positions("per_position") not in lines
        optimum = group.entries["classical"].positions("optimum_per_position")
        assert (optimum in lines) == (group.corpus == "markov")
        assert axes.get_ylim()[0] < 0
        solid = [line.get_color() for line in axes.lines if line.get_linestyle() == "-" and line.get_linewidth() < 4]
        assert solid == [INK, *SERIES[:4], WARN, WARN]
    assert legend_of(figure) == [
        *("classical", "qisa", "gaussian-quadratic", "qsann-multi", "overlap"),
        *("qisa-published LEAKS", "qisa-absorbed-published LEAKS"),
        *("predicted from the past alone", "the least there can be"),
    ]
    assert legend_of(position_figure(groups_of([row for row in rows if row["variant"] == "qisa"])))[:1] == ["qisa"]


def test_a_mechanism_looks_the_same_in_all_panels():
    rows = made_up()
    figure = position_figure(groups_of([r for r in rows if r["corpus"] == "markov" or r["variant"] != "classical"]))
    colours = [[line.get_color() for line in axes.lines if line.get_linestyle() == "-"] for axes in figure.axes]
    assert colours[0] == colours[1][2:]  # without the optimum and classical
    assert colours[0] == [*SERIES[:4], WARN, WARN]


def test_time_against_quality():
    rows = one_corpus()
    timings = made_up_timings(rows)
    group = group_of(rows, timings)
    figure = cost_figure([group])
    (axes,) = figure.axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    for name in ("classical", "qisa", "qisa-frozen", "classical-h11"):
        entry = group.entries[name]
        assert (entry.time("training").median, entry.spread("cross_entropy").mean) in points
    below = [line for line in axes.lines if line.get_marker() == "v"]
    assert {line.get_ydata()[0] for line in below} == {axes.get_ylim()[0]} and len(below) == 2
    assert legend_of(figure) == [
        *("classical", "qisa", "gaussian-quadratic", "qsann-multi", "overlap", "LEAKS: far below", "its twin"),
        "its ablation",
    ]
    assert cost_figure(groups_of(rows)) is None


def test_a_leak_that_is_not_far_below():
    rows = one_corpus(seeds=(0,))
    for row in rows:
        row["causality"] = "LEAKS" if row["variant"] == "qisa-frozen" else "causal"
    rows = [row for row in rows if "published" not in row["variant"]]
    figure = cost_figure(groups_of(rows, made_up_timings(rows)))
    (entry,) = [e for e in group_of(rows).entries.values() if e.leaks]
    value = entry.spread("cross_entropy").mean
    assert {line.get_color() for line in figure.axes[0].lines if list(line.get_ydata()) == [value]} == {WARN}
    assert "qisa, circuit frozen LEAKS" in legend_of(figure)


def test_the_picture_of_positions_alone():
    rows = one_corpus(seeds=(0,))
    assert position_picture(rows).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        position_picture([{**row, "per_position": None, "optimum_per_position": None} for row in rows])


def test_nothing_is_left_in_matplotlib(tmp_path):
    before = dict(matplotlib.rcParams)
    write_all(tmp_path, one_corpus(seeds=(0,)))
    assert dict(matplotlib.rcParams) == before
