"""`qattn report`: runs that are there already, finished or not, side by side on one page.

A run is the folder that `qattn fit` or `qattn compare` made, or a checkpoint in it. Nothing is trained and nothing
evaluated: metrics are those that the run has written, and its model is loaded only to look at its attention and its
circuit and to let it write. What a run lacks is left out, and said.
"""

import math
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_modules.checkpoints import CHECKPOINTS, read_checkpoint, resolve
from lightning_modules.cli import COMMANDS, Parser, add_trust
from lightning_modules.comparison_rows import ROW, complete_rows, read_history, read_json, training_speed
from lightning_modules.corpora import load_corpus
from lightning_modules.data import split_text
from lightning_modules.evaluation import write_sample
from lightning_modules.executions import say
from lightning_modules.inspection import attention_maps, circuit_drawing
from lightning_modules.labels import LEAKS
from lightning_modules.language_model import LanguageModel
from lightning_modules.loggers import LABEL
from lightning_modules.progress import following, shown
from lightning_modules.report import HEADLINE_METRICS, PAGE, RunResult, print_comparison, write_page, write_report
from lightning_modules.training_cli import check_writable

#: Folder and heading of a page about several runs.
OUTPUT, TITLE = "runs/report", "Runs, compared"
METRICS, CONFIG, POSITIONS = "metrics.csv", "config.yaml", "val_cross_entropy_per_position.csv"
#: Tokens of a sentence whose attention is drawn, unless one is given: more are too small to be seen.
MAX_SENTENCE = 64
#: In place of the text that metrics are of.
UNMEASURED = "not validated yet"
#: Options of a model that its attention and its sizes tell better.
TOLD_BY_THE_MODEL = ("attention", "preset", "num_layers", "num_heads", "embed_dim", "block_size", "dropout")


def report(argv: list[str]) -> None:
    """`qattn report`."""
    options = _parser().parse_args(argv)
    _check(options)
    runs = _named([find(path) for path in options.runs])
    results, path = _write(options, runs)
    print_comparison(results, Console(width=None if sys.stdout.isatty() else 100))
    print(f"report: {path}")


def report_of(folder: str | os.PathLike[str]) -> Path:
    """Writes what `qattn report` writes of one run, the page in its folder; gives the path."""
    options = _parser().parse_args(["--", str(folder)])
    _, path = _write(options, _named([find(folder)]))
    return path


def _write(options: Namespace, runs: Sequence["Run"]) -> tuple[list[RunResult], Path]:
    results = [run.examine(options) for run in shown(runs, "looking at runs")]
    notes = [*_cautions(runs, results), *(note for run in runs for note in run.notes)]
    for note in notes:
        say(note)
    about = "Metrics are those that each run has written; of which text, and at which step, is under Settings."
    title = options.title or (TITLE if len(runs) > 1 else f"Run {runs[0].name}")
    notes = [about, *notes]
    with following("drawing the report"):
        if _is_of_one_run(options):
            return results, write_page(runs[0].path, results[0], title, notes, hover=True)
        return results, write_report(options.output or OUTPUT, results, title, notes, hover=True)


def _is_of_one_run(options: Namespace) -> bool:
    """Whether the page belongs to one run, and goes into its folder."""
    return options.output is None and len(options.runs) == 1 and Path(options.runs[0]).expanduser().is_dir()


def _cautions(runs: Sequence["Run"], results: Sequence[RunResult]) -> list[str]:
    """What keeps the numbers of the runs from being compared."""
    found = []
    texts = {run.name: result.settings["metrics"].partition(",")[0] for run, result in zip(runs, results, strict=True)}
    if len(set(texts.values()) - {UNMEASURED}) > 1:
        listed = ", ".join(f"{name}: {text}" for name, text in texts.items())
        found.append(f"The metrics are not of the same text, and do not compare ({listed}).")
    plain = [(result.settings.get("gpt") or {}, result.settings.get("data") or {}) for result in results]
    of_text = [(gpt["vocab_size"], data.get("corpus")) for gpt, data in plain if gpt]
    if len(set(of_text)) > 1:
        found.append(
            "The runs read different texts or tokens: cross-entropy and perplexity are per token, and compare only "
            "where both are the same; bits per character compare where the text is."
        )
    return found


def _parser() -> Parser:
    parser = Parser(
        prog="qattn report",
        description="Shows runs side by side on one page that needs no network: metrics, losses, attention, circuits, "
        "samples and settings. Trains and evaluates nothing.",
        epilog=f"example: {COMMANDS['report'].example}",
        allow_abbrev=False,
    )
    add_trust(parser)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run of qattn fit, finished or not, or a checkpoint in it")
    where = f"where the page goes (default: of one run its own folder, of several {OUTPUT})"
    add("--output", metavar="FOLDER", help=where)
    add("--overwrite", action="store_true", help="replace the report that the folder holds")
    add("--title", metavar="TEXT", help=f"heading of the page (default: Run and its name, of several: {TITLE})")
    add("--prompt", metavar="TEXT", help="what the samples continue; by default each run's own text")
    add("--sample_length", type=int, default=300, metavar="N", help="tokens of a sample (default: %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="X", help="of the samples (default: %(default)s)")
    add("--sentence", metavar="TEXT", help="whose attention is drawn; by default each run's own text")
    return parser


def _check(options: Namespace) -> None:
    """Refuses what could not be done, before any model is loaded."""
    if options.sample_length < 1:
        raise ValueError(f"sample_length must be at least 1; got {options.sample_length}")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or positive and finite; got {options.temperature}")
    if _is_of_one_run(options):  # whose own page is replaced
        return
    output = Path(options.output or OUTPUT)
    check_writable(output, "output")
    page = output / PAGE
    if page.exists() and not options.overwrite:
        raise ValueError(f"{str(page)!r} is there already; choose another --output, or replace it with --overwrite")


# --- what there is of a run -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """What is on disk of one run.

    Attributes:
        path: as it was given.
        folder: of the run; `None` for a checkpoint that lies alone.
        checkpoint: the file to look at; `None` if there is none yet.
        name: what it is called in the report.
        notes: what is missing, one line each.
    """

    path: Path
    folder: Path | None
    checkpoint: Path | None
    name: str = ""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def saved(self) -> dict[str, Any]:
        """The checkpoint without its weights; empty if there is none."""
        return {} if self.checkpoint is None else read_checkpoint(self.checkpoint, map_location="meta")

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """The numbers of metrics.csv."""
        return [] if self.folder is None else read_history(self.folder)

    @cached_property
    def row(self) -> dict[str, Any]:
        """What `qattn compare` has measured of the run; empty for any other, and for a checkpoint that was chosen."""
        return read_json(self.folder / ROW) or {} if self.folder == self.path else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The options of the run; empty if they are not there."""
        path = None if self.folder is None else self.folder / CONFIG
        if path is None or not path.is_file():
            return {}
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"{str(path)!r} is damaged; remove it, and the report does without the options")
        return content

    @property
    def causal(self) -> bool | None:
        """Whether the run is causal, by its certificates; a leak that is written anywhere counts."""
        certificate = self.saved.get("causality")
        verdicts = {self.row.get("causality"), certificate.get("verdict") if isinstance(certificate, dict) else None}
        verdicts |= {row.get(LABEL) for row in complete_rows(self.folder / METRICS)} if self.folder else set()
        return False if LEAKS in verdicts else True if "causal" in verdicts else None

    @property
    def measured(self) -> tuple[str, dict[str, float], list[float]]:
        """Where the metrics are from, the metrics, and the cross-entropy by position."""
        if self.row and not self.row["failure"]:
            metrics = {name: self.row[name] for name in (*HEADLINE_METRICS, "prefix_cross_entropy")}
            return f"{self.row['split']} text, by qattn compare", metrics, self.row["per_position"]
        end = self.saved.get("global_step", math.inf)
        validations = [row for row in self.history if "val_loss" in row and row.get("step", 0) < end]
        if not validations:
            return UNMEASURED, {}, []
        last = validations[-1]
        metrics = {name.removeprefix("val_"): value for name, value in last.items() if name.startswith("val_")}
        metrics["cross_entropy"] = metrics.pop("loss")
        step = int(last.get("step", -1))
        return f"validation text, step {step + 1}", metrics, self._per_position(step)

    def _per_position(self, step: int) -> list[float]:
        found = [row for row in complete_rows(self.folder / POSITIONS) if row["step"] == str(step)]
        columns = {name: value for row in found for name, value in row.items() if name.startswith("position_")}
        return [float(columns[name]) for name in sorted(columns) if columns[name]]

    # --- looking at it ------------------------------------------------------------------------------------------

    def examine(self, options: Namespace) -> RunResult:
        """All that can be shown of the run."""
        source, metrics, per_position = self.measured
        done, wanted = self._steps
        if done < wanted:
            self.notes.append(f"{self.name} is at step {done} of {wanted}")
        result = RunResult(
            name=self.name,
            metrics=metrics,
            per_position=per_position,
            train_characters_per_second=training_speed(self.history),
            causal=self.causal,
            history=self.history,
        )
        if failure := self.row.get("failure"):
            self.notes.append(f"{self.name} diverged: {failure}")
        if self.checkpoint is None:
            self.notes.append(f"{self.name} has no checkpoint yet, so there is no attention, circuit or sample of it")
            result.settings = self._settings(source, None)
            return result
        model = LanguageModel.load_from_checkpoint(self.checkpoint)
        if model.label and result.causal is not False:  # by construction
            result = RunResult(**{**vars(result), "causal": False, "title": ""})
        result.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result.circuit = circuit_drawing(model)
        result.settings = self._settings(source, model)
        size = model.gpt.config.block_size
        if sentence := self._text(model, "sentence", options, min(size, MAX_SENTENCE)):
            result.attention_maps, result.attention_labels = attention_maps(model, sentence)
        if prompt := self._text(model, "prompt", options, max(1, size // 2)):
            result.sample, speed = write_sample(model, prompt, options.sample_length, options.temperature)
            result.generation_characters_per_second = speed
        return result

    def _text(self, model: LanguageModel, option: str, options: Namespace, length: int) -> str:
        """What the option says, or the first tokens of the run's own text; "" where that is not to be had."""
        given = getattr(options, option)
        try:
            tokens = model.tokenizer.encode(self._own_text[: 16 * length] if given is None else given)
        except ValueError as error:
            raise ValueError(f"{option}: {self.name}: {error}") from None
        if given is None:
            return model.tokenizer.decode(tokens[:length])
        if not tokens:
            raise ValueError(f"{option} is empty; give at least one token")
        return given

    @cached_property
    def _own_text(self) -> str:
        """The test text of the run, or its validation text where it has none; "" if its corpus is not here."""
        data = self.saved.get("data") or {}
        names = ("train_fraction", "val_fraction", "published_split")
        try:
            text = load_corpus(data.get("corpus", ""), data_dir=data.get("data_dir"), download=False).text
        except ValueError:
            corpus = repr(data["corpus"]) if "corpus" in data else "its text"
            lost = "an attention map or a sample needs --sentence and --prompt"
            self.notes.append(f"{self.name}: {corpus} is not on this machine, so {lost}")
            return ""
        pieces = split_text(text, **{name: data[name] for name in names if name in data})
        return pieces.get("test") or pieces["validation"]

    def _settings(self, source: str, model: LanguageModel | None) -> dict[str, Any]:
        config = {kind: self.config.get(kind) for kind in ("model", "data", "trainer", "seed_everything")}
        settings: dict[str, Any] = {"metrics": source}
        if model is not None:
            settings["checkpoint"] = f"{self.checkpoint.name}, step {self.saved.get('global_step', '?')}"
            settings |= {"attention": model.attention.to_plain(), "gpt": model.gpt.config.to_plain()}
            told = config["model"] or {}
            config["model"] = {name: value for name, value in told.items() if name not in TOLD_BY_THE_MODEL}
            config["data"] = config["data"] or self.saved.get("data")
        done, wanted = self._steps
        settings["steps"] = f"{done} of {wanted}" if wanted > 0 else str(done)
        return settings | {kind: value for kind, value in config.items() if value not in (None, {})}

    @cached_property
    def _steps(self) -> tuple[int, int]:
        """How many steps the run has come, and how many it was to; -1 where it does not say."""
        done = int(max((row["step"] for row in self.history if "step" in row), default=-1)) + 1
        wanted = (self.config.get("trainer") or {}).get("max_steps", -1)
        return max(done, self.saved.get("global_step", 0)), wanted


def find(path: str | os.PathLike[str]) -> Run:
    """The run that a path means: its folder, or a checkpoint, in a run's folder or alone.

    Raises:
        ValueError: if there is no run.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"there is no run {str(path)!r}; give the folder of a run of qattn fit, or a checkpoint in it")
    if path.is_file():
        home = path.parent.parent if path.parent.name == CHECKPOINTS else path.parent
        return Run(path, home if (home / METRICS).is_file() else None, path)
    found = resolve(path)
    checkpoint = found if found.is_file() else None
    if checkpoint is None and not any((path / name).is_file() for name in (METRICS, ROW)):
        raise ValueError(
            f"{str(path)!r} holds no run: neither {METRICS} nor a checkpoint is in it; give the folder of a run of "
            "qattn fit, as runs/NAME"
        )
    return Run(path, path, checkpoint)


def _named(runs: Sequence[Run]) -> Sequence[Run]:
    """Names each run by its folder, and by its checkpoint if that was chosen; by its path where those are equal."""
    places = [run.path.resolve() for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{str(place)!r} is given twice; give each run once")
    names = [_short_name(run) for run in runs]
    if len(set(names)) < len(names):
        common = Path(os.path.commonpath([place.parent for place in places]))
        names = [place.relative_to(common).as_posix() for place in places]
    for run, name in zip(runs, names, strict=True):
        run.name = name
    return runs


def _short_name(run: Run) -> str:
    if run.path == run.folder:
        return run.path.resolve().name
    return run.path.stem if run.folder is None else f"{run.folder.resolve().name}-{run.path.stem}"
