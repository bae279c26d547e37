"""Properties that hold for anything: texts and their splits, words, partitions of a sequence, checkpoints, vectors."""

import contextlib
import functools
import math
import tempfile
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_modules.checkpoints import PlainCheckpointIO, read_checkpoint
from lightning_modules.corpora import load_corpus
from lightning_modules.data import split_text
from lightning_modules.language_model import LanguageModel
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer, tokenizer_from_plain
from pennylane_qattn import ATTENTION, build_attention
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


# --- corpora ----------------------------------------------------------------------------------------------------


@given(texts)
@repeatable
def test_a_file_is_kept_exactly(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_bytes(text.encode())
        assert load_corpus(path).text == text


@given(st.binary(min_size=1))
@repeatable
def test_bytes_are_a_text_or_refused_in_a_line(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_bytes(data)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(
                ValueError, match=rf"is not UTF-8: byte {error.start} is 0x[0-9a-f]+; convert the file$"
            ):
                load_corpus(path)
        else:
            assert load_corpus(path).text == text


@given(texts, st.sampled_from([1, 100]), st.integers(1, 99), st.integers(1, 99))
@repeatable
def test_a_split_is_the_text_in_its_order(text, times, train, val):
    """By parts of a hundred, which floats may miss by their rounding: of a hundred characters a whole one."""
    assume(train + val <= 100)
    text = text * times
    pieces = split_text(text, train / 100, val / 100)
    assert "".join(pieces.values()) == text
    assert len(pieces["training"]) == len(text) * train // 100
    assert len(text) - len(pieces.get("test", "")) == len(text) * (train + val) // 100
    assert ("test" in pieces) == (train + val < 100)


@given(texts)
@repeatable
def test_the_published_split_does_not_overlap(text):
    pieces = split_text(text, published_split=True)
    seen, test = pieces["training"] + pieces["validation"], pieces["test"]
    assert text.startswith(seen) and text.endswith(test)
    assert len(seen) == len(text) * 4 // 5 and len(seen) + len(test) <= len(text)


# --- words ------------------------------------------------------------------------------------------------------


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


# --- caches -----------------------------------------------------------------------------------------------------

#: The published forms, which see the future, have no cache.
CACHED = sorted(name for name in ATTENTION if not ATTENTION[name].is_published)


@functools.cache
def attention(name: str):
    torch.manual_seed(1)
    return build_attention(name, 6, 2, 12).double().eval()


@pytest.mark.parametrize("name", CACHED)
@given(parts=st.lists(st.integers(1, 4), max_size=5))
@settings(repeatable, max_examples=12)
def test_any_partition_through_the_cache_is_the_whole(name, parts):
    module = attention(name)
    parts = [part for i, part in enumerate(parts) if sum(parts[: i + 1]) <= 12] or [1]
    x = torch.randn(2, sum(parts), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(parts)))
    cache = module.new_cache(2)
    with torch.no_grad():
        pieces = [module(part, cache=cache) for part in x.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), module(x), rtol=1e-12, atol=1e-12)


# --- checkpoints ------------------------------------------------------------------------------------------------

#: What a checkpoint holds: numbers, text and tensors, in lists and dicts.
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.none()
tensors = st.lists(st.floats(allow_nan=False, width=32), max_size=5).map(torch.tensor)
plain = st.recursive(
    numbers | st.text(st.characters(exclude_categories=["Cs"])) | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(LETTERS), inner, max_size=3),
    max_leaves=8,
)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@functools.cache
def tiny_checkpoint() -> dict:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_heads": 1, "embed_dim": 4, "block_size": 5}
    model = LanguageModel(CharTokenizer("ab\n"), attention="qisa", **sizes)
    return {"state_dict": dict(model.state_dict()), "hyper_parameters": model.to_plain()}


def file_of(content: dict, folder: str) -> Path:
    path = Path(folder, "a.ckpt")
    PlainCheckpointIO().save_checkpoint(content, path)
    return path


@given(plain)
@repeatable
def test_what_a_checkpoint_holds_comes_back(value):
    content = tiny_checkpoint() | {"more": value}
    with tempfile.TemporaryDirectory() as folder:
        assert same(read_checkpoint(file_of(content, folder)), content)


@functools.cache
def saved() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return file_of(tiny_checkpoint(), folder).read_bytes()


mutations = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


@given(mutations, st.floats(0, 1))
@repeatable
def test_damaged_bytes_are_refused_in_a_line_or_change_nothing(changes, kept):
    """What lies between the parts of an archive, each of which has a checksum, is read by nobody."""
    changed = bytearray(saved())
    for place, difference in changes:
        changed[math.floor(place * len(changed))] ^= difference
    for damaged in (changed, saved()[: math.floor(kept * len(saved()))]):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.ckpt")
            path.write_bytes(damaged)
            try:
                state = LanguageModel.load_from_checkpoint(path).state_dict()
            except ValueError as error:
                assert str(error) and "\n" not in str(error)
            else:
                assert same(dict(state), tiny_checkpoint()["state_dict"])


@st.composite
def paths(draw) -> tuple:
    """The way to some part of what describes a model."""
    value, path = tiny_checkpoint()["hyper_parameters"], []
    while isinstance(value, dict | list) and value and (not path or draw(st.booleans())):
        path.append(draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value)))))
        value = value[path[-1]]
    return tuple(path)


def changed(value, path: tuple, other):
    """A copy of nested data with another value at the end of a path."""
    if not path:
        return other
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], other)
    return copy


@contextlib.contextmanager
def signatures_unchecked():
    """A reader meets the package's own messages, and not those of the checks that tests/conftest.py installs."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@given(paths(), st.integers(-1, 9) | plain)
@repeatable
def test_a_changed_description_is_refused_in_a_line_or_makes_a_model(path, other):
    description = changed(tiny_checkpoint()["hyper_parameters"], path, other)
    with tempfile.TemporaryDirectory() as folder, signatures_unchecked():
        file = file_of(tiny_checkpoint() | {"hyper_parameters": description}, folder)
        try:
            model = LanguageModel.load_from_checkpoint(file)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert isinstance(model, LanguageModel)


# --- vectors ----------------------------------------------------------------------------------------------------

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
