"""Properties that hold for anything: texts, words, partitions of a sequence, vectors."""

import functools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.tokenizers import BPETokenizer, CharTokenizer, tokenizer_from_plain
from pennylane_qattn import build_attention
from pennylane_qattn.encoding import normalise
from pennylane_qattn.observables import LETTERS, decode_words, encode_words, group_words, word_signs

#: The same examples every time: a failure in CI is a failure at home.
repeatable = settings(deadline=None, derandomize=True, max_examples=50)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
words = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.text(LETTERS, min_size=n, max_size=n).filter(lambda w: set(w) != {"I"}), min_size=1)
)


@given(texts)
@repeatable
def test_characters_come_back(text):
    tokenizer = CharTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer_from_plain(tokenizer.to_plain()) == tokenizer


@functools.cache
def bpe() -> BPETokenizer:
    return BPETokenizer.train("the value of the list is the value of a tuple " * 20, 300)


@given(texts)
@repeatable
def test_bytes_come_back(text):
    assert bpe().decode(bpe().encode(text)) == text


@given(words)
@repeatable
def test_words_come_back_and_their_groups_agree(drawn):
    assert decode_words(encode_words(drawn)) == tuple(drawn)
    groups = group_words(drawn)
    assert sorted(i for _, members in groups for i in members) == list(range(len(drawn)))
    for basis, members in groups:
        assert all(letter in ("I", b) for i in members for letter, b in zip(drawn[i], basis, strict=True))


@given(words)
@repeatable
def test_eigenvalues_of_a_word_balance(drawn):
    signs = word_signs(drawn[0])
    assert set(np.unique(signs)) == {-1.0, 1.0} and signs.sum() == 0


@functools.cache
def attention(name: str):
    torch.manual_seed(1)
    return build_attention(name, 6, 2, 12).double().eval()


@given(st.sampled_from(["classical", "qisa", "gaussian", "overlap"]), st.lists(st.integers(1, 4), max_size=5))
@repeatable
def test_any_partition_through_the_cache_is_the_whole(name, parts):
    module = attention(name)
    parts = [part for i, part in enumerate(parts) if sum(parts[: i + 1]) <= 12] or [1]
    x = torch.randn(2, sum(parts), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(parts)))
    cache = module.new_cache(2)
    with torch.no_grad():
        pieces = [module(part, cache=cache) for part in x.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), module(x), rtol=1e-12, atol=1e-12)


finite = st.floats(-1e30, 1e30, allow_nan=False, allow_subnormal=False)


@given(st.lists(finite, min_size=1, max_size=9))
@repeatable
def test_every_vector_has_a_unit_and_a_finite_gradient(numbers):
    x = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    unit = normalise(x)
    assert abs(float(unit.detach().square().sum()) - 1) < 1e-12
    unit.sum().backward()
    # The derivative has no part along the vector. What cancels to make it so is as large as the upstream gradient over
    # the norm, also where nothing is left, as for equal entries: that is what rounding is relative to.
    assert torch.isfinite(x.grad).all()
    largest = max(map(abs, numbers))
    scale = len(numbers) ** 0.5 / largest if largest else 0.0
    assert abs(float(x.grad @ unit.detach())) <= 1e-12 * max(1.0, scale)


def test_a_tiny_vector_of_equal_entries_has_a_gradient_of_rounding():
    x = torch.full((2,), 8.3962e-178, dtype=torch.float64, requires_grad=True)
    normalise(x).sum().backward()
    assert float(x.grad.abs().max()) <= 1e-12 / 8.3962e-178
