"""Pure torch programs as plain data: traced once from any Python function, run without calling it again.

PennyLane cannot be called inside `forward` without breaking `torch.compile`, and a checkpoint must not run a
stranger's code. Both are served by a list of named torch operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

#: How values other than numbers, strings and lists are written.
_ENCODED = {"ref", "tensor", "dtype", "complex", "device", "layout", "memory_format"}
#: Operations a program may hold: arithmetic, shapes and constants, nothing that reads files or draws numbers.
ALLOWED = frozenset(
    """abs acos add addcmul alias angle arange argmax asin atan atan2 bitwise_and bitwise_or bmm broadcast_tensors cat
    clamp clamp_max clamp_min clone complex conj conj_physical copy cos cosh cumsum cumprod detach diag_embed diagonal
    diagonal_copy div einsum empty eq erf exp exp2 expand expm1 expand_copy eye fill flatten flip full full_like
    gather ge gelu gt index index_select le lerp lift_fresh lift_fresh_copy linspace log log1p log2 lt matmul max
    maximum mean min minimum mm mul mv narrow ne neg new_empty new_full new_ones new_zeros ones ones_like outer
    permute polar pow prod real imag reciprocal relu remainder repeat reshape resolve_conj resolve_neg roll rsqrt rsub
    scalar_tensor scatter select select_copy sigmoid sign sin sinc sinh slice slice_copy softmax _softmax softplus split
    split_with_sizes sqrt square squeeze stack std sub sum t tan tanh tensordot tile to _to_copy transpose tril triu
    tril_indices unbind unsqueeze unsqueeze_copy vdot view view_as_complex view_as_real _view_copy view_copy
    _reshape_alias _unsafe_view _conj where zeros zeros_like""".split()
)


@dataclass(frozen=True)
class Graph:
    """A program: `inputs` tensors in, `outputs` tensors out.

    Attributes:
        inputs: number of input tensors.
        nodes: one `[operation, arguments, keyword arguments]` each; values are plain data, references to earlier
            results are `{"ref": index}` and count the inputs first.
        outputs: indices of the results returned.
    """

    inputs: int
    nodes: tuple
    outputs: tuple[int, ...]
    _resolved: list = field(default_factory=list, compare=False, repr=False)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        values: list[Any] = list(inputs)
        if not self._resolved:
            self._resolved.extend(_resolve(node) for node in self.nodes)
        device = inputs[0].device
        for operation, args, kwargs in self._resolved:
            args = [_fill(a, values, device) for a in args]
            values.append(operation(*args, **{k: _fill(v, values, device) for k, v in kwargs.items()}))
        return [values[i] for i in self.outputs]

    def __getstate__(self) -> dict:
        return {"inputs": self.inputs, "nodes": self.nodes, "outputs": self.outputs}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_resolved", [])

    def to_plain(self) -> dict[str, Any]:
        """The program as plain data."""
        return {"inputs": self.inputs, "nodes": _tree(list, self.nodes), "outputs": list(self.outputs)}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> "Graph":
        """Reads `to_plain`; a program with an operation that is not allowed is refused."""
        try:
            graph = cls(int(data["inputs"]), _tree(tuple, data["nodes"]), tuple(data["outputs"]))
            for node in graph.nodes:
                _resolve(node)
            _check_references(graph)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not a traced program: {error!r}") from None
        return graph


def trace(function: Callable[..., Sequence[Tensor]], *examples: Tensor) -> tuple[Graph, list[Any]]:
    """Records the torch operations of `function` on tensors like `examples`.

    Returns:
        The program of those outputs that are computed from tensors, and for every output either its index among
        them (as `{"ref": i}`) or, if it is no tensor of the trace, its plain value.

    Raises:
        ValueError: if the function reads the values of its inputs, for instance to branch on them.
    """
    returned: list[Any] = []

    def tensors_only(*inputs: Tensor) -> list[Tensor]:
        returned[:] = function(*inputs)
        return [value for value in returned if isinstance(value, Tensor)]

    try:
        traced = make_fx(tensors_only, tracing_mode="real")(*examples)
    except RuntimeError as error:
        if "tracing tensor" not in str(error):
            raise
        raise ValueError("the function reads the values of its inputs (a branch, float() or item() on them)") from None
    traced.graph.eliminate_dead_code()
    index: dict[torch.fx.Node, int] = {}
    nodes: list[tuple] = []
    outputs: list[int] = []
    placeholders = 0
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            index[node] = placeholders
            placeholders += 1
        elif node.op == "get_attr":
            tensor = getattr(traced, node.target)
            nodes.append(("constant", (_encode(tensor, index),), {}))
            index[node] = placeholders + len(nodes) - 1
        elif node.op == "call_function":
            args = tuple(_encode(a, index) for a in node.args)
            kwargs = {k: _encode(v, index) for k, v in node.kwargs.items()}
            nodes.append((_operation_name(node.target), args, kwargs))
            index[node] = placeholders + len(nodes) - 1
        elif node.op == "output":
            outputs = [index[value] for value in node.args[0]]
    references = iter(range(len(outputs)))
    results = [{"ref": next(references)} if isinstance(value, Tensor) else value for value in returned]
    return Graph(placeholders, tuple(nodes), tuple(outputs)), results


def _operation_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return f"{target._schema.name.removeprefix('aten::')}.{target._overloadname}"
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def _resolve(node: Sequence) -> tuple[Callable, Sequence, dict]:
    name, args, kwargs = node
    if not (isinstance(name, str) and isinstance(args, list | tuple) and isinstance(kwargs, dict)):
        raise ValueError(f"a traced program is made of [name, arguments, keyword arguments]; got {node!r}")
    if name == "constant":
        return _identity, args, kwargs
    if name == "_operator.getitem":
        return _getitem, args, kwargs
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base) if base in ALLOWED else None
    # Only what torch lists as an overload: other attributes of these objects lead to anything at all.
    operation = getattr(packet, overload) if packet is not None and overload in packet.overloads() else None
    if not isinstance(operation, torch._ops.OpOverload) or operation._schema.is_mutable:
        raise ValueError(f"a traced program may not call {name!r}; allowed are torch's arithmetic and shape operations")
    return operation, args, kwargs


def _identity(value: Any) -> Any:
    return value


def _getitem(values: Sequence, index: int) -> Any:
    if not isinstance(values, list | tuple) or not all(isinstance(v, Tensor) for v in values):
        raise ValueError("a traced program takes items of lists of tensors only")
    return values[index]


def _check_references(graph: "Graph") -> None:
    """Every reference must be to an earlier result."""

    def check(value: Any, known: int) -> None:
        if isinstance(value, dict):
            if len(value.keys() - {"dtype"}) > 1 or not value.keys() <= _ENCODED:
                raise ValueError(f"a traced program cannot hold {value!r}")
            if "ref" in value and not (type(value["ref"]) is int and 0 <= value["ref"] < known):
                raise ValueError(f"a traced program refers to {value['ref']!r}, which is not there")
        elif isinstance(value, list | tuple):
            for item in value:
                check(item, known)

    for place, (_, args, kwargs) in enumerate(graph.nodes):
        for value in (args, *kwargs.values()):
            check(value, graph.inputs + place)
    known = graph.inputs + len(graph.nodes)
    if not all(type(i) is int and 0 <= i < known for i in graph.outputs):
        raise ValueError(f"a traced program has no results {graph.outputs!r}")


def _encode(value: Any, index: dict) -> Any:
    if isinstance(value, torch.fx.Node):
        return {"ref": index[value]}
    if isinstance(value, Tensor):
        as_pairs = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return {"tensor": as_pairs.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": (value.real, value.imag)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "input"}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return tuple(_encode(v, index) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a traced program cannot hold {value!r}")


def _fill(value: Any, values: list, device: torch.device) -> Any:
    """An encoded argument as the value it stands for."""
    if isinstance(value, dict):
        if "ref" in value:
            return values[value["ref"]]
        if "tensor" in value:
            dtype = _constant(value["dtype"], torch.dtype)
            if dtype.is_complex:
                return torch.view_as_complex(torch.tensor(value["tensor"], dtype=dtype.to_real(), device=device))
            return torch.tensor(value["tensor"], dtype=dtype, device=device)
        if "complex" in value:
            return complex(*value["complex"])
        if "device" in value:
            return device
        kind, name = next(iter(value.items()))
        return _constant(name, {"dtype": torch.dtype, "layout": torch.layout}.get(kind, torch.memory_format))
    if isinstance(value, list | tuple):
        return [_fill(v, values, device) for v in value]
    return value


def _constant(name: Any, kind: type) -> Any:
    """A constant of torch, such as a dtype, by name."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, kind):
        raise ValueError(f"a traced program names {name!r}, which is no {kind.__name__} of torch")
    return found


def _tree(sequence: type, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return sequence(_tree(sequence, v) for v in value)
    if isinstance(value, dict):
        return {k: _tree(sequence, v) for k, v in value.items()}
    return value
