"""Looking into a trained model: attention maps of a text, its circuits, whether it sees the future."""

import textwrap
from dataclasses import dataclass
from typing import Any, cast

import pennylane as qml
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from pennylane.drawer import tape_mpl, tape_text
from pennylane.tape import QuantumScript
from torch import Tensor

from lightning_modules.gpt import GPT
from lightning_modules.language_model import LanguageModel
from pennylane_qattn import Attention, Circuit, CircuitFeatureMap, StateFeatureMap
from pennylane_qattn.causality import certify
from pennylane_qattn.encoding import Encoding
from pennylane_qattn.execution import RunsCircuits
from pennylane_qattn.features import circuit_within
from pennylane_qattn.gates import EncodingBox, ansatz_operations, encoding_operations
from pennylane_qattn.observables import group_words, to_pennylane

#: Layers of gates that a picture may have: a wider one is more than image formats hold.
MAX_DRAWN_LAYERS = 400


@torch.no_grad()
def attention_maps(model: LanguageModel, text: str) -> tuple[dict[str, Any], list[str]]:
    """Attention weights of every layer on a text.

    Args:
        model: a model in evaluation mode.
        text: at most `block_size` tokens of it are used, the first ones.

    Returns:
        The weights `(heads, seq, seq)` by name of the layer, as nested lists, and the tokens as text.
    """
    ids = model.tokenizer.encode(text)[: model.gpt.config.block_size]
    maps: dict[str, Any] = {}

    def record(module: Attention, args: tuple, kwargs: dict) -> None:
        maps[f"layer {len(maps) + 1}"] = module.weights(args[0])[0].cpu().tolist()

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in attentions_of(model.gpt)]
    try:
        model.gpt(torch.tensor([ids], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return maps, [model.tokenizer.decode([i]) for i in ids]


# --- circuits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCircuit:
    """The circuit of one head of one map of one layer, with its angles.

    Attributes:
        layer, head: counted from 1.
        map: "query", "key" or "value".
        circuit: what is run.
        weights: its angles, radians.
        measures_words: whether Pauli words are measured; otherwise final states are compared.
        inputs: the entries of what the map reads that it encodes.
    """

    layer: int
    head: int
    map: str
    circuit: Circuit
    weights: Tensor
    measures_words: bool
    inputs: slice

    def __str__(self) -> str:
        return f"layer {self.layer}, head {self.head}, {self.map} map"


def head_circuit(attention: Attention, layer: int, head: int = 1, map: str | None = None) -> HeadCircuit:
    """The circuit of a head of an attention.

    Args:
        attention: of that layer.
        layer: its number, from 1: for information.
        head: counted from 1.
        map: "query", "key" or "value"; by default the value map if it has circuits, else the first map that has.

    Raises:
        ValueError: if there is no such head, or no circuit.
    """
    found = {name: circuit_within(getattr(attention, f"{name}_map")) for name in ("value", "query", "key")}
    found = {name: m for name, m in found.items() if m is not None}
    if not found and isinstance(attention.score, RunsCircuits):
        raise ValueError(
            f"the circuits of {attention.name} attention are of rows of keys and not of a map; "
            "pennylane_qattn.grover.circuits.row_circuit makes one, to draw or to export"
        )
    if not found:
        raise ValueError(f"{attention.name} attention has no circuits; choose one that has, such as qisa")
    if map is not None and map not in found:
        raise ValueError(f"the {map} map of {attention.name} attention is no circuit; choose {' or '.join(found)}")
    if not 1 <= head <= attention.num_heads:
        raise ValueError(f"head must be 1 to {attention.num_heads}; got {head}")
    name = map or next(iter(found))
    chosen = found[name]
    first = (head - 1) * chosen.in_features if chosen.split else 0
    return HeadCircuit(
        layer=layer,
        head=head,
        map=name,
        circuit=chosen.circuits[head - 1],
        weights=chosen.weights[head - 1].detach().cpu().double(),
        measures_words=not isinstance(chosen, StateFeatureMap),
        inputs=slice(first, first + chosen.in_features),
    )


def attentions_of(gpt: GPT) -> list[Attention]:
    """The attention of each layer."""
    return [module for module in gpt.modules() if isinstance(module, Attention)]


@torch.no_grad()
def layer_input(
    model: LanguageModel, text: str, layer: int, position: int | None = None, map: str = "value"
) -> tuple[Tensor, int]:
    """What a map of a layer reads at one token of a text: its embedding, and joined to it those that `span` adds.

    Args:
        model: a model in evaluation mode.
        text: at most `block_size` tokens.
        layer: counted from 1.
        position: of the token, counted from 0; by default the last one.
        map: "query", "key" or "value".

    Returns:
        The vector `(embed,)`, for values `(embed * span,)`, and the position.

    Raises:
        ValueError: if the text is empty or too long, or has no such position.
    """
    ids = model.tokenizer.encode(text)
    size = model.gpt.config.block_size
    if not 0 < len(ids) <= size:
        raise ValueError(f"the text must have 1 to {size} tokens, the model's block_size; got {len(ids)}")
    position = len(ids) - 1 if position is None else position
    if not 0 <= position < len(ids):
        raise ValueError(f"position must be 0 to {len(ids) - 1} in this text of {len(ids)} tokens; got {position}")
    seen: list[Tensor] = []
    read = getattr(attentions_of(model.gpt)[layer - 1], f"{map}_map")
    hook = read.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model.gpt(torch.tensor([ids], device=model.device))
    finally:
        hook.remove()
    return seen[0][0, position].cpu().double(), position


def circuit_tape(shown: HeadCircuit, inputs: Tensor | None = None, gates: bool = False) -> QuantumScript:
    """The circuit for drawing.

    Args:
        shown: which one.
        inputs: the vector that is encoded, for the angles of its gates; any other has the same gates.
        gates: the encoding decomposed into gates, instead of one box.
    """
    circuit = shown.circuit
    if gates:
        vector = torch.ones(circuit.num_features) if inputs is None else inputs
        encoding = encoding_operations(circuit, vector)
    else:
        encoding = [EncodingBox(cast(Encoding, circuit.encoding), range(circuit.num_wires))]
    words = dict.fromkeys(circuit.words) if shown.measures_words else ()
    measured = [qml.expval(to_pennylane(word, range(circuit.num_wires))) for word in words]
    return QuantumScript([*encoding, *ansatz_operations(circuit, shown.weights)], measured)


def circuit_text(shown: HeadCircuit, tape: QuantumScript, decimals: int | None = None, width: int = 100) -> str:
    """The circuit in letters, and the words it measures.

    Args:
        shown: which one.
        tape: its `circuit_tape`.
        decimals: of the angles; `None`: no angles.
        width: characters in a line.
    """
    circuit = shown.circuit
    wires = list(range(circuit.num_wires))
    gates = QuantumScript(tape.operations)
    lines = [
        f"{shown}; qubits: {circuit.num_wires}, trainable angles: {shown.weights.numel()}, "
        f"encoding: {circuit.encoding.name}, of {circuit.num_features} numbers, ansatz: {circuit.ansatz.label}",
        "",
        tape_text(gates, wire_order=wires, show_all_wires=True, decimals=decimals, max_length=width),
        "",
    ]
    if not shown.measures_words:
        return "\n".join([*lines, "Its final state is compared with another; no words are measured."])
    groups = group_words(circuit.words)
    distinct = len(set(circuit.words))
    lines.append(
        f"Pauli words: {len(circuit.words)} ({distinct} distinct; the first letter is wire 0), "
        f"measurement settings: {len(groups)}"
    )
    for basis, members in groups:
        words = " ".join(dict.fromkeys(circuit.words[i] for i in members))
        lines.append(textwrap.fill(f"basis {basis}: {words}", width, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


def circuit_figure(tape: QuantumScript, decimals: int | None = None) -> Figure:
    """A matplotlib figure of a `circuit_tape`; `decimals` as in `circuit_text`.

    Raises:
        ValueError: if it would be too wide for a picture.
    """
    if (depth := tape.graph.get_depth()) > MAX_DRAWN_LAYERS:
        raise ValueError(
            f"a picture holds {MAX_DRAWN_LAYERS} layers of gates, and these are {depth}; draw the encoding as one box, "
            "or export the gates with qattn export-qasm"
        )
    wires = list(range(max(tape.wires) + 1))
    figure, _ = tape_mpl(tape, wire_order=wires, show_all_wires=True, decimals=decimals)
    pyplot.close(figure)  # PennyLane draws by pyplot, which would keep it for ever
    return figure


def circuit_drawing(model: LanguageModel) -> Figure | None:
    """The circuit of the first head of the first layer, its encoding as one box; `None` if it has no circuit."""
    attention = attentions_of(model.gpt)[0]
    if not any(isinstance(module, CircuitFeatureMap) for module in attention.modules()):
        return None
    return circuit_figure(circuit_tape(head_circuit(attention, 1)))


def is_causal(gpt: GPT, seed: int = 0) -> bool:
    """Whether its certificate says that it is causal."""
    return certify(gpt, seed=seed).passes
