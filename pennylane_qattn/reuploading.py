r"""Values of a circuit that reads its input twice: data re-uploading (arXiv 1907.02085) with amplitudes and phases.

.. math::

    v_o = \langle\phi|P_o|\phi\rangle, \qquad
    |\phi\rangle = U(\theta_2)\, D(x)\, U(\theta_1)\, \frac{x}{\lVert x \rVert}, \qquad
    D(x) = \sum_b e^{i s x_b} |b\rangle\langle b|.

The first encoding is QISA's (arXiv 2603.03318), the second turns the phase of each amplitude by the feature of the same
number, times a learned :math:`s`. Without it the circuit is quadratic in the unit vector; with it, no polynomial.
It is folded like any other circuit, in two parts; there is no QNode of it here.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pennylane_qattn.ansatz import ANSATZE, Ansatz
from pennylane_qattn.complex_numbers import real_and_imaginary
from pennylane_qattn.devices import Meter
from pennylane_qattn.encoding import ENCODINGS, AmplitudeEncoding, Encoding, normalise
from pennylane_qattn.execution import Execution, as_execution
from pennylane_qattn.executor import Executor
from pennylane_qattn.features import _MeasuredFeatureMap, default_dtype
from pennylane_qattn.folding import Fold, Memory
from pennylane_qattn.planning import Plan
from pennylane_qattn.precision import promoted
from pennylane_qattn.quadratic import quadratic_forms


class ReuploadedFeatureMap(_MeasuredFeatureMap):
    """Pauli words after a circuit that encodes its input twice.

    Args:
        embed_dim: width of the embedding.
        num_heads: number of heads.
        out_features: observables per head.
        ansatz: an `Ansatz` or its name; both parts have one of their own.
        encoding: amplitude encoding, or its name.
        split: each head encodes its own slice of the embedding instead of the whole.
        words: the same observables for every head instead of drawn ones.
        seed: draws the words.
        trainable: `False` freezes the angles where they are drawn.

    Shapes:
        `weights`: `(heads, 2, *ansatz.shape(num_wires))`, radians; `phase_scale`: `(heads,)`, radians per unit.
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
        trainable: bool = True,
    ):
        self.ansatz, encoding = ANSATZE.build(ansatz), ENCODINGS.build(encoding)
        if not isinstance(encoding, AmplitudeEncoding):
            raise ValueError(f"a re-uploaded circuit encodes amplitudes; got encoding {encoding.name!r}: use amplitude")
        out_features = out_features if words is None else len(words)
        super().__init__(embed_dim, num_heads, out_features, split, encoding, words, seed)
        shape = (num_heads, 2, *self.ansatz.shape(self.num_wires))
        angles = torch.rand(shape, dtype=default_dtype()) * 2 * math.pi
        self.weights = nn.Parameter(angles, requires_grad=trainable)
        self.phase_scale = nn.Parameter(torch.ones(num_heads, dtype=default_dtype()), requires_grad=trainable)
        self._folds: dict = {}
        self.executor = self.make_executor("auto", 0, None)
        self.prepare()

    def per_head(self, x: Float[Tensor, "#heads tokens inputs"]) -> Float[Tensor, "heads tokens features"]:
        x, weights = promoted(x, self.weights)
        fold = self._fold(x.dtype, x.device)
        to_real, to_imaginary = self._states(lambda: self._first(fold, weights), weights)
        unit = normalise(x)
        real, imaginary = unit @ to_real, unit @ to_imaginary
        phases = F.pad(x, (0, 2**self.num_wires - self.in_features)) * self.phase_scale.to(x.dtype)[:, None, None]
        cosine, sine = phases.cos(), phases.sin()
        state = torch.cat((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
        rows, signs = self._readouts(lambda: self._second(fold, weights), weights)
        return quadratic_forms(state, rows, signs)

    def _first(
        self, fold: Fold, weights: Float[Tensor, "heads 2 ..."]
    ) -> tuple[Float[Tensor, "heads inputs dim"], Float[Tensor, "heads inputs dim"]]:
        """What takes amplitudes to the real and imaginary parts of the state between the two parts."""
        real, imaginary = real_and_imaginary(fold.states(weights[:, 0], self.in_features))
        return real.transpose(1, 2), imaginary.transpose(1, 2)

    def _second(
        self, fold: Fold, weights: Float[Tensor, "heads 2 ..."]
    ) -> tuple[Float[Tensor, "heads rows amplitudes"], Float[Tensor, "heads rows words"]]:
        """Rows and signs of the quadratic forms of that state, real amplitudes followed by imaginary ones."""
        dim = 2**self.num_wires
        rows, signs = fold.readout(*fold.evolve(weights[:, 1], dim))
        return _on_complex(rows, dim), signs

    def prepare(self) -> None:
        super().prepare()
        if hasattr(self, "phase_scale"):
            self._folds.clear()
            self._states, self._readouts = Memory(), Memory()
            self._fold(self.weights.dtype, self.weights.device)

    def _fold(self, dtype: torch.dtype, device: torch.device) -> Fold:
        if (dtype, device) not in self._folds:
            program = self.ansatz.program(self.num_wires)
            self._folds[dtype, device] = Fold(program, self.num_wires, self.words, dtype=dtype, device=device)
        return self._folds[dtype, device]

    # --- how it is run ----------------------------------------------------------------------------------------------

    def make_executor(self, execution: Execution | str, index: int, meter: Meter | None) -> Executor:
        """The folded executor; refuses any other."""
        execution = as_execution(execution)
        if execution.executor == "qnode" or not execution.is_exact or execution.device_options:
            raise ValueError("re-uploaded circuits are run folded only; leave shots, noise and executor qnode out")
        return FoldedOnly()

    def use(self, executor: Executor, execution: Execution | str, index: int = 0) -> None:
        """Nothing changes: there is one way to run it."""
        self.executor = executor


class FoldedOnly(Executor):
    """Stands for circuits that their feature map folds by itself."""

    name = "folded"
    plan = Plan("folded", None, None, None, ("re-uploaded circuits are run in no other way",))

    def __init__(self) -> None:
        super().__init__(())

    def expectations(self, x: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("the feature map computes its values")

    def states(self, x: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("the feature map computes its values")

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing: the feature map has its own tables."""


def _on_complex(rows: Float[Tensor, "heads rows amplitudes"], dim: int) -> Float[Tensor, "heads rows both"]:
    """Rows for real amplitudes, real and imaginary parts by turns of `dim`, made rows for complex ones.

    The amplitudes are real parts followed by imaginary ones: the real part of `R a` is `R_r a_r - R_i a_i`.
    """
    real, imaginary = rows.unflatten(1, (-1, 2, dim)).unbind(2)
    both = torch.stack((torch.cat((real, -imaginary), dim=-1), torch.cat((imaginary, real), dim=-1)), dim=2)
    return both.flatten(1, 3)
