"""Windows of text for training and evaluation, as a LightningDataModule.

The order of training is a pure function of the seed, the epoch and the number of the batch in it. Which batch
comes next is not counted here: it is read from the trainer's own progress, which Lightning stores in every
checkpoint, at the moment the first batch is asked for. A run that is continued in mid-epoch therefore trains
on exactly the batches that were left, however many of them workers had already fetched.
"""

import functools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .corpora import load_corpus
from .progress import following
from .sources import Source
from .tokenizers import TOKENIZERS, BPETokenizer, CharTokenizer, Tokenizer

Batch = tuple[Int64[Tensor, "batch seq"], Int64[Tensor, "batch seq"]]
Shuffle = Literal["windows", "epoch", "sequential"]


class Windows:
    """Windows of one token sequence, gathered a whole batch at a time.

    Window w reads T tokens from ``starts[w]`` on, and is to predict T tokens from ``starts[w] + 1`` on.

    Args:
        tokens: the sequence.
        block_size: T.
        starts: where the windows begin, each at most ``len(tokens) - T - 1``.
    """

    def __init__(self, tokens: Int[Tensor, " length"], block_size: int, starts: Int64[Tensor, " windows"]) -> None:
        self.tokens, self.block_size, self.starts = tokens, block_size, starts
        self._inputs = tokens[:-1].unfold(0, block_size, 1)
        self._targets = tokens[1:].unfold(0, block_size, 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Int64[Tensor, " batch"]) -> Batch:
        starts = self.starts.index_select(0, index)
        # Not `[starts]`, which wakes torch's threads for these few rows: milliseconds on a busy machine.
        return self._inputs.index_select(0, starts).long(), self._targets.index_select(0, starts).long()


class Batches(Dataset):
    """The batches of each epoch: ``batches[epoch, batch]`` is a pure function of the arguments.

    `world_size` processes take `batch_size` windows each from a common list of `samples` windows. The last
    round shares out what is left; if that is less than one window each, it joins the round before. So every
    process gets as many batches as the others, and every window of the list belongs to exactly one of them.

    Args:
        windows: to draw from.
        batch_size: windows of one batch of one process.
        shuffle: ``windows``: independent random windows, with replacement; ``epoch``: every window once an
            epoch, in random order; ``sequential``: every window once, in the order of the text.
        seed: of the random orders.
        samples: windows in an epoch; only for ``windows``. By default as many as there are.
        rank: which of the processes this one is.
        world_size: the number of processes.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        shuffle: Shuffle = "sequential",
        seed: int = 0,
        samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.windows, self.batch_size, self.shuffle, self.seed = windows, batch_size, shuffle, seed
        self.samples = len(windows) if samples is None else samples
        self.rank, self.world_size = rank, world_size
        if self.samples < world_size:
            raise ValueError(f"{self.samples} windows cannot be shared by {world_size} processes; use fewer of them")

    def __len__(self) -> int:
        return -(-(self.samples - self.world_size + 1) // (self.batch_size * self.world_size))

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        epoch, batch = position
        size = self.batch_size * self.world_size
        first, last = batch * size, self.samples if batch == len(self) - 1 else (batch + 1) * size
        if self.shuffle == "windows":
            draws = np.random.default_rng((self.seed, epoch, batch))
            order = torch.from_numpy(draws.integers(len(self.windows), size=last - first))
        elif self.shuffle == "epoch":
            order = _permutation(len(self.windows), self.seed, epoch)[first:last]
        else:
            order = torch.arange(first, last)
        return self.windows[order[self.rank :: self.world_size]]

    def description(self) -> dict[str, Any]:
        """What determines the order, the same for all processes."""
        return {
            "text": f"{zlib.crc32(self.windows.tokens.numpy().data):08x}",
            "block_size": self.windows.block_size,
            "number of windows": len(self.windows),
            "batch_size * processes": self.batch_size * self.world_size,
            "batches in an epoch": len(self),
            "shuffle": self.shuffle,
            "samples_per_epoch": self.samples,
            "seed": self.seed,
        }


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Int64[Tensor, " count"]:
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))


class BatchLoader:
    """Iterates over the batches of an epoch, in the trainer's hands over those that it has still to train on.

    Not a DataLoader, so that Lightning leaves the order and the sharing among processes alone. The batches
    come from one, with workers if wanted, that draws nothing from the global random state.

    Args:
        batches: the batches of each epoch.
        num_workers: processes that gather batches ahead; 0 gathers in this one, which is faster for short
            windows.
        trainer: the trainer whose training progress says where to start. Without it, or while it is not
            training, each pass is a whole epoch and the next one.
    """

    def __init__(self, batches: Batches, num_workers: int = 0, trainer: L.Trainer | None = None) -> None:
        self.batches, self._num_workers, self._trainer = batches, num_workers, trainer
        self._passes = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning calls `iter` early, and nothing may run before it asks for the first batch.
        yield from DataLoader(
            self.batches,
            batch_size=None,
            sampler=self._positions(),
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        )

    def _positions(self) -> list[tuple[int, int]]:
        trainer = self._trainer
        if trainer is None or not trainer.training:
            self._passes += 1
            return [(self._passes - 1, batch) for batch in range(len(self))]
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # A checkpoint written within a step has counted it as begun. Lightning takes that back in the epoch's
        # counts only, which would put the next restart one batch off.
        progress.total.reset_on_restart()
        length = int(trainer.num_training_batches)
        # Lightning counts an epoch that max_steps has cut short as a whole one; the sum of batches is true.
        epoch = 0 if trainer.overfit_batches else progress.total.completed // length
        return [(epoch, batch) for batch in range(progress.current.ready, length)]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps to know the order again; the position in it is the trainer's."""
        return self.batches.description()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to continue in mid-epoch with other data: ValueError naming what differs."""
        for key, now in self.batches.description().items():
            if (then := state.get(key)) != now:
                raise ValueError(
                    f"cannot continue the training data: {key} was {then} in the checkpoint and is {now} "
                    "now; use the data and options that the run began with"
                )


def _as_it_is(batch: Any) -> Any:
    return batch


class TextDataModule(L.LightningDataModule):
    """A corpus, its tokenizer, and windows for training, validation and test.

    All is read and checked at construction, so that `tokenizer` and `vocab_size` are there for the model. A
    batch is ``(inputs, targets)``, both (B, T) int64, the targets one token further. The splits are
    consecutive pieces of the text in the order training, validation, test; each is encoded by itself, so no
    window crosses a boundary. For characters the vocabulary is that of the whole text; BPE is trained on the
    training split. `predict` sees the test windows.

    Args:
        corpus: pydoc, shakespeare, markov or hidden-markov (random languages of known entropy, with options as in
            markov:order=2,symbols=8,seed=1,length=1000000), or the path of a UTF-8 text file.
        data_dir: Folder that holds tinyshakespeare.txt; without it the folder that QATTN_DATA names, the
            user's cache, and a download are tried.
        tokenizer: char, bpe (trained on the training split), the path of a tokenizer.json, the path of a
            folder with GPT-1's vocab.json and merges.txt, or a tokenizer.
        bpe_vocab_size: Number of tokens that bpe learns, at least 256.
        block_size: Tokens in a window (T).
        batch_size: Windows in a batch of one process (B); several processes take a step together on as many times B.
        train_fraction: Part of the text to train on, between 0 and 1.
        val_fraction: Part of the text to validate on, the piece after the training split. The test split is
            the rest; with fractions that sum to 1 there is none.
        published_split: Split as the published code of QISA does, 80/20 twice: train on the first 64 %, test
            on the last 4 %. Validation is on the 16 % after the training split, and 16 % are left out. The
            fractions have no effect then.
        stride: Distance between the beginnings of neighbouring windows, in tokens.
        shuffle: Order of training: windows (independent random windows, with replacement), epoch (every
            window once an epoch, in random order), or sequential.
        samples_per_epoch: Windows in a training epoch, for shuffle=windows only; by default as many as the
            split has.
        eval_windows: Number of random windows, drawn once, to validate and to test on; a split with fewer
            gives all that it has, and null takes all windows of either split.
        num_workers: Processes that gather batches ahead; 0 is faster for short windows.
        seed: Seed of the order of training.
        eval_seed: Seed of the choice of eval_windows; apart from seed, so that runs with different seeds
            compare.

    Raises:
        ValueError: one line naming the wrong value and the remedy.
    """

    def __init__(
        self,
        corpus: str = "pydoc",
        data_dir: str | None = None,
        tokenizer: str | Tokenizer = "char",
        bpe_vocab_size: int = 512,
        block_size: int = 16,
        batch_size: int = 64,
        train_fraction: float = 0.8,
        val_fraction: float = 0.1,
        published_split: bool = False,
        stride: int = 1,
        shuffle: Shuffle = "windows",
        samples_per_epoch: int | None = None,
        eval_windows: int | None = 4096,
        num_workers: int = 0,
        seed: int = 0,
        eval_seed: int = 0,
    ) -> None:
        super().__init__()
        at_least = {
            "block_size": (block_size, 1),
            "batch_size": (batch_size, 1),
            "stride": (stride, 1),
            "samples_per_epoch": (samples_per_epoch, 1),
            "eval_windows": (eval_windows, 1),
            "num_workers": (num_workers, 0),
            "seed": (seed, 0),
            "eval_seed": (eval_seed, 0),
        }
        for name, (value, least) in at_least.items():
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        for name, value in (("train_fraction", train_fraction), ("val_fraction", val_fraction)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1; got {value}")
        if train_fraction + val_fraction > 1 + 1e-9:
            raise ValueError(f"train_fraction + val_fraction must not exceed 1; got {train_fraction} + {val_fraction}")
        if shuffle not in get_args(Shuffle):
            raise ValueError(f"unknown shuffle {shuffle!r}; choose from {', '.join(get_args(Shuffle))}")
        if samples_per_epoch is not None and shuffle != "windows":
            raise ValueError(
                f"samples_per_epoch needs shuffle 'windows', as {shuffle!r} takes every window once; "
                "limit_train_batches shortens any epoch"
            )
        self.block_size, self.batch_size, self.stride = block_size, batch_size, stride
        self.shuffle, self.samples_per_epoch, self.seed = shuffle, samples_per_epoch, seed
        self.eval_windows, self.eval_seed, self.num_workers = eval_windows, eval_seed, num_workers

        self.corpus = load_corpus(corpus, data_dir=data_dir)
        text = self.corpus.text
        texts = split_text(text, train_fraction, val_fraction, published_split)
        # A source has all its symbols in the vocabulary, also those too rare for a short text.
        characters = text + (self.corpus.source_model.symbols if self.corpus.source_model else "")
        with following(f"tokenizing {self.corpus.name}"):
            self.tokenizer = _build_tokenizer(tokenizer, characters, texts["training"], bpe_vocab_size)
            tokens = {name: self._tokens(name, text) for name, text in texts.items()}
        self._check_lengths({name: len(split) for name, split in tokens.items()})
        self.splits = {name: self._windows(name, split) for name, split in tokens.items()}
        #: The language that the corpus was drawn from, with the ids of the tokenizer. None for other texts, and for
        #: BPE, whose tokens are no symbols of the source.
        self.source = _with_ids_of(self.tokenizer, self.corpus.source_model)

    def _tokens(self, split: str, text: str) -> Int[Tensor, " length"]:
        try:
            return torch.tensor(self.tokenizer.encode(text), dtype=torch.int32)
        except ValueError as error:
            raise ValueError(f"the {split} split of {self.corpus.name}: {error}") from None

    def _check_lengths(self, lengths: dict[str, int]) -> None:
        needed = self.block_size + 1
        short = [f"{length} for {name}" for name, length in lengths.items() if length < needed]
        if short:
            raise ValueError(
                f"{self.corpus.name} is too short: it has {', '.join(short)}, and a window needs block_size + 1 = "
                f"{needed} tokens; give a longer text, a larger fraction or a smaller block_size"
            )

    def _windows(self, split: str, tokens: Int[Tensor, " length"]) -> Windows:
        starts = torch.arange(0, len(tokens) - self.block_size, self.stride)
        if split != "training" and self.eval_windows is not None and self.eval_windows < len(starts):
            draws = np.random.default_rng((self.eval_seed, ("validation", "test").index(split)))
            starts = starts[np.sort(draws.choice(len(starts), self.eval_windows, replace=False))]
        return Windows(tokens, self.block_size, starts)

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self.tokenizer.vocab_size

    def train_dataloader(self) -> BatchLoader:
        """The batches left to train on in the trainer's epoch."""
        order = {"shuffle": self.shuffle, "seed": self.seed, "samples": self.samples_per_epoch}
        return BatchLoader(self._batches("training", **order), self.num_workers, self.trainer)

    def val_dataloader(self) -> BatchLoader:
        """The windows of the validation split, in the order of the text."""
        return BatchLoader(self._batches("validation"), self.num_workers)

    def test_dataloader(self) -> BatchLoader:
        """The windows of the test split, in the order of the text."""
        if "test" not in self.splits:
            raise ValueError("there is no test split, as train_fraction and val_fraction sum to 1; make them smaller")
        return BatchLoader(self._batches("test"), self.num_workers)

    def predict_dataloader(self) -> BatchLoader:
        """As for the test."""
        return self.test_dataloader()

    def _batches(self, split: str, **order: Any) -> Batches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Batches(self.splits[split], self.batch_size, **order, rank=rank, world_size=world_size)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={len(windows)}" for name, windows in self.splits.items())
        return f"TextDataModule({self.corpus.name}, {self.tokenizer}, block_size={self.block_size}, {sizes})"

    __str__ = __repr__  # Lightning's own takes every loader for a DataLoader


def split_text(
    text: str, train_fraction: float = 0.8, val_fraction: float = 0.1, published_split: bool = False
) -> dict[str, str]:
    """The pieces of a text, by the name of the split, with the options of `TextDataModule`."""
    cuts = _published_cuts(len(text)) if published_split else _cuts(len(text), train_fraction, val_fraction)
    return {name: text[cut] for name, cut in cuts.items()}


def _cuts(length: int, train_fraction: float, val_fraction: float) -> dict[str, slice]:
    train_end = int(length * train_fraction + 1e-6)  # 0.7 + 0.1 is a little less than 0.8
    val_end = int(length * (train_fraction + val_fraction) + 1e-6)
    cuts = {"training": slice(0, train_end), "validation": slice(train_end, val_end)}
    return cuts if train_fraction + val_fraction > 1 - 1e-9 else cuts | {"test": slice(val_end, length)}


def _published_cuts(length: int) -> dict[str, slice]:
    first, rest = length * 4 // 5, length - length * 4 // 5
    train_end, test_start = first * 4 // 5, first + rest * 4 // 5
    return {
        "training": slice(0, train_end),
        "validation": slice(train_end, first),
        "test": slice(test_start, length),
    }


def _with_ids_of(tokenizer: Tokenizer, source: Source | None) -> Source | None:
    if source is None or not isinstance(tokenizer, CharTokenizer):
        return None
    return source.reordered(tokenizer.decode(range(tokenizer.vocab_size)))


def _build_tokenizer(choice: str | Tokenizer, text: str, train_text: str, bpe_vocab_size: int) -> Tokenizer:
    if isinstance(choice, Tokenizer):
        return choice
    if choice == "char":
        return CharTokenizer.train(text)
    if choice == "bpe":
        return BPETokenizer.train(train_text, bpe_vocab_size)
    if not isinstance(choice, str) or not Path(choice).expanduser().exists():
        raise ValueError(
            f"unknown tokenizer {choice!r}: there is no such file; choose from {', '.join(TOKENIZERS)}, or "
            "give the path of a tokenizer.json"
        )
    return BPETokenizer.load(choice)
