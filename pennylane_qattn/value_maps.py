r"""Value maps that tell what of the circuit matters: random or learned observables, and mixtures with linear values.

A circuit with amplitude encoding gives :math:`v_o = x^T O_o x / \lVert x \rVert^2`, where
:math:`O_o = \mathrm{Re}\,U^\dagger P_o U` and :math:`P_o` is a Pauli word (QISA, arXiv 2603.03318). Here the matrices
:math:`O_o` come from elsewhere, and are as many and as large, or linear values are added.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pennylane_qattn.ansatz import Ansatz
from pennylane_qattn.encoding import ENCODINGS, AmplitudeEncoding, Encoding, normalise
from pennylane_qattn.features import (
    CircuitFeatureMap,
    FeatureMap,
    LinearFeatureMap,
    PerHeadFeatureMap,
    default_dtype,
    draw_matrices,
)
from pennylane_qattn.precision import promoted
from pennylane_qattn.quadratic import learned_quadratic_forms
from pennylane_qattn.recipes import Forms, is_as_written

#: Largest table of random forms of one map, in bytes of float32.
MAX_FORM_BYTES = 2**31
#: Most qubits of which all words of I and Z are measured: 255 words.
MAX_READOUT_WIRES = 8


def draw_forms(num_forms: int, num_features: int, seed: int | Sequence[int]) -> np.ndarray:
    r"""Random symmetric matrices in place of Pauli words, `(forms, features, features)`.

    Each is drawn on :math:`2^n` amplitudes from the Gaussian orthogonal ensemble, made traceless, scaled to the
    Frobenius norm :math:`\sqrt{2^n}` of a Pauli word on :math:`n` qubits, and last cut to the amplitudes that are not
    padding, as a word acts on a zero-padded vector.

    Args:
        num_forms: how many.
        num_features: width :math:`d` of the vectors; :math:`n = \max(1, \lceil\log_2 d\rceil)`.
        seed: one or several non-negative integers.
    """
    dim = 2 ** AmplitudeEncoding().num_wires(num_features)
    drawn = np.random.default_rng(seed).standard_normal((num_forms, dim, dim))
    forms = drawn + drawn.transpose(0, 2, 1)
    forms -= np.eye(dim) * np.trace(forms, axis1=1, axis2=2)[:, None, None] / dim
    forms *= np.sqrt(dim) / np.linalg.norm(forms, axis=(1, 2), keepdims=True)
    return forms[:, :num_features, :num_features]


def evaluate_forms(
    x: Float[Tensor, "#heads tokens inputs"], forms: Float[Tensor, "heads forms inputs inputs"]
) -> Float[Tensor, "heads tokens forms"]:
    """`x^T R_o x` for every head, token and form."""
    products = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return products @ forms.flatten(-2).transpose(-2, -1)


class RandomQuadraticFeatureMap(PerHeadFeatureMap):
    r"""Random quadratic forms, :math:`v_o = x^T R_o x / \lVert x \rVert^2`: a circuit's features without the circuit.

    Nothing of it is trained. The zero vector has the value of the first basis vector, and gradient 0, as in amplitude
    encoding.

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        out_features: forms per head.
        split: each head reads its own slice of the embedding.
        seed: draws the forms (`draw_forms`), with the head's number; one or several non-negative integers.

    Shapes:
        `forms`: `(heads, out_features, inputs, inputs)`, a buffer, so that it travels in the checkpoint.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        out_features: int,
        split: bool = False,
        seed: int | Sequence[int] = 0,
    ):
        super().__init__(embed_dim, num_heads, out_features, split)
        size = 4 * num_heads * out_features * self.in_features**2
        if size > MAX_FORM_BYTES:
            raise ValueError(
                f"{num_heads} x {out_features} random forms of {self.in_features} inputs take {size / 2**30:.1f} GiB; "
                "use split heads or fewer features"
            )
        seeds = (seed,) if isinstance(seed, int) else tuple(seed)
        drawn = [draw_forms(out_features, self.in_features, (*seeds, head)) for head in range(num_heads)]
        self.register_buffer("forms", torch.as_tensor(np.stack(drawn)).to(default_dtype()))

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        return evaluate_forms(normalise(x), self.forms.to(x.dtype))


class RandomAbsorbedFeatureMap(RandomQuadraticFeatureMap):
    r"""Random forms of a learned linear map, :math:`v_o = u^T R_o u` with :math:`u = W x`, nothing normalised.

    `QuadraticFeatureMap` with its Pauli words replaced.

    Shapes:
        `weight`: `(heads, inputs, inputs)`, drawn as `nn.Linear` draws its own.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        out_features: int,
        split: bool = False,
        seed: int | Sequence[int] = 0,
    ):
        super().__init__(embed_dim, num_heads, out_features, split, seed)
        self.weight = draw_matrices(num_heads, self.in_features)

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        x, weight = promoted(x, self.weight)
        return evaluate_forms(x @ weight.transpose(-2, -1), self.forms.to(x.dtype))


class LearnedQuadraticFeatureMap(PerHeadFeatureMap):
    r"""Learned observables, :math:`v = S^T (Wx)^{\circ 2} / \lVert x \rVert^2`: a free basis, free values on it.

    It starts with a random orthonormal basis :math:`W`, and with :math:`S` uniform of variance 1: observables of the
    mean square 1 that the eigenvalues of a Pauli word have. The zero vector is read as the first basis vector, with
    gradient 0, as in amplitude encoding.

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        out_features: observables per head.
        split: each head reads its own slice of the embedding.
        rank: vectors of the basis; observables are 0 on the others. `None`: as many as inputs.

    Shapes:
        `weight`: :math:`W`, `(heads, rank, inputs)`; `readout_weight`: :math:`S`, `(heads, rank, out_features)`.
    """

    def __init__(self, embed_dim: int, num_heads: int, out_features: int, split: bool = False, rank: int | None = None):
        super().__init__(embed_dim, num_heads, out_features, split)
        rank = self.in_features if rank is None else rank
        if not 1 <= rank <= self.in_features:
            raise ValueError(f"rank must lie between 1 and the {self.in_features} inputs of a head; got {rank}")
        bases = torch.empty(num_heads, rank, self.in_features, dtype=default_dtype())
        for basis in bases:
            nn.init.orthogonal_(basis)
        self.weight = nn.Parameter(bases)
        self.readout_weight = _uniform((num_heads, rank, out_features), variance=1.0)

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        x, weight = promoted(x, self.weight)
        return learned_quadratic_forms(normalise(x), weight, self.readout_weight.to(x.dtype))

    def recipe(self, x: Float[Tensor, "batch seq embed"]) -> Forms | None:
        parts = {"per_head": LearnedQuadraticFeatureMap.per_head, "inputs": PerHeadFeatureMap.inputs}
        if not is_as_written(self, PerHeadFeatureMap.forward, **parts):
            return None
        weight, readout = (self._parameters.get(name) for name in ("weight", "readout_weight"))
        return None if weight is None or readout is None else Forms(self.inputs(x), True, weight, readout)


class RectifiedFeatureMap(LearnedQuadraticFeatureMap):
    r""":math:`v = S^T \max(Wx, 0) / \lVert x \rVert`: learned observables with the square replaced by a rectifier.

    As many parameters that start in the same way, and nothing of quantum mechanics: one hidden layer.
    """

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        x, weight = promoted(x, self.weight)
        hidden = normalise(x) @ weight.transpose(1, 2)
        return hidden.relu() @ self.readout_weight.to(x.dtype)


class LearnedCircuitFeatureMap(FeatureMap):
    r"""A circuit whose observables are learned: any that are diagonal in the computational basis and traceless.

    Measured are all :math:`2^n - 1` words of I and Z, which one setting gives; each feature is a learned linear
    combination of them, :math:`v_o = \sum_w A_{wo} \langle Z_w \rangle`. That is :math:`S^T p` with the probabilities
    :math:`p` of the :math:`2^n` outcomes, up to a constant. It starts with observables whose eigenvalues have a mean
    square of 1, as those of a Pauli word.

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        out_features: observables per head.
        ansatz: an `Ansatz` or its name.
        encoding: an `Encoding` or its name, of at most `MAX_READOUT_WIRES` qubits.
        split: each head encodes its own slice of the embedding instead of the whole.
        **options: others of `CircuitFeatureMap`, such as `trainable`.

    Shapes:
        `readout_weight`: :math:`A`, `(heads, 2 ** num_wires - 1, out_features)`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        out_features: int,
        ansatz: Ansatz | str = "qisa",
        encoding: Encoding | str = "amplitude",
        split: bool = False,
        **options: Any,
    ):
        super().__init__(embed_dim, num_heads, out_features)
        wires = ENCODINGS.build(encoding).num_wires(max(1, embed_dim // num_heads if split else embed_dim))
        if wires > MAX_READOUT_WIRES:
            raise ValueError(
                f"learned-circuit values measure all words of I and Z, on {MAX_READOUT_WIRES} qubits at most; "
                f"got {wires}: use split heads, or amplitude encoding"
            )
        words = tuple("".join(letters) for letters in product("IZ", repeat=wires))[1:]
        self.words_map = CircuitFeatureMap(
            embed_dim, num_heads, len(words), ansatz, encoding, split, words=words, **options
        )
        self.readout_weight = _uniform((num_heads, len(words), out_features), variance=1 / len(words))

    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch heads seq features"]:
        return self.words_map(x) @ self.readout_weight


class MixedFeatureMap(FeatureMap):
    r""":math:`a\, W x + b\, v(x)`: linear values plus those of another map, weighted; a and b are learned per head.

    Args:
        other: the other map, :math:`v`.
        bias: of the linear map.

    Shapes:
        `mixture`: `(heads, 2)`, the weights of the linear map and of the other; they start at 1.
    """

    def __init__(self, other: FeatureMap, bias: bool = False):
        super().__init__(other.embed_dim, other.num_heads, other.out_features)
        self.linear_map = LinearFeatureMap(self.embed_dim, self.num_heads, self.out_features, bias)
        self.other_map = other
        self.mixture = nn.Parameter(torch.ones(self.num_heads, 2))

    def forward(self, x: Float[Tensor, "batch seq embed"]) -> Float[Tensor, "batch heads seq features"]:
        linear, other = self.mixture[:, :, None, None].unbind(1)
        return linear * self.linear_map(x) + other * self.other_map(x)


def _uniform(shape: tuple[int, ...], variance: float) -> nn.Parameter:
    bound = (3 * variance) ** 0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
