"""A token's attention in one call of a kernel: the same as that of the whole text, and only where it may be."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize

from pennylane_qattn import ATTENTION, build_attention, kernels, token_attention
from pennylane_qattn.attention import KeyValueCache
from pennylane_qattn.executor import FoldedExecutor
from pennylane_qattn.features import FeatureMap
from pennylane_qattn.value_maps import LearnedQuadraticFeatureMap

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="kernels are of the extra fast")

LENGTH, FILLED = 7, 3
CACHED = sorted(name for name, cls in ATTENTION.items() if not cls.is_published)
SERVED = {"classical", "gaussian", "ngram", "qisa", "qisa-absorbed", "qsann", "qsann-multi", "scaled-dot"}
#: A mechanism with its options, and its embedding and heads: features with recipes of every kind and without, one or
#: several features, widths that fill no vector and more than one.
CASES = [
    *((name, {}, 12, 3) for name in CACHED),
    ("qisa", {"split": True, "bias": True, "out_bias": False}, 12, 2),
    ("qisa", {"span": 2, "ansatz": "strongly-entangling"}, 9, 3),
    ("qisa", {"head_dim": 5}, 40, 1),
    ("qisa", {"encoding": "angle", "split": True}, 6, 2),
    ("gaussian", {"bias": True, "span": 3}, 34, 2),
    ("gaussian", {"values": "learned-circuit"}, 8, 2),
    ("gaussian", {"values": "rectified", "head_dim": 1}, 5, 2),
    ("ngram", {"split": True, "head_dim": 1, "rank": 3}, 6, 2),
    ("qisa-absorbed", {"split": True, "head_dim": 7}, 10, 2),
    ("classical", {"bias": True, "head_dim": 17}, 8, 2),
    ("scaled-dot", {"head_dim": 16}, 32, 2),
]


@pytest.fixture
def calls(monkeypatch):
    """How many texts each call of the kernel had."""
    found = []
    kernel = token_attention.attend_token

    def counted(places, sizes, *rest):
        found.append(sizes[0])
        kernel(places, sizes, *rest)

    monkeypatch.setattr(token_attention, "attend_token", counted)
    return found


def make(name, options, embed, heads, dtype=torch.float64, texts=2, seed=5):
    torch.manual_seed(seed)
    module = build_attention(name, embed, heads, LENGTH, **options).to(dtype).eval()
    return module, torch.randn(texts, LENGTH, embed, dtype=dtype)


def by_tokens(module, x, cache=None):
    """The outputs of the text's tokens, one at a time after the first few."""
    cache = module.new_cache(len(x)) if cache is None else cache
    with torch.no_grad():
        parts = [module(x[:, :FILLED], cache=cache)]
        parts += [module(x[:, i : i + 1], cache=cache) for i in range(FILLED, LENGTH)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("texts", [1, 3, 5, 8])
@pytest.mark.parametrize(("name", "options", "embed", "heads"), CASES)
def test_token_by_token_equals_the_whole_text(name, options, embed, heads, texts, dtype, close, calls, monkeypatch):
    module, x = make(name, options, embed, heads, dtype, texts)
    cache = module.new_cache(texts)
    found = by_tokens(module, x, cache)
    assert calls == ([texts] * (LENGTH - FILLED) if name in SERVED else [])
    with torch.no_grad():
        close(found, module(x), factor=10)
    monkeypatch.setenv("QATTN_KERNELS", "0")
    plain = module.new_cache(texts)
    close(found, by_tokens(module, x, plain), factor=10)
    for one, other in ((cache._keys, plain._keys), (cache._values, plain._values)):
        close(one, other, factor=10)


def test_as_many_texts_as_a_vector_has_lanes(calls, close, dtype):
    lanes = token_attention.most_texts(dtype)
    assert lanes == {torch.float32: 16, torch.float64: 8}[dtype]
    for texts in (lanes, lanes + 1):
        module, x = make("qisa", {}, 12, 3, dtype, texts)
        with torch.no_grad():
            close(by_tokens(module, x), module(x), factor=10)
    assert set(calls) == {lanes}


def test_much_work_is_left_to_the_threads_of_torch(calls, monkeypatch):
    module, x = make("gaussian", {}, 12, 3)  # 2 texts, 4 x 12 x 12 weights
    monkeypatch.setattr(token_attention, "MOST_WORK", 2 * 4 * 12 * 12 * 3)
    for threads, number in ((1, 4), (4, 4), (5, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        calls.clear()
        by_tokens(module, x)
        assert len(calls) == number


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e18])
def test_embeddings_of_any_size(scale, calls, dtype, close):
    """The norm is taken with care, and the zero vector has the value of the first basis state."""
    module, x = make("qisa", {}, 12, 3, dtype)
    x[:, FILLED:] *= scale
    with torch.no_grad():
        for part in (module.query_map, module.key_map):
            part.linear.weight.mul_(1e-18)
        close(by_tokens(module, x), module(x), factor=10)
    assert calls


# --- what may have changed since the last token ---------------------------------------------------------------------


def by_data(module):
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.1


def by_alias(module):
    for parameter in module.parameters():
        parameter.detach().numpy()[...] += 0.1


def by_load(module):
    other = {name: value + 0.1 if value.is_floating_point() else value for name, value in module.state_dict().items()}
    module.load_state_dict(other)


def by_words(module):
    for name, buffer in module.named_buffers():
        if name.endswith("word_codes"):
            buffer.copy_((buffer + 1) % 4)


@pytest.mark.parametrize("change", [by_data, by_alias, by_load, by_words])
@pytest.mark.parametrize("name", ["qisa", "qisa-absorbed", "ngram", "gaussian"])
def test_nothing_is_stale(name, change, calls):
    module, x = make(name, {}, 12, 3)
    cache, other = module.new_cache(2), module.new_cache(2)
    with torch.no_grad():
        for held in (cache, other):
            module(x[:, :FILLED], cache=held)
        before = module(x[:, FILLED : FILLED + 1], cache=cache)
        module(x[:, FILLED : FILLED + 1], cache=other)
        change(module)
        fresh = copy.deepcopy(module)
        found = module(x[:, FILLED + 1 : FILLED + 2], cache=cache)
    number = len(calls)
    expected = fresh(x[:, FILLED + 1 : FILLED + 2], cache=other)  # with gradients, so not by the kernel
    assert number == len(calls) == 3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, before)


# --- where the kernel stays out -------------------------------------------------------------------------------------


def with_hook(part, seen):
    part.register_forward_hook(lambda module, inputs, output: seen.append(module))


def with_pre_hook(part, seen):
    part.register_forward_pre_hook(lambda module, inputs: seen.append(module))


def with_patch(part, seen):
    own = part.forward
    part.forward = lambda *inputs: (seen.append(part), own(*inputs))[1]


@pytest.mark.parametrize("add", [with_hook, with_pre_hook, with_patch])
@pytest.mark.parametrize("path", ["query_map", "query_map.linear", "key_map", "value_map", "out_proj"])
def test_hooks_are_called(path, add, close, dtype):
    module, x = make("qisa", {}, 12, 3, dtype)
    with torch.no_grad():
        whole, seen = module(x), []
    add(module.get_submodule(path), seen)
    close(by_tokens(module, x), whole, factor=10)
    assert len(seen) == 1 + LENGTH - FILLED


def test_hooks_of_all_modules_are_called():
    module, x = make("qisa", {}, 12, 3)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda part, inputs, output: seen.append(part))
    try:
        by_tokens(module, x)
    finally:
        handle.remove()
    assert seen.count(module.value_map) == seen.count(module.out_proj) == 1 + LENGTH - FILLED


@pytest.mark.parametrize("path", ["query_map.linear", "value_map", "out_proj"])
def test_a_subclass_does_what_it_says(path):
    module, x = make("qisa", {}, 12, 3)
    part = module.get_submodule(path)
    kind = type(part)
    part.__class__ = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)


def test_a_parametrized_layer_does_what_it_says(calls):
    module, x = make("qisa", {}, 12, 3)
    parametrizations.weight_norm(module.key_map.linear)
    module.key_map.linear.parametrizations.weight.original0.data *= 3
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)
    assert calls  # the rest of it is the kernel's all the same


def test_only_where_it_may_be(calls):
    module, x = make("qisa", {}, 12, 3, torch.float32)
    token, padding = x[:, FILLED : FILLED + 1], torch.tensor([[False, True, False], [False, False, False]])

    def prepared(**options):
        cache = module.new_cache(2)
        module(x[:, :FILLED], cache=cache, **options)
        return cache

    def attended(module=module, token=token, **options):
        calls.clear()
        cache = prepared()
        module(token, cache=cache, **options)
        return len(calls)

    assert attended() == 0  # gradients are wanted
    with torch.inference_mode():
        assert attended() == 1
    with torch.no_grad():
        assert attended() == 1
        assert attended(token=x[:, FILLED : FILLED + 2]) == 0
        assert attended(position_ids=torch.tensor([[4], [5]])) == 0
        assert attended(key_padding_mask=torch.tensor([[False], [True]])) == 0
        calls.clear()
        module(token, cache=prepared(key_padding_mask=padding))
        module(token, cache=module.new_cache(2))
        with torch.autocast("cpu", torch.bfloat16):
            module(token, cache=prepared())
        assert calls == []
        half = copy.deepcopy(module).to(torch.bfloat16)
        cache = half.new_cache(2)
        half(x[:, :FILLED].bfloat16(), cache=cache)
        half(token.bfloat16(), cache=cache)
        assert calls == []


@pytest.mark.parametrize("name", ["query_map.linear", "out_proj"])
def test_a_weight_of_another_shape_is_refused(name, calls):
    """By torch, as always: the kernel knows addresses alone."""
    module, x = make("qisa", {}, 12, 3)
    cache = module.new_cache(2)
    with torch.no_grad():
        module(x[:, :FILLED], cache=cache)
        module.get_submodule(name).weight.data = torch.ones(12, 11, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(x[:, FILLED : FILLED + 1], cache=cache)
    assert calls == []


def test_a_weight_that_lies_otherwise_in_memory(calls):
    module, x = make("gaussian", {}, 12, 3)
    module.out_proj.weight.data = module.out_proj.weight.data.T.contiguous().T
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)
    assert calls == []


def test_a_full_cache_and_another_batch_are_refused(calls):
    module, x = make("qisa", {}, 12, 3)
    cache, small = module.new_cache(2), KeyValueCache(2, FILLED)
    by_tokens(module, x, cache)
    calls.clear()
    with torch.no_grad():
        with pytest.raises(ValueError, match="a sequence of 8 tokens is longer than block_size=7"):
            module(x[:, :1], cache=cache)
        module(x[:, :FILLED], cache=small)
        with pytest.raises(ValueError, match="the cache has room for max_len=3 tokens; it holds 3, and got 1 more"):
            module(x[:, :1], cache=small)
        cache = module.new_cache(2)
        module(x[:, :FILLED], cache=cache)
        with pytest.raises(ValueError, match="the cache was made for a batch of 2; got 1"):
            module(x[:1, :1], cache=cache)
    assert calls == [] and len(cache) == FILLED


@pytest.mark.parametrize("options", [{"head_dim": 5}, {"head_dim": 2}])
def test_the_cache_of_another_attention_is_refused(options, calls):
    module, x = make("qisa", {}, 12, 3)
    other, _ = make("qisa", options, 12, 3)
    cache = other.new_cache(2)
    with torch.no_grad():
        other(x[:, :FILLED], cache=cache)
        with pytest.raises(RuntimeError, match="must match"):
            module(x[:, FILLED : FILLED + 1], cache=cache)
    assert calls == []


def test_a_temperature_of_another_precision(calls):
    module, x = make("gaussian", {}, 12, 3, torch.float32)
    module.score.raw_beta.data = module.score.raw_beta.data.double()
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-5, atol=1e-5)
    assert calls


class SharedQueries(FeatureMap):
    """One query for all heads, which attention has always spread over them."""

    def forward(self, x):
        return x[:, None, :, : self.out_features]


@pytest.mark.usefixtures("without_shape_checks")
def test_features_that_are_spread_over_heads(calls):
    module, x = make("classical", {}, 12, 3)
    module.query_map = SharedQueries(12, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)
    assert calls


class Wrapped(nn.Module):
    """A map that is no `FeatureMap`, and hands everything else on, as `torch.compile` does with a module."""

    def __init__(self, other):
        super().__init__()
        self.other, self.seen = other, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("other"), name)

    def forward(self, x):
        self.seen += 1
        return self.other(x)


@pytest.mark.parametrize("name", ["query_map", "value_map"])
def test_maps_of_another_kind(name, calls):
    module, x = make("qisa", {}, 12, 3)
    with torch.no_grad():
        whole = module(x)
        setattr(module, name, Wrapped(getattr(module, name)))
        torch.testing.assert_close(by_tokens(module, x), whole, rtol=1e-12, atol=1e-12)
    assert getattr(module, name).seen == 1 + LENGTH - FILLED and calls == []


def test_dropout_is_drawn(calls):
    """As in generation by a model that is left in training mode."""
    module, x = make("classical", {"dropout": 0.5}, 12, 3)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(by_tokens(module.train(), x))
    assert calls == [] and not torch.allclose(*found)
    by_tokens(module.eval(), x)
    assert calls


class Rounding(KeyValueCache):
    def append(self, keys, values, padding, positions):
        return super().append(keys.round(decimals=1), values, padding, positions)


class CountsAll(KeyValueCache):
    def __len__(self):
        return 2**40


def test_a_cache_of_ones_own(calls):
    module, x = make("gaussian", {}, 12, 3)
    cache = Rounding(2, LENGTH)
    by_tokens(module, x, cache)
    assert torch.equal(cache._keys, cache._keys.round(decimals=1)) and calls == []
    cache = KeyValueCache(2, LENGTH)
    append = cache.append
    cache.append = lambda keys, *rest: append(keys.round(decimals=1), *rest)
    by_tokens(module, x, cache)
    assert torch.equal(cache._keys, cache._keys.round(decimals=1)) and calls == []
    assert CountsAll(2, 3).room_for_next(2) is None


def parametrized_values(module):
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(module.value_map, "weights", Halved())


def as_attribute(path):
    def change(module):
        linear = module.get_submodule(path)
        weight = linear.weight.detach()
        del linear.weight
        linear.weight = weight

    return change


@pytest.mark.parametrize("change", [parametrized_values, *map(as_attribute, ("query_map.linear", "out_proj"))])
def test_weights_that_are_kept_otherwise(change):
    module, x = make("qisa", {}, 12, 3)
    change(module)
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)


def test_an_orthogonal_basis():
    module, x = make("ngram", {}, 12, 3)
    parametrizations.orthogonal(module.value_map, "weight")
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)


class InSinglePrecision(LearnedQuadraticFeatureMap):
    def inputs(self, x):
        return super().inputs(x).float()


def test_inputs_of_a_subclass(calls):
    module, x = make("ngram", {}, 12, 3)
    module.value_map.__class__ = InSinglePrecision
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-5, atol=1e-5)
    assert calls  # its features are made before


class Halving(FoldedExecutor):
    def expectations(self, x, weights):
        return super().expectations(x, weights) / 2


@pytest.mark.parametrize("by_class", [True, False])
def test_an_executor_of_ones_own(by_class):
    module, x = make("qisa", {}, 12, 3)
    values = module.value_map
    if by_class:
        values.use(Halving(values.circuits), "folded")
    else:
        own = values.executor.expectations
        values.executor.expectations = lambda x, weights: own(x, weights) / 2
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)


def test_an_executor_of_other_words_is_refused(calls):
    module, x = make("qisa", {}, 12, 3)
    cache = module.new_cache(2)
    with torch.no_grad():
        module(x[:, :FILLED], cache=cache)
        other, _ = make("qisa", {"head_dim": 2}, 12, 3)
        module.value_map.executor = other.value_map.executor
        with pytest.raises(RuntimeError):
            module(x[:, FILLED : FILLED + 1], cache=cache)
    assert calls == []


def test_a_score_that_was_changed():
    module, x = make("gaussian", {}, 12, 3)
    own, seen = module.score.queries, []
    module.score.queries = lambda q: own(2 * q)
    with torch.no_grad():
        torch.testing.assert_close(by_tokens(module, x), module(x), rtol=1e-12, atol=1e-12)
    module, x = make("classical", {"head_dim": 2}, 12, 2)
    module.score.register_forward_hook(lambda *_: seen.append(1))
    by_tokens(module, x)
    plain = list(seen)
    with torch.no_grad():
        module(x)
    assert len(plain) in (0, LENGTH - FILLED)  # as often as without kernels: fused attention calls no score


def test_as_many_temperatures_as_heads(calls):
    module, x = make("gaussian", {}, 12, 3)
    cache = module.new_cache(2)
    with torch.no_grad():
        module(x[:, :FILLED], cache=cache)
        module.score.raw_beta.data = torch.ones(6, dtype=torch.float64)
        module(x[:, FILLED : FILLED + 1], cache=cache)
    assert calls == []


def test_sparse_weights(calls):
    module, x = make("gaussian", {}, 12, 3)
    with torch.no_grad():
        whole = module(x)
        module.out_proj.weight = nn.Parameter(module.out_proj.weight.to_sparse_csr())
        torch.testing.assert_close(by_tokens(module, x), whole, rtol=1e-12, atol=1e-12)
    assert calls == []


def test_another_default_device(calls):
    module, x = make("classical", {}, 12, 3)
    with torch.no_grad(), torch.device("meta"):
        module.new_cache(2)
        found = by_tokens(module, x)
    with torch.no_grad():
        torch.testing.assert_close(found, module(x), rtol=1e-12, atol=1e-12)
    assert calls


@pytest.mark.parametrize("name", ["classical", "gaussian", "qisa"])
def test_what_is_recorded_is_no_constant(name, calls):
    module, x = make(name, {}, 12, 3)

    def last(x):
        cache = module.new_cache(2)
        with torch.no_grad():
            module(x[:, :FILLED], cache=cache)
            return module(x[:, FILLED : FILLED + 1], cache=cache)

    program, other = make_fx(last)(x), x.flip(2)
    torch.testing.assert_close(program(other), last(other), rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


def test_what_is_refused_leaves_no_trace():
    module, x = make("ngram", {}, 12, 3)
    cache = KeyValueCache(2, 4)
    with torch.no_grad():
        module(x[:, :FILLED], cache=cache)
        with pytest.raises(ValueError, match="the cache has room for max_len=4 tokens"):
            module(x[:, 5:7], cache=cache)
        found = module(x[:, FILLED : FILLED + 1], cache=cache)
        torch.testing.assert_close(found, module(x)[:, FILLED : FILLED + 1], rtol=1e-12, atol=1e-12)
