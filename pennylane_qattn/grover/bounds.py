r"""How far the operator `B` of `sparse.py` is from exact attention: theorems, and what is true of an instance.

`P` and `Q` are the rows of :math:`A = e^x` and of :math:`B` divided by their sums. Per row, with
:math:`|x| \leq \eta` off the support and :math:`\beta = (n - k)/Z_B`,

.. math::

    \text{T1:}\quad \lVert P - Q \rVert_1 &\leq \min\{2 \tanh(\eta/2),\ 2\beta(e^\eta - 1)\} \leq \eta \\
    \text{T1':}\quad \lVert P - Q \rVert_1 &\leq 2\beta \max(e^\eta - 1, 1) \quad \text{if only } x \leq \eta \\
    \text{T2:}\quad \lVert P - Q \rVert_1 &\leq 2 \tanh(h/4) \leq h/2, \quad h = -\ln(1 - \eta) - \eta,\ \eta < 1.

The paper (arXiv 2307.08045) states :math:`O(\eta)` for T1; these constants are the project's own. All forms with
:math:`\beta` are one inequality, :math:`\lVert P - Q \rVert_1 \leq 2 \sum |A - B| / Z_B`, which holds for any positive
:math:`Z_B`. It gives two more that are used here: keys that a search missed cost at most
:math:`2 \sum_\text{missed} |e^x - 1| / Z_B`, and at order 2, for any :math:`\eta`,

.. math::

    \text{T2':}\quad \lVert P - Q \rVert_1 \leq 2\beta(e^\eta - 1 - \eta).

What every bound on :math:`\ell_1` gives: an entry errs by at most half of it, and an output coordinate by half of it
times the range of the values that the row sees.

To know :math:`\eta` of an instance every score has to be seen, `O(n^2 d)`: a bound here certifies a result, it is no
part of computing one. It is computed in float64 from the scores in the precision they have, in blocks of rows.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pennylane_qattn.grover.sparse import SparseAttention, check_row_sums, dense_rows
from pennylane_qattn.grover.support import ScoreMatrix, Support, midrange_shift, threshold_support

#: What `ErrorBounds.theorem` counts in. "missed": with the term for keys that the search missed.
THEOREMS = ("T1", "T1'", "T1 missed", "T1' missed", "T2", "T2'", "T2' missed")


def t1_bound(eta: Float[Tensor, "*rows"], beta: Float[Tensor, "*rows"] | None = None) -> Float[Tensor, "*rows"]:
    r"""T1: :math:`\min\{2\tanh(\eta/2),\ 2\beta(e^\eta - 1)\}`, the first alone where `beta` is not known."""
    _check_eta(eta, lowest=0.0)
    bound = 2 * (eta / 2).tanh()
    return bound if beta is None else torch.minimum(bound, 2 * _times(beta, _log_expm1(eta)))


def t1_one_sided_bound(eta: Float[Tensor, "*rows"], beta: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    r"""T1': :math:`2\beta\max(e^\eta - 1, 1)`, for backgrounds with :math:`x \leq \eta` and no lower limit."""
    _check_eta(eta, lowest=-math.inf)
    return 2 * _times(beta, _log_expm1(eta.clamp(min=0)).clamp(min=0))


def t2_bound(eta: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    r"""T2: :math:`2\tanh(h/4)`, :math:`h = -\ln(1 - \eta) - \eta`, for the background :math:`1 + x`."""
    _check_eta(eta, lowest=0.0)
    if (eta >= 1).any():
        raise ValueError(f"T2 needs eta < 1; got {float(eta.max()):.3g}: keep more keys or shift by the midrange")
    return 2 * (_oscillation(eta) / 4).tanh()


def value_range(
    v: Float[Tensor, "*batch keys features"], scores: ScoreMatrix
) -> Float[Tensor, "*batch queries features"]:
    """Greatest minus least value of each coordinate over the keys that each row may see; 0 where it sees none."""
    shown = torch.ones(v.shape[:-1], dtype=torch.bool, device=v.device) if scores.visible is None else scores.visible
    low, high = v.masked_fill(~shown[..., None], math.inf), v.masked_fill(~shown[..., None], -math.inf)
    if scores.is_causal:
        low, high = (t[..., scores.offset :, :] for t in (low.cummin(-2).values, high.cummax(-2).values))
    else:
        low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    spread = torch.where(low <= high, high - low, 0.0)
    return spread.expand(*v.shape[:-2], scores.num_queries, v.shape[-1])


@dataclass(frozen=True, eq=False)
class ErrorBounds:
    """An instance's bounds beside its true errors, per row, in float64.

    Attributes:
        l1: the least bound on the row error that applies.
        true_l1: the row error.
        theorem: which bound `l1` is, an index into `THEOREMS`.
        ratio: a bound on `|Z_A / Z_B - 1|`.
        true_ratio: that number.
        entrywise: a bound on the error of a row's entries, half of `l1`.
        true_entrywise: the greatest error of an entry.
        eta: the greatest `|x|` off the support, 0 where nothing is off it.
        eta_above: the greatest `x` off the support, `-inf` where nothing is off it.
        beta: `(n - k) / Z_B`.
    """

    l1: Float[Tensor, "*batch queries"]
    true_l1: Float[Tensor, "*batch queries"]
    theorem: Int[Tensor, "*batch queries"]
    ratio: Float[Tensor, "*batch queries"]
    true_ratio: Float[Tensor, "*batch queries"]
    true_entrywise: Float[Tensor, "*batch queries"]
    eta: Float[Tensor, "*batch queries"]
    eta_above: Float[Tensor, "*batch queries"]
    beta: Float[Tensor, "*batch queries"]

    @property
    def entrywise(self) -> Float[Tensor, "*batch queries"]:
        return self.l1 / 2

    def output(
        self, v: Float[Tensor, "*batch keys features"], scores: ScoreMatrix
    ) -> Float[Tensor, "*batch queries features"]:
        """A bound on the error of every coordinate of the output."""
        return self.entrywise[..., None] * value_range(v.double(), scores)

    def count(self) -> dict[str, int]:
        """How many rows owe their bound to which theorem."""
        counts = self.theorem.flatten().bincount(minlength=len(THEOREMS)).tolist()
        return {name: rows for name, rows in zip(THEOREMS, counts, strict=True) if rows}

    def __str__(self) -> str:
        applied = ", ".join(f"{name} in {rows} rows" for name, rows in self.count().items())
        return (
            f"l1 error {float(self.true_l1.max()):.3g} at the most, bounded by {float(self.l1.max()):.3g} ({applied})"
        )


def bound(attention: SparseAttention, tau: float | Float[Tensor, "..."] | None = None) -> ErrorBounds:
    """The bounds of an operator beside its true errors.

    Args:
        attention: the operator.
        tau: scores before the shift from which a key should be in the support. Keys from there on that are not were
            missed by the search; they get the term of their own where that gives less than to call them background.
    """
    return bounds_of_scores(attention.scores, attention.support, attention.shift, order=attention.order, tau=tau)


@torch.no_grad()
def bounds_of_scores(
    scores: ScoreMatrix,
    support: Support,
    shift: Float[Tensor, "*batch queries"] | None = None,
    *,
    order: int = 1,
    tau: float | Float[Tensor, "..."] | None = None,
) -> ErrorBounds:
    """The same for any scores, such as a trained model's; nothing of `SparseAttention` is used.

    Args:
        scores: the scores.
        support: the keys kept exactly.
        shift: `c_i`; `None` for none.
        order: of the background.
        tau: as for `bound`.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 (background 1) or 2 (background 1 + x); got {order}")
    if tau is not None:
        tau = scores.thresholds(tau)
    support.check_allowed(scores)
    pieces = []
    for rows in scores.blocks():
        s, allowed = scores.block(rows).double(), scores.allowed(rows)
        x = s if shift is None else s - shift[..., rows, None].double()
        kept = support.dense(rows, scores.num_keys)
        missed = None if tau is None else allowed & ~kept & (s >= tau[..., rows, None])
        pieces.append(_block_bounds(x, allowed.expand(x.shape), kept, missed, order))
    return ErrorBounds(**{f.name: torch.cat([piece[f.name] for piece in pieces], dim=-1) for f in fields(ErrorBounds)})


def _block_bounds(x: Tensor, allowed: Tensor, kept: Tensor, missed: Tensor | None, order: int) -> dict[str, Tensor]:
    """Bounds and errors of some rows."""
    sees = allowed.any(-1)
    off = allowed & ~kept
    b, m = dense_rows(x, allowed, kept, order)
    z_b = check_row_sums(b.sum(-1).masked_fill(~sees, 1.0))
    hidden = x.masked_fill(~allowed, -math.inf)
    log_z_a = hidden.logsumexp(-1).masked_fill(~sees, 0.0)
    error = ((hidden - log_z_a[..., None]).exp() - b / z_b[..., None]).abs()

    log_z_b = z_b.log() + m
    log_beta = off.sum(-1).double().log() - log_z_b
    eta = x.abs().masked_fill(~off, 0.0).amax(-1)
    eta_above = x.masked_fill(~off, -math.inf).amax(-1)
    excess = _log_excess(eta, order)
    if order == 1:
        sums = {
            "T1": (log_beta + excess).exp(),
            "T1'": (log_beta + _log_expm1(eta_above.clamp(min=0)).clamp(min=0)).exp(),
        }
        ratio = torch.minimum(sums["T1"], sums["T1'"])
        bounds = {"T1": torch.minimum(2 * (eta / 2).tanh(), 2 * sums["T1"]), "T1'": 2 * sums["T1'"]}
    else:
        h = _oscillation(eta.clamp(max=1))  # infinite from 1 on
        sums = {"T2'": (log_beta + excess).exp()}
        ratio = torch.minimum(h.expm1(), sums["T2'"])
        bounds = {"T2": torch.where(eta < 1, 2 * (h / 4).tanh(), math.inf), "T2'": 2 * sums["T2'"]}
    if missed is not None:
        rest = off & ~missed
        log_beta_rest = rest.sum(-1).double().log() - log_z_b
        differences = (x.expm1() - (x if order == 2 else 0.0)).abs().masked_fill(~missed, 0.0)
        missing = differences.sum(-1).log().sub(log_z_b).exp()
        eta_rest = x.abs().masked_fill(~rest, 0.0).amax(-1)
        sums["T1 missed" if order == 1 else "T2' missed"] = (
            log_beta_rest + _log_excess(eta_rest, order)
        ).exp() + missing
        if order == 1:
            above = x.masked_fill(~rest, -math.inf).amax(-1).clamp(min=0)
            sums["T1' missed"] = (log_beta_rest + _log_expm1(above).clamp(min=0)).exp() + missing
        for name in [name for name in sums if name.endswith("missed")]:
            ratio, bounds[name] = torch.minimum(ratio, sums[name]), 2 * sums[name]
    least = torch.stack(list(bounds.values())).min(0)
    codes = torch.tensor([THEOREMS.index(name) for name in bounds], device=x.device)
    return {
        "l1": least.values,
        "true_l1": error.sum(-1),
        "theorem": codes[least.indices],
        "ratio": ratio,
        "true_ratio": torch.where(sees, (log_z_a - log_z_b).expm1().abs(), 0.0),
        "true_entrywise": error.amax(-1),
        "eta": eta,
        "eta_above": eta_above,
        "beta": log_beta.exp(),
    }


def _check_eta(eta: Tensor, lowest: float) -> None:
    if not (eta >= lowest).all():
        raise ValueError(f"eta must be a number of at least {lowest:g}; got {float(eta.min()):.3g}")


def _oscillation(eta: Tensor) -> Tensor:
    """`h`, the greatest `x - ln(1 + x)`."""
    return -torch.log1p(-eta) - eta


def _log_expm1(eta: Tensor) -> Tensor:
    """`ln(e^eta - 1)`, which does not overflow."""
    return eta + (-(-eta).expm1()).log()


def _log_excess(eta: Tensor, order: int) -> Tensor:
    """The logarithm of the most that `e^x` and the background can differ by."""
    if order == 1:
        return _log_expm1(eta)
    return torch.where(eta < 1, (eta.clamp(max=1).expm1() - eta).log(), eta + (1 - (1 + eta) * (-eta).exp()).log())


def _times(beta: Tensor, log_factor: Tensor) -> Tensor:
    return (beta.log() + log_factor).exp()


@dataclass(frozen=True)
class HeadGoodness:
    r"""How good one head's scores are for the sparse algorithm: its :math:`(\tau, k, \eta)`.

    Attributes:
        head: number of the head, from 0.
        rows, keys: how many rows were looked at, and of how many keys.
        tau: the threshold on the scores before the shift.
        tau_shifted: the least `x` on any row's support: the threshold after the shift; `inf` if all supports are empty.
        k_max, k_mean, k_median, k_90: sizes of the supports.
        eta_max, eta_mean, eta_median, eta_90: the greatest `|x|` off the support, after the shift.
        flat: fraction of the rows whose :math:`\eta` is below 1.
        error_max, error_mean: true row errors of the approximation.
        bound_max, bound_mean: what the theorems say of them.
    """

    head: int
    rows: int
    keys: int
    tau: float
    tau_shifted: float
    k_max: int
    k_mean: float
    k_median: float
    k_90: float
    eta_max: float
    eta_mean: float
    eta_median: float
    eta_90: float
    flat: float
    error_max: float
    error_mean: float
    bound_max: float
    bound_mean: float

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)

    def __str__(self) -> str:
        return goodness_table([self])


@torch.no_grad()
def goodness(scores: ScoreMatrix, tau: float, *, order: int = 1, shifted: bool = True) -> list[HeadGoodness]:
    r"""How good scores are at a threshold, head by head; the heads are the last axis before queries and keys.

    Rows are pooled over the batch. Rows that see nothing are left out.

    Args:
        scores: scores of a model, or its queries and keys.
        tau: the support are the keys with :math:`s \geq \tau`, before the shift.
        order: of the background.
        shifted: shift every row by the midrange of its background.
    """
    tau = float(tau)
    support = threshold_support(scores, tau)
    shift = midrange_shift(scores, support) if shifted else torch.zeros(scores.shape[:-1], device=scores.device)
    bounds = bounds_of_scores(scores, support, shift, order=order)
    # On every row's support s >= tau, so the least x there is found from the scores of the support alone.
    lowest = torch.cat(
        [
            scores.block(rows)
            .double()
            .sub(shift[..., rows, None])
            .masked_fill(~support.dense(rows, scores.num_keys), math.inf)
            .amin(-1)
            for rows in scores.blocks()
        ],
        dim=-1,
    )
    sees = scores.num_allowed.expand(scores.shape[:-1]) > 0

    def by_head(rows: Tensor) -> Tensor:
        return rows.unsqueeze(0).movedim(-2, 0).flatten(1) if rows.ndim > 1 else rows[None]

    split = [by_head(t) for t in (sees, lowest, support.sizes, bounds.eta, bounds.true_l1, bounds.l1)]
    reports = []
    for head, (seen, low, sizes, eta, error, least) in enumerate(zip(*split, strict=True)):
        if not seen.any():
            raise ValueError(f"head {head} has no row that sees a key: leave out what is padding all through")
        low, sizes, eta, error, least = (t[seen].double() for t in (low, sizes, eta, error, least))
        reports.append(
            HeadGoodness(
                head=head,
                rows=int(seen.sum()),
                keys=scores.num_keys,
                tau=tau,
                tau_shifted=float(low.min()),
                k_max=int(sizes.max()),
                **_summary("k", sizes),
                eta_max=float(eta.max()),
                **_summary("eta", eta),
                flat=float((eta < 1).double().mean()),
                error_max=float(error.max()),
                error_mean=float(error.mean()),
                bound_max=float(least.max()),
                bound_mean=float(least.mean()),
            )
        )
    return reports


def _summary(name: str, values: Tensor) -> dict[str, float]:
    # torch.quantile takes no more than 2^24 numbers; a sorted list takes any
    ordered = values.sort().values
    return {
        f"{name}_mean": float(values.mean()),
        f"{name}_median": float(ordered[(len(ordered) - 1) // 2]),
        f"{name}_90": float(ordered[math.ceil(0.9 * len(ordered)) - 1]),
    }


def goodness_table(reports: Sequence[HeadGoodness]) -> str:
    """Reports as lines of text, one a head, under a line of names."""
    shown = [field.name for field in fields(HeadGoodness)]
    lines = [shown] + [[f"{value:.4g}" for value in report.as_dict().values()] for report in reports]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
