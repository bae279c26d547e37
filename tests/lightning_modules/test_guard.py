"""The guard in a Trainer of one's own: models it was not made for, loggers, several processes, and the label."""

import csv
import dataclasses
import math
import signal
import threading
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules import labels
from lightning_modules.callbacks import RandomState, RunCheckpoint, random_state, set_random_state
from lightning_modules.checkpoints import PlainCheckpointIO, read_checkpoint
from lightning_modules.data import TextDataModule
from lightning_modules.executions import say
from lightning_modules.guard import CausalityGuard, NonCausalError
from lightning_modules.language_model import LanguageModel
from lightning_modules.loggers import RunCSVLogger, set_label
from lightning_modules.progress import RichProgress
from lightning_modules.tokenizers import CharTokenizer
from pennylane_qattn import Classical, causality

pytestmark = [
    # Lightning 2.6 uses what torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

TEXT = "the quick brown fox jumps over the lazy dog. " * 12
SIZES = dict(num_layers=1, embed_dim=4, block_size=5, warmup_steps=1)


class Sums(nn.Module):
    """Tokens (B, T) to logits (B, T, 11): running sums of embeddings, or, leaking, those of the whole row."""

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal
        self.embedding, self.head = nn.Embedding(11, 3), nn.Linear(3, 11)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x.cumsum(1) if self.is_causal else x.sum(1, keepdim=True) + x)


class Foreign(L.LightningModule):
    """A LightningModule that knows nothing of guards."""

    def __init__(self, is_causal=True):
        super().__init__()
        self.net = Sums(is_causal)

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        tokens = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(3))
        return DataLoader(tokens, batch_size=2)


def trainer(folder, *callbacks, **options):
    options = {"logger": False, "enable_checkpointing": False, "max_steps": 3, "log_every_n_steps": 1} | options
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def guard(allow_noncausal=False, **options):
    return CausalityGuard(allow_noncausal, **{"module": "net", "vocab_size": 11, "length": 5, **options})


# --- any model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["net", None])
def test_a_model_of_ones_own(tmp_path, capsys, module):
    torch.manual_seed(0)
    fine = guard(module=module)
    own = trainer(tmp_path, fine)
    own.lock = threading.Lock()  # a trainer may hold what cannot be copied
    model = Foreign()
    own.fit(model)
    assert own.global_step == 3 and fine.certificate.passes and fine.label == "" and model.trainer is own
    leaking = Foreign(is_causal=False)
    weights = {name: value.clone() for name, value in leaking.state_dict().items()}
    with pytest.raises(NonCausalError, match="LEAKS.*allow_noncausal=True") as raised:
        trainer(tmp_path, guard(module=module)).fit(leaking)
    assert raised.value.certificate["verdict"] == "LEAKS"
    assert all(torch.equal(value, weights[name]) for name, value in leaking.state_dict().items())
    assert capsys.readouterr().err.count("LEAKS") >= 1


def test_what_is_allowed_is_labelled(tmp_path):
    tables = CSVLogger(str(tmp_path), name="csv", version="")
    board = TensorBoardLogger(str(tmp_path), name="board", version="", prefix="mine")
    allowed = guard(allow_noncausal=True)
    saving = ModelCheckpoint(dirpath=tmp_path / "saved", filename="model", every_n_train_steps=1)
    options = dict(logger=[tables, board], enable_checkpointing=True)
    trainer(tmp_path, saving, allowed, **options).fit(Foreign(is_causal=False))
    assert allowed.label == "LEAKS"
    assert torch.load(tmp_path / "saved" / "model.ckpt", weights_only=True)["causality"]["verdict"] == "LEAKS"
    with open(tmp_path / "csv" / "metrics.csv") as file:
        assert "LEAKS-train_loss" in next(csv.reader(file))
    assert board._prefix == "LEAKS-mine"


def test_a_foreign_run_that_is_continued_keeps_its_label(tmp_path):
    first = trainer(tmp_path, guard(allow_noncausal=True))
    first.fit(Foreign(is_causal=False))
    first.save_checkpoint(tmp_path / "model.ckpt")
    onwards = dict(ckpt_path=tmp_path / "model.ckpt", weights_only=True)
    with pytest.raises(NonCausalError):
        trainer(tmp_path, guard(), max_steps=5).fit(Foreign(), **onwards)
    later = guard(allow_noncausal=True)
    trainer(tmp_path, later, max_steps=5).fit(Foreign(), **onwards)
    assert later.certificate.passes and later.label == "LEAKS"


def test_the_time_limit():
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="time_limit must be positive and finite, in seconds; got"):
            CausalityGuard(time_limit=wrong)


def test_a_guard_of_one_model_after_the_other(tmp_path):
    own = guard(allow_noncausal=True)
    trainer(tmp_path, own).fit(Foreign(is_causal=False))
    assert own.label == "LEAKS"
    trainer(tmp_path, own).fit(Foreign())
    assert own.label == "" and own.certificate.passes
    own.allow_noncausal = False
    with pytest.raises(NonCausalError):
        trainer(tmp_path, own).fit(Foreign(is_causal=False))


# --- how much ---------------------------------------------------------------------------------------------------


class OpenInLargeCalls(Sums):
    """Causal as long as a call has few tokens."""

    def __init__(self, most):
        super().__init__(True)
        self.most = most

    def forward(self, tokens):
        self.is_causal = tokens.numel() <= self.most
        return super().forward(tokens)


class ForeignInLargeCalls(Foreign):
    def __init__(self, most):
        super().__init__()
        self.net = OpenInLargeCalls(most)


@pytest.mark.parametrize("where", ["model", "loader"])
def test_calls_as_large_as_the_runs_are_looked_at(tmp_path, where):
    """Of 30 rows of 5: more than any other test makes."""
    tokens = torch.randint(11, (60, 8), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(tokens, batch_size=30)

    def fit(own, most):
        model = ForeignInLargeCalls(most)
        model.train_dataloader = lambda: loader
        trainer(tmp_path, own).fit(model, *([loader] if where == "loader" else []))

    fit(guard(), 30 * 7)  # the tokens of a training step are fewer by one than the loader's
    fit(guard(run_batch_size=2), 30 * 5 - 1)  # by hand
    with pytest.raises(NonCausalError, match="large calls"):
        fit(guard(), 30 * 5 - 1)


def test_what_was_not_looked_at_is_said(text, capsys):
    model = LanguageModel(text.tokenizer, attention=Classical(), **SIZES | {"block_size": 130})
    certificate = CausalityGuard(modes=("eval",)).check(model, 2)
    assert certificate.passes and certificate.is_partial and model.label == ""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qattn: ")]
    assert "causal in part" in line and "128 of the 130 positions" in line


# --- when -------------------------------------------------------------------------------------------------------


@pytest.fixture
def verdicts(monkeypatch):
    """Certificates with these verdicts, one after the other."""
    real = causality.certify

    def verdicts(*wanted):
        left = iter(wanted)

        def certify(module, **options):
            certificate = real(module, **options)
            verdict = next(left)
            leak = real(Sums(False), vocab_size=11, length=5).leak if verdict == "LEAKS" else None
            return dataclasses.replace(certificate, verdict=verdict, leak=leak)

        monkeypatch.setattr(causality, "certify", certify)

    return verdicts


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return TextDataModule(str(tmp_path / "text.txt"), block_size=5, batch_size=4, eval_windows=7)


@pytest.fixture
def fit(tmp_path, text):
    """Trains a language model under this guard; RunCheckpoint stands before it in the list."""

    def fit(own, model=None, steps=4, **options):
        torch.manual_seed(1)
        model = model or LanguageModel(text.tokenizer, attention=Classical(), **SIZES)
        checkpoints = RunCheckpoint(tmp_path / "checkpoints", every_n_train_steps=100)
        callbacks = [checkpoints, RandomState(), *([own] if own else [])]
        logger = RunCSVLogger(tmp_path / "run")
        settings = dict(logger=logger, enable_checkpointing=True, plugins=[PlainCheckpointIO()], max_steps=steps)
        trainer(tmp_path, *callbacks, **settings).fit(model, datamodule=text, **options)
        return model

    return fit


def test_undecided_stops_nothing_and_is_said(fit, verdicts, capsys):
    verdicts("undecided", "undecided")
    own = CausalityGuard()
    model = fit(own)
    assert own.certificate.verdict == "undecided" and model.label == own.label == ""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qattn: ")]
    assert len(lines) == 2 and all("undecided" in line for line in lines)


def test_the_last_checkpoint_has_the_last_certificate(fit, verdicts, tmp_path):
    """Whatever the order of the callbacks."""
    verdicts("causal", "undecided")
    fit(CausalityGuard())
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert (last["causality"]["verdict"], last["global_step"]) == ("undecided", 4)


def test_a_leak_at_the_end_fails_after_the_last_checkpoint(fit, verdicts, tmp_path):
    verdicts("causal", "LEAKS")
    with pytest.raises(NonCausalError, match="found after training only"):
        fit(CausalityGuard())
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert (last["causality"]["verdict"], last["global_step"]) == ("LEAKS", 4)
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and {row["causality"] for row in rows} == {"LEAKS"}


def test_a_leak_of_the_beginning_is_not_taken_back(fit, verdicts, tmp_path):
    verdicts("LEAKS", "causal")
    own = CausalityGuard(allow_noncausal=True)
    model = fit(own)
    assert own.certificate.passes and own.label == model.label == "LEAKS"
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["causality"]["verdict"] == "LEAKS"


def test_what_was_checked_is_not_certified_again_before_training(fit, verdicts, text):
    verdicts("causal", "causal")  # before and after, and no more
    own = CausalityGuard()
    model = LanguageModel(text.tokenizer, attention=Classical(), **SIZES)
    own.check(model)
    fit(own, model)


def test_weights_of_a_checkpoint_are_certified(fit, verdicts, tmp_path):
    verdicts(*["causal"] * 2, "causal", "LEAKS")
    fit(CausalityGuard())
    own = CausalityGuard()
    model = LanguageModel(CharTokenizer("".join(sorted(set(TEXT)))), attention=Classical(), **SIZES)
    model.optimisation = dataclasses.replace(model.optimisation)
    own.check(model)
    with pytest.raises(NonCausalError, match="allow"):
        fit(own, model, steps=9, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_random_states_stay(text):
    own = CausalityGuard()
    model = LanguageModel(text.tokenizer, attention="qisa", **SIZES).train()
    before, was = random_state(), {name: value.clone() for name, value in model.state_dict().items()}
    try:
        own.check(model)
        after = random_state()
    finally:
        set_random_state(before)
    # Python's own is drawn from by beartype, which checks annotations in tests.
    assert torch.equal(before["torch"], after["torch"]) and before["numpy"] == after["numpy"]
    assert model.training and model.gpt.training and next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())


# --- several processes ------------------------------------------------------------------------------------------


class Ranks:
    """What the strategies of several processes hand on from the first one, one process after the other."""

    def __init__(self, monkeypatch):
        self.told, self.monkeypatch = [], monkeypatch

    def on(self, own, rank):
        calls = iter(range(9))

        def broadcast(value, src=0):
            call = next(calls)
            if rank == 0:
                self.told.append(value)
            return self.told[call]

        self.monkeypatch.setattr(own.strategy, "broadcast", broadcast)
        self.monkeypatch.setattr(type(own), "is_global_zero", rank == 0)
        return own


@pytest.mark.parametrize("allowed", [False, True])
def test_the_first_process_certifies_and_all_stop_alike(tmp_path, monkeypatch, allowed):
    ranks, certified = Ranks(monkeypatch), []
    real = causality.certify
    monkeypatch.setattr(causality, "certify", lambda *args, **options: certified.append(1) or real(*args, **options))
    for rank in range(2):
        own = guard(allow_noncausal=allowed)
        run = ranks.on(trainer(tmp_path), rank)
        model = Foreign(is_causal=False)
        if allowed:
            own.on_fit_start(run, model)
            assert own.label == "LEAKS"
        else:
            with pytest.raises(NonCausalError):
                own.on_fit_start(run, model)
    assert len(certified) == 1


# --- the label --------------------------------------------------------------------------------------------------


def test_a_model_keeps_its_label_without_a_guard(fit, tmp_path):
    text = CharTokenizer("".join(sorted(set(TEXT))))
    model = LanguageModel(text, attention=Classical(is_causal=False), **SIZES)
    CausalityGuard(allow_noncausal=True).check(model)
    assert model.label == "LEAKS" == labels.label_of(model)
    fit(None, model)
    read = LanguageModel.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert read.label == "LEAKS" and read.causality == model.causality
    assert LanguageModel(text, attention=Classical(), **SIZES).label == ""


def test_a_certificate_in_a_checkpoint_that_is_none(fit, tmp_path):
    fit(None)
    path = tmp_path / "checkpoints" / "last.ckpt"
    for wrong in ("LEAKS", 3, ["verdict"], {"verdict": None}, {}):
        torch.save({**read_checkpoint(path), "causality": wrong}, path)
        assert LanguageModel.load_from_checkpoint(path).label == ""


def test_a_table_gets_its_label_late(tmp_path):
    logger = RunCSVLogger(tmp_path / "run")
    logger.log_metrics({"b": 1.0, "d": 2.0}, step=0)
    logger.log_row("other", {"z": 5}, step=0)
    logger.save()
    logger.log_metrics({"b": 3.0}, step=1)
    set_label(logger, "LEAKS")
    logger.save()
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert lines == ["b,causality,d,step", "1.0,LEAKS,2.0,0", "3.0,LEAKS,,1"]
    assert (tmp_path / "run" / "other.csv").read_text().splitlines() == ["causality,step,z", "LEAKS,0,5"]
    onwards = RunCSVLogger(tmp_path / "run", resume_step=1)
    set_label(onwards, "LEAKS")
    onwards.log_metrics({"e": 7.0}, step=1)
    onwards.save()
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert lines == ["b,causality,d,e,step", "1.0,LEAKS,2.0,,0", ",LEAKS,,7.0,1"]


def test_a_logger_gets_its_label_once(tmp_path):
    logger = TensorBoardLogger(str(tmp_path))
    for _ in range(2):
        set_label(logger, "LEAKS")
    assert logger._prefix == "LEAKS"


def test_progress_bars_carry_the_label():
    model = LanguageModel(CharTokenizer("abc"), attention=Classical(), **SIZES)
    bar = RichProgress()
    bar._trainer = SimpleNamespace(lightning_module=model)
    names = [f"{stage}_description" for stage in ("sanity_check", "validation", "test", "predict")]
    plain = [bar._get_train_description(3), *(getattr(bar, name) for name in names)]
    assert not any("LEAKS" in text for text in plain) and plain[0].startswith("Epoch 3")
    model.causality = {"verdict": "LEAKS"}
    labelled = [bar._get_train_description(3), *(getattr(bar, name) for name in names)]
    assert [text.strip() for text in labelled] == [f"LEAKS: {text.strip()}" for text in plain]


def test_a_signal_is_answered_with_the_label(tmp_path, capfd):
    with labels.labelling(lambda: "LEAKS"):
        RunCheckpoint(tmp_path)._on_signal(signal.SIGINT, None)
    assert capfd.readouterr().err.strip().startswith("qattn: LEAKS: stopping after this batch")


def test_what_is_said_in_a_run_with_a_label(capsys):
    label = ""
    with pytest.raises(KeyError) as raised, labels.labelling(lambda: label):
        say("one")
        label = "LEAKS"
        say("two")
        raise KeyError
    say("three")
    assert capsys.readouterr().err.splitlines() == ["qattn: one", "qattn: LEAKS: two", "qattn: three"]
    assert raised.value.label == "LEAKS"
