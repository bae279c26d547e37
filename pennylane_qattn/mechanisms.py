r"""Named attention mechanisms: each one line of composition from feature maps and a score, plus its registry entry.

A mechanism is a description and a factory: `mechanism(embed_dim, num_heads, block_size, layer=0)` builds the module.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar

from pennylane_qattn.ansatz import ANSATZE, Ansatz
from pennylane_qattn.attention import Attention
from pennylane_qattn.encoding import ENCODINGS, Encoding
from pennylane_qattn.features import (
    CircuitFeatureMap,
    FeatureMap,
    LinearFeatureMap,
    QuadraticFeatureMap,
    StateFeatureMap,
)
from pennylane_qattn.grover.score import AmplificationScore, check_options
from pennylane_qattn.grover.sparse_score import SPARSE_SCORES, Sparsity
from pennylane_qattn.registry import Description, Registry
from pennylane_qattn.reuploading import ReuploadedFeatureMap
from pennylane_qattn.scores import (
    GaussianScore,
    OverlapScore,
    PublishedGaussianScore,
    ScaledDotScore,
    Score,
    TemperedDotScore,
)
from pennylane_qattn.value_maps import (
    LearnedCircuitFeatureMap,
    LearnedQuadraticFeatureMap,
    MixedFeatureMap,
    RandomAbsorbedFeatureMap,
    RandomQuadraticFeatureMap,
    RectifiedFeatureMap,
)

#: Attention mechanisms by name.
ATTENTION: "Registry[Mechanism]" = Registry("attention")


@dataclass(frozen=True, kw_only=True)
class Mechanism(Description, ABC):
    """A named way to attend.

    Attributes:
        is_published: a published form that sees the future, kept for reproduction (`published.py`).
        attention_class: what a call builds.

    Args:
        head_dim: features of one head's values (the number of observables of a circuit); `None`: embed_dim / num_heads.
        out_bias: bias of the output projection.
        dropout: probability of dropping an attention weight in training.
        is_causal: no token sees a later one.
        seed: draws Pauli words and random quadratic forms, together with the layer's number.
    """

    is_published: ClassVar[bool] = False
    attention_class: ClassVar[type[Attention]] = Attention

    head_dim: int | None = None
    out_bias: bool = True
    dropout: float = 0.0
    is_causal: bool = True
    seed: int = 0

    @abstractmethod
    def parts(
        self, embed_dim: int, num_heads: int, head_dim: int, seed: tuple[int, int]
    ) -> tuple[FeatureMap, FeatureMap, FeatureMap, Score]:
        """Query map, key map, value map and score."""

    def __call__(self, embed_dim: int, num_heads: int, block_size: int, layer: int = 0) -> Attention:
        """Builds the attention of one layer; `layer` sets the random draws of layers apart."""
        for size, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("block_size", block_size)):
            if not isinstance(value, Integral):
                raise ValueError(f"{size} must be an integer; got {value!r}")
        if embed_dim < 1 or num_heads < 1:
            raise ValueError(f"embed_dim and num_heads must be at least 1; got {embed_dim} and {num_heads}")
        head_dim = self.head_dim
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim must be divisible by num_heads; got {embed_dim} and {num_heads}")
            head_dim = embed_dim // num_heads
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1; got {head_dim}")
        query_map, key_map, value_map, score = self.parts(embed_dim, num_heads, head_dim, (self.seed, layer))
        return self.attention_class(
            query_map,
            key_map,
            value_map,
            score,
            block_size=block_size,
            is_causal=self.is_causal,
            out_bias=self.out_bias,
            dropout=self.dropout,
            name=type(self).__name__,
            span=self.value_span,
        )

    @property
    def value_span(self) -> int:
        """Tokens that a value reads."""
        return 1


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class Classical(Mechanism):
    """Scaled dot-product attention (arXiv 1706.03762), `3dh` parameters per head in q, k and v, biases apart.

    Args:
        bias: bias of the query, key and value maps.
    """

    name = "classical"
    bias: bool = False

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k, v = (LinearFeatureMap(embed_dim, num_heads, head_dim, self.bias) for _ in range(3))
        return q, k, v, ScaledDotScore(num_heads, head_dim)


@dataclass(frozen=True, kw_only=True)
class CircuitMechanism(Mechanism, ABC):
    """A mechanism with variational circuits.

    Args:
        ansatz: the trainable circuit, an `Ansatz` or its name in `ANSATZE`.
        encoding: how a vector becomes a state, an `Encoding` or its name in `ENCODINGS`.
        split: each head encodes its own slice of the embedding (far cheaper) instead of the whole (as published).
        trainable: `False` freezes the circuits' angles where they are drawn.
    """

    ansatz: Ansatz | str = "qisa"
    encoding: Encoding | str = "amplitude"
    split: bool = False
    trainable: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ansatz", ANSATZE.build(self.ansatz))
        object.__setattr__(self, "encoding", ENCODINGS.build(self.encoding))

    def circuit(
        self,
        embed_dim: int,
        num_heads: int,
        observables: int,
        seed: tuple,
        kind: Callable[..., FeatureMap] = CircuitFeatureMap,
        **options: Any,
    ) -> FeatureMap:
        """One circuit feature map, or one of another kind, with this mechanism's ansatz and encoding."""
        options = {"seed": seed, "trainable": self.trainable, **options}
        return kind(embed_dim, num_heads, observables, self.ansatz, self.encoding, self.split, **options)


@dataclass(frozen=True, kw_only=True)
class FreeValues(CircuitMechanism, ABC):
    """A mechanism with a choice of value map.

    Args:
        values: one of `VALUES`; by default the mechanism's own.
        bias: bias of the linear maps.
        span: tokens that a value reads, its own and those just before it, joined on one register (`neighbours.py`).
        rank: of the bases of `learned-quadratic` and `rectified` values; `None`: as many vectors as inputs.
    """

    #: Queries and keys come from circuits, whatever the values are.
    circuit_queries: ClassVar[bool] = False

    values: str = "linear"
    bias: bool = False
    span: int = 1
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.span, Integral) or self.span < 1:
            raise ValueError(f"span must be an integer of at least 1, the token itself; got {self.span!r}")
        if self.values not in VALUES:
            raise ValueError(f"values must be one of {', '.join(VALUES)}; got {self.values!r}")
        if self.rank is not None and self.values not in RANKED:
            raise ValueError(f"rank={self.rank} is for values {' and '.join(RANKED)}; got values {self.values!r}")
        if not (self.trainable or self.circuit_queries or VALUES[self.values].has_circuit):
            raise ValueError(
                f"trainable=False freezes the angles of circuits, and {self.name} with values {self.values!r} has "
                "none; leave it out, or choose values with a circuit"
            )

    def linear_queries(self, embed_dim: int, num_heads: int, features: int) -> tuple[FeatureMap, FeatureMap]:
        """Linear query and key maps."""
        q, k = (LinearFeatureMap(embed_dim, num_heads, features, self.bias) for _ in range(2))
        return q, k

    def value_map(self, embed_dim: int, num_heads: int, head_dim: int, seed: tuple) -> FeatureMap:
        """The chosen value map, on `span` tokens joined."""
        return VALUES[self.values].build(self, embed_dim * self.span, num_heads, head_dim, seed=(*seed, 2))

    @property
    def value_span(self) -> int:
        return self.span


@dataclass(frozen=True)
class Values:
    """How value maps are built, `build(mechanism, embed_dim, num_heads, head_dim, seed=...)`; what they hold."""

    build: Callable[..., FeatureMap]
    has_circuit: bool = False


#: Value maps that have a rank.
RANKED = ("learned-quadratic", "rectified")
#: Value maps by name. With the published ansatz on n qubits, and biases apart, a head's values have these parameters,
#: d being the width of what they read, `span` tokens:
#:
#: - `linear`: `dh`;
#: - `circuit`, as `qisa`: `3n`;
#: - `quadratic`, as `qisa-absorbed`: `d^2`;
#: - `random-quadratic`, `circuit` with random forms in place of its observables: none;
#: - `random-absorbed`, `quadratic` with random forms in place of its Pauli words: `d^2`;
#: - `learned-quadratic`, observables with one learned basis in common: `d^2 + dh`, or `r(d + h)` of rank r;
#: - `rectified`, `learned-quadratic` with its square replaced by a rectifier: `d^2 + dh`, or `r(d + h)` of rank r;
#: - `learned-circuit`, any observables that are diagonal after the circuit: `3n + (2^n - 1)h`;
#: - `reuploaded-circuit`, `circuit` with its input encoded a second time, as phases: `6n + 1`;
#: - `mixed-circuit`, `linear` and `circuit` added, each with a learned weight: `dh + 3n + 2`;
#: - `mixed-quadratic`, `linear` and `quadratic` likewise: `dh + d^2 + 2`.
VALUES: dict[str, Values] = {
    "linear": Values(lambda m, d, heads, width, seed: LinearFeatureMap(d, heads, width, m.bias)),
    "circuit": Values(lambda m, d, heads, width, seed: m.circuit(d, heads, width, seed), has_circuit=True),
    "quadratic": Values(lambda m, d, heads, width, seed: QuadraticFeatureMap(d, heads, width, m.split, seed=seed)),
    "random-quadratic": Values(
        lambda m, d, heads, width, seed: RandomQuadraticFeatureMap(d, heads, width, m.split, seed=seed)
    ),
    "random-absorbed": Values(
        lambda m, d, heads, width, seed: RandomAbsorbedFeatureMap(d, heads, width, m.split, seed=seed)
    ),
    "learned-quadratic": Values(
        lambda m, d, heads, width, seed: LearnedQuadraticFeatureMap(d, heads, width, m.split, m.rank)
    ),
    "rectified": Values(lambda m, d, heads, width, seed: RectifiedFeatureMap(d, heads, width, m.split, m.rank)),
    "learned-circuit": Values(
        lambda m, d, heads, width, seed: m.circuit(d, heads, width, seed, LearnedCircuitFeatureMap), has_circuit=True
    ),
    "reuploaded-circuit": Values(
        lambda m, d, heads, width, seed: m.circuit(d, heads, width, seed, ReuploadedFeatureMap), has_circuit=True
    ),
    "mixed-circuit": Values(
        lambda m, d, heads, width, seed: MixedFeatureMap(m.circuit(d, heads, width, seed), m.bias), has_circuit=True
    ),
    "mixed-quadratic": Values(
        lambda m, d, heads, width, seed: MixedFeatureMap(
            QuadraticFeatureMap(d, heads, width, m.split, seed=seed), m.bias
        )
    ),
}


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QISA(FreeValues):
    r"""QISA "v3", "QISA-A" (arXiv 2603.03318), causal: linear queries and keys, circuit values.

    Score :math:`\exp(-\lVert q-k\rVert^2)`; `2(dh + h) + 3n` parameters per head in q, k and v.
    """

    name = "qisa"
    values: str = "circuit"
    bias: bool = True

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k = self.linear_queries(embed_dim, num_heads, head_dim)
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, PublishedGaussianScore(num_heads, head_dim)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QISAAbsorbed(FreeValues):
    r"""QISA with the circuit absorbed into a linear map (arXiv 2603.03318), causal.

    Values :math:`u^T P_o u`, :math:`u = Wx`; `2(dh + h) + d^2` parameters per head in q, k and v.
    """

    name = "qisa-absorbed"
    values: str = "quadratic"
    bias: bool = True

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k = self.linear_queries(embed_dim, num_heads, head_dim)
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, PublishedGaussianScore(num_heads, head_dim)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QSANN(FreeValues):
    r"""QSANN (arXiv 2205.05625; QISA "v1"), causal: circuits for all three, queries and keys measure Z on wire 0.

    Score :math:`\exp(-(q-k)^2)`; `9n` parameters per head with the published ansatz.
    """

    name = "qsann"
    circuit_queries: ClassVar[bool] = True
    values: str = "circuit"

    def parts(self, embed_dim, num_heads, head_dim, seed):
        width = embed_dim // num_heads if self.split else embed_dim
        z_on_first = ("Z".ljust(ENCODINGS.build(self.encoding).num_wires(width), "I"),)
        q, k = (self.circuit(embed_dim, num_heads, 1, (*seed, i), words=z_on_first) for i in range(2))
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, PublishedGaussianScore(num_heads, 1)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QSANNMulti(FreeValues):
    r"""QISA "v2" (arXiv 2603.03318), causal: circuits for all three, each measuring h Pauli words.

    Score :math:`\exp(-\lVert q-k\rVert^2)`; `9n` parameters per head with the published ansatz.
    """

    name = "qsann-multi"
    circuit_queries: ClassVar[bool] = True
    values: str = "circuit"

    def parts(self, embed_dim, num_heads, head_dim, seed):
        # queries and keys are compared feature by feature, so they measure the same words
        q, k = (self.circuit(embed_dim, num_heads, head_dim, (*seed, 0)) for _ in range(2))
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, PublishedGaussianScore(num_heads, head_dim)


#: The scores of `scaled-dot` by what its temperature is.
TEMPERATURES: dict[str, type[Score]] = {"fixed": ScaledDotScore, "learned": TemperedDotScore}


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class ScaledDot(FreeValues):
    r"""Scaled dot-product attention, as `classical`, with any values.

    With quadratic values `2dh + d^2` parameters per head in q, k and v, biases apart; one more for a learned
    temperature.

    Args:
        temperature: `"fixed"`, :math:`1/\sqrt{h}`, or `"learned"`: an inverse temperature per head that starts there.
    """

    name = "scaled-dot"
    values: str = "quadratic"
    temperature: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature not in TEMPERATURES:
            raise ValueError(f"temperature must be one of {', '.join(TEMPERATURES)}; got {self.temperature!r}")

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k = self.linear_queries(embed_dim, num_heads, head_dim)
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, TEMPERATURES[self.temperature](num_heads, head_dim)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class Gaussian(FreeValues):
    r"""Score :math:`-\beta\lVert q-k\rVert^2`, :math:`\beta` learned per head: QISA's score without its outer exp.

    With linear values `3dh + 1` parameters per head in q, k, v and score, biases apart.

    Args:
        beta: starting value of the inverse temperature; `None`: as sharp as scaled dot-product attention.
    """

    name = "gaussian"
    beta: float | None = None

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k = self.linear_queries(embed_dim, num_heads, head_dim)
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, GaussianScore(num_heads, head_dim, self.beta)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class NGram(Gaussian):
    r"""`gaussian` whose values are learned observables of n-grams: of the joint state of `span` neighbouring tokens.

    Amplitude encoding writes the tokens side by side on one register (`neighbours.py`), and a head measures h
    observables with one learned basis of `rank` vectors in common. `2dh + r(nd + h) + 1` parameters per head in q, k,
    v and score, biases apart, with n tokens and rank r.

    Args:
        rank: `None`: as many vectors as a head has features.
    """

    name = "ngram"
    values: str = "learned-quadratic"
    span: int = 4

    def value_map(self, embed_dim: int, num_heads: int, head_dim: int, seed: tuple) -> FeatureMap:
        if self.rank is None and self.values in RANKED:
            return replace(self, rank=head_dim).value_map(embed_dim, num_heads, head_dim, seed)
        return super().value_map(embed_dim, num_heads, head_dim, seed)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class Overlap(FreeValues):
    r"""Score :math:`\lambda\,|\langle\psi(q)|\psi(k)\rangle|^2` between states that two circuits prepare.

    With linear values `6n + dh + 1` parameters per head in q, k, v and score, biases apart.

    Args:
        strength: starting value of :math:`\lambda`.
    """

    name = "overlap"
    circuit_queries: ClassVar[bool] = True
    strength: float = 8.0

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k = (
            StateFeatureMap(
                embed_dim,
                num_heads,
                ansatz=self.ansatz,
                encoding=self.encoding,
                split=self.split,
                trainable=self.trainable,
            )
            for _ in range(2)
        )
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, OverlapScore(num_heads, q.out_features, self.strength, complex_states=True)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class Grover(FreeValues):
    r"""Weights by amplitude amplification of softly marked keys (after arXiv 2307.08045).

    It has `3dh + 2` parameters per head in q, k, v and score, biases apart. The keys' marks are
    :math:`\sigma((s - \tau)/T)` of scaled dot products :math:`s`; a measurement after as many Grover iterations as the
    row needs gives the weights. See `grover/score.py`, whose options these are.

    Args:
        marks: `"sigmoid"`, or `"softmax"`, which has neither threshold nor temperature.
        oracle: `"amplitude"` or `"phase"`.
        iterations: `"per-row"`, `"quarter"`, `"fixed-point"`, or a number.
        threshold: `"fixed"`, `"learned"` or `"quantile"`.
        tau: the threshold, or where it starts.
        quantile: the part of a row's keys above a threshold `"quantile"`.
        temperature: `"fixed"` or `"learned"`.
        start_temperature: the temperature, or where it starts.
        conditional: the distribution given that the marked outcome was found; independent of the iterations.
        least_marked: rows with fewer marked keys on average are not amplified, by the rule `"per-row"`.
        length: of the fixed-point schedule, odd.
        delta: of the fixed-point schedule.
    """

    name = "grover"
    marks: str = "sigmoid"
    oracle: str = "amplitude"
    iterations: int | str = "per-row"
    threshold: str = "learned"
    tau: float = 1.0
    quantile: float = 0.25
    temperature: str = "learned"
    start_temperature: float = 1.0
    conditional: bool = False
    least_marked: float = 0.0
    length: int = 3
    delta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(**self._amplification)

    @property
    def _amplification(self) -> dict[str, Any]:
        others = {field.name for field in fields(FreeValues)}
        return {field.name: getattr(self, field.name) for field in fields(Grover) if field.name not in others}

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k = self.linear_queries(embed_dim, num_heads, head_dim)
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        return q, k, v, AmplificationScore(num_heads, head_dim, **self._amplification)


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class GroverSparse(FreeValues):
    r"""A few entries of every row exactly, the rest as a constant background (arXiv 2307.08045).

    For models that were trained with `classical` or `gaussian` attention (`of`), whose parameters it has; it trains,
    too. See `grover/sparse_score.py`, whose options these are.

    Args:
        score: `"scaled-dot"` or `"gaussian"`.
        support: `"top"` or `"threshold"`.
        k: keys that a row keeps, with `"top"`.
        tau: the threshold, with `"threshold"`.
        order: 1, a background of ones; or 2, of :math:`1 + x`.
        shifted: shift rows by the midrange of their background.
        beta: of a Gaussian score, as in `gaussian`.
    """

    name = "grover-sparse"
    score: str = "scaled-dot"
    support: str = "top"
    k: int = 4
    tau: float = 1.0
    order: int = 1
    shifted: bool = True
    beta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SPARSE_SCORES:
            raise ValueError(f"score must be one of {', '.join(SPARSE_SCORES)}; got {self.score!r}")
        if self.beta is not None and self.score != "gaussian":
            raise ValueError(f"beta belongs to a Gaussian score; got beta={self.beta} with score {self.score!r}")
        self.sparsity  # noqa: B018 refuses what is out of range

    @property
    def sparsity(self) -> Sparsity:
        """Which entries are kept."""
        return Sparsity(support=self.support, k=self.k, tau=self.tau, order=self.order, shifted=self.shifted)

    @classmethod
    def of(cls, mechanism: Mechanism, **options: Any) -> "GroverSparse":
        """The sparse form of a mechanism, for a model that was trained with it.

        Args:
            mechanism: `classical` or `gaussian`.
            **options: support, k, tau, order and shifted.

        Raises:
            ValueError: for another mechanism.
        """
        scores = {Classical: "scaled-dot", ScaledDot: "scaled-dot", Gaussian: "gaussian"}
        score = scores.get(type(mechanism))
        if score is None or getattr(mechanism, "temperature", "fixed") != "fixed":
            raise ValueError(
                f"{mechanism.name} has no sparse form; choose a model with classical, gaussian or scaled-dot attention "
                "of fixed temperature"
            )
        shared = {f.name for f in fields(mechanism)} & {f.name for f in fields(cls)}
        return cls(score=score, **{name: getattr(mechanism, name) for name in shared}, **options)

    def parts(self, embed_dim, num_heads, head_dim, seed):
        q, k = self.linear_queries(embed_dim, num_heads, head_dim)
        v = self.value_map(embed_dim, num_heads, head_dim, seed)
        beta = {"beta": self.beta} if self.score == "gaussian" else {}
        return q, k, v, SPARSE_SCORES[self.score](num_heads, head_dim, self.sparsity, **beta)


def build_attention(
    name: str, embed_dim: int, num_heads: int, block_size: int, layer: int = 0, **options: Any
) -> Attention:
    """Builds the attention of that name: a module `(B, T, C) -> (B, T, C)` that also runs with a cache.

    Args:
        name: a name in `ATTENTION`.
        embed_dim: width `C` of the embedding.
        num_heads: number of heads.
        block_size: longest sequence.
        layer: which layer of a model it is, so that layers draw other Pauli words.
        **options: the mechanism's own options.

    Raises:
        ValueError: for an unknown name or option, or sizes that do not fit together.
    """
    return ATTENTION.build(name, **options)(embed_dim, num_heads, block_size, layer=layer)
