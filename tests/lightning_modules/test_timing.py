"""Ratios of times against a clock that the test turns, and activations counted by hand."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_modules import timing
from lightning_modules.gpt import GPT, preset
from lightning_modules.timing import (
    activation_bytes,
    describe_spread,
    forward,
    forward_and_backward,
    inference,
    interleaved_ratios,
    interleaved_seconds,
    quotients,
    seconds_of,
    training_step,
)
from pennylane_qattn import ATTENTION

BATCH, LENGTH, VOCABULARY, WIDTH, HIDDEN = 3, 5, 11, 7, 13


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test lets them."""

    class Clock:
        now = 0.0

        def passing(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Tokens to logits, with dropout, a parameter and a buffer that are used as they are."""

    def __init__(self, between: nn.Module | None = None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.between = between or nn.ReLU()

    def forward(self, tokens):
        return self.last(self.between(self.first(self.embedding(tokens))))


def test_ratios_are_those_of_one_round(clock):
    """The machine slows down from round to round, and no ratio notices."""
    order, slowness = [], {"by": 1.0}

    def contestant(name, seconds):
        def run():
            order.append(name)
            clock.passing(seconds * slowness["by"])

        return run

    def rounds():
        for by in (1, 2, 8):
            slowness["by"] = by
            yield by

    functions = {"slow": contestant("slow", 3), "base": contestant("base", 2), "quick": contestant("quick", 1)}
    ratios = interleaved_ratios(functions, "base", rounds())
    assert ratios == {"slow": [1.5] * 3, "base": [1.0] * 3, "quick": [0.5] * 3}
    assert list(ratios) == list(functions)
    assert order == ["slow", "base", "quick"] * 4  # once to warm up
    assert {len(values) for values in interleaved_ratios(functions, "quick", 5).values()} == {5}


def test_work_that_goes_on_is_waited_for(clock):
    waiting = []

    def synchronize():
        clock.passing(sum(waiting))
        waiting.clear()

    functions = {"a": lambda: waiting.append(4.0), "b": lambda: clock.passing(1)}
    assert interleaved_ratios(functions, "b", 2, synchronize) == {"a": [4.0, 4.0], "b": [1.0, 1.0]}
    assert seconds_of(functions["a"], synchronize) == 4 and seconds_of(functions["a"]) == 0


def test_what_cannot_be_timed():
    with pytest.raises(ValueError, match="the baseline must be one of a, b; got 'c'"):
        interleaved_ratios({"a": print, "b": print}, "c", 1)
    with pytest.raises(ValueError, match="rounds must be positive; got 0"):
        interleaved_ratios({"a": print}, "a", 0)


def test_seconds_of_every_round(clock):
    waits = iter([9, 9, 1, 2, 3, 5])
    functions = {"a": lambda: clock.passing(next(waits)), "b": lambda: clock.passing(next(waits))}
    seconds = interleaved_seconds(functions, 2)
    assert seconds == {"a": [1, 3], "b": [2, 5]}  # the nines warm up
    assert quotients(seconds["b"], seconds["a"]) == [2, 5 / 3]


def test_the_spread_in_words():
    assert describe_spread([2.704, 2.61, 2.5451, 9.0]) == "2.66 (2.55 to 9.00)"
    assert describe_spread([2.7, 9.0, 1.0], lambda value: f"{value:.0f}") == "3 (1 to 9)"


def test_passes_of_a_layer():
    """Squares of 3 x + 1 by hand: the slope is 6 (3 x + 1)."""
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 3.0)
    nn.init.constant_(layer.bias, 1.0)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    inputs = torch.tensor([[2.0], [5.0]])
    forward(layer, inputs)
    assert forward_and_backward(layer, inputs).flatten().tolist() == [42, 96]
    assert seen == [False, True] and inputs.grad is None
    assert layer.bias.grad.item() == 2 * (7 + 16)


def test_inference_changes_nothing(tokens):
    model = Model(nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    inference(model, tokens)
    ((given, output),) = seen
    assert torch.equal(given, tokens[:, :-1]) and not output.requires_grad and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_training_step_goes_down_the_gradient_of_the_next_token(tokens):
    """Plain descent, against the loss as it is written down."""
    model, rate = Model().eval(), 0.25
    logits = model(tokens[:, :-1])
    rows, places = torch.arange(BATCH)[:, None], torch.arange(LENGTH)
    loss = -logits.log_softmax(-1)[rows, places, tokens[:, 1:]].mean()
    expected = [
        p.detach() - rate * g
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True)
    ]
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of an earlier step
    training_step(model, optimizer, tokens)
    assert model.training
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


# What the loss keeps: the logarithms of the probabilities, the targets, and the number of targets.
LOSS = BATCH * LENGTH * (VOCABULARY * 4 + 8) + 4


@pytest.mark.parametrize(
    "between, per_token",
    [
        (nn.ReLU(), WIDTH + HIDDEN),  # the ReLU and the layer after it keep the same tensor
        (nn.GELU(), WIDTH + 2 * HIDDEN),  # the GELU keeps what goes in
        (nn.Identity(), WIDTH + HIDDEN),
    ],
    ids=["relu", "gelu", "identity"],
)
def test_activations_counted_by_hand(tokens, between, per_token):
    assert activation_bytes(Model(between), tokens) == 4 * BATCH * LENGTH * per_token + LOSS


def test_double_precision_takes_twice_the_memory(tokens):
    single = activation_bytes(Model(), tokens) - LOSS
    double = activation_bytes(Model().double(), tokens) - (LOSS + BATCH * LENGTH * VOCABULARY * 4 + 4)
    assert double == 2 * single


def test_a_slice_keeps_its_whole_storage(tokens):
    class Half(nn.Module):
        def forward(self, x):
            wide = x.repeat(1, 1, 2)
            return (wide[..., :HIDDEN] ** 2) + (wide[..., HIDDEN:] ** 2)

    expected = 4 * BATCH * LENGTH * (WIDTH + 2 * HIDDEN + HIDDEN) + LOSS  # the wide one once, and the sum
    assert activation_bytes(Model(Half()), tokens) == expected


def test_what_is_there_anyway_does_not_count(tokens):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(HIDDEN))
            self.register_buffer("fixed", torch.ones(HIDDEN))

        def forward(self, x):
            return (x * self.fixed) * self.scale  # keep the buffer, and the parameter with what it multiplies

    assert activation_bytes(Model(Scaled()), tokens) == 4 * BATCH * LENGTH * (WIDTH + 2 * HIDDEN) + LOSS


def test_a_branch_that_leads_nowhere_is_not_kept(tokens):
    class Detour(nn.Module):
        def forward(self, x):
            (x.exp() * 2).cos()
            return x

    assert activation_bytes(Model(Detour()), tokens) == activation_bytes(Model(nn.Identity()), tokens)


def test_checkpointing_is_seen(tokens):
    class Checkpointed(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda y: y.sin().cos().sin().cos(), x, use_reentrant=False)

    class Plain(nn.Module):
        def forward(self, x):
            return x.sin().cos().sin().cos()

    saved = activation_bytes(Model(Plain()), tokens) - activation_bytes(Model(Checkpointed()), tokens)
    assert saved == 4 * BATCH * LENGTH * 3 * HIDDEN


@pytest.mark.parametrize("name", ["classical", "qisa"])
def test_the_number_is_always_the_same_and_nothing_is_left_behind(name):
    config = preset("qisa-16", num_layers=2, dropout=0.2)
    torch.manual_seed(0)
    model = GPT(config, ATTENTION.build(name))
    model.eval()
    model.blocks[1].train()
    modes = [module.training for module in model.modules()]
    tokens = torch.randint(config.vocab_size, (BATCH, config.block_size + 1))
    state = torch.get_rng_state()
    sizes = {activation_bytes(model, tokens) for _ in range(3)}
    assert len(sizes) == 1 and sizes.pop() > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_tensor_outlives_the_count(tokens):
    kept = []

    class Watched(nn.Module):
        def forward(self, x):
            y = x.exp()  # saved as an output, which could make a cycle
            kept.append(weakref.ref(y))
            return y

    gc.disable()
    try:
        activation_bytes(Model(Watched()), tokens)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_memory_grows_with_the_batch_and_the_baseline_is_the_smallest():
    config = preset("qisa-16", num_layers=1)
    tokens = torch.randint(config.vocab_size, (8, config.block_size + 1), generator=torch.Generator().manual_seed(1))
    sizes = {}
    for name in ("classical", "qisa"):
        model = GPT(config, ATTENTION.build(name))
        sizes[name] = activation_bytes(model, tokens)
        assert sizes[name] > activation_bytes(model, tokens[:3])
    assert sizes["qisa"] > sizes["classical"]
