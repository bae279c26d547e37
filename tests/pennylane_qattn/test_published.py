"""The published forms: the causal mechanisms with the weights transposed, and nothing else changed."""

import numpy as np
import pytest
import torch

from pennylane_qattn import ATTENTION, Attention, Mechanism, build_attention
from pennylane_qattn.causality import certify
from pennylane_qattn.published import PublishedAttention

EMBED, HEADS, BLOCK, BATCH, SEQ = 15, 3, 11, 2, 7
CAUSAL = ("qisa", "qisa-absorbed", "qsann", "qsann-multi")


@pytest.fixture(params=CAUSAL)
def pair(request):
    """The causal attention and its published form, of one seed."""
    built = []
    for name in (request.param, f"{request.param}-published"):
        torch.manual_seed(5)
        built.append(build_attention(name, EMBED, HEADS, BLOCK, seed=3).double())
    return built


@pytest.fixture
def x(rng):
    return torch.randn(BATCH, SEQ, EMBED, dtype=torch.float64, generator=rng)


def dense(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """Sums over tokens in NumPy: token j receives w_ij V_i of every i >= j, w normalised over j."""
    q, k, v = (m(x[None]).detach().numpy()[0] for m in (module.query_map, module.key_map, module.value_map))
    heads, tokens, width = v.shape
    out = np.zeros((tokens, heads, width))
    for h in range(heads):
        for i in range(tokens):
            scores = np.array([np.exp(-((q[h, i] - k[h, j]) ** 2).sum()) for j in range(i + 1)])
            weights = np.exp(scores) / np.exp(scores).sum()
            for j in range(i + 1):
                out[j, h] += weights[j] * v[h, i]
    return module.out_proj(torch.as_tensor(out.reshape(tokens, -1)))


def test_every_published_form_is_marked():
    marked = {name for name, mechanism in ATTENTION.items() if mechanism.is_published}
    assert marked == {f"{name}-published" for name in CAUSAL}
    assert not any(ATTENTION[name].is_published for name in CAUSAL)


def test_is_its_formula(pair, x):
    _, published = pair
    for row in x:
        torch.testing.assert_close(published(row[None])[0], dense(published, row), rtol=1e-12, atol=1e-12)


def test_all_but_the_transpose_is_the_causal_mechanisms(pair, x):
    causal, published = pair
    ours, theirs = causal.state_dict(), published.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(published.weights(x), causal.weights(x).mT, rtol=0, atol=0)
    heads = causal.weights(x).mT @ causal.value_map(x)
    expected = causal.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(published(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("forwards", [True, False])
def test_checkpoints_go_both_ways(name, forwards, x):
    """Words of another seed and all parameters come with the state."""
    names = (name, f"{name}-published") if forwards else (f"{name}-published", name)
    source, target = (build_attention(n, EMBED, HEADS, BLOCK, seed=s).double() for s, n in enumerate(names))
    target.load_state_dict(source.state_dict())
    weights = source.weights(x).mT
    torch.testing.assert_close(target.weights(x), weights, rtol=1e-12, atol=1e-12)
    heads = (weights @ source.value_map(x)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(target(x), source.out_proj(heads), rtol=1e-12, atol=1e-12)


def test_options_and_plain_data_are_the_causal_mechanisms():
    for name in CAUSAL:
        ours = ATTENTION.build(name, head_dim=5, seed=7, split=True, dropout=0.25).to_plain()
        theirs = {**ours, "name": f"{name}-published"}
        assert Mechanism.from_plain(theirs).to_plain() == theirs
        assert Mechanism.from_plain(theirs) != Mechanism.from_plain(ours)


def test_where_both_agree(pair, x):
    """One token alone; of several, the last one receives its own value only, weighted by its weight on itself."""
    causal, published = pair
    torch.testing.assert_close(published(x[:, :1]), causal(x[:, :1]), rtol=1e-12, atol=1e-12)
    own = causal.weights(x)[:, :, -1, -1, None] * causal.value_map(x)[:, :, -1]
    torch.testing.assert_close(published(x)[:, -1], causal.out_proj(own.flatten(1)), rtol=1e-12, atol=1e-12)
    assert ((published(x) - causal(x)).abs().amax(-1) > 1e-6).all()


def test_every_token_moves_every_output(pair, x):
    """Later tokens by their values, earlier ones by sharing the rows that are normalised."""
    _, published = pair
    jacobian = torch.autograd.functional.jacobian(lambda v: published(v[None])[0].sum(-1), x[0])
    assert (jacobian.abs().amax(-1) > 0).all()


def test_the_certificate_sees_it(pair):
    causal, published = (certify(module) for module in pair)
    assert causal.verdict == "causal"
    assert published.verdict == "LEAKS" and (published.leak.output, published.leak.input) == (0, 1)
    assert published.leak.size > 1e-3


def test_what_a_token_receives_does_not_sum_to_one(pair, x):
    _, published = pair
    weights = published.weights(x)
    assert (weights.tril(-1) == 0).all()
    torch.testing.assert_close(weights.sum(-2), torch.ones(BATCH, HEADS, SEQ).double())
    assert ((weights.sum(-1) - 1).abs().amax((1, 2)) > 0.5).all()


@pytest.mark.parametrize("side", ["left", "right", "both", "middle"])
@pytest.mark.parametrize("filling", [0.0, 7.0, float("nan")])
def test_padding_sends_and_changes_nothing(pair, side, filling, x):
    _, published = pair
    padding = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    padding[0, {"left": [0, 1], "right": [5, 6], "both": [0, 6], "middle": [2, 3]}[side]] = True
    alone = published(x[:1, ~padding[0]])[0]
    x[0, padding[0]] = filling
    out = published(x, key_padding_mask=padding)
    torch.testing.assert_close(out[0, ~padding[0]], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1], published(x[1:])[0], rtol=1e-12, atol=1e-12)
    assert (out[0, padding[0]] == 0).all()  # nothing reaches them, so not even a bias does
    weights = published.weights(x, key_padding_mask=padding)
    assert (weights[0, :, padding[0]] == 0).all() and (weights[0, :, :, padding[0]] == 0).all()


def test_a_fully_padded_row_gives_zero_and_finite_gradients(pair, x):
    _, published = pair
    padding = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    padding[0] = True
    x.requires_grad_()
    out = published(x, key_padding_mask=padding)
    assert (out[0] == 0).all()
    (out + 1).square().sum().backward()
    assert (x.grad[0] == 0).all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in published.parameters())


def test_position_ids_say_what_is_later(pair, x):
    _, published = pair
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    out = published(x[:, order], position_ids=order.expand(BATCH, -1))
    torch.testing.assert_close(out, published(x)[:, order], rtol=1e-12, atol=1e-12)


def test_padding_and_positions_together(pair, x):
    _, published = pair
    padding = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    padding[0, :3] = True
    positions = ((~padding).cumsum(1) - 1).clamp(min=0)
    out = published(x, key_padding_mask=padding, position_ids=positions)
    torch.testing.assert_close(out[0, 3:], published(x[:1, 3:])[0], rtol=1e-12, atol=1e-12)


def test_not_causal_is_transposed_too(x):
    causal = build_attention("qisa", EMBED, HEADS, BLOCK, is_causal=False).double()
    published = build_attention("qisa-published", EMBED, HEADS, BLOCK, is_causal=False).double()
    published.load_state_dict(causal.state_dict())
    torch.testing.assert_close(published.weights(x), causal.weights(x).mT, rtol=0, atol=0)


def test_dropout_drops_weights(x):
    module = build_attention("qisa-published", EMBED, HEADS, BLOCK, dropout=0.5).double()
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_gradients(pair, rng):
    _, published = pair
    x = torch.randn(1, 3, EMBED, dtype=torch.float64, generator=rng, requires_grad=True)
    assert torch.autograd.gradcheck(published, (x,))


def test_there_is_no_cache(pair, x):
    causal, published = pair
    assert causal.has_cache and not published.has_cache
    message = "attention runs without a key/value cache.*generate without one"
    with pytest.raises(ValueError, match=message) as error:
        published.new_cache(2)
    assert "\n" not in str(error.value) and published.name in str(error.value)
    with pytest.raises(ValueError, match=message):
        published(x, cache=causal.new_cache(BATCH))


def test_fused_attention_is_no_way_round(x):
    """A score that is a dot product goes through explicit weights here."""
    parts = ATTENTION.build("scaled-dot").parts(EMBED, HEADS, 5, (0, 0))
    module = PublishedAttention(*parts, block_size=BLOCK).double()
    heads = module.weights(x) @ module.value_map(x)
    torch.testing.assert_close(module(x), module.out_proj(heads.transpose(1, 2).flatten(2)), rtol=1e-12, atol=1e-12)
    assert (module.weights(x).triu(1) > 0).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qisa", "QISAPublished(embed=16, heads=1, head_dim=16, qubits=4, LEAKS)"),
        ("qisa-absorbed", "QISAAbsorbedPublished(embed=16, heads=1, head_dim=16, qubits=4, LEAKS)"),
        ("qsann", "QSANNPublished(embed=16, heads=1, head_dim=16, qubits=4, LEAKS)"),
        ("qsann-multi", "QSANNMultiPublished(embed=16, heads=1, head_dim=16, qubits=4, LEAKS)"),
    ],
)
def test_it_says_what_it_is(name, expected):
    assert repr(build_attention(f"{name}-published", 16, 1, 8)) == expected
