r"""Attention weights by amplitude amplification: a score that returns its own distribution over the keys.

Scaled dot products mark the keys softly, :math:`f_{ij} = \sigma((s_{ij} - \tau)/T)`; a row's marks are amplified by its
own number of iterations, and the weights are what a measurement of the key register gives (`amplification.py`; on
devices, `circuits.py`). Grover search for attention: arXiv 2307.08045, which marks hard and does not learn; soft marks
make it differentiable.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pennylane_qattn.devices import Meter
from pennylane_qattn.execution import Execution
from pennylane_qattn.grover import amplification as closed_form
from pennylane_qattn.grover.circuits import Amplification, RowExecutor
from pennylane_qattn.precision import widened
from pennylane_qattn.scores import ScaledDotScore

#: Ways to mark keys. `softmax` marks by :math:`e^{s - \max s}`, which needs neither threshold nor temperature.
MARKS = ("sigmoid", "softmax")
ORACLES = ("amplitude", "phase")
#: Rules for the number of iterations, besides a number of them.
RULES = ("per-row", "quarter", "fixed-point")
THRESHOLDS = ("fixed", "learned", "quantile")
TEMPERATURES = ("fixed", "learned")


@dataclass(frozen=True)
class Amplified:
    """What amplification did to rows.

    Attributes:
        weights: the distribution over keys.
        iterations: of each row.
        mean_mark: of each row, the probability of finding the ancilla in 1 before amplification.
        success: of each row, that probability after it.
        reversed_order: rows whose rule would have put keys of smaller marks above larger ones, and which were
            therefore not amplified.
    """

    weights: Float[Tensor, "*rows keys"]
    iterations: Int[Tensor, "*rows"]
    mean_mark: Float[Tensor, "*rows"]
    success: Float[Tensor, "*rows"]
    reversed_order: Bool[Tensor, "*rows"]

    @property
    def oracle_calls(self) -> Float[Tensor, "*rows"]:
        """Uses of the oracle or its inverse for one sample of an unconditional row: `2R + 1`."""
        return (2 * self.iterations + 1).to(self.success.dtype)

    @property
    def conditional_oracle_calls(self) -> Float[Tensor, "*rows"]:
        """The same for one sample with the ancilla in 1, on average: those of an unconditional one over its chance."""
        return self.oracle_calls / self.success


class AmplificationScore(ScaledDotScore):
    r"""Scaled dot products whose rows are normalised by amplitude amplification.

    Unconditional weights are :math:`p_j = (f_j a^2 + (1 - f_j) b^2)/n_i`; with R = 0 they are uniform. Conditional
    ones, of runs that found the ancilla in 1, are :math:`f_j/\sum f`, independent of R: amplification then only makes
    such runs less rare. With marks :math:`e^{s - \max s}` they are the softmax.

    Args:
        num_heads: number of heads.
        features: width of queries and keys.
        marks: `"sigmoid"` or `"softmax"`.
        oracle: `"amplitude"`, or `"phase"`, the textbook one, which does not keep the order of soft marks.
        iterations: `"per-row"`, the best number for the row's expected number of marked keys; `"quarter"`, one, with
            the threshold where a quarter of the keys is marked; `"fixed-point"`; or a number for all rows.
        threshold: `"fixed"`, `"learned"` per head, or `"quantile"`: of each row, between its `quantile`-th part and the
            rest.
        tau: the threshold, or where it starts; in the unit of the scores.
        quantile: the part of a row's keys above a threshold `"quantile"`.
        temperature: `"fixed"` or `"learned"` per head.
        start_temperature: the temperature, or where it starts.
        conditional: the distribution given that the ancilla is found in 1.
        least_marked: `"per-row"` leaves rows alone that have fewer marked keys than that on average. A search would
            take 1/2; but such a row is uniform and has no gradient, so heads that come there in training stay there.
        length: :math:`L` of the fixed-point schedule, odd.
        delta: :math:`\delta` of the fixed-point schedule.

    Raises:
        ValueError: for a value outside its range, or options that do not fit together.
    """

    is_dot_product = False
    is_sparing = False  # the marks are a matrix

    def __init__(
        self,
        num_heads: int,
        features: int,
        *,
        marks: str = "sigmoid",
        oracle: str = "amplitude",
        iterations: str | int = "per-row",
        threshold: str = "learned",
        tau: float = 1.0,
        quantile: float = 0.25,
        temperature: str = "learned",
        start_temperature: float = 1.0,
        conditional: bool = False,
        least_marked: float = 0.0,
        length: int = 3,
        delta: float = 0.5,
    ):
        super().__init__(num_heads, features)
        check_options(
            marks=marks,
            oracle=oracle,
            iterations=iterations,
            threshold=threshold,
            tau=tau,
            quantile=quantile,
            temperature=temperature,
            start_temperature=start_temperature,
            conditional=conditional,
            least_marked=least_marked,
            length=length,
            delta=delta,
        )
        self.marks, self.oracle, self.conditional = marks, oracle, conditional
        self.iterations, self.threshold, self.quantile = iterations, threshold, quantile
        self.least_marked, self.length, self.delta = least_marked, length, delta
        if marks == "sigmoid":
            self._hold("tau", tau, threshold == "learned")
            # the logarithm, so that a learned temperature stays positive
            self._hold("log_temperature", math.log(start_temperature), temperature == "learned")
        self.longest_row = 2
        self._how: tuple = ("auto", 0, None)
        self.executor = self.make_executor(*self._how)

    def _hold(self, name: str, start: float, learned: bool) -> None:
        values = torch.full((self.num_heads,), float(start))
        self.register_parameter(name, nn.Parameter(values)) if learned else self.register_buffer(name, values)

    @property
    def temperature(self) -> Float[Tensor, " heads"]:
        """The temperature of each head."""
        return self.log_temperature.exp()

    def set_longest_row(self, block_size: int) -> None:
        self.longest_row = block_size
        self.use(self.make_executor(*self._how), *self._how[:2])

    def set_temperature(self, temperature: float) -> None:
        """Gives all heads that temperature; for annealing."""
        self.check_can_be_annealed()
        _check_temperature(temperature)
        self.log_temperature.fill_(math.log(temperature))

    def check_can_be_annealed(self) -> None:
        """Refuses to set a temperature that is learned, or that there is not."""
        if self.marks != "sigmoid":
            raise ValueError(f"marks {self.marks!r} have no temperature to set; use marks sigmoid")
        if isinstance(self.log_temperature, nn.Parameter):
            raise ValueError("a temperature that is learned cannot be set; use temperature fixed")

    # --- the distribution ---------------------------------------------------------------------------------------

    @property
    def is_structured(self) -> bool:  # type: ignore[override]  # nobody assigns to it
        """The weighted sums follow from those of the marks alone, so no weights need be written out."""
        own_threshold = self.threshold == "quantile" or self.iterations == "quarter"
        plain = self.marks == "sigmoid" and self.oracle == "amplitude" and not own_threshold
        return plain and self.executor.is_closed_form

    def attend(
        self,
        q: Float[Tensor, "batch heads queries prepared"],
        k: Float[Tensor, "batch heads keys prepared"],
        v: Float[Tensor, "batch heads keys features"],
        is_causal: bool,
        visible: Bool[Tensor, "batch keys"] | None,
    ) -> Float[Tensor, "batch heads queries features"]:
        r"""From the sums of marks and of marked values, :math:`\sum_j f_{ij}` and :math:`\sum_j f_{ij} v_j`.

        :math:`\sum_j p_{ij} v_j = \frac{a^2 - b^2}{n_i} \sum_j f_{ij} v_j + \frac{b^2}{n_i} \sum_{j \preceq i} v_j`.
        """
        queries, keys = q.shape[-2], k.shape[-2]
        sharpness = 1 / self.temperature.to(q.dtype)[:, None, None]
        tau = self.tau.to(q.dtype)[:, None, None]
        # (s - tau) / T as one product
        q = torch.cat((q * (self.scale * sharpness), (-tau * sharpness).expand(*q.shape[:-1], 1)), dim=-1)
        k = torch.cat((k, torch.ones_like(k[..., :1])), dim=-1)
        f = closed_form.masked_sigmoid(q @ k.transpose(-2, -1), keys - queries if is_causal else None, visible)
        marked = f @ torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        marked, mass = marked[..., :-1], marked[..., -1:]
        num_keys = _num_keys(queries, keys, is_causal, visible, v)
        if self.conditional:
            everything = closed_form.sums_over_seen(v, queries, is_causal)
            return torch.where(mass > 0, marked / torch.where(mass > 0, mass, 1.0), everything / num_keys)
        mean = (mass / num_keys).clamp(max=1.0)
        iterations, most, _ = self._iterations(mean.detach(), num_keys, keys)
        a, b = self._factors(mean, iterations, most)
        high, low = a.square() / num_keys, b.square() / num_keys
        return marked * (high - low) + closed_form.sums_over_seen(v, queries, is_causal) * low

    def normalise(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        visible: Bool[Tensor, "#batch #heads queries keys"] | None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        return self.amplify(scores, visible).weights

    def amplify(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    ) -> Amplified:
        """The weights of every row, and how they came about. Each row needs a key that is visible."""
        with torch.autocast(scores.device.type, enabled=False):
            scores = widened(scores)
            allowed = _allowed(scores, visible)
            num_keys = allowed.sum(-1, keepdim=True)
            f = self._marks(scores, visible, num_keys)
            mean = closed_form.mean_mark(f, num_keys)
            iterations, most, turned_back = self._iterations(mean.detach(), num_keys, f.shape[-1])
            if self.executor.is_closed_form:
                weights = self._closed_form(f, mean, allowed, num_keys, iterations, most)
            else:
                weights = self._on_device(f, allowed, num_keys, iterations)
            success = self._success(mean.detach(), iterations)
        return Amplified(weights, iterations[..., 0], mean[..., 0], success[..., 0], turned_back[..., 0])

    def _marks(self, scores: Tensor, visible: Tensor | None, num_keys: Tensor) -> Tensor:
        if self.marks == "softmax":
            hidden = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
            return (hidden - hidden.amax(-1, keepdim=True)).exp()
        tau = self.tau.to(scores.dtype)[:, None, None]
        if self.threshold == "quantile" or self.iterations == "quarter":
            part = 0.25 if self.iterations == "quarter" else self.quantile
            tau = row_quantile(scores, visible, num_keys, part)
        f = closed_form.sigmoid_marks(scores, tau, self.temperature.to(scores.dtype)[:, None, None])
        return f if visible is None else f * visible

    @property
    def _fixed_iterations(self) -> int:
        """The same for all rows; 0 where each row has its own."""
        if isinstance(self.iterations, int):
            return self.iterations
        return {"quarter": 1, "fixed-point": (self.length - 1) // 2}.get(self.iterations, 0)

    def _iterations(self, mean: Tensor, num_keys: Tensor, keys: int) -> tuple[Tensor, int, Tensor]:
        """For each row how many, for all rows the most, and which rows a rule would have turned upside down."""
        never = torch.zeros_like(mean, dtype=torch.bool)
        if self.iterations == "per-row":
            rounds = closed_form.grover_iterations(mean * num_keys, num_keys.expand_as(mean), self.least_marked)
            return rounds, closed_form.most_iterations(keys), never
        fixed = self._fixed_iterations
        rounds = torch.full_like(mean, fixed).long()
        if isinstance(self.iterations, int) or self.oracle == "phase":
            return rounds, fixed, never  # what was asked for, as it is
        if self.iterations == "fixed-point":
            a, _ = closed_form.fixed_point(mean, self.length, self.delta)
            a = a.abs()
        else:
            a, _ = closed_form.amplified(mean, rounds, fixed)
        reverses = a.square() < 1 - 1e-6  # P below the mean mark
        return rounds.masked_fill(reverses, 0), fixed, reverses

    def _factors(self, mean: Tensor, iterations: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The moduli of `a` and `b`."""
        if self.iterations != "fixed-point":
            return closed_form.amplified(mean, iterations, most)
        a, b = (_modulus(factor) for factor in closed_form.fixed_point(mean, self.length, self.delta))
        run = iterations > 0
        return torch.where(run, a, 1.0), torch.where(run, b, 1.0)

    def _closed_form(self, f, mean, allowed, num_keys, iterations, most) -> Tensor:
        if self.conditional:
            return _share(f, allowed, num_keys)
        if self.oracle == "phase":
            return closed_form.amplify_phase(f, allowed, num_keys, iterations, most)
        return closed_form.amplify(f, allowed, num_keys, *self._factors(mean, iterations, most))

    def _success(self, mean: Tensor, iterations: Tensor) -> Tensor:
        if self.iterations != "fixed-point":
            return closed_form.success_probability(mean, iterations)
        a, _ = self._factors(mean, iterations, 0)
        return mean * a.square()

    # --- on a device --------------------------------------------------------------------------------------------

    def make_executor(self, execution: Execution | str, index: int, meter: Meter | None) -> RowExecutor:
        """What runs the rows that way; `index` sets the shots of several layers apart, and `meter` counts for all."""
        delta = self.delta if self.iterations == "fixed-point" else None
        encoding = Amplification(self._fixed_iterations, self.oracle, delta)
        return RowExecutor(encoding, self.conditional, self.longest_row, execution, index, meter)

    def set_execution(self, execution: Execution | str, index: int = 0, meter: Meter | None = None) -> None:
        """Runs the rows that way from now on."""
        self.use(self.make_executor(execution, index, meter), execution, index)

    def use(self, executor: RowExecutor, execution: Execution | str, index: int = 0) -> None:
        """Takes over an executor that `make_executor` made."""
        self.executor = executor
        self._how = (execution, index, executor.meter)

    def _on_device(self, f: Tensor, allowed: Tensor, num_keys: Tensor, iterations: Tensor) -> Tensor:
        """Rows of one length together: their allowed keys first, then back to where they belong."""
        shape = f.shape
        angles = (math.pi * f if self.oracle == "phase" else _rotation(f)).reshape(-1, shape[-1])
        seen = allowed.expand(shape).reshape(-1, shape[-1]) > 0
        lengths = num_keys.expand(*shape[:-1], 1).reshape(-1).long()
        rounds = iterations.reshape(-1)
        order = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)
        weights = f.new_zeros(angles.shape)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            places = order[rows, :length]
            if length == 1:
                values = angles[rows].new_ones(len(rows), 1)
            else:
                values = self._measured(angles[rows[:, None], places], rounds[rows])
            weights = weights.index_put((rows[:, None], places), values)
        return weights.reshape(shape)

    def _measured(self, angles: Tensor, iterations: Tensor) -> Tensor:
        everywhere, with_one = self.executor.probabilities(angles, iterations)
        found = with_one if self.conditional else everywhere
        total = found.sum(-1, keepdim=True)
        # noise may leave the register in no key's state, and shots may never find the ancilla in 1
        return torch.where(total > 0, found / torch.where(total > 0, total, 1.0), 1 / found.shape[-1])


def row_quantile(
    scores: Float[Tensor, "batch heads queries keys"],
    visible: Bool[Tensor, "#batch #heads queries keys"] | None,
    num_keys: Float[Tensor, "#batch #heads queries 1"],
    part: float,
) -> Float[Tensor, "batch heads queries 1"]:
    r"""The threshold of each row with :math:`m = \max(1, \mathrm{round}(\text{part} \cdot n_i))` keys above it.

    It lies halfway to the next key, or on the last one where there is no next.
    """
    hidden = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    ordered = hidden.sort(dim=-1, descending=True).values
    marked = (part * num_keys).round().clamp(min=1).long().expand(*scores.shape[:-1], 1)
    last = ordered.gather(-1, marked - 1)
    following = ordered.gather(-1, marked.clamp(max=scores.shape[-1] - 1))
    has_next = (marked < num_keys) & (marked < scores.shape[-1])
    return torch.where(has_next, (last + torch.where(has_next, following, last)) / 2, last)


def _num_keys(queries: int, keys: int, is_causal: bool, visible: Tensor | None, like: Tensor) -> Tensor:
    """How many keys each query sees, `(#batch, 1, queries, 1)`, and at least 1."""
    last = torch.arange(keys - queries, keys, device=like.device)
    last = last if is_causal else torch.full_like(last, keys - 1)
    counts = (last + 1)[None] if visible is None else visible.cumsum(-1)[:, last]
    return counts[:, None, :, None].clamp(min=1).to(like.dtype)


def _allowed(scores: Tensor, visible: Tensor | None) -> Tensor:
    if visible is None:
        return scores.new_ones(1, 1, *scores.shape[-2:])
    return visible.to(scores.dtype)


def _share(f: Tensor, allowed: Tensor, num_keys: Tensor) -> Tensor:
    """`f / sum f`; uniform where nothing is marked at all."""
    total = f.sum(-1, keepdim=True)
    marked = total > 0
    return torch.where(marked, f / torch.where(marked, total, 1.0), allowed / num_keys)


def _rotation(f: Tensor) -> Tensor:
    r""":math:`2\arcsin\sqrt f` with gradient 0 at its ends, where `f` is constant or has gradient 0 itself."""
    inside = (f > 0) & (f < 1)
    safe = torch.where(inside, f, 0.5)
    return torch.where(inside, 2 * safe.sqrt().asin(), math.pi * (f >= 1))


def _modulus(z: Tensor) -> Tensor:
    """`|z|`, with gradient 0 where `z` is 0."""
    square = z.real.square() + z.imag.square()
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


# --- options ----------------------------------------------------------------------------------------------------


def check_options(**options: Any) -> None:
    """Refuses options of `AmplificationScore` in one line."""
    for name, choices in (
        ("marks", MARKS),
        ("oracle", ORACLES),
        ("threshold", THRESHOLDS),
        ("temperature", TEMPERATURES),
    ):
        if options[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {options[name]!r}")
    rule, oracle = options["iterations"], options["oracle"]
    is_number = isinstance(rule, int) and not isinstance(rule, bool)
    if not is_number and rule not in RULES:
        raise ValueError(f"iterations must be one of {', '.join(RULES)}, or a number of them; got {rule!r}")
    if is_number and rule < 0:
        raise ValueError(f"the number of iterations must not be negative; got {rule}")
    if not _is_real(options["tau"]) or not math.isfinite(options["tau"]):
        raise ValueError(f"tau must be a finite number; got {options['tau']!r}")
    if not _is_real(options["quantile"]) or not 0 < options["quantile"] <= 1:
        raise ValueError(f"quantile must lie in (0, 1]; got {options['quantile']!r}")
    if not _is_real(options["least_marked"]) or not 0 <= options["least_marked"] <= 1:
        raise ValueError(f"least_marked must lie in [0, 1]; got {options['least_marked']!r}")
    _check_temperature(options["start_temperature"])
    closed_form.fixed_point_phases(options["length"], options["delta"])
    if oracle == "phase" and options["conditional"]:
        raise ValueError("the phase oracle has no ancilla to condition on; use oracle amplitude, or conditional False")
    if oracle == "phase" and rule == "fixed-point":
        raise ValueError("the fixed-point schedule needs the amplitude oracle; leave oracle at amplitude")
    if options["marks"] == "softmax" and rule == "quarter":
        raise ValueError("the quarter rule sets a threshold, and marks softmax have none; use another rule for it")


def _is_real(value: Any) -> bool:
    return isinstance(value, Real)  # in a function of its own: mypy does not know that a Real can be compared


def _check_temperature(temperature: Any) -> None:
    if not _is_real(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite; got {temperature!r}")
