"""Attention with a sparse part and a background: against dense weights, against the models it stands in for."""

import math

import pytest
import torch
from largest_tensor import LargestTensor

from pennylane_qattn import Classical, Gaussian, GroverSparse, Overlap, ScaledDot, build_attention, certify
from pennylane_qattn.grover.bounds import bound

FORMS = {
    "top": {},
    "threshold": {"support": "threshold", "tau": 0.3},
    "unshifted": {"shifted": False},
    "second order": {"order": 2},
    "gaussian": {"score": "gaussian", "beta": 0.4},
    "circuit values": {"values": "circuit"},
}


def attention(form: str, block_size: int = 11, **options):
    torch.manual_seed(5)
    return build_attention("grover-sparse", 6, 2, block_size, **{"k": 3, **FORMS[form], **options}).double()


def embeddings(length: int = 11, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def by_definition(module, x: torch.Tensor) -> torch.Tensor:
    """Weights row by row, in plain Python, from the scores."""
    score, options = module.score, module.score.sparsity
    s = score(score.queries(module.query_map(x)), score.keys(module.key_map(x)))
    weights = torch.zeros_like(s)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in s.shape[:3])).tolist():
        row = s[b, h, i, : i + 1]
        if options.support == "top":
            kept = set(row.argsort(descending=True)[: options.k].tolist())
        else:
            kept = {j for j, value in enumerate(row.tolist()) if value >= options.tau}
        rest = [row[j] for j in range(i + 1) if j not in kept]
        shift = (min(rest) + max(rest)) / 2 if rest and options.shifted else 0.0
        entries = torch.stack(
            [
                (row[j] - shift).exp() if j in kept else (1 + (row[j] - shift) * (options.order == 2)) + 0 * row[j]
                for j in range(i + 1)
            ]
        )
        weights[b, h, i, : i + 1] = entries / entries.sum()
    return weights


@pytest.mark.parametrize("form", FORMS)
def test_weights_by_definition(form):
    module, x = attention(form), embeddings()
    torch.testing.assert_close(module.weights(x), by_definition(module, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_structure_and_dense_weights_agree_with_gradients(form):
    module, x = attention(form), embeddings().requires_grad_()
    learned = [x, *module.parameters()]
    structured = module(x)
    # with position ids there is no plain triangle, and the weights are written out
    dense = module(x, position_ids=torch.arange(11).expand(2, -1))
    torch.testing.assert_close(structured, dense, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), learned, allow_unused=True) for y in (structured, dense)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_causal_cached_and_padded(form):
    module, x = attention(form), embeddings()
    assert certify(module).verdict == "causal"
    whole = module(x)
    cache = module.new_cache(2)
    by_token = torch.cat([module(x[:, t : t + 1], cache=cache) for t in range(11)], dim=1)
    torch.testing.assert_close(by_token, whole, rtol=1e-12, atol=1e-12)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[0, :4] = True
    torch.testing.assert_close(module(x, key_padding_mask=padding)[:1, 4:], module(x[:1, 4:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "mechanism, name", [(Classical(bias=True), "classical"), (Gaussian(), "gaussian"), (ScaledDot(), "scaled-dot")]
)
def test_takes_the_weights_of_a_trained_model(mechanism, name):
    torch.manual_seed(1)
    trained = mechanism(6, 2, 11).double()
    sparse = GroverSparse.of(mechanism, k=11)(6, 2, 11).double()
    sparse.load_state_dict(trained.state_dict())
    x = embeddings()
    torch.testing.assert_close(sparse(x), trained(x), rtol=0, atol=1e-12)  # every key is kept
    fewer = GroverSparse.of(mechanism, k=2)(6, 2, 11).double()
    fewer.load_state_dict(trained.state_dict())
    q, k = fewer.score.queries(fewer.query_map(x)), fewer.score.keys(fewer.key_map(x))
    found = bound(fewer.score.operator(q, k, is_causal=True))
    error = (fewer.weights(x) - trained.weights(x)).abs().sum(-1)
    torch.testing.assert_close(error, found.true_l1, rtol=0, atol=1e-12)
    assert (error <= found.l1 + 1e-12).all() and error.max() > 1e-3


def test_no_matrix_of_weights_is_made():
    torch.manual_seed(0)
    module = build_attention("grover-sparse", 8, 1, 1500, k=4)

    x = torch.randn(1, 1500, 8, requires_grad=True)
    with LargestTensor() as seen:
        module(x).sum().backward()
    assert 2**19 < seen.numbers < 1500 * 1500 / 2  # a block of rows, to find the keys


def test_training_lowers_a_loss():
    module, x = attention("top"), embeddings()
    target = embeddings(11).roll(1, dims=1)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    losses = []
    for _ in range(40):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k must be an integer of at least 1; got 0"),
        ({"tau": math.nan}, "tau must be a number; got nan"),
        ({"order": 3}, "order must be 1"),
        ({"support": "all"}, "support must be one of top, threshold; got 'all'"),
        ({"score": "cosine"}, "score must be one of scaled-dot, gaussian; got 'cosine'"),
        ({"beta": 0.5}, "beta belongs to a Gaussian score"),
    ],
)
def test_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        GroverSparse(**options)


def test_refused_when_built():
    with pytest.raises(ValueError, match="k must be no more than the 4 keys of a row; got 5"):
        build_attention("grover-sparse", 6, 1, 4, k=5)
    with pytest.raises(ValueError, match="overlap has no sparse form"):
        GroverSparse.of(Overlap())
    with pytest.raises(ValueError, match="fixed temperature"):
        GroverSparse.of(ScaledDot(temperature="learned"))
