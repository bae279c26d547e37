"""What a certificate does not look at in full: long sequences, large calls, further outputs, and what it says of it."""

import dataclasses

import pytest
import torch
from leaky_modules import Cached, coverage
from torch import nn

from pennylane_qattn import Certificate, attention, build_attention, certify, leak_trial
from pennylane_qattn.attention import Attention, max_weights


class Open(nn.Module):
    """A causal running sum of 300 tokens at most, but for what `sees` says that queries see of keys."""

    embed_dim, block_size = 3, 300

    def __init__(self, sees=lambda queries, keys: queries < 0):
        super().__init__()
        self.sees, self.inner = sees, nn.Linear(3, 3)

    def forward(self, x):
        place = torch.arange(x.shape[1])
        queries, keys = place[:, None], place
        weights = ((keys <= queries) | self.sees(queries, keys)).to(x.dtype) / len(place)
        return weights @ self.inner(x)


# --- length -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sees", "output", "token"),
    [
        (lambda queries, keys: queries >= 150, 150, 299),  # fully open beyond
        (lambda queries, keys: keys >= 150, 0, 299),  # late keys are masked for nobody
        (lambda queries, keys: (queries >= 150) & (keys == queries + 1), 298, 299),  # off by one beyond
        (lambda queries, keys: (queries < 150) & (keys >= 150), 0, 299),
    ],
    ids=["queries", "keys", "off by one", "halves"],
)
def test_leaks_beyond_the_length_that_is_looked_at_in_full(sees, output, token):
    found = certify(nn.Sequential(nn.Linear(3, 3), Open(sees)))
    assert found.verdict == "LEAKS" and found.inputs.endswith("3 rows of 128")
    leak = found.leak
    assert (leak.test, leak.mode, leak.layer, leak.across) == ("large calls", "eval", "1", "time")
    assert (leak.output, leak.input) == (output, token) and 0 < leak.size <= leak.largest
    # the same is found by the tests in full, at that length
    assert certify(Open(sees), length=300, modes=("eval",)).leak.test == "futures"


def test_the_latest_token_that_is_felt_is_named():
    """Only by all tokens from the middle on it is seen, as one token moves it by less than is tolerated."""
    leak = certify(Open(lambda queries, keys: (queries == 140) & (keys == 201))).leak
    assert (leak.test, leak.output, leak.input) == ("large calls", 140, 201)


def test_a_certificate_of_a_part_says_so():
    found = certify(Open())
    assert (found.verdict, found.passes, found.is_partial) == ("causal", True, True)
    assert coverage(found, "large calls", "eval") == coverage(found, "large calls", "train") == (6, 6)
    assert "2 rows of 300" in str(found) and str(found).startswith("Open: causal in part\n")
    assert found.summary().startswith("Open: causal in part (embeddings of width 3, 3 rows of 128; ")
    assert "12 of 12 large calls" in found.summary()
    assert "128 of the 300 positions that it takes; length=300 looks at all" in found.summary()
    whole = certify(Open(), length=300, modes=("eval",))
    assert not whole.is_partial and whole.summary().startswith("Open: causal (")


def test_large_calls_that_cannot_be_made_are_said(monkeypatch):
    class Short(Open):
        def forward(self, x):
            if x.shape[1] > 200:
                raise ValueError("too long")
            return super().forward(x)

    found = certify(Short())
    assert found.passes and found.is_partial
    assert "large calls (eval mode, 0 of 6): it does not take 2 rows of 300 (ValueError: too long)" in found.summary()
    monkeypatch.setattr(leak_trial, "MAX_LARGE_ENTRIES", 2 * 300 * 300 - 1)
    found = certify(Open())
    assert found.passes and "calls of 2 rows of 300 take too much memory" in found.summary()


# --- size of the call -------------------------------------------------------------------------------------------


class MaskedInSmallCalls(nn.Module):
    """Masks as long as there are few weights, and forgets it where there are many."""

    embed_dim, block_size = 5, 32

    def __init__(self, most=2**15, mode=None):
        super().__init__()
        self.most, self.only, self.inner = most, mode, nn.Linear(5, 5)

    def forward(self, x):
        batch, length, _ = x.shape
        weights = torch.ones(length, length, dtype=x.dtype)
        is_open = batch * length * length > self.most and self.only in (None, self.training)
        return (weights if is_open else weights.tril()) @ self.inner(x) / length


@pytest.mark.parametrize("mode", [None, True])
def test_leaks_in_batches_as_large_as_a_runs(mode):
    module = nn.Sequential(nn.Linear(5, 5), MaskedInSmallCalls(2**16, mode))
    assert certify(module).passes and not certify(module).is_partial  # 64 rows of 32 at most
    leak = certify(module, run_batch_size=65).leak
    assert (leak.test, leak.layer, leak.output, leak.across) == ("large calls", "1", 0, "time")
    assert leak.mode == ("train" if mode else "eval") and "large calls" in str(leak)
    assert certify(module, run_batch_size=64).passes


def test_every_future_is_looked_at_where_rows_are_many():
    found = certify(MaskedInSmallCalls(2**40), run_batch_size=70)
    assert not found.is_partial and coverage(found, "large calls", "train") == (62, 62)
    assert {check.remark for check in found.checks if check.test == "large calls"} == {"70 rows of 32"}


def test_rows_that_mix_in_large_batches_only():
    class Mixes(MaskedInSmallCalls):
        def forward(self, x):
            out = self.inner(x).cumsum(1)
            return out + x.mean((0, 1)) * (len(x) > 100)

    leak = certify(Mixes(), run_batch_size=101).leak
    assert leak.test == "large calls"


def test_unequal_equal_calls_of_large_batches_are_no_leak():
    class Restless(MaskedInSmallCalls):
        def forward(self, x):
            out = self.inner(x).cumsum(1)
            return out + torch.rand_like(out, requires_grad=False).new_tensor(clock()) if len(x) > 100 else out

    calls = iter(range(10**6))

    def clock():
        return float(next(calls))

    found = certify(Restless(), run_batch_size=101)
    assert found.verdict == "undecided" and "two equal calls of 101 rows of 32 in eval mode differ" in found.reason


def test_dropout_in_large_batches_is_no_leak():
    module = nn.Sequential(nn.Linear(5, 5), MaskedInSmallCalls(2**40), nn.Dropout(0.5))
    assert certify(module, run_batch_size=65).passes


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_wrong_run_batch_size(wrong):
    with pytest.raises(ValueError, match=f"run_batch_size must be an integer of at least 1; got {wrong}"):
        certify(MaskedInSmallCalls(), run_batch_size=wrong)


@pytest.mark.parametrize("name", ["qsann", "gaussian", "overlap"])
def test_attention_in_blocks_of_rows_is_causal(name, monkeypatch):
    """The path of large calls, taken for small ones; it is taken, and it is looked at: without its mask it leaks."""
    monkeypatch.setattr(attention, "MAX_WEIGHTS", {"cpu": 13})
    taken = []
    blocked = attention.blocked_attention
    monkeypatch.setattr(attention, "blocked_attention", lambda *args: taken.append(1) or blocked(*args))
    torch.manual_seed(4)
    module = build_attention(name, 6, 2, 7, dropout=0.2)
    assert max_weights(torch.device("cpu")) == 13
    found = certify(module)
    assert found.passes and not found.is_partial and taken
    assert all(check.largest == 0 for check in found.checks if check.test in ("rows", "futures", "jacobians"))
    rows = attention.Visibility.of_rows
    monkeypatch.setattr(  # each block sees all keys
        attention.Visibility,
        "of_rows",
        lambda self, *ends: rows(dataclasses.replace(self, is_causal=False), *ends),
    )
    assert certify(module).verdict == "LEAKS"


# --- outputs ----------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """A clean output, and others beside it."""

    embed_dim, block_size = 5, 7

    def __init__(self, beside):
        super().__init__()
        self.inner, self.beside = nn.Linear(5, 5), beside

    def forward(self, x):
        clean = self.inner(x).cumsum(1)
        return self.beside(clean, x)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    states: torch.Tensor


def leaking(x):
    return x + 1e-6 * x.flip(1).cumsum(1)


@pytest.mark.parametrize(
    "beside",
    [
        lambda clean, x: (clean, leaking(x)),
        lambda clean, x: (clean, (clean, [leaking(x)])),
        lambda clean, x: {"logits": clean, "states": leaking(x)},
        lambda clean, x: (clean, leaking(x)[..., 0]),
        lambda clean, x: (clean, 1e-9 * leaking(x)),
        lambda clean, x: (clean, (1e3 * x.flip(1)).long()),
        lambda clean, x: (clean, torch.complex(x.sum(1, keepdim=True) - x, x)),
    ],
    ids=["tuple", "nested", "dict", "flat", "small", "integers", "complex"],
)
def test_leaks_in_further_tensors_of_the_output(beside):
    leak = certify(nn.Sequential(nn.Linear(5, 5), Several(beside))).leak
    assert leak is not None and (leak.test, leak.output, leak.layer) == ("futures", 0, "1")


def test_leaks_in_a_dataclass():
    """torch's trees know nothing of it, so the layer cannot be told."""
    leak = certify(Several(lambda clean, x: Output(clean, leaking(x)))).leak
    assert (leak.test, leak.output) == ("futures", 0)


@pytest.mark.parametrize(
    "beside",
    [
        lambda clean, x: (clean, clean),
        lambda clean, x: (clean, x.mean(1)),  # (batch, width), as wide as it is long
        lambda clean, x: (clean, x.mean(1)[:, None].expand(-1, 7, 5).transpose(0, 1)),  # (7, batch, width)
        lambda clean, x: (clean, x.mean()),
        lambda clean, x: (clean, x[:, None].expand(-1, 7, -1, -1).sum(2)),  # (batch, heads, width)
        lambda clean, x: {"logits": clean, "past_key_values": leaking(x)},
        lambda clean, x: (clean, None, "words"),
    ],
    ids=["clean", "pooled", "time last", "number", "heads", "cache", "no tensors"],
)
def test_other_tensors_are_no_outputs(beside):
    found = certify(Several(beside), embed_dim=5, length=7)
    assert found.passes and not found.is_partial


def test_weights_beside_the_output():
    """`(batch, seq, seq)` depends on the length in its last axis too."""

    class WithWeights(nn.Module):
        embed_dim, block_size = 6, 200

        def __init__(self, is_causal):
            super().__init__()
            self.attention, self.is_causal = nn.MultiheadAttention(6, 2, batch_first=True), is_causal

        def forward(self, x):
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            clean, weights = self.attention(x, x, x, attn_mask=mask)
            return clean, weights if self.is_causal else weights.transpose(1, 2)

    assert certify(WithWeights(True), run_batch_size=3).passes
    leak = certify(WithWeights(False)).leak
    assert (leak.test, leak.output) == ("futures", 0)


def test_further_tensors_of_a_module_of_one_shape_are_said():
    class Rigid(Several):
        def forward(self, x):
            if x.shape[1] != 7:
                raise ValueError("seven tokens, please")
            return super().forward(x)

    found = certify(Rigid(lambda clean, x: (clean, leaking(x))))
    assert found.passes and found.is_partial
    why = "it takes no other shape (ValueError: seven tokens, please)"
    assert f"only the first tensor of its output in eval mode, as {why}" in found.summary()


def test_a_cache_beside_further_tensors():
    class Both(Cached):
        def forward(self, x, *, cache=None):
            out = super().forward(x, cache=cache)
            return out, out

    assert coverage(certify(Both(0)), "cache", "eval") == (2, 2)
    assert certify(Both(-1)).leak.test == "cache"


# --- what cannot be run -----------------------------------------------------------------------------------------


def test_rows_that_are_refused_by_themselves_are_said():
    class Together(Attention):
        def forward(self, x, **options):
            if len(x) == 1:
                raise ValueError("no single rows")
            return super().forward(x, **options)

    torch.manual_seed(0)
    module = build_attention("classical", 6, 2, 7)
    module.__class__ = Together
    found = certify(module)
    assert found.verdict == "causal" and found.is_partial
    said = "single rows (eval mode, 0 of 3): it does not take a row alone (ValueError: no single rows)"
    assert said in found.summary() and Certificate.from_plain(found.to_plain()) == found
