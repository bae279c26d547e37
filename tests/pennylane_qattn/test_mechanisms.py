"""The contract of every registered mechanism: one suite, picked up from the registry."""

import copy
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reference import causal_attention, qisa_values, word_matrix
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pennylane_qattn import (
    ATTENTION,
    QISA,
    VALUES,
    Attention,
    CircuitFeatureMap,
    Gaussian,
    GaussianScore,
    LearnedCircuitFeatureMap,
    LinearFeatureMap,
    OverlapScore,
    PublishedGaussianScore,
    QISAAbsorbed,
    QuadraticFeatureMap,
    ReuploadedFeatureMap,
    ScaledDotScore,
    StateFeatureMap,
    build_attention,
    kernels,
)
from pennylane_qattn.features import circuit_within
from pennylane_qattn.folding import Fold
from pennylane_qattn.neighbours import join_neighbours
from pennylane_qattn.testing import assert_valid_attention

EMBED, HEADS, BLOCK, BATCH, SEQ = 15, 3, 11, 2, 7

#: Every registered name, and the variants that take another way through the code.
VARIANTS = {
    **{name: (name, {}) for name, mechanism in ATTENTION.items() if not mechanism.is_published},
    "qisa-split": ("qisa", {"split": True}),
    "qisa-angle": ("qisa", {"encoding": "angle", "split": True}),
    "qisa-strong": ("qisa", {"ansatz": "strongly-entangling", "head_dim": 7}),
    "qisa-absorbed-split": ("qisa-absorbed", {"split": True}),
    "qsann-split": ("qsann", {"split": True}),
    "gaussian-circuit": ("gaussian", {"values": "circuit", "bias": True}),
    "gaussian-quadratic": ("gaussian", {"values": "quadratic"}),
    "overlap-circuit": ("overlap", {"values": "circuit"}),
    "scaled-dot-learned": ("scaled-dot", {"values": "linear", "temperature": "learned", "bias": True}),
    "qisa-linear": ("qisa", {"values": "linear"}),
    "qisa-frozen": ("qisa", {"trainable": False}),
    "qisa-random-quadratic": ("qisa", {"values": "random-quadratic"}),
    "qsann-multi-learned-circuit": ("qsann-multi", {"values": "learned-circuit", "trainable": False}),
    "qisa-absorbed-random": ("qisa-absorbed", {"values": "random-absorbed", "split": True}),
    "overlap-learned-quadratic": ("overlap", {"values": "learned-quadratic", "split": True}),
    "gaussian-mixed-circuit": ("gaussian", {"values": "mixed-circuit", "bias": True, "head_dim": 7}),
    "scaled-dot-mixed-quadratic": ("scaled-dot", {"values": "mixed-quadratic", "split": True}),
    "scaled-dot-pairs": ("scaled-dot", {"span": 2, "split": True}),
    "gaussian-triples": ("gaussian", {"span": 3, "values": "mixed-circuit", "head_dim": 4}),
    "qisa-pairs": ("qisa", {"span": 2}),
    "classical-narrow": ("classical", {"head_dim": 2, "bias": True, "out_bias": False}),
}


@pytest.fixture(params=VARIANTS)
def make(request):
    name, options = VARIANTS[request.param]

    def build(**more) -> Attention:
        torch.manual_seed(5)
        return build_attention(name, EMBED, HEADS, BLOCK, **{**options, **more})

    return build


@pytest.fixture
def x(rng):
    return torch.randn(BATCH, SEQ, EMBED, dtype=torch.float64, generator=rng)


def test_is_a_valid_attention(make, dtype):
    """Shape, dtype, rows apart, copies and more: what users' own attentions are held to."""
    assert not assert_valid_attention(make().to(dtype), is_causal=True).skipped


def test_the_future_changes_no_bit(make, dtype, x):
    module, x = make().to(dtype), x.to(dtype)
    before = module(x)
    for token in range(SEQ):
        changed = x.clone()
        changed[:, token] += 3.0
        after = module(changed)
        assert torch.equal(after[:, :token], before[:, :token])
        assert not torch.equal(after[:, token], before[:, token])


def test_jacobian_is_zero_above_the_diagonal(make, x):
    module = make().double()
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0].sum(-1), x[0])
    size = jacobian.abs().amax(-1)
    assert (size.triu(1) == 0).all()
    assert (size.diagonal() > 0).all()


def test_batched_gradients_are_those_one_by_one(make, x):
    """`vectorize=True` hands many gradients backwards at once, which kernels and blocks must notice."""
    module, x = make().double(), x[:1, :4].requires_grad_()
    if module.name == "GroverSparse":
        pytest.skip("torch batches no gradients of sparse products")
    out = module(x).flatten()
    inputs = (x, *(p for p in module.parameters() if p.requires_grad))
    upstream = torch.eye(out.numel(), dtype=out.dtype)[::7]
    batched = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for row, each in enumerate(upstream):
        for one, all_of_them in zip(torch.autograd.grad(out, inputs, each, retain_graph=True), batched, strict=True):
            torch.testing.assert_close(all_of_them[row], one, rtol=1e-12, atol=1e-12)


def test_kernels_change_nothing(make, x, monkeypatch):
    """What Numba compiles gives the values and gradients of torch alone."""
    if kernels.numba is None:
        pytest.skip("Numba is not installed")
    module, x = make().double(), x.requires_grad_()
    inputs = (x, *(p for p in module.parameters() if p.requires_grad))
    found = {}
    for switch in ("1", "0"):
        monkeypatch.setenv(kernels.SWITCH, switch)
        out = module(x)
        found[switch] = (out.detach(), *torch.autograd.grad(out.sin().sum(), inputs))
    for one, other in zip(found["1"], found["0"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [(1,) * SEQ, (3, 1, 3), (SEQ,)])
def test_cached_equals_uncached(make, chunks, dtype, close, x):
    module, x = make().to(dtype).eval(), x.to(dtype)
    cache = module.new_cache(BATCH)
    with torch.no_grad():
        pieces = [module(part, cache=cache) for part in x.split(list(chunks), dim=1)]
        close(torch.cat(pieces, dim=1), module(x))
    assert len(cache) == SEQ


@pytest.mark.usefixtures("few_tokens")
def test_few_tokens_give_what_many_give(make, dtype, close, x):
    """One by one, and beside so many others that kernels and blocks are used."""
    module, x = make().to(dtype).eval(), x.to(dtype)
    cache = module.new_cache(BATCH)
    with torch.no_grad():
        many = module(torch.cat((x, torch.ones(60, SEQ, EMBED, dtype=dtype))))[:BATCH]
        close(module(x), many)
        close(torch.cat([module(part, cache=cache) for part in x.split(1, dim=1)], dim=1), many)


def test_gradients_flow_through_the_cache(make, x):
    module = make().double()
    cache = module.new_cache(BATCH)
    pieces = [module(part, cache=cache) for part in x.split(1, dim=1)]
    whole = torch.autograd.grad(module(x).square().sum(), module.out_proj.weight, retain_graph=True)[0]
    cached = torch.autograd.grad(torch.cat(pieces, dim=1).square().sum(), module.out_proj.weight)[0]
    torch.testing.assert_close(cached, whole, rtol=1e-12, atol=1e-12)


def test_rows_of_weights_sum_to_one(make, dtype, close, x):
    weights = make().to(dtype).weights(x.to(dtype)).detach()
    assert weights.shape == (BATCH, HEADS, SEQ, SEQ)
    close(weights.sum(-1), torch.ones(BATCH, HEADS, SEQ))
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()


def test_output_is_the_weighted_sum(make, dtype, close, x):
    """The fused path gives what the weights say."""
    module, x = make().to(dtype), x.to(dtype)
    heads = module.weights(x) @ module.value_map(join_neighbours(x, module.span)[0])
    close(module(x).detach(), module.out_proj(heads.transpose(1, 2).flatten(2)).detach(), factor=5)


@pytest.mark.parametrize("cached", [False, True])
def test_padding_changes_nothing(make, cached, dtype, close, x):
    """Rows of unequal length, padded on the left and in the middle, give what each gives alone."""
    module, x = make().to(dtype), x.to(dtype)
    padding = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    padding[0, :3] = True
    padding[1, 2] = padding[1, 5] = True
    if cached:
        cache = module.new_cache(BATCH)
        parts = zip(x.split(2, dim=1), padding.split(2, dim=1), strict=True)
        out = torch.cat([module(part, key_padding_mask=mask, cache=cache) for part, mask in parts], dim=1)
    else:
        out = module(x, key_padding_mask=padding)
    for row in range(BATCH):
        real = ~padding[row]
        close(out[row, real], module(x[row, real][None])[0].detach(), factor=5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fully_padded_row_gives_zero_and_finite_gradients(make, batch, dtype, x):
    module = make().to(dtype)
    x = x[:batch].to(dtype).requires_grad_()
    padding = torch.zeros(batch, SEQ, dtype=torch.bool)
    padding[0] = True
    out = module(x, key_padding_mask=padding)
    assert (out[0] == 0).all()
    (out + 1).square().sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad[0] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)
    assert (module.weights(x, key_padding_mask=padding)[0] == 0).all()


ORDER = torch.tensor([3, 0, 6, 2, 5, 1, 4])


def test_position_ids_say_what_is_past(make, x):
    """A shuffled sequence with its positions gives the shuffled output."""
    module = make().double()
    out = module(x[:, ORDER], position_ids=ORDER.expand(BATCH, -1))
    torch.testing.assert_close(out, module(x)[:, ORDER], rtol=1e-12, atol=1e-12)


def test_the_cache_remembers_positions(make, x):
    """The last tokens to come find all others in the cache, and see those of earlier positions only."""
    module = make().double()
    cache, positions = module.new_cache(BATCH), ORDER.expand(BATCH, -1)
    module(x[:, ORDER[:5]], position_ids=positions[:, :5], cache=cache)
    if module.span > 1:  # what is in the cache would have been joined with what comes now
        with pytest.raises(ValueError, match="must come in the order of time"):
            module(x[:, ORDER[5:]], position_ids=positions[:, 5:], cache=cache)
        return
    out = module(x[:, ORDER[5:]], position_ids=positions[:, 5:], cache=cache)
    torch.testing.assert_close(out, module(x)[:, ORDER[5:]], rtol=1e-12, atol=1e-12)


def test_positions_after_tokens_without(make, x):
    module = make().double()
    cache = module.new_cache(BATCH)
    module(x[:, :3], cache=cache)
    out = module(x[:, 3:], position_ids=torch.arange(3, SEQ).expand(BATCH, -1), cache=cache)
    torch.testing.assert_close(out, module(x)[:, 3:], rtol=1e-12, atol=1e-12)


def test_not_causal_sees_everything(make, x):
    module = make(is_causal=False).double()
    weights = module.weights(x)
    assert (weights > 0).all()
    if module.span > 1:  # values are joined with tokens before them, never with those after
        return
    torch.testing.assert_close(module(x.flip(1)).flip(1), module(x), rtol=1e-12, atol=1e-12)


def drawn(module):
    """What the seed decides: random forms, and words that are measured, unless they are the same for every head."""
    found = []
    for part in (module.query_map, module.key_map, module.value_map):
        within = circuit_within(part) or part
        fixed = isinstance(within, StateFeatureMap) or len(set(getattr(within, "words", [0, 1]))) == 1
        found += [] if fixed else part.buffers()
    return found


def test_state_dict_into_another_seed(make, x):
    module, other = make(seed=1).double(), make(seed=2).double()
    assert torch.equal(module(x), other(x)) != bool(drawn(module))  # other draws, other values
    assert all(not torch.equal(a, b) for a, b in zip(drawn(module), drawn(other), strict=True))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(module(x), other(x))


def test_same_seed_same_module(make, x):
    assert torch.equal(make()(x.float()), make()(x.float()))


def test_layers_draw_other_words():
    words = [QISA()(64, 2, 8, layer=layer).value_map.words for layer in (0, 1)]
    assert words[0] != words[1] and words[0][0] != words[0][1]
    assert QISA(seed=1)(64, 2, 8).value_map.words != words[0]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_angles_in_float32(make, half, x):
    module = make()
    expected = module(x.float())
    low = copy.deepcopy(module).to(half)
    out = low(x.to(half))
    assert out.dtype == half
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    for name, parameter in low.named_parameters():
        precise = name.endswith((".weights", "value_map.weight", "other_map.weight"))
        precise |= name == "value_map.readout_weight" and not isinstance(low.value_map, LearnedCircuitFeatureMap)
        assert parameter.dtype == (torch.float32 if precise else half), name
    assert all(b.dtype == torch.float32 for b in low.buffers() if b.is_floating_point())


def test_autocast_keeps_angles_in_float32(make, x):
    module = make()
    expected = module(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x.float())
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_there_and_back_in_precision(make, x):
    module = make().double()
    out = module(x)
    again = copy.deepcopy(module).float().double()
    torch.testing.assert_close(again(x), out, rtol=1e-5, atol=1e-5)
    # what is derived (bases, signs) must be rebuilt, not rounded and widened
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), out)


@pytest.mark.parametrize("seq", [0, 1, BLOCK])
@pytest.mark.parametrize("batch", [0, 1])
def test_edge_sizes(make, batch, seq):
    module = make()
    assert module(torch.zeros(batch, seq, EMBED)).shape == (batch, seq, EMBED)


def by_data(module):
    module.weights.data += 1


def by_numpy(module):
    module.weights.detach().numpy()[...] += 1


def by_load(module):
    module.load_state_dict({**module.state_dict(), "weights": module.weights.detach() + 1})


def by_optimizer(module):
    module.weights.grad = torch.ones_like(module.weights)
    torch.optim.SGD([module.weights], lr=1.0).step()


def by_replacing(module):
    module.weights = torch.nn.Parameter(module.weights.detach() + 1)


def by_words(module):
    module.load_state_dict({**module.state_dict(), "word_codes": module.word_codes % 3 + 1})


def by_precision(module):
    module.float()


def by_precision_and_back(module):
    module.float().double()


def by_words_in_place(module):
    module.word_codes.copy_(module.word_codes % 3 + 1)


def by_words_of_numpy(module):
    module.word_codes.numpy()[...] = module.word_codes % 3 + 1


def by_ema_swap(module):
    """The parameters are exchanged with their moving average, as before an evaluation."""
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(module)
    module.weights.data += 1
    average.update_parameters(module)
    with torch.no_grad():
        for ours, mean in zip(module.parameters(), average.module.parameters(), strict=True):
            kept = ours.clone()
            ours.copy_(mean)
            mean.copy_(kept)


CHANGES = [
    *(by_data, by_numpy, by_load, by_optimizer, by_replacing, by_words, by_words_in_place, by_words_of_numpy),
    *(by_ema_swap, by_precision, by_precision_and_back),
]
KEEPING = [CircuitFeatureMap, StateFeatureMap, QuadraticFeatureMap, ReuploadedFeatureMap]


def keeps_its_fold(kind):
    torch.manual_seed(3)
    feature_map = (kind(EMBED, HEADS) if kind is StateFeatureMap else kind(EMBED, HEADS, 4)).double()
    if kind is QuadraticFeatureMap:
        feature_map.register_parameter("weights", feature_map.weight)  # the same tensor under both names
    return feature_map


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KEEPING)
def test_a_kept_fold_is_never_stale(kind, change, x):
    """Where no gradient is wanted, the fold is kept between calls; any change of what it depends on renews it."""
    feature_map = keeps_its_fold(kind)
    if "words" in change.__name__ and kind is StateFeatureMap:
        pytest.skip("states measure no words")
    if change is by_replacing and kind is QuadraticFeatureMap:
        pytest.skip("would replace the alias only")
    with torch.no_grad():
        before = feature_map(x)
        assert torch.equal(feature_map(x), before)
    change(feature_map)
    with torch.no_grad():
        after = feature_map(x)
    # with gradients nothing is kept, and a map of its own never had anything else
    torch.testing.assert_close(after, feature_map(x).detach(), rtol=1e-12, atol=1e-12)
    fresh = keeps_its_fold(kind).to(feature_map.weights.dtype)
    fresh.load_state_dict(feature_map.state_dict())
    torch.testing.assert_close(after, fresh(x).detach(), rtol=1e-12, atol=1e-12)
    if "precision" not in change.__name__:
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("name", ["weights", "word_codes"])
@pytest.mark.parametrize("kind", KEEPING)
def test_a_kept_fold_and_functional_call(kind, name, x):
    if name == "word_codes" and kind is StateFeatureMap:
        pytest.skip("states measure no words")
    feature_map, changed = keeps_its_fold(kind), keeps_its_fold(kind)
    by_numpy(changed) if name == "weights" else by_words(changed)
    with torch.no_grad():
        before, other = feature_map(x), dict(changed.named_parameters()) | dict(changed.named_buffers())
        swapped = torch.func.functional_call(feature_map, other, x)
        assert torch.equal(swapped, changed(x)) and not torch.allclose(swapped, before)
        assert torch.equal(feature_map(x), before)


@pytest.mark.parametrize("kind", [CircuitFeatureMap, QuadraticFeatureMap, ReuploadedFeatureMap])
def test_words_under_torch_func(kind, x):
    """Words that are the module's may be handed in, mapped over or not; others are refused, not ignored."""
    feature_map, others = keeps_its_fold(kind), keeps_its_fold(kind)
    by_words(others)
    parameters, buffers = dict(feature_map.named_parameters()), dict(feature_map.named_buffers())

    def total(parameters, buffers, x):
        return torch.func.functional_call(feature_map, (parameters, buffers), x).sum()

    (name,) = parameters.keys() & {"weight", "weights"}
    expected = torch.autograd.grad(feature_map(x).sum(), feature_map.weights)[0]
    found = torch.func.grad(total)(parameters, buffers, x)[name]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    stacked = torch.func.stack_module_state([feature_map, copy.deepcopy(feature_map)])
    found = torch.func.vmap(torch.func.grad(total), in_dims=(0, 0, None))(*stacked, x)[name]
    torch.testing.assert_close(found, expected.expand(2, *expected.shape), rtol=1e-12, atol=1e-12)
    twice = {"word_codes": feature_map.word_codes.expand(2, 5, *feature_map.word_codes.shape).movedim(1, 3)}
    over = torch.func.vmap(torch.func.vmap(total, in_dims=(None, 2, None)), in_dims=(None, 0, None))
    torch.testing.assert_close(over(parameters, twice, x), total(parameters, buffers, x).expand(2, 5))
    stacked = torch.func.stack_module_state([feature_map, others])
    for function in (
        lambda: torch.func.grad(total)(parameters, dict(others.named_buffers()), x),
        lambda: torch.func.vmap(total, in_dims=(0, 0, None))(*stacked, x),
    ):
        with pytest.raises(ValueError, match="under torch.func the Pauli words are those of the module"):
            function()


@pytest.mark.parametrize("kind", [CircuitFeatureMap, QuadraticFeatureMap, ReuploadedFeatureMap])
def test_words_that_are_none_are_refused(kind, x):
    feature_map = keeps_its_fold(kind)
    with pytest.raises(ValueError, match=r"word_codes must have the shape \(heads, words, wires\) = \(3, 4, 4\)"):
        torch.func.functional_call(feature_map, {"word_codes": feature_map.word_codes[:, :2]}, x)
    feature_map.word_codes[0, 0, 0] = 9
    with pytest.raises(ValueError, match=r"word_codes must hold 0 to 3 for I, X, Y, Z; got .*9\]"):
        feature_map(x)


def test_ema_weights_are_swapped_in_and_out(x):
    """As `swap` does around an evaluation: nothing of the average is left behind."""
    for kind in KEEPING:
        feature_map = keeps_its_fold(kind)
        average = AveragedModel(feature_map)
        average.update_parameters(feature_map)
        by_data(average.module)
        with torch.no_grad():
            before, of_average = feature_map(x), average(x)
            for expected in (of_average, before):
                for ours, mean in zip(feature_map.parameters(), average.module.parameters(), strict=True):
                    ours.data, mean.data = mean.data, ours.data
                assert torch.equal(feature_map(x), expected) and not torch.equal(before, of_average)


@pytest.mark.parametrize("kind", KEEPING)
def test_the_fold_is_kept_where_no_gradient_is_wanted(kind, x, monkeypatch):
    feature_map = keeps_its_fold(kind)
    calls = []
    readout, states = Fold.readout, Fold.states
    monkeypatch.setattr(Fold, "readout", lambda self, *args: calls.append(1) or readout(self, *args))
    monkeypatch.setattr(Fold, "states", lambda self, *args: calls.append(1) or states(self, *args))
    monkeypatch.setenv("QATTN_KERNELS", "0")  # without them every map has a fold
    with torch.no_grad():
        feature_map(x), feature_map(x)
    assert (once := len(calls)) == (2 if kind is ReuploadedFeatureMap else 1)
    feature_map(x), feature_map(x)
    assert len(calls) == 3 * once


def test_a_moved_map_forgets_where_it_was(x):
    """Tables and folds of precisions that it no longer has are let go of."""
    module = QISA()(EMBED, HEADS, BLOCK)
    executor = module.value_map.executor
    with torch.no_grad():
        module(x.float())
        words = executor._words
        assert words._pairs.keys() <= {torch.float32} and executor._states._kept or executor._readouts._kept
        module.double()
    assert executor._folds.keys() == {(torch.float64, torch.device("cpu"))} and not words._pairs
    assert executor._states._kept is None and executor._readouts._kept is None
    fold = executor._folds[torch.float64, torch.device("cpu")]
    module.double()
    assert executor._folds[torch.float64, torch.device("cpu")] is fold


def repacked(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


def turned_about(tensor):
    axes = tuple(range(tensor.dim()))
    return tensor.permute(axes[::-1]).clone(memory_format=torch.contiguous_format).permute(axes[::-1])


@pytest.mark.parametrize("pack", [repacked, turned_about])
def test_hooks_for_saved_tensors_may_change_strides(make, pack, x):
    """As `save_on_cpu(pin_memory=True)` does, which copies what is saved into memory of its own."""
    module, x = make().double(), x.requires_grad_()
    if pack is turned_about and module.score.is_dot_product:
        pytest.skip("torch's own fused attention expects features side by side")
    inputs = (x, *(p for p in module.parameters() if p.requires_grad))
    expected = torch.autograd.grad(module(x).sin().sum(), inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    for found, wanted in zip(torch.autograd.grad(out.sin().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- against references


def head_parts(module, x):
    q, k, v = (m(x).detach().numpy()[0] for m in (module.query_map, module.key_map, module.value_map))
    return q, k, v


@pytest.mark.parametrize("name", ["qisa", "qisa-absorbed", "qsann", "qsann-multi"])
def test_published_forms_are_their_formula(name, x):
    """Loops over tokens in NumPy: score exp(-|q-k|^2) inside a causal softmax."""
    module = build_attention(name, EMBED, HEADS, BLOCK).double()
    q, k, v = head_parts(module, x[:1])
    heads = [causal_attention(q[h], k[h], v[h], lambda a, b: np.exp(-((a - b) ** 2).sum())) for h in range(HEADS)]
    expected = module.out_proj(torch.as_tensor(np.concatenate(heads, -1)))
    torch.testing.assert_close(module(x[:1])[0], expected, rtol=1e-12, atol=1e-12)


def test_circuit_features_are_dense_numpy(x):
    feature_map = QISA()(EMBED, HEADS, BLOCK).value_map.double()
    values = feature_map(x).detach().numpy()
    for head in range(HEADS):
        angles = feature_map.weights[head, 0].detach().numpy()
        expected = [qisa_values(row, angles, feature_map.words[head]) for row in x[1].numpy()]
        np.testing.assert_allclose(values[1, head], expected, atol=1e-12)


def test_split_heads_read_their_slice(x):
    feature_map = QISA(split=True)(EMBED, HEADS, BLOCK).value_map.double()
    values = feature_map(x).detach().numpy()
    for head in range(HEADS):
        angles = feature_map.weights[head, 0].detach().numpy()
        own = x[1, :, head * 5 : head * 5 + 5].numpy()
        expected = [qisa_values(row, angles, feature_map.words[head]) for row in own]
        np.testing.assert_allclose(values[1, head], expected, atol=1e-12)


def test_quadratic_features_are_dense_numpy(x):
    feature_map = QISAAbsorbed()(EMBED, HEADS, BLOCK).value_map.double()
    values = feature_map(x).detach().numpy()
    for head in range(HEADS):
        u = np.pad(x[1].numpy() @ feature_map.weight[head].detach().numpy().T, ((0, 0), (0, 1)))
        for o, word in enumerate(feature_map.words[head]):
            expected = np.einsum("ti,ij,tj->t", u, word_matrix(word), u).real
            np.testing.assert_allclose(values[1, head, :, o], expected, atol=1e-12)


def test_an_odd_number_of_y_measures_nothing_on_real_vectors(x):
    feature_map = QuadraticFeatureMap(EMBED, 1, 2, words=("YIII", "YYII")).double()
    values = feature_map(x)[:, 0]
    assert values[..., 0].abs().max() < 1e-12 and values[..., 1].abs().max() > 1e-3


def test_classical_is_torchs_multi_head_attention(x):
    module = build_attention("classical", EMBED, HEADS, BLOCK, bias=True).double()
    reference = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        maps = (module.query_map, module.key_map, module.value_map)
        reference.in_proj_weight.copy_(torch.cat([m.linear.weight for m in maps]))
        reference.in_proj_bias.copy_(torch.cat([m.linear.bias for m in maps]))
        reference.out_proj.load_state_dict(module.out_proj.state_dict())
    mask = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)
    expected, weights = reference(x, x, x, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.weights(x), weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("classical", 3 * 16 * 16),
        ("qsann", 9 * 4),
        ("qsann-multi", 9 * 4),
        ("qisa", 2 * (16 * 16 + 16) + 3 * 4),
        ("qisa-absorbed", 2 * (16 * 16 + 16) + 16 * 16),
        ("gaussian", 3 * 16 * 16 + 1),
        ("overlap", 2 * 3 * 4 + 16 * 16 + 1),
        ("ngram", 2 * 16 * 16 + 16 * (4 * 16 + 16) + 1),
        ("scaled-dot", 2 * 16 * 16 + 16 * 16),
    ],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_parameters_of_a_head(name, count, heads):
    """The table of the mathematics: one head with d = h = 16 (4 qubits), whole embedding."""
    module = build_attention(name, 16, heads, 8, head_dim=16)
    parts = (module.query_map, module.key_map, module.value_map, module.score)
    assert sum(p.numel() for part in parts for p in part.parameters()) == heads * count


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ("linear", 16 * 11),
        ("circuit", 3 * 4),
        ("quadratic", 16 * 16),
        ("random-quadratic", 0),
        ("random-absorbed", 16 * 16),
        ("learned-quadratic", 16 * 16 + 16 * 11),
        ("rectified", 16 * 16 + 16 * 11),
        ("learned-circuit", 3 * 4 + 15 * 11),
        ("reuploaded-circuit", 6 * 4 + 1),
        ("mixed-circuit", 16 * 11 + 3 * 4 + 2),
        ("mixed-quadratic", 16 * 11 + 16 * 16 + 2),
    ],
)
@pytest.mark.parametrize("name", ["qisa", "qisa-absorbed", "qsann", "qsann-multi", "scaled-dot", "gaussian", "overlap"])
def test_parameters_of_a_heads_values(name, values, count):
    """Every mechanism with every map, d = 16 (4 qubits) and h = 11, whole embedding."""
    options = {} if name.startswith("qsann") else {"bias": False}
    module = build_attention(name, 16, 3, 8, head_dim=11, values=values, **options)
    assert sum(p.numel() for p in module.value_map.parameters()) == 3 * count
    assert module.value_map.out_features == 11 and module(torch.zeros(1, 2, 16)).shape == (1, 2, 16)


def test_every_map_has_its_count():
    (table,) = [m for m in test_parameters_of_a_heads_values.pytestmark if m.args[0] == ("values", "count")]
    assert [values for values, _ in table.args[1]] == list(VALUES)


def test_a_learned_temperature_starts_at_the_fixed_one(x):
    made = []
    for temperature in ("fixed", "learned"):
        torch.manual_seed(5)
        made.append(build_attention("scaled-dot", EMBED, HEADS, BLOCK, temperature=temperature).double())
    fixed, learned = made
    torch.testing.assert_close(learned(x), fixed(x), rtol=1e-6, atol=1e-6)  # the start is a float32
    torch.testing.assert_close(learned.score.beta, torch.full((HEADS,), 5**-0.5).double(), rtol=1e-6, atol=0)
    with torch.no_grad():
        learned.score.raw_beta[1] += 1
    changed = (learned.weights(x) - fixed.weights(x)).abs().amax((0, 2, 3))
    assert changed[0] < 1e-6 < 1e-2 < changed[1]


def test_scaled_dot_with_linear_values_is_classical(x):
    module = build_attention("scaled-dot", EMBED, HEADS, BLOCK, values="linear").double()
    classical = build_attention("classical", EMBED, HEADS, BLOCK).double()
    classical.load_state_dict(module.state_dict())
    assert torch.equal(classical(x), module(x))


@pytest.mark.parametrize("score", [ScaledDotScore, GaussianScore, PublishedGaussianScore, OverlapScore])
@pytest.mark.parametrize("queries", ["linear", "circuit", "quadratic"])
@pytest.mark.parametrize("values", ["linear", "circuit", "quadratic"])
def test_any_score_with_any_feature_map(score, queries, values, x):
    maps = {"linear": LinearFeatureMap, "circuit": CircuitFeatureMap, "quadratic": QuadraticFeatureMap}
    q, k, v = maps[queries](EMBED, HEADS, 3), maps[queries](EMBED, HEADS, 3), maps[values](EMBED, HEADS, 5)
    module = Attention(q, k, v, score(HEADS, 3), block_size=BLOCK).double()
    out = module(x)
    changed = x.clone()
    changed[:, -1] += 1
    assert torch.equal(module(changed)[:, :-1], out[:, :-1])
    torch.testing.assert_close(module.weights(x).sum(-1), torch.ones(BATCH, HEADS, SEQ).double())


def test_dropout_acts_in_training_only(make, x):
    module = make(dropout=0.5)
    module.eval()
    assert torch.equal(module(x.float()), module(x.float()))
    module.train()
    assert not torch.equal(module(x.float()), module(x.float()))


def test_repr_speaks_the_fields_language():
    assert repr(QISA()(64, 4, 8)) == "QISA(embed=64, heads=4, head_dim=16, qubits=6)"
    assert repr(Gaussian(is_causal=False)(8, 2, 8)) == "Gaussian(embed=8, heads=2, head_dim=4, causal=False)"


def test_sizes_of_another_type():
    """In a process of its own, as the tests check annotations before the package can."""
    code = "import pennylane_qattn; pennylane_qattn.build_attention('qisa', 8, '2', 4)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ValueError: num_heads must be an integer; got '2'"


def test_angles_start_within_a_turn():
    angles = QISA()(64, 4, 8).value_map.weights
    assert angles.min() >= 0 and angles.max() < 2 * math.pi and angles.std() > 1


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_attention("foo", 4, 1, 4), "unknown attention 'foo'; choose from classical, gaussian"),
        (lambda: build_attention("classical", 10, 4, 4), "divisible by num_heads; got 10 and 4"),
        (lambda: build_attention("qisa", 10, 4, 4, head_dim=3, split=True), "divisible by num_heads; got 10 and 4"),
        (lambda: build_attention("classical", 4, 1, 0), "block_size must be at least 1; got 0"),
        (lambda: build_attention("classical", 0, 1, 4), "at least 1; got 0 and 1"),
        (lambda: build_attention("classical", 4, 0, 4), "at least 1; got 4 and 0"),
        (lambda: build_attention("classical", 4, 1, 4, head_dim=0), "head_dim must be at least 1; got 0"),
        (lambda: build_attention("classical", 4, 1, 4, dropout=1.5), "dropout must lie in"),
        (lambda: build_attention("classical", 4, 1, 4, foo=1), "has no option 'foo'"),
        (lambda: build_attention("classical", 4, 1, 4)(torch.zeros(1, 5, 4)), "5 tokens is longer than block_size=4"),
        (lambda: build_attention("classical", 4, 1, 4)(torch.zeros(1, 3, 5)), "width embed_dim=4; got 5"),
        (lambda: build_attention("classical", 4, 1, 4).new_cache(0), "at least 1; got 0 and 4"),
        (
            lambda: build_attention("gaussian", 4, 1, 4, trainable=False),
            "gaussian with values 'linear' has none; leave it out",
        ),
        (
            lambda: build_attention("qisa", 4, 1, 4, trainable=False, values="quadratic"),
            "freezes the angles of circuits",
        ),
        (lambda: build_attention("scaled-dot", 4, 1, 4, temperature="hot"), "one of fixed, learned; got 'hot'"),
        (lambda: build_attention("qsann", 4, 1, 4, values="magic"), "values must be one of linear, circuit, quadratic"),
        (
            lambda: build_attention("qisa", 257, 1, 4, values="learned-circuit"),
            "on 8 qubits at most; got 9: use split heads",
        ),
        (
            lambda: build_attention("qisa", 9, 1, 4, values="learned-circuit", encoding="angle"),
            "on 8 qubits at most; got 9: use split heads, or amplitude encoding",
        ),
        (
            lambda: build_attention("qisa", 2**12, 1, 4, values="random-quadratic", head_dim=64),
            "1 x 64 random forms of 4096 inputs take 4.0 GiB; use split heads or fewer features",
        ),
        (lambda: CircuitFeatureMap(4, 1, 1, words=("XX", "XQ")), "letters of IXYZ; got 'XQ'"),
        (lambda: CircuitFeatureMap(4, 1, 1, execution="foo"), "unknown executor 'foo'"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match="got|unknown|option|longer|must|none|take") as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_full_cache_and_a_foreign_batch():
    module = build_attention("qisa", 4, 1, 3)
    cache = module.new_cache(2)
    module(torch.zeros(2, 3, 4), cache=cache)
    with pytest.raises(ValueError, match="4 tokens is longer than block_size=3"):
        module(torch.zeros(2, 1, 4), cache=cache)
    with pytest.raises(ValueError, match="made for a batch of 5; got 2"):
        module(torch.zeros(2, 1, 4), cache=module.new_cache(5))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((LinearFeatureMap(6, 2, 3), LinearFeatureMap(6, 3, 3), LinearFeatureMap(6, 2, 3)), "one number of heads"),
        ((LinearFeatureMap(6, 2, 3), LinearFeatureMap(6, 2, 4), LinearFeatureMap(6, 2, 3)), "one width; got 3 and 4"),
        ((LinearFeatureMap(6, 2, 3), LinearFeatureMap(6, 2, 3), LinearFeatureMap(8, 2, 3)), "one embedding"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        Attention(*parts, ScaledDotScore(2, 3), block_size=4)


def test_words_in_a_checkpoint_are_checked():
    module = build_attention("qisa", 4, 1, 3)
    state = module.state_dict()
    state["value_map.word_codes"] = state["value_map.word_codes"] + 7
    with pytest.raises(ValueError, match="must hold 0 to 3"):
        build_attention("qisa", 4, 1, 3).load_state_dict(state)
