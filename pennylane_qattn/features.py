r"""Feature maps: embeddings `(B, T, d)` -> one vector per head and token, `(B, H, T, f)`.

Queries, keys and values of every attention are feature maps; any of them combines with any score. Sources: linear,
arXiv 1706.03762; circuits, QSANN (arXiv 2205.05625) and QISA (arXiv 2603.03318).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pennylane_qattn.ansatz import ANSATZE, Ansatz
from pennylane_qattn.circuit import Circuit
from pennylane_qattn.complex_numbers import from_real
from pennylane_qattn.devices import Meter
from pennylane_qattn.encoding import ENCODINGS, AmplitudeEncoding, Encoding
from pennylane_qattn.execution import Execution, Executor, make_executor
from pennylane_qattn.folding import Fold, Memory
from pennylane_qattn.measurement import WordMeasurement
from pennylane_qattn.observables import check_words, decode_words, draw_words, encode_words
from pennylane_qattn.precision import at_least_float32, cast, promoted, widened
from pennylane_qattn.quadratic import quadratic_forms
from pennylane_qattn.recipes import Affine, Forms, Recipe, affine, is_as_written
from pennylane_qattn.transforms import is_transformed, is_without_numbers, values_of, without_autocast


class FeatureMap(nn.Module, ABC):
    """Maps every token by itself; it never looks at another token, so it cannot leak the future.

    Attributes:
        embed_dim: width `d` of the embedding.
        num_heads: number of heads `H`.
        out_features: width `f` of one head's features.
    """

    def __init__(self, embed_dim: int, num_heads: int, out_features: int):
        super().__init__()
        for name, value in (
            ("embed_dim", embed_dim),
            ("num_heads", num_heads),
            ("out_features", out_features),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.embed_dim, self.num_heads, self.out_features = embed_dim, num_heads, out_features

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch heads seq features"]: ...

    def recipe(self, x: Float[Tensor, "batch seq embed"]) -> Recipe | None:
        """What a kernel makes the features of by itself, without gradients; `None`: `forward` alone makes them."""
        return None


class LinearFeatureMap(FeatureMap):
    """One linear map per head (Vaswani et al. 2017, equation 1).

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        out_features: features per head.
        bias: whether each feature has a learned offset.
    """

    def __init__(self, embed_dim: int, num_heads: int, out_features: int, bias: bool = False):
        super().__init__(embed_dim, num_heads, out_features)
        self.linear = nn.Linear(embed_dim, num_heads * out_features, bias=bias)

    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch heads seq features"]:
        return self.linear(x).unflatten(-1, (self.num_heads, self.out_features)).transpose(1, 2)

    def recipe(self, x: Float[Tensor, "batch seq embed"]) -> Affine | None:
        return affine(self._modules.get("linear")) if is_as_written(self, LinearFeatureMap.forward) else None


class PerHeadFeatureMap(FeatureMap):
    """Base of maps in which a head reads the whole embedding, or its own slice of it (`split`).

    Its parameters stay in float32 or better whatever the model's precision, and so does what it computes.
    """

    def __init__(self, embed_dim: int, num_heads: int, out_features: int, split: bool):
        super().__init__(embed_dim, num_heads, out_features)
        if split and embed_dim % num_heads:
            raise ValueError(f"split heads need embed_dim divisible by num_heads; got {embed_dim} and {num_heads}")
        self.split = split
        self.in_features = embed_dim // num_heads if split else embed_dim

    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch heads seq features"]:
        batch, seq, _ = x.shape
        with without_autocast(x.device):
            features = cast(self.per_head(self.inputs(widened(x))), x.dtype)
        return features.view(self.num_heads, batch, seq, features.shape[-1]).transpose(0, 1)

    def inputs(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "#heads tokens inputs"]:
        """What each head reads, or all of them."""
        tokens = x.shape[0] * x.shape[1]
        if self.split:
            return x.reshape(tokens, self.num_heads, self.in_features).transpose(0, 1)
        return x.reshape(1, tokens, self.embed_dim)

    @abstractmethod
    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        """The features of each head from its inputs."""

    def prepare(self) -> None:
        """Rebuilds everything that is derived from parameters' dtype and device, and from the words."""

    def _apply(self, fn, recurse=True):
        super()._apply(at_least_float32(fn), recurse)
        self.prepare()
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._apply(lambda tensor: tensor)  # assigned tensors may be of half precision


class _MeasuredFeatureMap(PerHeadFeatureMap):
    """Base of maps that measure Pauli words. The words are a buffer, so they travel in the checkpoint.

    What is derived from them follows them: a call compares them with those it was made for. A compiled or exported
    model keeps the words of its compilation; `torch.func` may map over words that are the same in every call, and
    refuses others. Of words on a GPU, writing through `.data` is not seen.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        out_features: int,
        split: bool,
        encoding: Encoding,
        words: Sequence[str] | None,
        seed: int | Sequence[int],
    ):
        super().__init__(embed_dim, num_heads, out_features, split)
        self.num_wires = encoding.num_wires(self.in_features)
        if words is None:
            seeds = (seed,) if isinstance(seed, int) else tuple(seed)
            drawn = [draw_words(out_features, self.num_wires, (*seeds, head)) for head in range(num_heads)]
        else:
            drawn = [check_words(words, self.num_wires)] * num_heads
        codes = np.stack([encode_words(head) for head in drawn])
        self.register_buffer("word_codes", torch.as_tensor(codes))
        self._measured, self._as_bytes = codes.copy(), codes.tobytes()
        self._mark: tuple[Tensor, int, int] | None = None

    @property
    def words(self) -> list[tuple[str, ...]]:
        """The Pauli words of each head."""
        return [decode_words(head) for head in values_of(self.word_codes)]

    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch heads seq features"]:
        self._follow_words()
        return super().forward(x)

    def _follow_words(self) -> None:
        """Makes anew what is derived from the words, if they have been written into or replaced.

        Raises:
            ValueError: if they are no words, or `torch.func` has other ones than the module.
        """
        if torch.compiler.is_compiling() or is_without_numbers():  # what is compiled keeps the words that it began with
            return
        codes, mark = self.word_codes, None
        if is_transformed():
            values = values_of(codes)
        elif codes.device.type == "cpu":
            values = codes.detach().numpy()
            if values.shape == self._measured.shape and values.tobytes() == self._as_bytes:
                return  # in a microsecond
        else:
            if not codes.is_inference():
                mark = codes, codes.data_ptr(), codes._version  # the tensor too: nothing else may take its address
            if mark and self._mark and self._mark[0] is codes and self._mark[1:] == mark[1:]:
                return  # reading them would wait for the device
            values = values_of(codes)
        if values.shape[-3:] == self._measured.shape and (values == self._measured).all():
            self._mark = mark
            return
        if is_transformed():
            raise ValueError(
                "under torch.func the Pauli words are those of the module; got other word_codes: copy them into the "
                "module before, or leave word_codes out of functional_call"
            )
        if values.shape != self._measured.shape:
            raise ValueError(
                f"word_codes must have the shape (heads, words, wires) = {self._measured.shape}; got {values.shape}"
            )
        _check_codes(codes, "word_codes")
        self.prepare()
        self._mark = mark

    def prepare(self) -> None:
        self._measured, self._mark = values_of(self.word_codes).copy(), None
        self._as_bytes = self._measured.tobytes()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        codes = state_dict.get(f"{prefix}word_codes")
        if codes is not None:
            _check_codes(codes.data, f"{prefix}word_codes")  # `data`: reads what FSDP has left in the file
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_codes(codes: Tensor, name: str) -> None:
    if codes.is_floating_point() or ((codes < 0) | (codes > 3)).any():
        raise ValueError(f"{name} must hold 0 to 3 for I, X, Y, Z; got {codes.unique().tolist()}")


def default_dtype() -> torch.dtype:
    """That of new parameters, but float32 at least."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class CircuitFeatureMap(_MeasuredFeatureMap):
    r"""Expectation values of Pauli words after a variational circuit, one circuit per head.

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        out_features: observables per head.
        ansatz: an `Ansatz` or its name.
        encoding: an `Encoding` or its name.
        split: each head encodes its own slice of the embedding instead of the whole.
        words: the same observables for every head instead of drawn ones.
        seed: draws the words; one or several non-negative integers.
        execution: how the circuits are run, or the name of an executor.
        trainable: `False` freezes the angles where they are drawn; the checkpoint holds them all the same.

    Shapes:
        `weights`: `(heads, *ansatz.shape(num_wires))`, radians, drawn uniformly from [0, 2 pi).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        out_features: int,
        ansatz: Ansatz | str = "qisa",
        encoding: Encoding | str = "amplitude",
        split: bool = False,
        words: Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        execution: Execution | str = "auto",
        trainable: bool = True,
    ):
        self.ansatz, self.encoding = ANSATZE.build(ansatz), ENCODINGS.build(encoding)
        out_features = out_features if words is None else len(words)
        super().__init__(embed_dim, num_heads, out_features, split, self.encoding, words, seed)
        self._how: tuple = (execution, 0, None)
        self.executor = self.make_executor(*self._how)
        shape = (num_heads, *self.ansatz.shape(self.num_wires))
        angles = torch.rand(shape, dtype=default_dtype()) * 2 * math.pi
        self.weights = nn.Parameter(angles, requires_grad=trainable)
        self.executor.prepare(self.weights.dtype, self.weights.device)

    @property
    def circuits(self) -> list[Circuit]:
        """The circuit of each head."""
        return [Circuit(self.in_features, words, self.encoding, self.ansatz) for words in self.words]

    def make_executor(self, execution: Execution | str, index: int, meter: Meter | None) -> Executor:
        """An executor for these circuits; `index` sets the shots of several maps apart, and `meter` counts for all."""
        return make_executor(self.circuits, execution, index, meter=meter)

    def set_execution(self, execution: Execution | str, index: int = 0, meter: Meter | None = None) -> None:
        """Runs the circuits that way from now on."""
        self.use(self.make_executor(execution, index, meter), execution, index)

    def use(self, executor: Executor, execution: Execution | str, index: int = 0) -> None:
        """Takes over an executor that `make_executor` made."""
        self.executor = executor
        self._how = (execution, index, executor.meter)
        self.prepare()

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        return self.executor.expectations(*promoted(x, self.weights))

    def recipe(self, x: Float[Tensor, "batch seq embed"]) -> Forms | None:
        parts = {"per_head": CircuitFeatureMap.per_head, "inputs": PerHeadFeatureMap.inputs}
        weights = self._parameters.get("weights")
        if weights is None or not is_as_written(self, _MeasuredFeatureMap.forward, **parts):
            return None
        self._follow_words()
        return self.executor.recipe(self.inputs(x), weights)

    def prepare(self) -> None:
        super().prepare()
        if not hasattr(self, "weights"):
            return
        if [c.words for c in self.executor.circuits] != self.words:
            self.executor = self.make_executor(*self._how)
        self.executor.prepare(self.weights.dtype, self.weights.device)


def circuit_within(feature_map: nn.Module) -> CircuitFeatureMap | None:
    """The circuit feature map that a map is, or has among its parts; `None` if it has no circuit."""
    return next((part for part in feature_map.modules() if isinstance(part, CircuitFeatureMap)), None)


class StateFeatureMap(CircuitFeatureMap):
    """The circuit's final state itself, real amplitudes followed by imaginary ones: for the overlap score.

    Its words are not measured; `out_features` is `2 * 2 ** num_wires`.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options):
        super().__init__(embed_dim, num_heads, 1, **options)
        self.out_features = 2 * 2**self.num_wires

    def make_executor(self, execution: Execution | str, index: int, meter: Meter | None) -> Executor:
        return make_executor(self.circuits, execution, index, for_states=True, meter=meter)

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        return self.executor.states(*promoted(x, self.weights))


def draw_matrices(num_heads: int, size: int) -> nn.Parameter:
    """A square matrix per head, `(heads, size, size)`, drawn as `nn.Linear` draws its own."""
    bound = size**-0.5
    return nn.Parameter(torch.empty(num_heads, size, size, dtype=default_dtype()).uniform_(-bound, bound))


class QuadraticFeatureMap(_MeasuredFeatureMap):
    r"""Pauli words of a learned linear map, :math:`v_o = u^T P_o u` with :math:`u = W x` (QISA, "absorbed").

    No circuit and no normalising: the values grow with the square of the embedding. :math:`u` is zero-padded to
    :math:`2^n`. A word with an odd number of Y is purely imaginary, so on real vectors its value is always 0.

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        out_features: observables per head.
        split: each head reads its own slice of the embedding.
        words: the same observables for every head instead of drawn ones.
        seed: draws the words.

    Shapes:
        `weight`: `(heads, inputs, inputs)`, drawn as `nn.Linear` draws its own.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        out_features: int,
        split: bool = False,
        words: Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
    ):
        out_features = out_features if words is None else len(words)
        super().__init__(embed_dim, num_heads, out_features, split, AmplitudeEncoding(), words, seed)
        self.weight = draw_matrices(num_heads, self.in_features)
        self._folds: dict = {}
        self.prepare()

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        x, weight = promoted(x, self.weight)
        padded = self._padded(weight)
        if self._measurement.serves(x):
            return self._measurement(x, padded)
        fold = self._fold(weight.dtype, weight.device)
        rows, signs = self._readouts(lambda: fold.readout(from_real(padded)), weight)
        return quadratic_forms(x, rows, signs)

    def recipe(self, x: Float[Tensor, "batch seq embed"]) -> Forms | None:
        parts = {"per_head": QuadraticFeatureMap.per_head, "inputs": PerHeadFeatureMap.inputs}
        weight = self._parameters.get("weight")
        if weight is None or x.dtype != weight.dtype or not is_as_written(self, _MeasuredFeatureMap.forward, **parts):
            return None
        self._follow_words()
        return Forms(self.inputs(x), False, self._padded(weight), self._measurement.pairs(x.dtype))

    def _padded(self, weight: Float[Tensor, "heads inputs inputs"]) -> Float[Tensor, "heads dim inputs"]:
        return nn.functional.pad(weight, (0, 0, 0, 2**self.num_wires - self.in_features))

    def prepare(self) -> None:
        super().prepare()
        if hasattr(self, "weight"):
            self._folds.clear()
            self._readouts = Memory()
            self._measurement = WordMeasurement(self.words, is_complex=False)
            self._fold(self.weight.dtype, self.weight.device)

    def _fold(self, dtype: torch.dtype, device: torch.device) -> Fold:
        if (dtype, device) not in self._folds:
            self._folds[dtype, device] = Fold(None, self.num_wires, self.words, dtype=dtype, device=device)
            self._measurement.prepare(dtype, device)
        return self._folds[dtype, device]
