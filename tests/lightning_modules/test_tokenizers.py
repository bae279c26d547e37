"""Tokenizers: exact round trips, ids worked out by hand, and parity with Hugging Face's GPT-1 tokenizer."""

import copy
import io
import json
import pickle
import random
import time

import pytest
import torch

from lightning_modules import tokenizers
from lightning_modules.tokenizers import TOKENIZERS, BPETokenizer, CharTokenizer, tokenizer_from_plain

WORDS = ["".join(random.Random(i).choices("abcdefghijklm", k=7)) for i in range(40)]
TEXT = "".join(f"The {word} and, " + "on\n" * (i % 3 == 0) for i, word in enumerate(WORDS)) * 3
ODD = "naïve \U0001f600\t\r\n\x00\u2028 „x“ \u0301  "


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=["char", "bpe", "gpt1"])
def tokenizer(request, gpt1_folder):
    if request.param == "gpt1":
        return BPETokenizer.load(gpt1_folder)
    return CharTokenizer.train(TEXT) if request.param == "char" else BPETokenizer.train(TEXT, 300)


# GPT-1's format by hand: characters within and at the end of a word, and merges to "lo", "low</w>", "er</w>".
GPT1_TOKENS = ["<unk>", *"lowern,", *(f"{c}</w>" for c in "lowern,"), "lo", "low</w>", "er</w>"]
GPT1_MERGES = "#version: 0.2\nl o\nlo w</w>\ne r</w>\n"


@pytest.fixture
def gpt1_folder(tmp_path):
    folder = tmp_path / "gpt1"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(GPT1_TOKENS)}))
    (folder / "merges.txt").write_text(GPT1_MERGES)
    return folder


# Characters


def test_characters_are_numbered_in_the_order_of_their_code_points():
    tokenizer = CharTokenizer.train("hello\nworld")
    assert tokenizer.characters == "\ndehlorw" and tokenizer.vocab_size == 8
    assert tokenizer.encode("low") == [4, 5, 7] and tokenizer.decode([4, 5, 7]) == "low"
    assert CharTokenizer("ba").encode("ab") == [1, 0]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_characters_round_trip_exactly():
    tokenizer = CharTokenizer.train(ODD)
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD
    assert len(tokenizer.encode(ODD)) == len(ODD)
    assert tokenizer.decode(torch.tensor(tokenizer.encode(ODD))) == ODD


def test_a_character_outside_the_vocabulary_is_named_with_its_position():
    with pytest.raises(ValueError) as error:
        CharTokenizer("abc").encode("ab\nc")
    message = "character '\\n' at position 2 is outside the vocabulary of 3 characters; leave it out, or train"
    assert one_line(error).startswith(message)


def test_a_megabyte_of_characters_takes_well_under_a_second():
    text = "".join(random.Random(0).choices("abcdefg\n", k=1_000_000))
    tokenizer = CharTokenizer.train(text)
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 0.5
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("", "at least one character"),
        ("aba", "'a' stands there more than once"),
        (7, "must be a string"),
        (None, "None"),
    ],
)
def test_bad_vocabularies(characters, message):
    with pytest.raises(ValueError, match=message) as error:
        CharTokenizer(characters)
    one_line(error)


# Byte-pair encoding


def test_bpe_first_merges_the_most_frequent_pairs():
    tokenizer = BPETokenizer.train("ababab abab", 258)  # "ab" is the commonest pair, then "abab"
    ids = tokenizer.encode("ab ababab")
    assert tokenizer.vocab_size == 258 and [tokenizer.decode([i]) for i in ids] == ["ab", " ", "abab", "ab"]
    assert ids[0] == 256 and ids[2] == 257


def test_trained_bpe_round_trips_any_text():
    tokenizer = BPETokenizer.train(TEXT, 300)
    for text in (
        TEXT,
        ODD,
        "",
        " ",
        "\n\n  x",
        "<unk> </w> Ġ <|endoftext|>",
        "".join(map(chr, range(1, 3000))),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT)
    assert max(tokenizer.encode(TEXT)) < tokenizer.vocab_size == 300


def test_training_is_deterministic_and_may_run_out_of_pairs():
    assert BPETokenizer.train(TEXT, 290) == BPETokenizer.train(TEXT, 290) != BPETokenizer.train(TEXT, 291)
    assert BPETokenizer.train("ab", 5000).vocab_size == 257
    for text, size, message in (("abc", 255, "at least 256 tokens; got 255"), ("", 300, "an empty text")):
        with pytest.raises(ValueError, match=message) as error:
            BPETokenizer.train(text, size)
        one_line(error)


def test_saved_bpe_is_a_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(TEXT, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids == tokenizer.encode(TEXT)
    assert BPETokenizer.load(tmp_path) == BPETokenizer.load(tmp_path / "tokenizer.json") == tokenizer


def test_texts_are_neither_cut_nor_padded_nor_given_special_tokens(tmp_path):
    import tokenizers

    description = json.loads(BPETokenizer.train(TEXT, 300).description)
    raw = tokenizers.Tokenizer.from_str(json.dumps(description))
    raw.enable_truncation(4)
    raw.enable_padding(length=9)
    raw.add_special_tokens(["<s>"])
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    raw.save(str(tmp_path / "tokenizer.json"))
    loaded = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == 301
    assert loaded.encode(TEXT) == BPETokenizer.train(TEXT, 300).encode(TEXT)
    assert loaded.decode([300, *loaded.encode("cat")]) == "<s>cat"


# The original GPT-1


def test_gpt1_lower_cases_and_ends_words(gpt1_folder):
    tokenizer = BPETokenizer.load(gpt1_folder)
    names = {name: i for i, name in enumerate(GPT1_TOKENS)}
    expected = ["low</w>", "lo", "w", "er</w>", ",</w>", "n", "e", "w</w>"]
    assert tokenizer.encode("LOW lower,\n  néw") == [names[name] for name in expected]
    assert tokenizer.vocab_size == len(GPT1_TOKENS)
    assert tokenizer.decode(tokenizer.encode("LOW lower,\n  new")) == "low lower , new"
    assert tokenizer.encode("ne\u0301w") == tokenizer.encode("new")  # an accent of its own is dropped like the other


def test_gpt1_equals_hugging_face(gpt1_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.OpenAIGPTTokenizer.from_pretrained(str(gpt1_folder))
    ours = BPETokenizer.load(gpt1_folder)
    for text in "low lower, Lower owner", "new\nréol", "wwerr  ,,now", "low <unk> low", "":
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"])


@pytest.mark.parametrize(
    ("text", "character", "position"),
    [("low xlow", "x", 4), ("lowz", "z", 3), ("<unk> low\U0001f600", "\U0001f600", 9)],
)
def test_gpt1_names_a_character_that_it_does_not_know(gpt1_folder, text, character, position):
    with pytest.raises(ValueError) as error:
        BPETokenizer.load(gpt1_folder).encode(text)
    assert one_line(error).startswith(f"character {character!r} at position {position} is outside the vocabulary")


def test_a_character_that_vanishes_is_named_too(gpt1_folder):
    """Without an unknown token the library drops what it does not know."""
    description = json.loads(BPETokenizer.load(gpt1_folder).description)
    description["model"]["unk_token"] = None
    tokenizer = BPETokenizer(json.dumps(description))
    assert tokenizer.encode("low low") == 2 * [GPT1_TOKENS.index("low</w>")]
    with pytest.raises(ValueError, match="character 'q' at position 5"):
        tokenizer.encode("low lqow")


def test_bad_folders_and_files_are_named_in_one_line(gpt1_folder, tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "text.json").write_text("no json")
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "vocab.json").write_text('{"a": 0, "\\u0120b": 1}')
    (gpt2 / "merges.txt").write_text("a b\n")
    unfit = tmp_path / "unfit"
    unfit.mkdir()
    (unfit / "vocab.json").write_text('{"a": 0, "b</w>": 1}')
    (unfit / "merges.txt").write_text("x y\n")
    (gpt1_folder / "merges.txt").unlink()
    for path, message in (
        (tmp_path / "missing", "no such file or directory; give a tokenizer.json"),
        (tmp_path / "latin", "cannot read a tokenizer from"),
        (tmp_path / "other.json", "not the content of a tokenizer.json"),
        (tmp_path / "text.json", "not the content of a tokenizer.json"),
        (gpt1_folder, "no such file or directory; give a tokenizer.json"),
        (gpt2, "not GPT-1's"),
        (unfit, "do not fit"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            BPETokenizer.load(path)
        assert str(path) in one_line(error)


# What all have in common


def test_plain_data_goes_through_a_checkpoint(tokenizer):
    buffer = io.BytesIO()
    torch.save({"tokenizer": tokenizer.to_plain()}, buffer)
    buffer.seek(0)
    again = tokenizer_from_plain(torch.load(buffer, weights_only=True)["tokenizer"])
    text = "lower, new owner" if tokenizer.vocab_size == len(GPT1_TOKENS) else TEXT[:60]
    assert again == tokenizer and hash(again) == hash(tokenizer) and again is not tokenizer
    assert again.encode(text) == tokenizer.encode(text) and len(again.encode(text)) > 3
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.vocab_size == tokenizer.vocab_size and TOKENIZERS[again.name] is type(tokenizer)


def test_copies_are_equal_and_others_are_not(tokenizer):
    assert copy.deepcopy(tokenizer) == tokenizer == pickle.loads(pickle.dumps(tokenizer))
    assert tokenizer != CharTokenizer("xyz") and tokenizer != "tokenizer" and tokenizer != BPETokenizer.train(TEXT, 260)


def test_ids_outside_the_vocabulary_are_named(tokenizer):
    for wrong in -1, tokenizer.vocab_size:
        with pytest.raises(ValueError, match=f"between 0 and {tokenizer.vocab_size - 1}; got {wrong}"):
            tokenizer.decode([0, wrong, 1])


def altered_bpe(**model):
    """The plain data of a BPE tokenizer with other entries in its model."""
    description = json.loads(BPETokenizer.train(TEXT, 260).description)
    return {"name": "bpe", "description": json.dumps(description | {"model": description["model"] | model})}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            None,
            "expected {'name': 'char', 'characters': ...} or {'name': 'bpe', 'description': ...}; got None",
        ),
        ([], "got []"),
        ({}, "got {}"),
        ({"name": "word", "characters": "ab"}, "not a tokenizer's data"),
        ({"name": ["char"], "characters": "ab"}, "not a tokenizer's data"),
        ({"name": "char"}, "not a tokenizer's data"),
        ({"name": "char", "description": "ab"}, "not a tokenizer's data"),
        ({"name": "char", "characters": "ab", "more": 1}, "not a tokenizer's data"),
        ({"name": "char", "characters": ["a", "b"]}, "must be a string"),
        ({"name": "char", "characters": "aa"}, "more than once"),
        ({"name": "bpe", "description": {"model": {}}}, "described by the text of a tokenizer.json"),
        ({"name": "bpe", "description": "{}"}, "not the content of a tokenizer.json"),
        ({"name": "bpe", "description": altered_bpe()["description"][:-9]}, "not the content of"),
        (altered_bpe(type="WordLevel", unk_token="a"), "holds a WordLevel model"),
        (altered_bpe(dropout=0.1), "dropout 0.1 makes the encoding random"),
        (altered_bpe(vocab={}, merges=[]), "empty vocabulary"),
    ],
)
def test_foreign_and_corrupt_data_are_refused_in_one_line(plain, message):
    with pytest.raises(ValueError) as error:
        tokenizer_from_plain(plain)
    assert message in one_line(error) and len(str(error.value)) < 250


class Watched:
    """A tokenizer that learns from no longer words: the time to do so grows with the square of their length."""

    library = tokenizers.tokenizers.Tokenizer  # which has no subclasses
    from_str = library.from_str

    def __init__(self, model):
        self.__dict__["inner"] = self.library(model)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __setattr__(self, name, value):
        setattr(self.inner, name, value)

    def train_from_iterator(self, texts, trainer):
        words = [word for text in texts for word, _ in self.pre_tokenizer.pre_tokenize_str(text)]
        assert max(map(len, words)) <= 500
        self.inner.train_from_iterator(texts, trainer)


@pytest.mark.parametrize("unit", ["a", " ", "\0", "0123456789", "\U0001f389"])
def test_a_text_without_words_is_learned_from_in_pieces(unit, monkeypatch):
    """A word of 300,000 letters took minutes."""
    monkeypatch.setattr(tokenizers.tokenizers, "Tokenizer", Watched)
    text = (unit * 30_000)[:30_000]
    tokenizer = BPETokenizer.train(text, 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode()) / 4


def test_words_of_usual_length_are_learned_as_a_whole(monkeypatch):
    text = "the cat and the dog, " * 40 + "x" * (tokenizers.LONGEST_WORD - 1) + " end"  # its blank counts
    before = BPETokenizer.train(text, 290)
    monkeypatch.setattr(tokenizers, "LONGEST_WORD", 10_000)
    assert BPETokenizer.train(text, 290) == before
    assert json.loads(before.description)["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.mark.parametrize("text", ["\ufeffa\r\nb\rc\n\x85d\u2028", "\0\0a", "שלום ‏عليكم‎", "👩‍👩‍👧‍👦𝔘", "\ud7ff\ue000"])
def test_odd_characters_come_back(text):
    for tokenizer in (CharTokenizer.train(text), BPETokenizer.train("the cat " * 9, 260)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
