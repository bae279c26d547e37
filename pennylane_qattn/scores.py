r"""Scores: how much query `i` wants key `j`, `(B, H, T, f) x (B, H, S, f) -> (B, H, T, S)`.

Sources: scaled dot product, arXiv 1706.03762 eq. 1; exponential of the negative squared distance, QSANN (arXiv
2205.05625, eq. 8) and QISA (arXiv 2603.03318). Which keys a query may see is decided in `attention.py`.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pennylane_qattn import distance_attention, double_exponential
from pennylane_qattn.augmentation import Layout, augment
from pennylane_qattn.precision import widened
from pennylane_qattn.transforms import without_autocast

#: Fused attention kernels want query, key and value of one width that is a multiple of this.
ALIGNMENT = 8


class Score(nn.Module, ABC):
    """A score between prepared queries and prepared keys.

    `queries` and `keys` prepare each side by itself, so that a cache can hold prepared keys; `forward` compares.

    Attributes:
        is_dot_product: `forward(q, k)` is `scale * a @ b^T` of `a, b = sides(q, k)`, so fused attention may be used.
        is_widened: `sides` are wider than the prepared queries and keys.
        is_structured: rows have a structure that spares the matrix of weights (`grover/sparse_score.py`), so `attend`
            may be used.
        is_sparing: `attend` writes out nothing that grows with queries times keys, however many there are.
        scale: that factor.
        has_token_kernel: `token_attention.py` serves it, by `token_exponents`. A class says so for itself and not for
            those derived from it, which may normalise otherwise.
    """

    is_dot_product: bool = False
    is_widened: bool = False
    is_structured: bool = False
    is_sparing: bool = True
    scale: float = 1.0
    has_token_kernel: bool = False

    def __init__(self, num_heads: int, features: int):
        super().__init__()
        self.num_heads, self.features = num_heads, features

    def queries(self, q: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
        return q

    def keys(self, k: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
        return k

    @abstractmethod
    def forward(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> Float[Tensor, "batch heads queries keys"]: ...

    def sides(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> tuple[Float[Tensor, "batch heads queries side"], Float[Tensor, "batch heads keys side"]]:
        """The two factors of the score, where `is_dot_product`: by default prepared queries and keys as they are."""
        return q, k

    def has_kernel(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
    ) -> bool:
        """Whether `attend_by_kernel` serves these; it goes before all other ways then."""
        return False

    def attend_by_kernel(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
        is_causal: bool,
    ) -> Float[Tensor, "batch heads queries features"]:
        """The weighted sums where `has_kernel`; no key is hidden but what is later than a query."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel")

    def token_exponents(self, dtype: torch.dtype) -> tuple[np.ndarray, bool, np.floating, bool]:
        """The exponents of features as they are, where `has_token_kernel`: the inverse temperature of each head or of
        all, whether they are exponentials, the least, and whether they are of products, not of distances."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel")

    def set_longest_row(self, block_size: int) -> None:
        """Learns how many keys a query may see at the most, once the attention is built; for scores that need it."""

    def normalise(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        visible: Bool[Tensor, "#batch #heads queries keys"] | None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The weights of every query: a distribution over the keys it sees, exactly 0 on the others.

        By default the softmax. `visible` is `None` where every query sees every key; each query sees one at least.
        """
        return scores.softmax(-1) if visible is None else scores.masked_fill(~visible, float("-inf")).softmax(-1)

    def attend(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
        is_causal: bool,
        visible: Bool[Tensor, "batch keys"] | None,
    ) -> Float[Tensor, "batch heads queries features"]:
        """The weighted sums by the structure of the rows, where `is_structured`; 0 for a query that sees no key.

        Queries are the last of the keys; `visible` is `False` for keys that nobody sees, whose values are 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has weights only")


class ScaledDotScore(Score):
    r""":math:`a_{ij} = q_i \cdot k_j / \sqrt{f}`."""

    is_dot_product = True
    has_token_kernel = True

    def __init__(self, num_heads: int, features: int):
        super().__init__(num_heads, features)
        self.scale = features**-0.5

    def token_exponents(self, dtype: torch.dtype) -> tuple[np.ndarray, bool, np.floating, bool]:
        return *distance_attention.exponents(dtype, self.scale), True

    def forward(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        return q @ k.transpose(-2, -1) * self.scale


class TemperedDotScore(Score):
    r""":math:`a_{ij} = \beta\, q_i \cdot k_j`, the inverse temperature :math:`\beta > 0` learned per head.

    It starts at :math:`1/\sqrt{f}`, as the scaled dot product.
    """

    is_dot_product = True
    has_token_kernel = True

    def __init__(self, num_heads: int, features: int):
        super().__init__(num_heads, features)
        self.raw_beta = _positive_parameter(num_heads, features**-0.5)

    @property
    def beta(self) -> Float[Tensor, " heads"]:
        """The inverse temperature of each head."""
        return F.softplus(self.raw_beta)

    def queries(self, q: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
        return self.beta.to(q.dtype)[:, None, None] * q

    def token_exponents(self, dtype: torch.dtype) -> tuple[np.ndarray, bool, np.floating, bool]:
        return *distance_attention.exponents(dtype, self.beta), True

    def forward(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        return q @ k.transpose(-2, -1)


class DistanceScore(Score):
    """Base of scores of the distances between queries and keys, which have a kernel (`distance_attention.py`)."""

    @property
    def beta(self) -> Float[Tensor, " heads"] | None:
        r"""The inverse temperature of each head; `None` where exponents are :math:`\exp(-\lVert q - k \rVert^2)`."""
        return None

    def has_kernel(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
    ) -> bool:
        return distance_attention.serve(q, k, v)

    def attend_by_kernel(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
        is_causal: bool,
    ) -> Float[Tensor, "batch heads queries features"]:
        return distance_attention.attend(q, k, v, self.beta, is_causal)

    def token_exponents(self, dtype: torch.dtype) -> tuple[np.ndarray, bool, np.floating, bool]:
        return *distance_attention.exponents(dtype, self.beta), False


class GaussianScore(DistanceScore):
    r""":math:`a_{ij} = -\beta \lVert q_i - k_j \rVert^2`, :math:`\beta > 0` learned per head.

    The softmax cancels :math:`\lVert q_i \rVert^2`, so this is the dot product of :math:`[2\beta q, 1]` with
    :math:`[k, -\beta\lVert k\rVert^2]`, padded to an aligned width, and runs on fused attention where no kernel for
    distances serves. In half precision the norm is carried by two channels, high and low part, because one would lose
    its digits.

    Args:
        num_heads: number of heads.
        features: width of queries and keys.
        beta: starting value; `None` gives :math:`1 / (2\sqrt{f})`, the sharpness of scaled dot-product attention.
    """

    is_dot_product = True
    is_widened = True
    has_token_kernel = True

    def __init__(self, num_heads: int, features: int, beta: float | None = None):
        super().__init__(num_heads, features)
        beta = 0.5 * features**-0.5 if beta is None else float(beta)
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta must be positive and finite; got {beta}")
        self.raw_beta = _positive_parameter(num_heads, beta)

    @property
    def beta(self) -> Float[Tensor, " heads"]:
        """The inverse temperature of each head."""
        return F.softplus(self.raw_beta)

    def sides(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> tuple[Float[Tensor, "batch heads queries side"], Float[Tensor, "batch heads keys side"]]:
        beta = self.beta
        near = augment(q, 2 * beta.to(q.dtype), 0.0, self._layout(q, norm=None, ones=(0, 1)))
        if k.dtype in (torch.float32, torch.float64):
            return near, augment(k, 1.0, -beta.to(k.dtype), self._layout(k, norm=0, ones=()))
        norm = -beta.float()[:, None, None] * k.float().square().sum(-1, keepdim=True)
        high = norm.to(k.dtype)
        ends = torch.cat((k, high, (norm - high.float()).to(k.dtype)), dim=-1)
        return near, F.pad(ends, (0, self._layout(k, norm=0, ones=()).width - ends.shape[-1]))

    @staticmethod
    def _layout(x: Tensor, norm: int | None, ones: tuple[int, ...]) -> Layout:
        width = x.shape[-1] + 2
        return Layout(norm, ones, width + -width % ALIGNMENT)

    def forward(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        q, k = self.sides(q, k)
        return q @ k.transpose(-2, -1)


class PublishedGaussianScore(DistanceScore):
    r""":math:`a_{ij} = \exp(-\lVert q_i - k_j \rVert^2)`, itself an exponent of the softmax (QISA, QSANN).

    It lies in (0, 1], so no weight of a row exceeds another by more than a factor :math:`e`: rows are almost uniform.
    It is computed in float32 or better: a small difference of large norms is beyond half precision.
    """

    is_structured = True
    has_token_kernel = True

    def queries(self, q: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
        return widened(q)

    def keys(self, k: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
        return widened(k)

    def forward(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        with without_autocast(q.device):
            return double_exponential.exponentials(double_exponential.negative_distances(q, k))

    def attend(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
        is_causal: bool,
        visible: Bool[Tensor, "batch keys"] | None,
    ) -> Float[Tensor, "batch heads queries features"]:
        return double_exponential.attend(q, k, v, is_causal, visible)


class OverlapScore(Score):
    r""":math:`a_{ij} = \lambda\,|\langle\psi(q_i)|\psi(k_j)\rangle|^2`, :math:`\lambda` learned per head.

    Features are unit vectors: real amplitudes followed by imaginary ones (`StateFeatureMap`), or any real vector,
    which is normalised and read as a state of real amplitudes, imaginary ones zero.

    Args:
        num_heads: number of heads.
        features: width of queries and keys.
        strength: starting value of :math:`\lambda`; the overlap lies in [0, 1].
        complex_states: features hold real amplitudes, then as many imaginary ones.
    """

    def __init__(self, num_heads: int, features: int, strength: float = 8.0, complex_states: bool = False):
        super().__init__(num_heads, features)
        if complex_states and features % 2:
            raise ValueError(f"complex states need as many imaginary as real features; got {features} in all")
        self.complex_states = complex_states
        self.strength = nn.Parameter(torch.full((num_heads,), float(strength)))

    def queries(self, q: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
        return q if self.complex_states else F.normalize(widened(q), dim=-1)

    def keys(self, k: Float[Tensor, "batch heads seq features"]) -> Float[Tensor, "batch heads seq prepared"]:
        return self.queries(k)

    def forward(
        self, q: Float[Tensor, "batch heads queries prepared"], k: Float[Tensor, "batch heads keys prepared"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        overlap = (q @ k.transpose(-2, -1)).square()
        if self.complex_states:
            real, imaginary = q.chunk(2, dim=-1)
            # <q|k> = (q_r k_r + q_i k_i) + i (q_r k_i - q_i k_r)
            overlap = overlap + (torch.cat((-imaginary, real), dim=-1) @ k.transpose(-2, -1)).square()
        return self.strength.to(overlap.dtype)[:, None, None] * overlap


def _positive_parameter(num_heads: int, start: float) -> nn.Parameter:
    """The inverse of softplus at a starting value: softplus of it stays positive."""
    return nn.Parameter(torch.full((num_heads,), start + math.log(-math.expm1(-start))))
