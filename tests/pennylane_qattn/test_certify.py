"""The conduct of a certificate: what is read, bad arguments, devices, state outside, time, and data."""

import copy
import itertools
import json
import math
import random
import threading

import numpy as np
import pytest
import torch
from leaky_modules import WIDTH, Attend, Cached, Counted, Normed, Raises, SomePositions, Transposed, attention, coverage
from torch import nn

from pennylane_qattn import Certificate, Execution, build_attention, causality, certify, leak_subject, set_execution
from pennylane_qattn.attention import Attention
from pennylane_qattn.causality import Check, Leak

# --- what is read, and bad arguments ----------------------------------------------------------------------------


class OneHot(nn.Module):
    """Tokens without an embedding."""

    def __init__(self):
        super().__init__()
        self.vocab_size, self.max_len, self.linear = 11, 5, nn.Linear(11, 3)

    def forward(self, tokens):
        return self.linear(nn.functional.one_hot(tokens, 11).to(self.linear.weight.dtype)).cumsum(1)


class Tokens(nn.Module):
    """Positions come first among its embeddings, and nothing tells the vocabulary but a call."""

    def __init__(self, leak=False):
        super().__init__()
        self.position, self.token = nn.Embedding(16, 5), nn.Embedding(13, 5)
        self.leak = leak

    def forward(self, tokens):
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        return {"states": (x.cumsum(1) + self.leak * 1e-9 * x.flip(1).cumsum(1)).cumsum(1)}


def test_inputs_are_read_from_the_module():
    found = certify(Tokens())
    assert found.passes and found.inputs == "tokens of 13, 3 rows of 16"
    assert [c.done for c in found.checks if c.test == "jacobians"] == [15, 15]
    assert certify(Tokens(leak=True)).leak.layer == "Tokens"
    found = certify(OneHot())
    assert found.passes and found.inputs == "tokens of 11, 3 rows of 5"
    reasons = {c.left_out for c in found.checks if c.test == "jacobians"}
    assert reasons == {"no embedding of the tokens was found to take gradients by"}
    assert certify(nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 3))).inputs == "embeddings of width 7, 3 rows of 16"


def test_lengths():
    module = build_attention("classical", 5, 1, 331)
    found = certify(module, modes=("eval",), time_limit=120)
    assert found.inputs == "embeddings of width 5, 3 rows of 128"
    assert found.remarks == ("128 of the 331 positions that it takes; length=331 looks at all",)
    assert found.is_partial and found.verdict == "causal"
    # inside another module, too
    assert certify(nn.Sequential(nn.Linear(5, 5), build_attention("classical", 5, 1, 11))).inputs.endswith("of 11")


def test_one_position_has_no_future():
    found = certify(build_attention("classical", 5, 1, 1))
    assert found.passes
    left_out = {c.test: c.left_out for c in found.checks if c.left_out}
    assert left_out["futures"] == left_out["jacobians"] == "there is one position only, so no future"
    found = certify(nn.Sequential(nn.Embedding(1, 5), nn.Linear(5, 1)))
    assert found.passes and {c.left_out for c in found.checks if c.test == "futures"} == {
        "there is one token only, so nothing to change"
    }


def test_inputs_of_ones_own():
    generator = torch.Generator().manual_seed(3)
    module = attention(Attention)
    inputs = 100 + torch.randn(2, 5, WIDTH, generator=generator)
    before = inputs.clone()
    found = certify(module, inputs=inputs)
    assert found.passes and found.inputs == "embeddings of width 6, 3 rows of 5" and torch.equal(inputs, before)
    found = certify(Tokens(), inputs=torch.randint(13, (5, 7), generator=generator))
    assert found.passes and found.inputs == "tokens of 13, 3 rows of 7"
    assert certify(OneHot(), inputs=torch.tensor([[1, 2, 3]]), vocab_size=11).passes


class SeesOneToken(nn.Module):
    """Only where the example has a 7 does anything leak."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1009, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return x.cumsum(1) + (tokens[:, :1] == 7)[..., None] * x.sum(1, keepdim=True)


def test_an_example_is_used():
    assert certify(SeesOneToken()).passes
    leak = certify(SeesOneToken(), inputs=torch.tensor([[7, 1, 2, 3, 4]])).leak
    assert (leak.output, leak.input) == (0, 1)


class NotCopied(nn.Module):
    embed_dim = 5

    def __init__(self):
        super().__init__()
        self.lock, self.linear = threading.Lock(), nn.Linear(5, 5)

    def forward(self, x):
        return self.linear(x)


def test_what_cannot_be_copied_is_built():
    with pytest.raises(ValueError, match=r"NotCopied cannot be copied \(TypeError: .*; hand in a function that builds"):
        certify(NotCopied())
    found = certify(NotCopied)
    assert found.passes and found.name == "NotCopied"
    module = nn.Linear(5, 5)
    assert certify(lambda: module).passes and module.weight.dtype == torch.float32 and module.weight.requires_grad
    module = NotCopied()
    with pytest.raises(ValueError, match="gives the same module twice; build a new one each time"):
        certify(lambda: module)
    with pytest.raises(ValueError, match="NotCopied cannot be copied .NotImplementedError: Cannot copy out of meta"):
        certify(NotCopied().to("meta"))
    with pytest.raises(ValueError, match="a function must build a torch module; got int"):
        certify(lambda: 3)
    with pytest.raises(ValueError, match=r"fail\(\) builds no module: ZeroDivisionError: division by zero"):
        certify(fail)


def fail():
    return 1 / 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length must be an integer of at least 2; got 1"),
        ({"length": 9}, "QISA takes 7 tokens at most; got length 9"),
        ({"embed_dim": 0}, "embed_dim must be an integer of at least 1; got 0"),
        ({"vocab_size": 5, "embed_dim": 5}, "give vocab_size for tokens or embed_dim for embeddings, not both"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"modes": ()}, r"modes must be among eval, train, each once; got \(\)"),
        ({"modes": ("eval", "eval")}, "modes must be among eval, train, each once"),
        ({"modes": ("test",)}, r"modes must be among eval, train, each once; got \('test',\)"),
        ({"tolerance": -1e-9}, r"tolerance must lie in \[0, 1\); got -1e-09"),
        ({"tolerance": math.nan}, r"tolerance must lie in \[0, 1\); got nan"),
        ({"time_limit": 0}, "time_limit must be positive and finite, in seconds; got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        (
            {"embed_dim": 5},
            "QISA cannot be called with embeddings of width 5, 7 at a time: ValueError: embed",
        ),
        ({"vocab_size": 5}, "QISA cannot be called with tokens of 5, 7 at a time: "),
        (
            {"inputs": torch.zeros(3)},
            r"inputs must be tokens \(batch, seq\) or embeddings .* of shape \(3,\)",
        ),
        ({"inputs": torch.zeros(2, 1, 6)}, "inputs must have two positions or more"),
        ({"inputs": torch.zeros(2, 5, 6), "length": 7}, "inputs have 5 positions; got length 7"),
        ({"inputs": torch.zeros(2, 5, 6), "vocab_size": 7}, "inputs must be integers where vocab_size is given"),
        ({"inputs": torch.zeros(2, 5, 6), "embed_dim": 7}, "inputs must be embeddings of width embed_dim=7; got"),
        ({"inputs": torch.full((2, 5, 6), math.nan)}, "inputs must be finite"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message) as error:
        certify(attention(Attention), **options)
    assert len(str(error.value).splitlines()) == 1


def test_modules_that_tell_nothing():
    with pytest.raises(ValueError, match=r"cannot tell what Identity reads; give vocab_size or embed_dim, and length"):
        certify(nn.Identity())
    assert certify(nn.Identity(), embed_dim=5).passes
    with pytest.raises(ValueError, match=r"cannot be called with embeddings of width 5, 16 at a time: ValueError"):
        certify(nn.Sequential(nn.Linear(5, 5), nn.Flatten()), embed_dim=5)
    with pytest.raises(ValueError, match=r"inputs must lie in \[0, vocab_size=13\); got 1 to 13"):
        certify(Tokens(), inputs=torch.tensor([[1, 13, 2]]), vocab_size=13)


# --- circuits on devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"device": "lightning.qubit"}, {"shots": 10}], ids=["lightning", "shots"])
def test_circuits_are_folded(options):
    module = build_attention("qsann", 4, 2, 3)
    set_execution(module, Execution(executor="qnode", **options))
    found = certify(module)
    device = options.get("device", "default.qubit")
    assert found.passes and found.form == f"float64 copy, circuits folded instead of run on {device}"
    assert module.value_map.executor.name == "qnode" and module.value_map.executor.meter.executions == 0
    assert certify(build_attention("qsann", 4, 2, 3)).form == "float64 copy, circuits folded"


def test_circuits_that_cannot_be_folded(monkeypatch):
    module = build_attention("qisa", 3, 1, 3)
    set_execution(module, Execution(executor="qnode"))
    sampled = build_attention("qisa", 3, 1, 3)
    set_execution(sampled, Execution(executor="qnode", shots=10))
    monkeypatch.setattr("pennylane_qattn.planning.check_foldable", refuse)
    found = certify(module)
    assert found.passes
    assert found.form == "float64 copy, circuits run on default.qubit, as they cannot be folded (too wide)"
    found = certify(sampled)
    assert found.verdict == "undecided" and not found.checks
    assert found.reason == "its circuits are sampled on default.qubit and cannot be folded: too wide"


def refuse(*_):
    raise ValueError("too wide")


# --- nothing outside is touched ---------------------------------------------------------------------------------


def test_everything_is_as_it_was():
    module = nn.Sequential(attention(Attention, dropout=0.3), Normed(), nn.Dropout(0.5))
    module[1] = nn.Linear(WIDTH, WIDTH)
    module.train()
    module[0].eval()
    module(torch.randn(2, 5, WIDTH)).sum().backward()
    calls = []
    hook = module[1].register_forward_hook(lambda *_: calls.append(1))
    gradients = [p.grad.clone() for p in module.parameters()]
    state = copy.deepcopy(module.state_dict())
    attributes = [dict(part.__dict__) for part in module.modules()]
    dtype = torch.get_default_dtype()
    torch.manual_seed(11)
    np.random.seed(12)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist()
    for inside in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(11)
        np.random.seed(12)
        with inside():
            assert certify(module).passes
            assert torch.is_grad_enabled() == (inside is torch.enable_grad)
        assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == expected
    assert [m.training for m in module[:2]] == [False, True] and module.training
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert [list(part.__dict__.items()) for part in module.modules()] == [list(a.items()) for a in attributes]
    assert list(module[1]._forward_hooks) == [hook.id] and torch.get_default_dtype() == dtype
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_random_states_are_put_back():
    """Python's too, from which the checks of annotations in these tests draw, so not by `certify` itself."""
    states = random.getstate()
    with pytest.raises(KeyError), leak_subject.apart():
        random.seed(3)
        torch.set_default_dtype(torch.float64)
        raise KeyError
    assert random.getstate() == states and torch.get_default_dtype() == torch.float32


def test_a_leak_leaves_everything_as_it_was_too():
    module = nn.Sequential(nn.Linear(5, 5), Normed())
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    before = copy.deepcopy(module.state_dict())
    assert not certify(module).passes
    assert torch.rand(1) == expected and module[1].norm.num_batches_tracked == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_frozen_parameters_and_modules_in_place():
    module = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5)).requires_grad_(False)
    module[2].requires_grad_(True)
    assert certify(module).passes and not module[0].weight.requires_grad and module[2].weight.requires_grad


class ChangesItsInput(nn.Module):
    embed_dim = 5

    def forward(self, x):
        return x.add_(1).cumsum(1)


def test_a_module_that_changes_its_input():
    inputs = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = inputs.clone()
    found = certify(ChangesItsInput(), inputs=inputs)
    assert found.passes and torch.equal(inputs, before)
    assert {check.left_out for check in found.checks if check.test == "jacobians"} == {""}


# --- time -------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes by one second with every call of a module."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for place in ("pennylane_qattn.leak_subject.time", "pennylane_qattn.causality.time"):
        monkeypatch.setattr(place, clock)
    return clock


class Slow(nn.Module):
    """A causal sum of a long sequence, one second for a call; few rows go into one."""

    embed_dim, block_size = 2, 101

    def __init__(self, clock, leak=0):
        super().__init__()
        self.clock, self.leak = clock, leak

    def __deepcopy__(self, memo):
        return Slow(self.clock, self.leak)

    def forward(self, x):
        self.clock.now += 1
        out = x.cumsum(1)
        if self.leak and x.shape[1] > self.leak:
            out[:, self.leak - 1] += x[:, self.leak]
        return out


def test_time_that_is_too_short(clock):
    found = certify(Slow(clock), time_limit=2)
    assert found.verdict == "undecided" and found.seconds >= 2
    everything = ("rows", "futures", "jacobians", "single rows", "weights")
    assert found.reason == (
        "the time limit of 2 s left out "
        + ", ".join(f"{test} ({mode} mode)" for mode in ("eval", "train") for test in (*everything, "cache")).replace(
            ", cache (train mode)", ""
        )
    )
    assert {check.left_out for check in found.checks} == {"no time"}


def test_time_for_a_part(clock, monkeypatch):
    monkeypatch.setattr("pennylane_qattn.leak_trial.MAX_TOKENS", 2 * 101)
    found = certify(Slow(clock), time_limit=60)
    assert found.verdict == "causal" and found.passes and found.is_partial
    assert "futures (train mode, 3 of 100): no time for the rest" in found.remarks
    assert found.summary().startswith("Slow: causal in part (") and found.remarks[0] in found.summary()
    for test, mode in itertools.product(("futures", "jacobians"), ("eval", "train")):
        done, total = coverage(found, test, mode)
        assert total == 100 and 1 <= done <= total
    done, _ = coverage(found, "futures", "eval")
    assert 3 <= done < 100 and f"{done} of 100; the rest left out: no time" in str(found)
    assert coverage(found, "futures", "train")[0] == 3  # the least of every test comes before more of any
    sums = [sum(coverage(found, "futures", mode)[i] for mode in ("eval", "train")) for i in range(2)]
    assert f"{sums[0]} of {sums[1]} futures" in found.summary()


def test_a_leak_is_located_whatever_the_time(clock, monkeypatch):
    monkeypatch.setattr("pennylane_qattn.leak_trial.MAX_TOKENS", 2 * 101)
    # the last token is the first to be changed
    leak = certify(Slow(clock, leak=100), time_limit=20).leak
    assert (leak.output, leak.input) == (99, 100)
    # token 37 is none of the first three, but all outputs are there to be seen by suffixes
    assert certify(Slow(clock, leak=37), time_limit=10_000).leak.input == 37


# --- as data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Transposed(), Attend(), Normed(), Cached(-1), Raises()])
def test_plain_data(module):
    found = certify(module)
    plain = json.loads(json.dumps(found.to_plain(), allow_nan=False))
    assert Certificate.from_plain(plain) == found and isinstance(Certificate.from_plain(plain).seconds, float)
    assert plain["verdict"] == found.verdict and plain["leak"] == (
        None if found.leak is None else {**plain["leak"], "size": found.leak.size}
    )
    assert "\n" not in found.summary() and len(str(found).splitlines()) > 2


def test_data_that_are_no_certificate():
    plain = certify(Attend()).to_plain()
    for wrong in ({}, {"name": "x"}, plain | {"leak": {"size": 1}}, plain | {"colour": "red"}, plain | {"checks": 3}):
        with pytest.raises(ValueError, match="this is no certificate: "):
            Certificate.from_plain(wrong)


def test_the_same_seed_gives_the_same_certificate():
    for cls in (Counted, Attend, SomePositions):
        assert certify(cls(), seed=3) == certify(cls(), seed=3)
    assert certify(Transposed(), seed=1).leak.size != certify(Transposed(), seed=2).leak.size


def test_words():
    leak = Leak("futures", "eval", "blocks.4.attention", 3, 4, 1.234e-3, 0.5)
    found = Certificate("GPT", "LEAKS", leak, checks=(Check("futures", "eval", 3, 15),), form="float64 copy")
    assert found.summary() == (
        "GPT LEAKS: in blocks.4.attention, output 3 depends on input 4, by 1.2e-03 (futures, eval mode; "
        "largest 5.0e-01)"
    )
    assert str(found).splitlines()[0] == "GPT LEAKS"
    assert causality.LEAKS == "LEAKS"
    found = Certificate("GPT", "causal", checks=(Check("futures", "eval", 3, 15), Check("futures", "train", 15, 15)))
    assert found.summary() == "GPT: causal (18 of 30 futures)"
