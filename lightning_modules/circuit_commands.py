"""The commands that look at circuits: `qattn draw`, `qattn resources`, `qattn export-qasm`.

Layers and heads are counted from 1, as reports do; positions in a text from 0, as messages about texts do.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backend_bases import FigureCanvasBase
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_modules import progress
from lightning_modules.checkpoints import resolve
from lightning_modules.cli import COMMANDS, Parser, add_trust
from lightning_modules.files import atomic_write
from lightning_modules.gpt import PRESETS, GPTConfig, preset
from lightning_modules.guard import say_if_leaking
from lightning_modules.inspection import (
    HeadCircuit,
    attentions_of,
    circuit_figure,
    circuit_tape,
    circuit_text,
    head_circuit,
    layer_input,
)
from lightning_modules.labels import label_of, with_label
from lightning_modules.language_model import LanguageModel
from pennylane_qattn import ATTENTION, Attention, Mechanism
from pennylane_qattn.openqasm import VERSIONS, measurement_settings, to_openqasm, word_bits
from pennylane_qattn.resources import (
    MAPS,
    METHODS,
    MODES,
    CircuitGroup,
    GateCounts,
    circuit_groups,
    shots_for_confidence,
    shots_for_standard_error,
    to_plain,
)


def draw(argv: list[str]) -> None:
    """`qattn draw`."""
    parser = command_parser("draw", "Draws the circuit of one head: as text on stdout, and as a picture.")
    add_source(parser)
    _add_choice(parser)
    add = parser.add_argument
    add("--output", default="circuit.png", metavar="F", help="the picture: .png, .svg, .pdf ... (default: %(default)s)")
    level = "the encoding as one box, or decomposed into gates (default: %(default)s)"
    add("--level", choices=("box", "gates"), default="box", help=level)
    angles = "write the trained angles, with D decimals (default: 2); those of the encoding's gates need an input"
    add("--angles", nargs="?", type=_count("decimals", 0), const=2, metavar="D", help=angles)
    _add_input(parser, "the input, for --level gates --angles")
    options = parser.parse_args(argv)

    suffix = Path(options.output).suffix.removeprefix(".").lower()
    if suffix not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"no picture can be written as {options.output!r}; end it in .{', .'.join(sorted(known))}")
    wants_input = options.level == "gates" and options.angles is not None
    if _has_input(options) and not wants_input:
        raise ValueError("--text and --input show in the encoding's angles only; add --level gates --angles")
    if wants_input and not _has_input(options):
        raise ValueError('the encoding\'s angles follow from an input; give --text "TEXT" or --input F')
    if options.angles is not None and options.checkpoint is None:
        raise ValueError("a preset has no trained angles; give --checkpoint, or leave --angles out")
    source = source_of(options)
    shown = _head(source, options)
    inputs = _vector(source, shown, options)[0] if wants_input else None
    tape = circuit_tape(shown, inputs, gates=options.level == "gates")
    figure = circuit_figure(tape, options.angles)
    if label := label_of(source.model):
        figure.suptitle(label)
    with atomic_write(options.output) as file:
        figure.savefig(file, format=suffix, bbox_inches="tight")
    print(with_label(circuit_text(shown, tape, options.angles), label))
    print(f"\npicture: {options.output}")


def export_qasm(argv: list[str]) -> None:
    """`qattn export-qasm`."""
    parser = command_parser(
        "export-qasm",
        "Writes the trained circuit of one head, for one input, as OpenQASM programs into a folder: circuit.qasm "
        "without measurements, for simulators; setting-1.qasm, ... with basis changes and measurements, for hardware; "
        "and observables.json: which bits of which setting give each Pauli word, and its exact value.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="F", help="the .ckpt file, or the folder of a run (its best one)")
    _add_choice(parser)
    _add_input(parser, "what the head encodes")
    versions = [version.partition(".")[0] for version in VERSIONS]
    add("--version", choices=versions, default="2", help="of OpenQASM (default: %(default)s)")
    add("--output", default="qasm", metavar="DIR", help="the folder (default: %(default)s)")
    options = parser.parse_args(argv)
    if not _has_input(options):
        raise ValueError('a program encodes one input; give --text "TEXT" or --input F')
    source = source_of(options)
    shown = _head(source, options)
    inputs, origin = _vector(source, shown, options)
    version = next(v for v in VERSIONS if v.startswith(options.version))
    title = with_label(f"{options.checkpoint!a}, {shown}; {origin}", label_of(source.model))
    with progress.following("writing programs"):
        files = programs(shown, inputs, version, title)
    for name, text in files.items():
        with atomic_write(Path(options.output) / name, "w") as file:
            file.write(text)
    words = len(shown.circuit.words) if shown.measures_words else 0
    line = f"{shown}; Pauli words: {words}, measurement settings: {len(files) - 2}"
    print(with_label(line, label_of(source.model)))
    print(f"written to {options.output}: {', '.join(files)}")


def programs(shown: HeadCircuit, inputs: Tensor, version: str, title: str) -> dict[str, str]:
    """The files that `qattn export-qasm` writes, by name.

    Args:
        shown: the circuit.
        inputs: the vector that it encodes.
        version: of OpenQASM.
        title: first line of each file.
    """
    circuit, weights = shown.circuit, shown.weights
    words = circuit.words if shown.measures_words else ()
    values = circuit.qnode()(inputs, weights) if words else ()
    settings = measurement_settings(circuit, inputs, weights, version=version) if words else []
    listed = "".join(f"//   word {i}: {word}\n" for i, word in enumerate(words))
    about = f"// Without measurements. Pauli words, one letter for each qubit, q[0] first:\n{listed}" if words else ""
    files = {"circuit.qasm": f"// {title}\n{about}{to_openqasm(circuit, inputs, weights, version=version)}"}
    file_of = {}
    for number, setting in enumerate(settings, 1):
        name = f"setting-{number}.qasm"
        files[name] = f"// {title}\n{setting.program}"
        file_of |= dict.fromkeys(setting.words, name)
    manifest = {
        "source": title,
        "openqasm": version,
        "qubits": circuit.num_wires,
        "input": inputs.tolist(),
        "angles": weights.flatten().tolist(),
        "observables": [
            {"word": word, "file": file_of[i], "bits": word_bits(word), "exact": float(values[i])}
            for i, word in enumerate(words)
        ],
    }
    return files | {"observables.json": json.dumps(manifest, indent=1) + "\n"}


# --- resources --------------------------------------------------------------------------------------------------


def resources(argv: list[str]) -> None:
    """`qattn resources`."""
    parser = command_parser(
        "resources",
        "Counts what the circuits of a model take: qubits, gates, measurement settings, executions, shots. A preset "
        "without --attention: every attention there is.",
    )
    add_source(parser)
    add = parser.add_argument
    batch = "windows in a training step (default: %(default)s)"
    add("--batch_size", type=_count("batch_size", 1), default=64, metavar="N", help=batch)
    add("--accuracy", type=float, default=0.01, metavar="X", help="of an expectation value (default: %(default)s)")
    add("--confidence", type=float, default=0.95, metavar="P", help="of that accuracy (default: %(default)s)")
    directions = "random directions of spsa (default: %(default)s)"
    add("--directions", type=_count("directions", 1), default=1, metavar="N", help=directions)
    add("--json", action="store_true", help="print JSON with every circuit, instead of tables")
    options = parser.parse_args(argv)
    shots_for_confidence(options.accuracy, options.confidence)  # refuses wrong ones before the work
    source = source_of(options, all_attentions=True)
    tokens = options.batch_size * source.config.block_size
    every = progress.shown(list(source.every_attention()), "counting")
    counted = {name: circuit_groups(attentions) for name, attentions in every}
    if options.json:
        print(json.dumps(_plain(source, counted, tokens, options), indent=1))
        return
    console = Console(file=sys.stdout, highlight=False)
    config = source.config
    console.print(
        f"{source.title}; layers: {config.num_layers}, heads: {config.num_heads}, embedding: {config.embed_dim}, "
        f"tokens of a training step: {options.batch_size} x {config.block_size} = {tokens:,}",
        soft_wrap=True,
    )
    without = [name for name, groups in counted.items() if not groups]
    for name, groups in counted.items():
        if groups:
            console.print()
            console.print(_table(name, groups, tokens, options))
    if without:
        console.print(f"\nwithout circuits in their maps: {', '.join(without)}")
    if len(without) < len(counted):
        console.print("\n" + _notes(options), soft_wrap=not console.is_terminal)


def _plain(source: "CircuitSource", counted: dict[str, list[CircuitGroup]], tokens: int, options: Any) -> dict:
    config = source.config
    return {
        "source": source.title,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "embed_dim": config.embed_dim,
        "block_size": config.block_size,
        "tokens_per_training_step": tokens,
        "spsa_directions": options.directions,
        "accuracy": options.accuracy,
        "confidence": options.confidence,
        "attentions": {
            name: [
                {**to_plain(group, tokens, options.directions), "shots_per_setting": _shots(group, options)}
                for group in groups
            ]
            for name, groups in counted.items()
        },
    }


def _shots(group: CircuitGroup, options: Any) -> dict[str, int] | None:
    if group.for_states:
        return None
    words = max(circuit.distinct_words for circuit in group.each)
    return {
        "standard_error": shots_for_standard_error(options.accuracy),
        "confidence": shots_for_confidence(options.accuracy, options.confidence, words),
    }


def _table(name: str, groups: Sequence[CircuitGroup], tokens: int, options: Any) -> Table:
    """One column for each kind of circuit."""
    table = Table("", title=name, title_justify="left", title_style="bold")
    for group in groups:
        table.add_column(", ".join(group.maps), justify="right", overflow="fold")

    def row(label: str, cells: Sequence[str], **style: Any) -> None:
        table.add_row(label, *cells, **style)

    first = [group.each[0] for group in groups]
    row("circuits", [f"{group.count:,}" for group in groups])
    row("qubits", [str(one.qubits) for one in first])
    row("encoding", [f"{one.encoding}, {one.features} numbers" for one in first])
    row("ansatz", [one.ansatz for one in first])
    row("trainable angles of a circuit", [str(one.angles) for one in first])
    row("Pauli words of a circuit", ["none" if g.for_states else str(g.each[0].words) for g in groups])
    row("  distinct", ["-" if g.for_states else _span(c.distinct_words for c in g.each) for g in groups])
    row("measurement settings", ["-" if g.for_states else _span(c.settings for c in g.each) for g in groups])
    table.add_section()
    _gate_rows(row, "encoding as one box", [one.boxed for one in first])
    _gate_rows(row, "encoding as gates", [one.decomposed for one in first])
    row("  as T gates, fault-tolerant", [f"{one.t_gates:,}" for one in first])
    table.add_section()
    row(
        "executions for a token, exact / sampling",
        [f"{_number(g.inference())} / {_number(g.inference(sampling=True))}" for g in groups],
    )
    row("for a training step, exact / sampling", [""] * len(groups))
    for method in METHODS:
        row(f"  {method}", [_steps(group, method, tokens, options.directions) for group in groups])
    row("  polarisation, for inputs", [_polarisation(group, tokens) for group in groups])
    table.add_section()
    shots = [_shots(group, options) or {} for group in groups]
    row(f"shots for a standard error of {options.accuracy:g}", [_number(each.get("standard_error")) for each in shots])
    row(
        f"shots for {options.accuracy:g} with {options.confidence:.4g} confidence",
        [_number(each.get("confidence")) for each in shots],
    )
    return table


def _gate_rows(row: Any, title: str, counts: Sequence[GateCounts]) -> None:
    row(f"gates, {title}", [""] * len(counts))
    row("  depth", [f"{count.depth:,}" for count in counts])
    row("  on 1 qubit", [f"{count.one_qubit:,}" for count in counts])
    row("  on 2 qubits", [f"{count.two_qubit:,}" for count in counts])
    row("  by name", [", ".join(f"{n} {name}" for name, n in count.by_name.items()) for count in counts])


def _steps(group: CircuitGroup, method: str, tokens: int, directions: int) -> str:
    options = {"num_directions": directions} if method == "spsa" else {}
    found = [group.training(method, tokens, options=options, **MODES[mode]) for mode in ("exact", "sampling")]
    return " / ".join(_number(each.total if each else None) for each in found)


def _polarisation(group: CircuitGroup, tokens: int) -> str:
    if group.for_states or group.circuits[0].encoding.uses_gates:
        return "-"
    modes = ("exact_without_states", "sampling")
    found = [group.training("parameter-shift", tokens, **MODES[mode]) for mode in modes]
    return " / ".join(_number(each.inputs if each else None) for each in found)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _span(values: Iterator[int]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _notes(options: Any) -> str:
    return (
        "Executions are those of all circuits in a column, counted for each distinct token, shifted circuit and, when "
        "sampling, measurement setting, as devices charge them; a simulator may run many at once, backprop a whole "
        "batch. Exact: on a simulator that gives states, so that inputs encoded as amplitudes take one more execution; "
        "when sampling, and where values are all there is, they take two for each number, by polarisation. A dash: "
        "that cannot be done. Shots are those of a setting: (1 - <P>^2)/x^2, at most 1/x^2, for a standard error x, "
        f"and (2/x^2) ln(2W/{1 - options.confidence:.4g}) for errors below x in all W distinct words of a circuit at "
        "once (Hoeffding)."
    )


# --- options that the commands share ----------------------------------------------------------------------------


@dataclass
class CircuitSource:
    """Where circuits come from: a checkpoint's model, or a preset and mechanisms."""

    title: str
    config: GPTConfig
    model: LanguageModel | None
    mechanisms: dict[str, Mechanism]

    def attention(self, layer: int) -> Attention:
        """The attention of a layer, counted from 1."""
        if not 1 <= layer <= self.config.num_layers:
            raise ValueError(f"layer must be 1 to {self.config.num_layers}; got {layer}")
        if self.model is not None:
            return attentions_of(self.model.gpt)[layer - 1]
        (mechanism,) = self.mechanisms.values()
        return self._build(mechanism, layer)

    def every_attention(self) -> Iterator[tuple[str, Iterator[Attention]]]:
        """Names, and the attention of each layer; those of a preset are made one by one."""
        for name, mechanism in self.mechanisms.items():
            if self.model is not None:
                yield name, iter(attentions_of(self.model.gpt))
            else:
                yield name, self._layers(mechanism)

    def _layers(self, mechanism: Mechanism) -> Iterator[Attention]:
        for layer in range(1, self.config.num_layers + 1):
            yield self._build(mechanism, layer)

    def _build(self, mechanism: Mechanism, layer: int) -> Attention:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return mechanism(config.embed_dim, config.num_heads, config.block_size, layer=layer - 1)


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser that shows the command's example, with `--trust`."""
    example = COMMANDS[command].example
    parser = Parser(prog=f"qattn {command}", description=description, epilog=f"example: {example}", allow_abbrev=False)
    add_trust(parser)
    return parser


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `source_of` reads."""
    add = parser.add_argument
    add("--checkpoint", metavar="F", help="the .ckpt file, or the folder of a run (its best one)")
    add("--preset", metavar="NAME", help=f"instead of a checkpoint: {', '.join(sorted(PRESETS))}")
    add("--attention", metavar="NAME", help=f"the preset's attention: {', '.join(ATTENTION)}")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--layer", type=_count("layer", 1), default=1, metavar="N", help="counted from 1 (default: %(default)s)")
    add("--head", type=_count("head", 1), default=1, metavar="N", help="counted from 1 (default: %(default)s)")
    add("--map", choices=MAPS, help="which map's circuit (default: value if it has one, else query)")


def _add_input(parser: argparse.ArgumentParser, what: str) -> None:
    add = parser.add_argument_group(what).add_argument
    add("--text", metavar="TEXT", help="a text; the input is one token's embedding as the layer sees it")
    add("--position", type=_count("position", 0), metavar="N", help="of the token, from 0 (default: the last one)")
    add("--input", metavar="F", help="a JSON file with the list of numbers to encode; - reads stdin")


def _has_input(options: argparse.Namespace) -> bool:
    if options.text is not None and options.input is not None:
        raise ValueError("an input is one token of a text or a file of numbers; give --text or --input, not both")
    if options.position is not None and options.text is None:
        raise ValueError("--position is that of a token in a text; give --text too")
    return options.text is not None or options.input is not None


def source_of(options: argparse.Namespace, all_attentions: bool = False) -> CircuitSource:
    """The model or the preset that the options name; `all_attentions`: a preset may come without one."""
    name, attention = getattr(options, "preset", None), getattr(options, "attention", None)
    if (options.checkpoint is None) == (name is None):
        raise ValueError("circuits come from a checkpoint or from a preset; give one of --checkpoint and --preset")
    if options.checkpoint is not None:
        if attention is not None:
            raise ValueError(f"a checkpoint has its own attention; leave --attention {attention} out, or give --preset")
        model = LanguageModel.load_from_checkpoint(resolve(options.checkpoint))
        say_if_leaking(model, options.checkpoint)
        mechanism, title = model.attention, with_label(str(options.checkpoint), model.label)
        return CircuitSource(title, model.gpt.config, model, {mechanism.name: mechanism})
    config = preset(name)
    if attention is None and not all_attentions:
        raise ValueError(f"a preset is a size without an attention; give --attention, one of {', '.join(ATTENTION)}")
    names = list(ATTENTION) if attention is None else [attention]
    return CircuitSource(name, config, None, {each: ATTENTION.build(each) for each in names})


def _head(source: CircuitSource, options: argparse.Namespace) -> HeadCircuit:
    return head_circuit(source.attention(options.layer), options.layer, options.head, options.map)


def _vector(source: CircuitSource, shown: HeadCircuit, options: argparse.Namespace) -> tuple[Tensor, str]:
    """The vector that a head encodes, and where it comes from."""
    if options.text is not None:
        read, position = layer_input(source.model, options.text, shown.layer, options.position, shown.map)
        return read[shown.inputs], f"token at position {position} of {options.text!a}"
    return _read_vector(options.input, shown.circuit.num_features), f"input from {options.input!a}"


def _read_vector(file: str, size: int) -> Tensor:
    try:
        numbers = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{file!r} is not UTF-8; give a JSON file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file!r} is not JSON ({error}); give a list of {size} numbers") from None
    if not isinstance(numbers, list) or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"{file!r} must hold a list of {size} finite numbers")
    if len(numbers) != size:
        raise ValueError(f"the head encodes {size} numbers; {file!r} has {len(numbers)}")
    return torch.tensor(numbers, dtype=torch.float64)


def _count(name: str, least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{name} must be an integer of at least {least}; got {text!r}")
        return value

    return parse
