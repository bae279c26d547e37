"""What the rows of a comparison say: means over seeds, gains over matched classical attention, times and memory.

A row is what one run leaves behind (`variant_runs.py`). Rows may be missing, as in a sweep that is still going on, and
so may be numbers in them: everything here says from how many it comes.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from lightning_modules.labels import LEAKS
from lightning_modules.statistics import Difference, paired_difference

Row = Mapping[str, Any]
#: Times by corpus and size, as `timing.json` holds them.
Timings = Mapping[tuple[str, str], Mapping[str, Any]]

CLASSICAL = "classical"
#: Columns of a run that are no numbers for a table: they are in its own file.
TEXTS = ("sample", "certificate")


@dataclass(frozen=True)
class Spread:
    """Numbers of several seeds.

    Attributes:
        mean: NaN if there is none.
        deviation: standard deviation over seeds; NaN for fewer than two.
        count: of the numbers.
        runs: how many there could be; the others are missing or not finite.
    """

    mean: float
    deviation: float
    count: int
    runs: int

    @classmethod
    def of(cls, values: Sequence[Any]) -> Self:
        """Of numbers, some of which may be `None` or not finite."""
        found = [number for number in map(as_number, values) if math.isfinite(number)]
        mean = statistics.fmean(found) if found else math.nan
        return cls(mean, statistics.stdev(found) if len(found) > 1 else math.nan, len(found), len(values))


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest of the ratios that were measured."""

    median: float
    low: float
    high: float


def as_number(value: Any) -> float:
    """A number of a row; NaN for what is missing."""
    return math.nan if value is None or isinstance(value, str) else float(value)


def signed(number: float) -> str:
    """With its sign and two decimals, one from 10 on; zero has no sign."""
    text = f"{number:+.{1 if abs(number) >= 10 else 2}f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−").replace("inf", "∞")


@dataclass(eq=False)
class Entry:
    """A variant in its group: all its runs there.

    Attributes:
        name, title, role, of, twin: as in the rows.
        mechanism: the name of the variant under which it stands; its own, for a mechanism.
        runs: the rows by seed, in that order.
        group: the others.
    """

    name: str
    title: str
    role: str
    of: tuple[str, ...]
    twin: str
    runs: dict[int, Row]
    group: "Group" = field(repr=False)
    mechanism: str = ""

    @property
    def verdict(self) -> str:
        """`"LEAKS"` if a single run does, `"causal"` if all are certified, else `"undecided"`."""
        found = set(self.values("causality"))
        return LEAKS if LEAKS in found else "causal" if found == {"causal"} else "undecided"

    @property
    def leaks(self) -> bool:
        return self.verdict == LEAKS

    @property
    def label(self) -> str:
        """The title, with LEAKS where that is so."""
        return f"{self.title} {LEAKS}" if self.leaks else self.title

    @property
    def short_title(self) -> str:
        """Without the name of the mechanism under which it stands anyway."""
        return self.title_under(self.group.entries.get(self.mechanism))

    def title_under(self, above: "Entry | None") -> str:
        """Without the name of the variant above it."""
        return self.title if above is None else self.title.removeprefix(f"{above.title}, ")

    @property
    def ablations(self) -> list["Entry"]:
        """Its ablations, which may be those of other mechanisms, too, or mechanisms themselves."""
        return [other for other in self.group.entries.values() if other.role != "twin" and self.name in other.of]

    def values(self, key: str) -> list[Any]:
        """One number per run; `"generation.cer"` looks into `generation`."""
        outer, _, inner = key.partition(".")
        found = [row.get(outer) for row in self.runs.values()]
        return [(value or {}).get(inner) for value in found] if inner else found

    def spread(self, key: str) -> Spread:
        """A number over the seeds."""
        return Spread.of(self.values(key))

    def distinct(self, key: str) -> list[Any]:
        """The different values that the runs have, sorted."""
        return sorted({value for value in self.values(key) if value is not None})

    def positions(self, key: str) -> list[float]:
        """Mean over the runs at each position of the window."""
        lists = [values for values in self.values(key) if values]
        longest = max(map(len, lists), default=0)
        return [Spread.of([values[t] for values in lists if t < len(values)]).mean for t in range(longest)]

    def pairs(self, reference: str) -> list[tuple[float, float]]:
        """The cross-entropies of another variant and of this one, of the seeds for which there are both."""
        other = self.group.entries.get(reference)
        if other is None or other is self:
            return []
        runs = [(other.runs[seed], row) for seed, row in self.runs.items() if seed in other.runs]
        pairs = [(as_number(a.get("cross_entropy")), as_number(b.get("cross_entropy"))) for a, b in runs]
        return [pair for pair in pairs if all(map(math.isfinite, pair))]

    def gain(self, reference: str) -> Difference | None:
        """By how much less cross-entropy than another variant, paired by seed; above zero is better.

        `None` if there is no such variant, or it shares no seed.
        """
        pairs = self.pairs(reference)
        return -paired_difference(*zip(*pairs, strict=True)) if pairs else None

    def time(self, kind: str) -> Ratio | None:
        """Ratio of its time to the baseline's; `kind` is `"inference"` or `"training"`."""
        ratios = (self.group.timing.get(kind) or {}).get(self.name) or []
        found = [ratio for ratio in map(as_number, ratios) if math.isfinite(ratio)]
        return Ratio(statistics.median(found), min(found), max(found)) if found else None

    @property
    def memory(self) -> Spread:
        """Ratio of its activations to those of `classical` with the same seed."""
        baseline = self.group.entries.get(CLASSICAL)
        pairs = [(row, baseline.runs.get(seed, {})) for seed, row in self.runs.items()] if baseline else []
        bytes_of = [tuple(as_number(run.get("activation_bytes")) for run in pair) for pair in pairs]
        return Spread.of([own / other if other else math.nan for own, other in bytes_of])

    def parameters_over(self, other: "Entry") -> float:
        """By which part of another variant's parameters it has more; NaN where that is not known."""
        own, others = self.spread("parameters").mean, other.spread("parameters").mean
        return own / others - 1 if others else math.nan


@dataclass(eq=False)
class Group:
    """The variants that are compared with each other: of one size, on one corpus.

    Attributes:
        corpus, size: may be empty.
        timing: as in `timing.json`; empty if nothing was timed.
        entries: by name: classical attention first, then the mechanisms, each followed by its twin and ablations.
    """

    corpus: str
    size: str
    timing: Mapping[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.corpus, self.size)))

    @property
    def baseline(self) -> str:
        """Whose time is 1."""
        names = self.timing.get("training") or self.timing.get("inference") or {}
        return CLASSICAL if CLASSICAL in names or not names else next(iter(names))

    @property
    def rows(self) -> list[Row]:
        return [row for entry in self.entries.values() for row in entry.runs.values()]

    def settings(self) -> str:
        """How the models were trained and evaluated, and with how many seeds, in a line."""
        steps, batches = (sorted({row.get(key) for row in self.rows} - {None}) for key in ("steps", "batch_size"))
        splits = sorted({str(row["split"]) for row in self.rows if row.get("split")})
        seeds = sorted({len(entry.runs) for entry in self.entries.values()})
        parts = [f"{_range(steps)} steps" if steps else "", f"batches of {_range(batches)}" if batches else ""]
        parts += [f"{' and '.join(splits)} text" if splits else "", f"{_range(seeds)} seed{'s' * (seeds != [1])}"]
        return ", ".join(filter(None, parts))

    def timed(self) -> str:
        """How times were measured, in a line; empty if they were not."""
        if not self.timing:
            return ""
        known = {name: self.timing.get(name) for name in ("rounds", "batch_size", "threads", "machine")}
        parts = [
            f"median of {known['rounds']} rounds (lowest to highest)" if known["rounds"] else "",
            f"batches of {known['batch_size']}" if known["batch_size"] else "",
            f"{known['threads']} thread{'s' * (known['threads'] != 1)}" if known["threads"] else "",
            str(known["machine"] or ""),
        ]
        return ", ".join(filter(None, parts))


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def groups_of(rows: Sequence[Row], timings: Timings | None = None) -> list[Group]:
    """The rows by corpus and size, and in these by variant; in the order in which they come first.

    Raises:
        ValueError: if there are no rows, or a row does not say whose it is, or two are of the same run.
    """
    if not rows:
        raise ValueError("a comparison needs at least one row; got none")
    groups: dict[tuple[str, str], Group] = {}
    for row in rows:
        missing = [key for key in ("corpus", "size", "variant", "seed") if row.get(key) is None]
        if missing:
            raise ValueError(f"every row needs {', '.join(missing)}; got {json.dumps(dict(row), default=str):.200}")
        key = row["corpus"], row["size"]
        group = groups.setdefault(key, Group(*key, (timings or {}).get(key) or {}))
        name = row["variant"]
        if name not in group.entries:
            of = tuple(filter(None, (row.get("of") or "").split(",")))
            title, role = row.get("title") or name, row.get("role") or "mechanism"
            group.entries[name] = Entry(name, title, role, of, row.get("twin") or "", {}, group)
        runs = group.entries[name].runs
        if row["seed"] in runs:
            raise ValueError(f"two rows are of {name!r} with seed {row['seed']} ({group.title}); leave one out")
        runs[row["seed"]] = row
    for group in groups.values():
        group.entries = _ordered(group.entries)
        for entry in group.entries.values():
            entry.runs = dict(sorted(entry.runs.items()))
    return list(groups.values())


def _ordered(entries: dict[str, Entry]) -> dict[str, Entry]:
    mechanisms = [entry.name for entry in entries.values() if entry.role == "mechanism"]
    if CLASSICAL in entries:
        mechanisms = [CLASSICAL, *(name for name in mechanisms if name != CLASSICAL)]
    places = {name: place for place, name in enumerate(mechanisms)}
    for entry in entries.values():
        own = (entry.name,) if entry.name in places else entry.of
        # of several, the first; the twin of an ablation only stands where that does
        above = [name for name in own if name in places] or [m for name in own for m in _of(entries, name)]
        entry.mechanism = min((name for name in above if name in places), key=places.__getitem__, default="")

    def place(entry: Entry) -> tuple:
        kinds = {"mechanism": 0, "twin": 1, "ablation": 2}
        within = 0 if entry.name == entry.mechanism else kinds.get(entry.role, 3)
        if entry.role == "twin" and entry.mechanism not in (*entry.of, entry.name):
            within = 3  # of an ablation only
        return places.get(entry.mechanism, len(places)), within

    return {entry.name: entry for entry in sorted(entries.values(), key=place)}


def _of(entries: Mapping[str, Entry], name: str) -> tuple[str, ...]:
    return entries[name].of if name in entries else ()


# --- flat tables ------------------------------------------------------------------------------------------------

#: What is averaged over seeds.
METRICS = (
    "cross_entropy",
    "bits_per_character",
    "perplexity",
    "cer",
    "wer",
    "bleu",
    "prefix_cross_entropy",
    "generation.cer",
    "generation.wer",
    "generation.bleu",
    "optimum",
    "excess",
    "train_seconds",
    "train_characters_per_second",
    "activation_bytes",
)


def flat_row(row: Row) -> dict[str, Any]:
    """A run as a line of a table: numbers and short texts as they are, lists as JSON."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key in TEXTS:
            continue
        if key == "generation":
            flat.update({f"generation_{name}": number for name, number in (value or {}).items()})
        elif isinstance(value, list | tuple):
            flat[key] = json.dumps(value)
        elif not isinstance(value, Mapping):
            flat[key] = value
    return flat


def flat_entry(entry: Entry) -> dict[str, Any]:
    """A variant as a line of a table; `None` for what is not known."""
    group = entry.group
    flat: dict[str, Any] = {"corpus": group.corpus, "size": group.size, "variant": entry.name, "title": entry.title}
    flat |= {"role": entry.role, "of": ",".join(entry.of), "causality": entry.verdict, "seeds": len(entry.runs)}
    for key in ("parameters", "learning_rate", "steps", "batch_size"):
        flat[key] = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in entry.distinct(key))
    flat |= {"twin": entry.twin, "twin_mismatch": next(iter(entry.distinct("twin_mismatch")), None)}
    for key in METRICS:
        spread, name = entry.spread(key), key.replace(".", "_")
        flat |= {f"{name}_mean": spread.mean, f"{name}_sd": spread.deviation, f"{name}_n": spread.count}
    flat |= _flat_gain("twin", entry.gain(entry.twin)) | _flat_gain(CLASSICAL, entry.gain(CLASSICAL))
    for kind in ("inference", "training"):
        ratio = entry.time(kind)
        ends = (None, None, None) if ratio is None else (ratio.median, ratio.low, ratio.high)
        flat |= dict(zip((f"{kind}_time_ratio{end}" for end in ("", "_low", "_high")), ends, strict=True))
    flat["activation_bytes_ratio"] = entry.memory.mean
    return _without_nan(flat)


def flat_ablation(mechanism: Entry, ablation: Entry) -> dict[str, Any]:
    """A mechanism and one of its ablations as a line of a table; `None` for what is not known."""
    flat: dict[str, Any] = {"corpus": mechanism.group.corpus, "size": mechanism.group.size}
    for what, entry in (("mechanism", mechanism), ("ablation", ablation)):
        spread, parameters = entry.spread("cross_entropy"), entry.spread("parameters")
        flat |= {what: entry.name, f"{what}_causality": entry.verdict, f"{what}_parameters": parameters.mean}
        flat |= {f"{what}_cross_entropy_mean": spread.mean, f"{what}_cross_entropy_sd": spread.deviation}
        flat[f"{what}_cross_entropy_n"] = spread.count
    flat["parameters_over_mechanism"] = ablation.parameters_over(mechanism)
    return _without_nan(flat | _flat_gain("mechanism", ablation.gain(mechanism.name)))


def _flat_gain(what: str, gain: Difference | None) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for unit, one in (("nats", gain), ("percent", gain and gain.percent)):
        ends = (None, None, None) if one is None else (one.mean, one.low, one.high)
        flat |= dict(zip((f"gain_over_{what}_{unit}{end}" for end in ("", "_low", "_high")), ends, strict=True))
    return {**flat, f"gain_over_{what}_n": 0 if gain is None else gain.count}


def _without_nan(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in flat.items()}
