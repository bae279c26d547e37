"""Windows, splits and orders against slices of the text; resumption against an unbroken run."""

import random
import time
import warnings

import lightning as L
import numpy as np
import pytest
import torch

from lightning_modules.data import Batches, BatchLoader, TextDataModule, Windows
from lightning_modules.tokenizers import BPETokenizer, CharTokenizer

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # The worker processes wanted here are few, and they do nothing that a fork could block.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

PROSE = "".join(random.Random(0).choices("abcdefg hij\n", k=307))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(PROSE.encode())
    return str(path)


@pytest.fixture
def build(text_file):
    def build(**options):
        return TextDataModule(**{"corpus": text_file, "block_size": 5, "batch_size": 7, **options})

    return build


def decode_rows(module, rows):
    return [module.tokenizer.decode(row) for row in rows.tolist()]


def all_windows(text, size, stride=1):
    return [text[i : i + size] for i in range(0, len(text) - size + 1, stride)]


def read(module, loader):
    """The windows with their last target, as text, batch by batch."""
    batches = []
    for batch in loader:
        assert isinstance(batch, tuple)
        inputs, targets = batch
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape and inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        batches.append(decode_rows(module, torch.cat([inputs, targets[:, -1:]], 1)))
    return batches


def flat(batches):
    return [window for batch in batches for window in batch]


# Splits and windows


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_every_window_of_each_split_and_none_across_a_boundary(build, stride):
    module = build(shuffle="sequential", stride=stride, eval_windows=None, train_fraction=0.7, val_fraction=0.1)
    cuts = {"train": PROSE[:214], "val": PROSE[214:245], "test": PROSE[245:]}
    for name, text in cuts.items():
        batches = read(module, getattr(module, f"{name}_dataloader")())
        assert flat(batches) == all_windows(text, 6, stride)
        assert {len(batch) for batch in batches[:-1]} <= {7}
    assert read(module, module.predict_dataloader()) == read(module, module.test_dataloader())


def test_fractions_are_not_cut_short_by_rounding(tmp_path):
    """100 * 0.29 and 100 * 0.58 are a little less than 29 and 58 in floating point."""
    (tmp_path / "hundred.txt").write_text("0123456789" * 10)
    module = TextDataModule(str(tmp_path / "hundred.txt"), block_size=2, train_fraction=0.29, val_fraction=0.29)
    assert [len(windows.tokens) for windows in module.splits.values()] == [29, 29, 42]


def test_published_split_trains_on_64_percent_and_tests_on_the_last_4(build):
    module = build(published_split=True, shuffle="sequential", eval_windows=None)
    # floor(0.8 * 307) = 245; floor(0.8 * 245) = 196; floor(0.8 * 62) = 49, hence the test starts at 294
    assert flat(read(module, module.train_dataloader())) == all_windows(PROSE[:196], 6)
    assert flat(read(module, module.val_dataloader())) == all_windows(PROSE[196:245], 6)
    assert flat(read(module, module.test_dataloader())) == all_windows(PROSE[294:], 6)


def test_fractions_that_sum_to_one_leave_no_test_split(build):
    module = build(train_fraction=0.9, val_fraction=0.1, eval_windows=None)
    assert flat(read(module, module.val_dataloader())) == all_windows(PROSE[276:], 6)
    with pytest.raises(ValueError, match="there is no test split"):
        module.test_dataloader()


def test_eval_windows_are_drawn_once_without_repetition(build):
    first, again, other = (
        build(eval_windows=11, seed=1),
        build(eval_windows=11, seed=2),
        build(eval_windows=11, eval_seed=5),
    )
    chosen = first.splits["validation"].starts.tolist()
    assert len(set(chosen)) == 11 and chosen == sorted(chosen)
    assert read(first, first.val_dataloader()) == read(first, first.val_dataloader())
    assert chosen == again.splits["validation"].starts.tolist() != other.splits["validation"].starts.tolist()
    assert chosen != first.splits["test"].starts.tolist()
    assert len(build(eval_windows=10_000).splits["validation"]) == 26  # of 31 characters


def test_bpe_is_trained_on_the_training_split_and_encodes_each_split_by_itself(build):
    module = build(tokenizer="bpe", bpe_vocab_size=300)
    assert module.vocab_size == 300
    assert module.tokenizer == BPETokenizer.train(PROSE[:245], 300)
    texts = PROSE[:245], PROSE[245:276], PROSE[276:]
    for windows, text in zip(module.splits.values(), texts, strict=True):
        assert windows.tokens.tolist() == module.tokenizer.encode(text)


def test_a_tokenizer_or_the_path_of_one_can_be_given(build, tmp_path):
    wide = CharTokenizer("XYZ" + "".join(sorted(set(PROSE))))
    module = build(tokenizer=wide)
    assert module.tokenizer is wide and module.vocab_size == len(set(PROSE)) + 3
    assert module.splits["training"].tokens.tolist() == wide.encode(PROSE[:245])
    bpe = BPETokenizer.train(PROSE, 270)
    bpe.save(tmp_path / "tokenizer.json")
    assert build(tokenizer=str(tmp_path / "tokenizer.json")).tokenizer == bpe


# The order of training


def test_epoch_order_sees_every_window_once_and_each_epoch_anew(build):
    module = build(shuffle="epoch", seed=3)
    loader = module.train_dataloader()
    epochs = [flat(read(module, loader)) for _ in range(3)]
    assert len(loader) == 35 and all(len(epoch) == 240 for epoch in epochs)
    assert all(sorted(epoch) == sorted(all_windows(PROSE[:245], 6)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[:2] == [
        flat(read(module, again)) for again in [build(shuffle="epoch", seed=3).train_dataloader()] * 2
    ]
    assert epochs[0] != flat(read(module, build(shuffle="epoch", seed=4).train_dataloader()))


def test_random_windows_are_drawn_independently_and_evenly(build):
    module = build(samples_per_epoch=24_000, batch_size=1000, block_size=5)
    loader = module.train_dataloader()
    starts = torch.cat([inputs for inputs, _ in loader])
    assert len(loader) == 24 and len(starts) == 24_000
    windows, counts = starts.unique(dim=0, return_counts=True)
    assert len(windows) == len(set(all_windows(PROSE[:244], 5)))  # each is met
    expected = torch.tensor([all_windows(PROSE[:244], 5).count(w) for w in decode_rows(module, windows)]) * 100.0
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - len(windows)) < 5 * (2 * len(windows)) ** 0.5
    first, second = next(iter(loader)), next(iter(loader))  # the second and third pass
    assert not torch.equal(first[0], second[0])


def test_a_batch_is_a_pure_function_of_seed_epoch_and_number():
    tokens = torch.arange(101, dtype=torch.int32)
    windows = Windows(tokens, 3, torch.arange(0, 98, 2))
    for shuffle in "windows", "epoch", "sequential":
        batches = Batches(windows, 5, shuffle, seed=7)
        in_order = [batches[epoch, i][0] for epoch in range(2) for i in range(len(batches))]
        backwards = [Batches(windows, 5, shuffle, seed=7)[epoch, i][0] for epoch in (1, 0) for i in reversed(range(10))]
        assert all(map(torch.equal, in_order, reversed(backwards)))


def test_batches_follow_known_draws():
    """Against numpy's generator itself, so that a changed stream, which would break resuming, is seen."""
    windows = Windows(torch.arange(101, dtype=torch.int32), 3, torch.arange(98))
    inputs, targets = Batches(windows, 5, "windows", seed=7)[2, 11]
    expected = np.random.default_rng([7, 2, 11]).integers(98, size=5)
    assert inputs.tolist() == [[s, s + 1, s + 2] for s in expected] and torch.equal(targets, inputs + 1)
    inputs, _ = Batches(windows, 5, "epoch", seed=7)[2, 11]
    assert inputs[:, 0].tolist() == np.random.default_rng([7, 2]).permutation(98)[55:60].tolist()


@pytest.mark.parametrize("shuffle", ["epoch", "sequential"])
@pytest.mark.parametrize(
    ("count", "size", "processes"), [(97, 5, 3), (91, 5, 3), (90, 5, 3), (7, 5, 3), (3, 5, 3), (12, 4, 1)]
)
def test_processes_share_every_window_exactly_once(shuffle, count, size, processes):
    windows = Windows(torch.arange(count + 3, dtype=torch.int32), 3, torch.arange(count))
    shares = [Batches(windows, size, shuffle, rank=rank, world_size=processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    batches = [share[4, i][0][:, 0] for share in shares for i in range(len(share))]
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert all(0 < len(batch) <= size + 1 for batch in batches)
    whole = Batches(windows, size * processes, shuffle)  # step by step the same windows as one process would take
    for i in range(len(shares[0]) - 1):
        together = torch.cat([share[4, i][0] for share in shares])
        assert sorted(together.tolist()) == sorted(whole[4, i][0].tolist())


def test_more_processes_than_windows_is_an_error():
    windows = Windows(torch.arange(6, dtype=torch.int32), 3, torch.arange(2))
    with pytest.raises(ValueError, match="2 windows cannot be shared by 3 processes"):
        Batches(windows, 5, world_size=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_leave_the_global_random_states_alone(build, num_workers):
    module = build(shuffle="epoch", num_workers=num_workers)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    loaders = module.train_dataloader(), module.val_dataloader(), module.test_dataloader()
    numbers = [read(module, loader) for loader in loaders]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    here = build(shuffle="epoch")
    assert numbers[0] == read(here, here.train_dataloader())


@pytest.mark.parametrize("shuffle", ["windows", "epoch", "sequential"])
def test_gathering_a_batch_takes_less_than_a_millisecond(shuffle):
    windows = Windows(torch.zeros(1_000_000, dtype=torch.int32), 16, torch.arange(999_984))
    batches = iter(BatchLoader(Batches(windows, 1024, shuffle)))
    next(batches)
    times = []
    for _ in range(10):
        start = time.process_time()  # of this process only: other programs do not count
        for _ in range(10):
            next(batches)
        times.append((time.process_time() - start) / 10)
    assert min(times) < 1e-3


# Resuming


class Recorder(L.LightningModule):
    """Remembers the batches it trains on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, *(part.tolist() for part in batch)))
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(Exception):
    pass


class SaveAndDie(L.Callback):
    """Saves a checkpoint in a hook when `step` batches have been trained on, and raises."""

    def __init__(self, hook, step, path):
        self.step, self.path, self.seen = step, path, 0
        setattr(self, hook, self.die)

    def die(self, trainer, module, *_):
        if not trainer.sanity_checking and len(module.seen) >= self.step:
            trainer.save_checkpoint(self.path)
            raise Killed


class Save(SaveAndDie):
    def die(self, trainer, module, *_):
        trainer.save_checkpoint(self.path)


def fit(module, callbacks=(), ckpt_path=None, **options):
    model = Recorder()
    trainer = L.Trainer(
        **{"max_epochs": 4, "limit_val_batches": 0, **options},
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    try:
        trainer.fit(model, datamodule=module, ckpt_path=ckpt_path, weights_only=True)
    except Killed:
        pass
    return model.seen


# 245 characters of training text give 240 windows: 35 batches an epoch, the last of 2 windows.
EPOCH = 35
VALIDATE = {"limit_val_batches": 1, "val_check_interval": 7, "num_sanity_val_steps": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", ["windows", "epoch"])
def test_a_run_stopped_in_mid_epoch_goes_on_with_the_next_batch(build, tmp_path, shuffle, num_workers):
    options = {"shuffle": shuffle, "num_workers": num_workers, "seed": 5}
    whole = fit(build(**options), max_epochs=3)
    assert len(whole) == 3 * EPOCH and whole[0] != whole[EPOCH] != whole[2 * EPOCH]
    path = tmp_path / "killed.ckpt"
    before = fit(build(**options), [SaveAndDie("on_train_batch_end", EPOCH + 12, path)], max_epochs=3)
    after = fit(build(**options), ckpt_path=path, max_epochs=3)
    assert before == whole[: EPOCH + 12]
    assert after == whole[EPOCH + 12 :]


@pytest.mark.parametrize(
    "limit", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 4 * EPOCH}], ids=["epochs", "steps"]
)
@pytest.mark.parametrize(
    ("hook", "step", "trained", "options"),
    [
        ("on_train_batch_end", 1, 1, {}),
        ("on_train_batch_end", 2 * EPOCH - 1, 2 * EPOCH - 1, {}),
        ("on_train_batch_end", 2 * EPOCH, 2 * EPOCH, {}),
        ("on_train_epoch_end", 2 * EPOCH, 2 * EPOCH, {}),
        ("on_train_epoch_end", 2 * EPOCH, 2 * EPOCH, VALIDATE),
        ("on_train_batch_start", EPOCH + 12, EPOCH + 12, {}),
        ("on_before_zero_grad", EPOCH + 12, EPOCH + 11, {}),  # dies within a step: that batch comes again
        ("on_validation_end", EPOCH + 12, EPOCH + 14, VALIDATE),
        ("on_validation_start", EPOCH + 12, EPOCH + 14, VALIDATE),
        ("on_validation_end", 2 * EPOCH, 2 * EPOCH, VALIDATE),
        ("on_train_batch_end", EPOCH + 13, EPOCH + 13, {"accumulate_grad_batches": 3}),
    ],
)
def test_a_run_goes_on_from_wherever_it_was_saved(build, tmp_path, limit, hook, step, trained, options):
    if "accumulate_grad_batches" in options and "max_steps" in limit:
        limit = {"max_epochs": -1, "max_steps": 4 * 12}
    whole = fit(build(shuffle="epoch"), **limit, **options)
    assert len(whole) == 4 * EPOCH
    path = tmp_path / "killed.ckpt"
    fit(build(shuffle="epoch"), [SaveAndDie(hook, step, path)], **limit, **options)
    after = fit(build(shuffle="epoch"), ckpt_path=path, **limit, **options)
    assert after == whole[trained:]


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end"])
@pytest.mark.parametrize("steps", [EPOCH + 12, 2 * EPOCH])
def test_a_finished_run_goes_on_with_more_steps(build, tmp_path, steps, hook):
    whole = fit(build(shuffle="epoch"), max_epochs=-1, max_steps=4 * EPOCH)
    path = tmp_path / "finished.ckpt"
    before = fit(build(shuffle="epoch"), [Save(hook, steps, path)], max_epochs=-1, max_steps=steps)
    after = fit(build(shuffle="epoch"), ckpt_path=path, max_epochs=-1, max_steps=4 * EPOCH)
    assert before + after == whole


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_run_can_be_stopped_and_resumed_twice(build, tmp_path, hook):
    whole = fit(build(shuffle="epoch"))
    paths = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    pieces = [
        fit(build(shuffle="epoch"), [SaveAndDie(hook, EPOCH + 3, paths[0])]),
        fit(build(shuffle="epoch"), [SaveAndDie("on_train_batch_end", EPOCH + 5, paths[1])], paths[0]),
        fit(build(shuffle="epoch"), ckpt_path=paths[1]),
    ]
    assert sum(pieces, []) == whole


def test_limited_epochs_and_overfitting(build):
    limited = fit(build(shuffle="epoch"), max_epochs=2, limit_train_batches=4)
    assert len(limited) == 8 and limited[:4] != limited[4:]
    batches = fit(build(shuffle="epoch"), max_epochs=2, overfit_batches=4)
    assert batches[:4] == batches[4:] == limited[:4]


def test_resuming_with_other_data_is_an_error(build, tmp_path):
    path = tmp_path / "killed.ckpt"
    fit(build(seed=5), [SaveAndDie("on_train_batch_end", EPOCH + 12, path)])
    for options, message in (
        ({"batch_size": 6}, r"batch_size \* processes was 7 in the checkpoint and is 6 now"),
        ({"seed": 6}, "seed was 5 in the checkpoint and is 6 now"),
        (
            {"tokenizer": CharTokenizer("-" + "".join(sorted(set(PROSE))))},
            "text was [0-9a-f]{8} in the checkpoint",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            fit(build(**{"seed": 5, **options}), ckpt_path=path)
        assert "\n" not in str(error.value)


def test_a_loader_read_while_no_one_trains_starts_from_the_beginning(build):
    module = build(shuffle="epoch")
    expected = read(module, module.train_dataloader())
    fit(module, max_epochs=2)
    assert read(module, module.train_dataloader()) == expected


def test_validation_test_and_prediction_see_their_windows(build):
    module, seen = build(eval_windows=11), []

    class Eyes(Recorder):
        def validation_step(self, batch, batch_idx):
            seen.append(decode_rows(module, batch[0]))

        test_step = predict_step = validation_step

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for method, split in (
        (trainer.validate, "validation"),
        (trainer.test, "test"),
        (trainer.predict, "test"),
    ):
        seen.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "predict returned None")
            method(Eyes(), datamodule=module)
        text = {"validation": PROSE[245:276], "test": PROSE[276:]}[split]
        assert flat(seen) == [text[s : s + 5] for s in module.splits[split].starts]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"stride": 0}, "stride must be at least 1; got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0; got -1"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"samples_per_epoch": 0}, "samples_per_epoch must be at least 1; got 0"),
        ({"samples_per_epoch": 5, "shuffle": "epoch"}, "samples_per_epoch needs shuffle 'windows'"),
        ({"eval_windows": 0}, "eval_windows must be at least 1; got 0"),
        ({"train_fraction": 0.0}, "train_fraction must lie between 0 and 1; got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1; got 1.0"),
        ({"train_fraction": 0.9, "val_fraction": 0.2}, "must not exceed 1; got 0.9 + 0.2"),
        ({"shuffle": "random"}, "unknown shuffle 'random'; choose from windows, epoch, sequential"),
        ({"tokenizer": "words"}, "unknown tokenizer 'words': there is no such file; choose from char, bpe"),
        ({"tokenizer": "bpe", "bpe_vocab_size": 255}, "must have at least 256 tokens; got 255"),
        ({"corpus": "nowhere"}, "unknown corpus 'nowhere'"),
        (
            {"block_size": 245},
            "prose.txt is too short: it has 245 for training, 31 for validation, 31 for test, and a window needs "
            "block_size + 1 = 246 tokens",
        ),
        ({"block_size": 31}, "it has 31 for validation, 31 for test, and"),
        ({"val_fraction": 0.19}, "it has 4 for test, and"),
        ({"tokenizer": CharTokenizer("abc")}, "the training split of prose.txt: character"),
    ],
)
def test_bad_input_is_named_in_one_line(build, options, message):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_shortest_text_that_will_do(tmp_path):
    (tmp_path / "short.txt").write_text("abcdef" * 3)
    module = TextDataModule(str(tmp_path / "short.txt"), block_size=5, train_fraction=0.34, val_fraction=0.34)
    assert [len(windows) for windows in module.splits.values()] == [1, 1, 1]


def test_it_prints_its_sizes(build):
    assert str(build()) == repr(build())
    assert repr(build()).endswith("block_size=5, training=240, validation=26, test=26)")


# Texts of a known source


def test_the_source_has_the_ids_of_the_tokenizer():
    module = TextDataModule(
        "markov:symbols=4,order=2,length=5003,seed=2", block_size=5, tokenizer=CharTokenizer("xdbca")
    )
    drawn = module.corpus.source_model
    inputs, targets = next(iter(module.val_dataloader()))
    letters = [[drawn.symbols.index(c) for c in row] for row in decode_rows(module, inputs)]
    known = module.source.conditional(inputs)
    torch.testing.assert_close(known[..., [4, 2, 3, 1]], drawn.conditional(torch.tensor(letters)), rtol=1e-13, atol=0)
    assert not known[..., 0].any()
    assert torch.equal(module.source.cross_entropy(inputs, targets), -known.gather(2, targets[..., None])[..., 0].log())


def test_a_vocabulary_has_all_symbols_of_its_source():
    """Nine characters cannot hold them all."""
    module = TextDataModule("hidden-markov:symbols=11,length=9", block_size=1, train_fraction=0.5, val_fraction=0.25)
    assert module.tokenizer == CharTokenizer("abcdefghijk") and module.source.symbols == "abcdefghijk"
    assert "".join(text for text in module.corpus.text) == module.corpus.source_model.sample_text(9)


def test_only_characters_of_a_source_have_an_optimum(build):
    assert build().source is None
    bpe = TextDataModule("markov:length=2003", tokenizer="bpe", bpe_vocab_size=260, block_size=5)
    assert bpe.corpus.source_model is not None and bpe.source is None
