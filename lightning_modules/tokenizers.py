"""Text to token ids and back: characters, and byte-pair encoding (BPE) by Hugging Face's ``tokenizers``.

A tokenizer is described completely by plain data (`Tokenizer.to_plain`), which a checkpoint stores. BPE
follows Sennrich, Haddow and Birch (2016), arXiv 1508.07909; trained here it works on bytes, so that it
encodes any text and decodes it exactly. GPT-1's own (40,478 tokens) lower-cases and drops the layout: what it
decodes to is not the text it was given.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from .files import atomic_write

#: Byte-pair encoding learns from words of so many bytes at most; longer ones are cut.
LONGEST_WORD = 500


class Tokenizer(ABC):
    """What a language model needs of a tokenizer; two are equal when they encode and decode alike."""

    name: ClassVar[str]
    """The key in `TOKENIZERS`."""
    content: ClassVar[str]
    """The attribute, and argument of the class, that holds all there is to it, as a string."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids, 0 to vocab_size - 1."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises ValueError at the first character that no token can stand for."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Raises ValueError for an id outside the vocabulary."""

    def to_plain(self) -> dict[str, str]:
        """The tokenizer as strings in a dict, for `tokenizer_from_plain`."""
        return {"name": self.name, self.content: getattr(self, self.content)}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_plain() == other.to_plain()

    def __hash__(self) -> int:
        return hash((self.name, self.vocab_size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token ids must lie between 0 and {self.vocab_size - 1}; got {wrong[0]}")
        return ids


def _unknown_character(text: str, position: int, vocabulary: str) -> ValueError:
    return ValueError(
        f"character {text[position]!r} at position {position} is outside the vocabulary of {vocabulary}; "
        "leave it out, or train a tokenizer on text that has it"
    )


class CharTokenizer(Tokenizer):
    """One token for each character.

    Args:
        characters: the vocabulary; the id of a character is its position. No character may stand twice.
    """

    name, content = "char", "characters"

    def __init__(self, characters: str) -> None:
        if not isinstance(characters, str) or not characters:
            raise ValueError(f"characters must be a string of at least one character; got {characters!r}")
        self.characters = characters
        self._ids = {character: i for i, character in enumerate(characters)}
        if len(self._ids) != len(characters):
            twice = next(c for c in characters if characters.count(c) > 1)
            raise ValueError(f"characters must differ from each other; {twice!r} stands there more than once")

    @classmethod
    def train(cls, text: str) -> Self:
        """The characters of a text, in the order of their code points."""
        if not text:
            raise ValueError("a tokenizer cannot be trained on an empty text; give at least one character")
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError as error:
            position = text.index(error.args[0])
        raise _unknown_character(text, position, f"{self.vocab_size} characters")

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(map(self.characters.__getitem__, self._checked(ids)))


class BPETokenizer(Tokenizer):
    """Byte-pair encoding as a ``tokenizer.json`` of Hugging Face's ``tokenizers`` describes it.

    No special tokens are added to a text, and it is never cut or padded, whatever the description says.

    Args:
        description: the content of a ``tokenizer.json``.
    """

    name, content = "bpe", "description"

    def __init__(self, description: str) -> None:
        if not isinstance(description, str):
            raise ValueError(f"a BPE tokenizer is described by the text of a tokenizer.json; got {description!r:.80}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(description)
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise ValueError(f"not the content of a tokenizer.json: {reason}") from None
        model = self._tokenizer.model
        if not isinstance(model, models.BPE):
            raise ValueError(f"the tokenizer.json holds a {type(model).__name__} model; give one of byte-pair encoding")
        if model.dropout:
            raise ValueError(
                f"dropout {model.dropout:g} makes the encoding random; set it to null in the tokenizer.json"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError("the tokenizer.json has an empty vocabulary; train it first")
        self._vocab_size = max(ids) + 1
        self._unknown = None if model.unk_token is None else self._tokenizer.token_to_id(model.unk_token)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> Self:
        """Learn byte-level tokens from a text: the 256 bytes, and merges up to `vocab_size` tokens in all.

        Any text can then be encoded. A short text may have fewer pairs to merge, and gives fewer tokens.
        """
        if vocab_size < 256:
            raise ValueError(f"a byte-level BPE vocabulary must have at least 256 tokens; got {vocab_size}")
        if not text:
            raise ValueError("a tokenizer cannot be trained on an empty text; give at least one character")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        words = tokenizer.pre_tokenizer
        # The time to learn from a word grows with the square of its length: minutes for 200 kB without a blank.
        pieces = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{{LONGEST_WORD}}}"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
        tokenizer.train_from_iterator([text], trainer)
        tokenizer.pre_tokenizer = words
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a ``tokenizer.json``, or a folder with it or with GPT-1's ``vocab.json``, ``merges.txt``.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        path = Path(path).expanduser()
        try:
            if path.is_dir() and not (path / "tokenizer.json").is_file():
                return cls._load_gpt1(path)
            return cls((path / "tokenizer.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"cannot read a tokenizer from {str(path)!r}: {reason.lower()}; give a tokenizer.json, or a "
                "folder with vocab.json and merges.txt"
            ) from error
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error

    @classmethod
    def _load_gpt1(cls, folder: Path) -> Self:
        """The original GPT-1's: lower-cased, split at blanks and punctuation, words ending in ``</w>``."""
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        (folder / "merges.txt").read_bytes()  # for the usual errors
        if not isinstance(vocabulary, dict) or not any(token.endswith("</w>") for token in vocabulary):
            raise ValueError("vocab.json has no tokens ending in </w>, so it is not GPT-1's; give its tokenizer.json")
        try:
            model = models.BPE.from_file(
                str(folder / "vocab.json"),
                str(folder / "merges.txt"),
                unk_token="<unk>",
                end_of_word_suffix="</w>",
            )
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"vocab.json and merges.txt do not fit: {' '.join(str(error).split())}") from None
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        if "<unk>" in vocabulary:
            tokenizer.add_special_tokens(["<unk>"])
        return cls(tokenizer.to_str())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``tokenizer.json`` that `load` and Hugging Face's libraries read."""
        with atomic_write(path, "w") as file:
            file.write(self._tokenizer.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str) -> list[int]:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:  # of half a surrogate pair, which stands for a byte of an argument that is not UTF-8
            if not (lone := re.search("[\ud800-\udfff]", text)):
                raise
            raise _unknown_character(text, lone.start(), f"{self.vocab_size} BPE tokens") from None
        self._check_all_encoded(text, encoding)
        return encoding.ids

    def _check_all_encoded(self, text: str, encoding: tokenizers.Encoding) -> None:
        """Find characters that became the unknown token, or that no token covers.

        Not covered may be blanks, which pre-tokenizers drop, and what the normalizer takes out, as accents.
        """
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        unknown = [i for i, token in enumerate(encoding.ids) if token == self._unknown]
        spans = np.delete(spans, [i for i in unknown if text[slice(*spans[i])] != encoding.tokens[i]], axis=0)
        opened, closed = (np.bincount(ends, minlength=len(text) + 1) for ends in spans.T)
        normalize = self._tokenizer.normalizer.normalize_str if self._tokenizer.normalizer else str
        uncovered = np.flatnonzero(np.cumsum(opened - closed)[:-1] == 0)
        lost = [int(position) for position in uncovered if normalize(text[position]).strip()]
        if lost and self._unknown is None:
            # A character that vanishes moves the spans after it, so ask for each character by itself.
            vanishing = {
                c
                for c in set(text)
                if normalize(c).strip() and not self._tokenizer.encode(c, add_special_tokens=False).ids
            }
            lost = [position for position, c in enumerate(text) if c in vanishing] or lost
        if lost:
            raise _unknown_character(text, lost[0], f"{self.vocab_size} BPE tokens")

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(self._checked(ids), skip_special_tokens=False)

    @property
    def description(self) -> str:
        """The content of a ``tokenizer.json``."""
        return self._tokenizer.to_str()


TOKENIZERS: dict[str, type[CharTokenizer] | type[BPETokenizer]] = {
    CharTokenizer.name: CharTokenizer,
    BPETokenizer.name: BPETokenizer,
}


def tokenizer_from_plain(plain: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from what its `to_plain` gave.

    Raises:
        ValueError: the data are corrupt or something else; one line.
    """
    for cls in TOKENIZERS.values():
        if isinstance(plain, dict) and plain.keys() == {"name", cls.content} and plain["name"] == cls.name:
            return cls(plain[cls.content])
    kinds = " or ".join(f"{{'name': {name!r}, {cls.content!r}: ...}}" for name, cls in TOKENIZERS.items())
    raise ValueError(f"not a tokenizer's data: expected {kinds}; got {plain!r:.80}")
