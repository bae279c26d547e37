"""Attention by amplitude amplification: rules, thresholds, and the same weights on devices as in closed form."""

import copy
import math

import pytest
import torch

from pennylane_qattn import Execution, Grover, build_attention, certify, set_execution
from pennylane_qattn.execution import executors
from pennylane_qattn.grover.score import AmplificationScore, row_quantile

FORMS = {
    "per-row": {},
    "quarter": {"iterations": "quarter"},
    "fixed-point": {"iterations": "fixed-point", "length": 5, "delta": 0.3},
    "two": {"iterations": 2, "threshold": "fixed", "temperature": "fixed"},
    "quantile": {"threshold": "quantile", "quantile": 0.3},
    "phase": {"oracle": "phase"},
    "conditional": {"conditional": True},
    "softmax": {"marks": "softmax"},
    "softmax-conditional": {"marks": "softmax", "conditional": True},
}


def attention(form: str, block_size: int = 7, **options):
    torch.manual_seed(11)
    return build_attention("grover", 6, 2, block_size, **FORMS[form], **options).double()


def embeddings(length: int = 7, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(length)) * 2


def scores(rows: int, keys: int) -> torch.Tensor:
    return torch.randn(1, 1, rows, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(keys)) * 2


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_a_causal_distribution(form):
    module, x = attention(form), embeddings()
    weights = module.weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
    assert (weights >= 0).all()
    assert not weights.triu(1).any()
    assert certify(module).verdict == "causal"


@pytest.mark.parametrize("form", FORMS)
def test_cache_and_padding(form):
    module, x = attention(form), embeddings()
    whole = module(x)
    cache = module.new_cache(2)
    by_token = torch.cat([module(x[:, t : t + 1], cache=cache) for t in range(7)], dim=1)
    torch.testing.assert_close(by_token, whole, rtol=1e-12, atol=1e-12)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, :3] = True
    alone = module(x[:1, 3:])
    torch.testing.assert_close(module(x, key_padding_mask=padding)[:1, 3:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_sums_without_weights_are_those_with_them(form):
    module, x = attention(form), embeddings().requires_grad_()
    learned = [x, *(p for p in module.parameters() if p.requires_grad)]
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 2], padding[1, :3] = True, True
    places = torch.arange(7).expand(2, -1)
    for mask in (None, padding):
        # with position ids there is no plain triangle, and the weights are written out
        results = [module(x, key_padding_mask=mask, position_ids=ids) for ids in (None, places)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad(y.square().sum(), learned, allow_unused=True) for y in results]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert module.score.is_structured == (form in ("per-row", "fixed-point", "two", "conditional"))


def test_second_derivatives():
    module = attention("two", block_size=4)
    x = embeddings(4, batch=1).requires_grad_()
    assert torch.autograd.gradgradcheck(module, x)


def test_not_causal():
    torch.manual_seed(0)
    module = build_attention("grover", 6, 2, 7, is_causal=False).double()
    x = embeddings()
    ids = torch.arange(7).expand(2, -1)
    torch.testing.assert_close(module(x), module(x, position_ids=ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["default.qubit", "lightning.qubit"])
@pytest.mark.parametrize("form", FORMS)
def test_on_devices_as_in_closed_form(form, device):
    module = attention(form, block_size=5)
    x, padding = embeddings(5).requires_grad_(), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 1] = True
    upstream = embeddings(5)
    learned = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run():
        y = module(x, key_padding_mask=padding)
        return y, torch.autograd.grad((y * upstream).sum(), learned, allow_unused=True)

    y, gradients = run()
    (plan,) = set_execution(module, Execution(executor="qnode", device=device))
    assert plan.executor == "qnode"
    on_device, by_device = run()
    torch.testing.assert_close(on_device, y, rtol=0, atol=1e-10)
    for found, wanted in zip(by_device, gradients, strict=True):
        if wanted is None:
            assert found is None
        else:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert executors(module)[0].meter.executions > 0
    set_execution(module, Execution())
    assert torch.equal(module(x, key_padding_mask=padding), y)


def test_sixteen_tokens_on_a_device():
    torch.manual_seed(2)
    module = build_attention("grover", 4, 1, 16).double()
    x = torch.randn(1, 16, 4, dtype=torch.float64) * 2
    weights = module.weights(x)
    set_execution(module, "qnode")
    torch.testing.assert_close(module.weights(x), weights, rtol=0, atol=1e-10)


def test_conditional_softmax_marks_are_softmax_attention():
    torch.manual_seed(0)
    module = build_attention("grover", 6, 2, 7, marks="softmax", conditional=True).double()
    classical = build_attention("classical", 6, 2, 7).double()
    classical.load_state_dict(module.state_dict(), strict=False)
    x = embeddings()
    torch.testing.assert_close(module(x), classical(x), rtol=1e-12, atol=1e-12)


def test_conditional_weights_are_independent_of_iterations_and_cost_more():
    few, many = (AmplificationScore(1, 4, iterations=r, conditional=True).double() for r in (0, 3))
    s = scores(9, 9)
    one, three = few.amplify(s), many.amplify(s)
    assert torch.equal(one.weights, three.weights)
    assert torch.equal(three.oracle_calls, torch.full_like(three.success, 7.0))
    torch.testing.assert_close(three.conditional_oracle_calls, 7 / three.success)
    torch.testing.assert_close(one.success, one.mean_mark, rtol=0, atol=1e-12)


def test_large_thresholds_amplify_to_the_softmax():
    # far below the threshold marks are exponentials, and amplified to certainty they are the softmax
    score = AmplificationScore(1, 4, tau=9.0, threshold="fixed", temperature="fixed", iterations="per-row").double()
    s = scores(3, 4) / 4 + math.log(1.5)
    f = torch.sigmoid(s - 9.0)
    conditional = f / f.sum(-1, keepdim=True)
    torch.testing.assert_close(conditional, s.softmax(-1), rtol=2e-3, atol=0)
    # and as fewer than half a key is marked, a search would leave such a row as it is
    score.least_marked = 0.5
    assert torch.equal(score.amplify(s).weights, torch.full_like(s, 0.25))


def test_quarter_rule_turns_back_where_it_would_reverse_the_order():
    score = AmplificationScore(1, 4, iterations="quarter", temperature="fixed", start_temperature=3.0).double()
    # one key far above, the second hardly above the rest: more than half of all is marked, and once is too often
    crowded = torch.tensor([[5.0, 0.01, 0, 0, 0, 0, 0, 0], [5.0, 4.0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    found = score.amplify(crowded[None, None])
    assert found.reversed_order.flatten().tolist() == [True, False]
    assert found.iterations.flatten().tolist() == [0, 1]
    torch.testing.assert_close(found.weights[0, 0, 0], torch.full((8,), 1 / 8, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (found.success >= found.mean_mark - 1e-12).all()
    assert found.weights[0, 0, 1, :2].min() > found.weights[0, 0, 1, 2:].max()


@pytest.mark.parametrize("part, above", [(0.25, [1, 1, 1, 1, 1, 2, 2]), (1.0, [1, 2, 3, 4, 5, 6, 7])])
def test_row_quantile(part, above):
    s = scores(7, 7)
    visible = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    tau = row_quantile(s, visible, visible.sum(-1, keepdim=True).double(), part)
    marked = ((s >= tau) & visible).sum(-1)
    assert marked.flatten().tolist() == above
    # halfway to the next key
    if part < 1:
        last = s[0, 0, 6].sort(descending=True).values
        assert float(tau[0, 0, 6, 0]) == pytest.approx(float(last[1] + last[2]) / 2)


def test_annealing_keeps_the_temperature_in_the_checkpoint():
    score = AmplificationScore(2, 4, temperature="fixed", start_temperature=2.0)
    score.set_temperature(0.25)
    torch.testing.assert_close(score.temperature, torch.full((2,), 0.25))
    other = AmplificationScore(2, 4, temperature="fixed", start_temperature=2.0)
    other.load_state_dict(score.state_dict())
    torch.testing.assert_close(other.temperature, torch.full((2,), 0.25))
    with pytest.raises(ValueError, match="temperature must be positive and finite; got 0"):
        score.set_temperature(0.0)
    with pytest.raises(ValueError, match="learned cannot be set"):
        AmplificationScore(2, 4).set_temperature(1.0)
    with pytest.raises(ValueError, match="no temperature"):
        AmplificationScore(2, 4, marks="softmax").set_temperature(1.0)


def test_training_moves_threshold_and_temperature():
    module = attention("per-row", block_size=11)
    x = embeddings(11)
    module(x).square().sum().backward()
    assert module.score.tau.grad.abs().min() > 0
    assert module.score.log_temperature.grad.abs().min() > 0
    fixed = attention("two")
    assert not any("tau" in name or "temperature" in name for name, _ in fixed.named_parameters())
    assert {"score.tau", "score.log_temperature"} <= set(fixed.state_dict())


def test_rows_with_hardly_a_mark_have_a_gradient_if_asked_for():
    s = scores(3, 8).requires_grad_()
    for least, alive in ((0.5, False), (0.0, True)):
        score = AmplificationScore(1, 4, tau=6.0, threshold="fixed", least_marked=least).double()
        found = score.amplify(s)
        assert found.iterations.any() == alive
        (gradient,) = torch.autograd.grad(found.weights.square().sum(), s)
        assert gradient.any() == alive


def test_extreme_scores_stay_finite():
    for size in (1e-30, 1e4):
        for form in FORMS:
            module = attention(form)
            x = (embeddings() * size).requires_grad_()
            y = module(x)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert y.isfinite().all() and gradient.isfinite().all(), form


def test_copies_run_where_the_original_runs():
    module = attention("per-row", block_size=4)
    x = embeddings(4)
    set_execution(module, Execution(executor="qnode", device="lightning.qubit"))
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied(x), module(x), rtol=0, atol=1e-12)
    assert not copied.score.executor.is_closed_form


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tau": math.nan}, "tau must be a finite number; got nan"),
        ({"start_temperature": 0.0}, "temperature must be positive and finite; got 0"),
        ({"start_temperature": -1.0}, "temperature must be positive and finite; got -1.0"),
        ({"iterations": -1}, "number of iterations must not be negative; got -1"),
        ({"iterations": "best"}, "iterations must be one of per-row, quarter, fixed-point, or a number"),
        ({"iterations": True}, "iterations must be one of"),
        ({"oracle": "phase", "conditional": True}, "phase oracle has no ancilla"),
        ({"oracle": "phase", "iterations": "fixed-point"}, "needs the amplitude oracle"),
        ({"oracle": "xor"}, "oracle must be one of amplitude, phase; got 'xor'"),
        ({"marks": "softmax", "iterations": "quarter"}, "quarter rule sets a threshold"),
        ({"quantile": 0.0}, r"quantile must lie in \(0, 1\]; got 0"),
        ({"least_marked": 2.0}, r"least_marked must lie in \[0, 1\]; got 2.0"),
        ({"length": 4}, "odd"),
        ({"delta": 1.0}, "delta must lie between 0 and 1"),
    ],
)
def test_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Grover(**options)
    assert "\n" not in str(error.value)
