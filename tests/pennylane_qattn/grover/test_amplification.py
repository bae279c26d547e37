"""The closed form of amplitude amplification, against state vectors built here gate by gate and against formulas."""

import math

import numpy as np
import pytest
import torch

from pennylane_qattn.grover.amplification import (
    amplified,
    amplify,
    amplify_phase,
    fixed_point,
    fixed_point_phases,
    fixed_point_success,
    fixed_point_width,
    grover_iterations,
    keeps_order,
    mean_mark,
    most_iterations,
    sigmoid_marks,
    success_probability,
)


def by_state_vector(f: np.ndarray, iterations: int, phases=None) -> np.ndarray:
    """Joint distribution `(keys, ancilla)`: Z or a phase on the ancilla, then a reflection, on the vector itself."""
    start = np.stack([np.sqrt(1 - f), np.sqrt(f)], axis=1).reshape(-1) / np.sqrt(len(f))
    state = start.astype(complex)
    marked = np.tile([False, True], len(f))
    for alpha, beta in phases or [(math.pi, math.pi)] * iterations:
        state = np.where(marked, np.exp(1j * beta) * state, state)
        state = state - (1 - np.exp(-1j * alpha)) * start * (start @ state)
        state = -state
    return (np.abs(state) ** 2).reshape(-1, 2)


def closed_form(f: torch.Tensor, iterations: int) -> torch.Tensor:
    num_keys = torch.tensor([float(len(f))], dtype=f.dtype)
    a, b = amplified(mean_mark(f, num_keys), torch.tensor([iterations]), iterations)
    return amplify(f, torch.ones_like(f), num_keys, a, b)


@pytest.mark.parametrize("num_keys", [1, 2, 5, 7, 13])
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_unconditional_distribution_is_that_of_the_state_vector(num_keys, iterations):
    f = torch.rand(num_keys, dtype=torch.float64, generator=torch.Generator().manual_seed(num_keys))
    expected = by_state_vector(f.numpy(), iterations)
    np.testing.assert_allclose(closed_form(f, iterations), expected.sum(1), rtol=0, atol=1e-13)
    success = success_probability(f.mean(), torch.tensor(iterations))
    np.testing.assert_allclose(success, expected[:, 1].sum(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_given_the_ancilla_in_one_keys_are_distributed_as_their_marks(iterations):
    f = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = by_state_vector(f.numpy(), iterations)[:, 1]
    np.testing.assert_allclose(found / found.sum(), f / f.sum(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_keys", [16, 17, 23, 48])
def test_hard_marks_are_found_as_grover_has_it(num_keys):
    for marked in range(num_keys + 1):
        f = (torch.arange(num_keys) < marked).double()
        for iterations in range(9):
            found = closed_form(f, iterations)[:marked].sum()
            expected = math.sin((2 * iterations + 1) * math.asin(math.sqrt(marked / num_keys))) ** 2
            assert abs(float(found) - expected) <= 1e-12


def test_hand_computed_one_of_four():
    # one marked key of four: a single iteration finds it with certainty, a = 2 and b = 0
    f = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    a, b = amplified(torch.tensor([0.25], dtype=torch.float64), torch.tensor([1]), 1)
    assert (float(a), float(b)) == (2.0, 0.0)
    torch.testing.assert_close(closed_form(f, 1), f, rtol=0, atol=1e-15)


def test_three_quarters_marked_overshoot():
    f = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(closed_form(f, 1), 1 - f, rtol=0, atol=1e-15)


def test_factors_are_quotients_of_sines():
    mean = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)
    angle = mean.sqrt().asin()
    for rounds in range(7):
        a, b = amplified(mean, torch.full((37,), rounds), 8)
        torch.testing.assert_close(a, ((2 * rounds + 1) * angle).sin() / angle.sin(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(b, ((2 * rounds + 1) * angle).cos() / angle.cos(), rtol=1e-11, atol=1e-11)


def test_each_row_stops_at_its_own_number():
    mean = torch.full((4,), 0.1, dtype=torch.float64)
    together, _ = amplified(mean, torch.tensor([0, 3, 1, 2]), 5)
    alone = torch.cat([amplified(mean[:1], torch.tensor([r]), 9)[0] for r in (0, 3, 1, 2)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_or_everything_marked_is_uniform_with_finite_gradients(value):
    for num_keys in (1, 6, 13):
        f = torch.full((num_keys,), value, dtype=torch.float64, requires_grad=True)
        for rounds in (0, 1, 4):
            p = closed_form(f, rounds)
            torch.testing.assert_close(p, torch.full_like(p, 1 / num_keys), rtol=0, atol=1e-12)
            (gradient,) = torch.autograd.grad((p * torch.arange(num_keys)).sum(), f)
            assert gradient.isfinite().all()


def test_gradients():
    f = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: closed_form(f, 3), f)
    ones, num_keys, rounds = torch.ones_like(f), torch.tensor([5.0], dtype=f.dtype), torch.tensor([2])
    assert torch.autograd.gradcheck(lambda f: amplify_phase(f, ones, num_keys, rounds, 2), f)


def test_best_number_of_iterations_never_does_worse_than_looking_or_doing_nothing():
    for num_keys in range(1, 257):
        marked = torch.arange(num_keys + 1, dtype=torch.float64)
        rounds = grover_iterations(marked, torch.full_like(marked, num_keys))
        share = marked / num_keys
        success = success_probability(share, rounds)
        assert (success >= torch.maximum(share, 1 - share) - 1e-9)[1:].all()
        assert rounds.max() <= math.pi * math.sqrt(num_keys) / 4
        assert rounds.max() <= most_iterations(num_keys)
        assert rounds[0] == 0


def test_best_number_by_hand():
    def best(marked, num_keys):
        return int(grover_iterations(torch.tensor(marked), torch.tensor(num_keys)))

    assert [best(1.0, 4.0), best(1.0, 64.0), best(0.49, 64.0), best(0.51, 64.0), best(4.0, 4.0)] == [1, 6, 0, 6, 0]


def test_rows_of_two_are_amplified_whatever_the_precision():
    for dtype in (torch.float32, torch.float64):
        marked = torch.tensor([0.1, 0.7, 0.999, 1.0, 1.2], dtype=dtype)
        assert grover_iterations(marked, torch.full_like(marked, 2.0), 0.0).tolist() == [1, 1, 1, 1, 0]


def test_weights_are_continuous_where_the_number_of_iterations_changes():
    num_keys = 40
    shape = torch.rand(num_keys, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    count = torch.full((1,), float(num_keys), dtype=torch.float64)
    previous, rounds_seen = None, set()
    for strength in torch.linspace(0.001, 1.0, 4_001, dtype=torch.float64):
        f = shape * strength
        mean = mean_mark(f, count)
        rounds = grover_iterations(mean * count, count, 0.0)
        p = amplify(f, torch.ones_like(f), count, *amplified(mean, rounds, most_iterations(num_keys)))
        rounds_seen.add(int(rounds))
        if previous is not None:
            assert (p - previous).abs().max() < 5e-4
        previous = p
    assert len(rounds_seen) >= 4


@pytest.mark.parametrize("least", [0.5, 0.0])
@pytest.mark.parametrize("clustered", [False, True])
def test_rule_per_row_keeps_the_order_of_the_marks(clustered, least):
    generator = torch.Generator().manual_seed(17)
    for num_keys in (2, 3, 7, 16, 61):
        scores = torch.randn(300, num_keys, dtype=torch.float64, generator=generator) * 3
        if clustered:
            scores = scores.round() + 0.01 * scores
        tau = torch.randn(300, 1, dtype=torch.float64, generator=generator) * 3
        temperature = torch.rand(300, 1, dtype=torch.float64, generator=generator) * 2 + 0.05
        f = sigmoid_marks(scores, tau, temperature)
        count = torch.full((300, 1), float(num_keys), dtype=torch.float64)
        mean = mean_mark(f, count)
        rounds = grover_iterations(mean * count, count, least)
        most = most_iterations(num_keys)
        p = amplify(f, torch.ones_like(f), count, *amplified(mean, rounds, most))
        order = f.argsort(dim=-1)
        assert (p.gather(-1, order).diff(dim=-1) >= -1e-12).all()
        assert keeps_order(mean, rounds, most).all()


def test_phase_oracle_with_soft_marks_does_not_keep_the_order():
    generator = torch.Generator().manual_seed(5)
    f = torch.rand(200, 9, dtype=torch.float64, generator=generator)
    count, ones = torch.full((200, 1), 9.0, dtype=torch.float64), torch.ones_like(f)
    p = amplify_phase(f, ones, count, torch.ones(200, 1, dtype=torch.long), 1)
    assert (p.gather(-1, f.argsort(dim=-1)).diff(dim=-1) < -1e-3).any()


@pytest.mark.parametrize("num_keys", [16, 17, 23])
def test_phase_and_amplitude_oracle_agree_on_hard_marks(num_keys):
    for marked in (0, 1, 3, num_keys):
        f = (torch.arange(num_keys) < marked).double()
        count = torch.tensor([float(num_keys)], dtype=torch.float64)
        for rounds in range(5):
            by_phase = amplify_phase(f, torch.ones_like(f), count, torch.tensor([rounds]), rounds)
            torch.testing.assert_close(by_phase, closed_form(f, rounds), rtol=0, atol=1e-12)


# --- fixed point ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 5, 9])
@pytest.mark.parametrize("delta", [0.1, 0.5])
def test_fixed_point_follows_its_formula_and_the_state_vector(length, delta):
    f = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(length)) * 0.7
    a, b = fixed_point(f.mean(), length, delta)
    success = float(f.mean() * a.abs() ** 2)
    assert success == pytest.approx(fixed_point_success(float(f.mean()), length, delta), abs=1e-10)
    joint = by_state_vector(f.numpy(), 0, list(zip(*fixed_point_phases(length, delta), strict=True)) or None)
    expected = f.numpy() * float(a.abs()) ** 2 / 7 + (1 - f.numpy()) * float(b.abs()) ** 2 / 7
    np.testing.assert_allclose(joint.sum(1), expected, rtol=0, atol=1e-12)


def test_fixed_point_succeeds_from_its_width_on():
    length, delta = 7, 0.2
    width = fixed_point_width(length, delta)
    for share in np.linspace(width, 1, 200):
        a, _ = fixed_point(torch.tensor(share, dtype=torch.float64), length, delta)
        assert share * float(a.abs()) ** 2 >= 1 - delta**2 - 1e-12
    a, _ = fixed_point(torch.tensor(width / 4, dtype=torch.float64), length, delta)
    assert width / 4 * float(a.abs()) ** 2 < 1 - delta**2


@pytest.mark.parametrize("length, delta", [(4, 0.5), (0, 0.5), (-3, 0.5), (3, 0.0), (3, 1.0), (3, math.nan)])
def test_fixed_point_refuses(length, delta):
    with pytest.raises(ValueError, match="length|delta"):
        fixed_point_phases(length, delta)
