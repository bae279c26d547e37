r"""What Grover search would do for attention, as rows of tables: queries, errors, resources, and a model's own rows.

Everything is simulated and counted: an oracle call is one coherent inner product, and stands beside the inner products
of a full scan and of an index. Nothing here is a time, and no time of a simulation says anything of a quantum
computer. Mathematics and sources: `pennylane_qattn/grover`; arXiv 2307.08045.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.data import Windows
from lightning_modules.evaluation import window_losses
from lightning_modules.inspection import attentions_of
from lightning_modules.language_model import LanguageModel
from lightning_modules.progress import shown
from pennylane_qattn import AmplificationScore, Attention, GroverSparse
from pennylane_qattn.grover.bounds import bounds_of_scores, goodness
from pennylane_qattn.grover.estimate import estimates, to_plain
from pennylane_qattn.grover.expectation import expected_search, fit_scaling
from pennylane_qattn.grover.registers import Counting
from pennylane_qattn.grover.rivals import BallTreeIndex, FullScan, QuantumFinder, RowFinder, ScoreRows
from pennylane_qattn.grover.search import search, search_known
from pennylane_qattn.grover.sparse_score import Sparsity
from pennylane_qattn.grover.support import DotProductScores, midrange_shift, top_support
from pennylane_qattn.scores import GaussianScore, ScaledDotScore

Table = list[dict[str, Any]]

# --- random instances -------------------------------------------------------------------------------------------


def query_counts(num_keys: Sequence[int], num_marked: Sequence[int], repeats: int, seed: int) -> Table:
    """Calls of searches for all marked keys of a row: simulated, exact in the mean, and of a scan.

    Args:
        num_keys: values of n.
        num_marked: values of k; pairs with k over n are left out.
        repeats: searches of each kind and size.
        seed: of their draws.
    """
    rows = []
    for index, (n, k) in shown(list(enumerate(itertools.product(num_keys, num_marked))), "counting calls"):
        if k > n:
            continue
        counts = np.full(repeats, n), np.full(repeats, k)
        unknown = search(Counting.from_counts(*counts), seed=np.random.default_rng((seed, index, 0)))
        known = search_known(Counting.from_counts(*counts), seed=np.random.default_rng((seed, index, 1)))
        calls = unknown.counts.calls
        rows.append(
            {
                "n": n,
                "k": k,
                "quantum": float(calls.mean()),
                "quantum_error": float(calls.std(ddof=1) / math.sqrt(repeats)) if repeats > 1 else math.nan,
                "quantum_expected": expected_search(n, k).calls,
                "to_last_key": float(unknown.counts.calls_to_last.mean()),
                "number_known": float(known.counts.calls.mean()),
                "missed": float(unknown.missed.mean()),
                "root": math.sqrt(n * k),
                "scan": n,
                "wins": bool(calls.mean() < n),
            }
        )
    return rows


def scaling(rows: Table) -> dict[str, Any]:
    """Exponents and constants of a table of `query_counts`, of the calls up to the last key found."""
    num_keys, num_marked = ([row[name] for row in rows] for name in ("n", "k"))
    return {
        name: dataclasses.asdict(fit_scaling(num_keys, num_marked, [row[name] for row in rows]))
        for name in ("to_last_key", "number_known")
    }


@dataclasses.dataclass(frozen=True)
class Instance:
    r"""Queries and keys whose scores are :math:`(\tau, k)`-good: `k` keys of each row at `tau` or above, the rest flat.

    Attributes:
        queries: `(rows, dim)`, orthogonal to each other, so that what is planted in one row is flat in the others.
        keys: `(n, dim)`.
        tau: the threshold.
        planted: the keys of each row, `(rows, k)`.
    """

    queries: np.ndarray
    keys: np.ndarray
    tau: float
    planted: np.ndarray

    @property
    def rows(self) -> ScoreRows:
        return ScoreRows.from_vectors(self.queries, self.keys, causal=False)


def random_instance(n: int, k: int, dim: int, tau: float, eta: float, rows: int, seed: int) -> Instance:
    r"""A random (tau, k)-good and eta-flat instance.

    Args:
        n: keys.
        k: keys at `tau` or above in each row.
        dim: of queries and keys.
        tau: threshold; above `eta`.
        eta: bound of the other scores' moduli, which the greatest reaches.
        rows: queries; no more than `dim`, and `rows * k` no more than `n`.
        seed: of the draws.

    Raises:
        ValueError: for numbers that do not fit together.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the number of keys, {n}; got {k}")
    if not 1 <= rows <= dim or rows * k > n:
        raise ValueError(f"rows must be at most the dimension {dim}, and rows x k at most {n}; got {rows} and k = {k}")
    if not 0 < eta < tau < math.inf:
        raise ValueError(f"tau must be finite and above eta, and eta positive; got tau {tau} and eta {eta}")
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(dim, rows)))[0].T
    keys = rng.normal(size=(n, dim))
    keys *= eta / np.abs(keys @ directions.T).max()
    planted = rng.choice(n, size=(rows, k), replace=False)
    heights = tau + rng.exponential(0.3, size=(rows, k))
    for row, (places, height) in enumerate(zip(planted, heights, strict=True)):
        own = keys[places] @ directions[row]
        keys[places] += (height - own)[:, None] * directions[row]
    # scores are q . k / sqrt(dim), so queries are longer by that root
    return Instance(directions * math.sqrt(dim), keys, tau, planted)


def finders(seed: int, with_index: bool) -> list[RowFinder]:
    """Who is compared."""
    known = QuantumFinder(Counting, knows_number=True, seed=seed)
    return [QuantumFinder(Counting, seed=seed), known, FullScan(), *([BallTreeIndex()] if with_index else [])]


def finder_costs(
    num_keys: Sequence[int], k: int, dim: int, tau: float, eta: float, rows: int, seed: int, with_index: bool
) -> Table:
    """Inner products per row of everybody, on the same instances, with what building an index took."""
    table = []
    for n in shown(num_keys, "comparing with index and scan"):
        instance = random_instance(n, k, dim, tau, eta, rows, seed)
        truth = [set(row) for row in instance.planted.tolist()]
        for finder in finders(seed, with_index):
            found = finder.above(instance.rows, tau)
            hits = sum(len(truth[row] & set(found.row(row).tolist())) for row in range(rows))
            table.append(
                {
                    "n": n,
                    "k": k,
                    "dim": dim,
                    "finder": finder.name,
                    "per_row": float(found.cost.mean()),
                    "building": found.building,
                    "found": hits / (rows * k),
                    "exact": finder.exact,
                }
            )
    return table


def causal_costs(n: int, share: float, seed: int, with_index: bool) -> Table:
    """Everybody on all causal rows of a small random instance: where search loses."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(2, n, 16))
    rows = ScoreRows.from_vectors(queries, keys)
    seen = (queries @ keys.T / 4)[np.tril(np.ones((n, n), dtype=bool))]
    tau = float(np.quantile(seen, 1 - share))
    table = []
    for finder in shown(finders(seed, with_index), "searching causal rows"):
        found = finder.above(rows, tau)
        table.append({"n": n, "share": share, "finder": finder.name, "calls": found.total, "keys": len(found.keys)})
    return table


def error_table(n: int, k: int, dim: int, tau: float, etas: Sequence[float], seed: int) -> Table:
    """Row errors of the sparse approximation beside their bounds, for backgrounds of 1, of 1 + x, and of 0."""
    table = []
    for eta, order in shown(list(itertools.product(etas, (1, 2))), "bounding errors"):
        if order == 2 and eta >= 1:
            continue
        instance = random_instance(n, k, dim, tau, eta, min(8, dim, n // k), seed)
        q, keys = (torch.from_numpy(part) for part in (instance.queries, instance.keys))
        scores = DotProductScores(q, keys, is_causal=False)
        support = top_support(scores, k)
        found = bounds_of_scores(scores, support, midrange_shift(scores, support), order=order)
        dense = scores.block(slice(None))
        kept = support.dense(slice(None), n)
        exact = dense.softmax(-1)
        without = (exact - dense.masked_fill(~kept, -math.inf).softmax(-1)).abs().sum(-1)
        table.append(
            {
                "n": n,
                "k": k,
                "eta": eta,
                "order": order,
                "error": float(found.true_l1.max()),
                "bound": float(found.l1.max()),
                "theorems": found.count(),
                "error_of_zeros": float(without.max()),
            }
        )
    return table


def resource_table(num_keys: Sequence[int], dim: int, bits: int, k: int) -> Table:
    """Logical resources of one row's search, for each way to look a key up."""
    lookups = shown(("qrom", "select-swap", "qram"), "estimating resources")
    found = (estimates(num_keys, dim, bits, num_marked=k, lookup=lookup) for lookup in lookups)
    return [to_plain(one) for of_lookup in found for one in of_lookup]


# --- a model ----------------------------------------------------------------------------------------------------


def attention_inputs(model: LanguageModel, tokens: Tensor) -> list[tuple[Attention, Tensor]]:
    """Every attention of a model with what it reads."""
    found: list[tuple[Attention, Tensor]] = []
    attentions = attentions_of(model.gpt)
    hooks = [a.register_forward_pre_hook(lambda module, args: found.append((module, args[0]))) for a in attentions]
    try:
        with torch.no_grad():
            model.gpt(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _projected(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of the scores."""
    score = attention.score
    return score.sides(score.queries(attention.query_map(x)), score.keys(attention.key_map(x)))


def dot_product_scores(model: LanguageModel, tokens: Tensor) -> Iterator[DotProductScores]:
    """The scores of every layer, `(windows, heads, T, T)`, as queries and keys.

    Raises:
        ValueError: if they are no dot products.
    """
    for attention, x in attention_inputs(model, tokens):
        score = attention.score
        if not isinstance(score, ScaledDotScore | GaussianScore):
            name = model.attention.name
            raise ValueError(
                f"the scores of {name} attention are no dot products, which a search could compare with a threshold; "
                "give a checkpoint of classical, gaussian, scaled-dot or grover"
            )
        q, k = _projected(attention, x)
        yield DotProductScores(q.double(), k.double(), score.scale)


def visible_scores(scores: DotProductScores) -> Tensor:
    """All scores that any query sees, in one list."""
    block, allowed = scores.block(slice(None)), scores.allowed(slice(None))
    return block[allowed.expand(block.shape)]


def goodness_of_model(model: LanguageModel, tokens: Tensor, tau: float | None, share: float) -> Table:
    r"""(tau, k, eta) of every layer and head, at a threshold, or at the one that `share` of a layer's scores reach."""
    table = []
    for layer, scores in enumerate(dot_product_scores(model, tokens), 1):
        at = float(visible_scores(scores).quantile(1 - share)) if tau is None else tau
        for head in goodness(scores, at):
            table.append({"layer": layer, **head.as_dict(), "head": head.head + 1})
    return table


def search_costs_of_model(
    model: LanguageModel, tokens: Tensor, tau: float | None, share: float, seed: int, with_index: bool
) -> Table:
    """What it costs to find the keys above the threshold in all causal rows of a layer, by everybody."""
    table = []
    layers = list(enumerate(dot_product_scores(model, tokens), 1))
    for (layer, scores), finder in shown(list(itertools.product(layers, finders(seed, with_index))), "searching rows"):
        at = float(visible_scores(scores).quantile(1 - share)) if tau is None else tau
        pairs = list(zip(scores.q.flatten(0, 1), scores.k.flatten(0, 1), strict=True))
        found = [finder.above(ScoreRows.from_vectors(q, k, scale=scores.scale), at) for q, k in pairs]
        total = sum(each.total for each in found)
        rows = sum(len(each.cost) for each in found)
        table.append({"layer": layer, "finder": finder.name, "tau": at, "calls": total, "per_row": total / rows})
    return table


def sparse_model(model: LanguageModel, **options: Any) -> LanguageModel:
    """The model with the sparse form of its attention, and its own weights.

    Raises:
        ValueError: if its attention has none.
    """
    sparse = GroverSparse.of(model.attention, **options)
    plain = model.to_plain() | {"attention": sparse.to_plain()}
    made = LanguageModel.from_plain(plain).to(next(model.parameters()).dtype)
    made.load_state_dict(model.state_dict())
    return made.eval()


def sparsity_table(model: LanguageModel, windows: Windows, ks: Sequence[int], orders: Sequence[int] = (1, 2)) -> Table:
    """Cross-entropy, in nats per token, when every row keeps `k` keys only and the rest is background."""
    options = [{"k": k, "order": order} for k, order in itertools.product(ks, orders)]
    return _sparse_rows(model, windows, options)


def threshold_table(
    model: LanguageModel, windows: Windows, taus: Sequence[float], orders: Sequence[int] = (1, 2)
) -> Table:
    """The same when a row keeps the keys with a score of `tau` or more, in all layers."""
    options = [
        {"support": "threshold", "tau": float(tau), "order": order} for tau, order in itertools.product(taus, orders)
    ]
    return _sparse_rows(model, windows, options)


def _sparse_rows(model: LanguageModel, windows: Windows, options: Sequence[dict[str, Any]]) -> Table:
    exact = window_losses(model, windows)
    tokens = windows[torch.arange(min(64, len(windows)))][0]
    table = []
    for option in shown(options, "evaluating sparse attention"):
        row: dict[str, Any] = {**option, "exact": float(exact.mean())}
        try:
            sparse = sparse_model(model, **option)
            losses = window_losses(sparse, windows)
        except ValueError as error:  # a background of 1 + x that makes a row's sum negative
            nothing = dict.fromkeys(("cross_entropy", "change", "change_error"))
            table.append({**row, **nothing, "refused": str(error)})
            continue
        change = (losses - exact).mean(1)
        table.append(
            {
                **row,
                "cross_entropy": float(losses.mean()),
                "change": float(change.mean()),
                "change_error": float(change.std() / math.sqrt(len(change))),
                **_row_errors(model, tokens, Sparsity(**option)),
                "refused": "",
            }
        )
    return table


def _row_errors(model: LanguageModel, tokens: Tensor, sparsity: Sparsity) -> dict[str, float]:
    """Mean number of keys kept, eta, row error and bound over all layers, of the exact model's scores."""
    found = []
    for scores in dot_product_scores(model, tokens):
        support = sparsity.find(scores)
        bounds = bounds_of_scores(scores, support, midrange_shift(scores, support), order=sparsity.order)
        found.append([support.sizes.double(), bounds.eta, bounds.true_l1, bounds.l1])
    names = ("k_mean", "eta_mean", "error_mean", "bound_mean")
    return {
        name: float(np.mean([float(values.mean()) for values in of_layers]))
        for name, of_layers in zip(names, zip(*found, strict=True), strict=True)
    }


def amplification_table(model: LanguageModel, tokens: Tensor) -> Table:
    """What amplification does in every layer and head of a `grover` model: chances, iterations, calls."""
    table = []
    for layer, (attention, x) in enumerate(attention_inputs(model, tokens), 1):
        score = attention.score
        if not isinstance(score, AmplificationScore):
            continue
        with torch.no_grad():
            scores = score(*_projected(attention, x))
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None, None]
            found = score.amplify(scores, visible)
        for head in range(attention.num_heads):
            of_head: Mapping[str, Tensor] = {
                "mean_mark": found.mean_mark,
                "success": found.success,
                "iterations": found.iterations.double(),
                "calls": found.oracle_calls,
                "conditional_calls": found.conditional_oracle_calls,
                "not_amplified": (found.iterations == 0).double(),
                "reversed_order": found.reversed_order.double(),
            }
            means = {name: float(value[:, head].mean()) for name, value in of_head.items()}
            table.append({"layer": layer, "head": head + 1, **means, "scan": (scores.shape[-1] + 1) / 2})
    return table
