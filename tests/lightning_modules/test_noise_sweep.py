"""What is sampled in a noise sweep: variances of words, and the bias of a whole model by Taylor expansion."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from dense_reference import amplitude_state, qisa_unitary, word_matrix

from lightning_modules.language_model import LanguageModel, cross_entropy
from lightning_modules.noise_sweep import Condition, Subject, conditions
from lightning_modules.tokenizers import CharTokenizer
from pennylane_qattn import QISA, CircuitFeatureMap, Execution, Noise, set_execution
from pennylane_qattn.devices import Runner
from pennylane_qattn.observables import group_words

OPTIONS = Namespace(device="default.qubit", noise_device="default.mixed", max_executions=None)


@pytest.mark.parametrize("device", ["default.qubit", "lightning.qubit", "default.mixed"])
def test_a_sampled_word_has_the_variance_of_a_binomial(device):
    """4,001 equal tokens, each measured for itself, with 17 shots; chi squared within four standard deviations."""
    torch.manual_seed(0)
    count, shots = (4001, 17) if device != "lightning.qubit" else (401, 17)
    features = CircuitFeatureMap(3, 1, 3, words=["ZI", "IX", "YZ"]).double()
    x = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64).expand(1, count, 3)
    exact = features(x)[0, 0, 0].detach()
    set_execution(features, Execution(device=device, shots=shots, seed=3))
    with torch.no_grad():
        found = features(x)[0, 0]
    assert torch.equal((found * shots).round() % 2, torch.ones_like(found))  # odd sums of 17 signs
    variance = (1 - exact**2) / shots
    assert (variance > 0.01).all()
    pulls = (found - exact) / variance.sqrt()
    assert (pulls.mean(0).abs() < 4 / count**0.5).all()
    fourth = pulls.pow(4).mean(0)
    assert ((pulls.pow(2).mean(0) - 1).abs() < 4 * ((fourth - 1) / count).sqrt()).all()
    # neighbouring tokens know nothing of each other
    assert ((pulls[1:] * pulls[:-1]).mean(0).abs() < 4 / count**0.5).all()


def test_many_shots_are_sampled_in_parts_that_fit_in_memory(monkeypatch):
    monkeypatch.setattr("pennylane_qattn.qnode.MAX_AMPLITUDES", 1000)
    run, sizes = Runner.run, []

    def recorded(self, tapes):
        sizes.extend(tape.batch_size * tape.shots.total_shots * tape.num_wires for tape in tapes)
        return run(self, tapes)

    monkeypatch.setattr(Runner, "run", recorded)
    torch.manual_seed(0)
    features = CircuitFeatureMap(3, 1, 2, words=["ZI", "IX"]).double()
    x = torch.randn(1, 23, 3, dtype=torch.float64)
    exact = features(x)
    set_execution(features, Execution(shots=101))
    with torch.no_grad():
        assert (features(x) - exact).abs().max() < 0.5
    assert sum(sizes) == 23 * 101 * 2 and max(sizes) <= 1000 < 23 * 101 * 2


def test_the_bias_of_a_model_is_that_of_its_taylor_expansion():
    """Half of Hessian times covariance, over shots; the covariance from dense matrices.

    Words of one setting are sampled together, so Cov(P, Q) = (<PQ> - <P><Q>) / shots; others are independent.
    """
    torch.manual_seed(3)
    sizes = dict(num_layers=1, num_heads=1, embed_dim=4, block_size=5, dropout=0.0)
    model = LanguageModel(CharTokenizer("abcdefg"), attention=QISA(seed=4), **sizes).double()
    with torch.no_grad():
        model.gpt.blocks[0].attention.out_proj.weight.mul_(20)  # so that the values matter
    inputs, targets = (torch.randint(7, (1, 5), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    copies, shots, repetitions = 1000, 401, 5
    subject = Subject(model, [(inputs.expand(copies, -1), targets.expand(copies, -1))])
    (features,) = subject.first_maps
    (words,), angles = features.words, features.weights.detach().numpy()[0, 0]
    distinct = len(set(words))
    assert len(words) == 4 and distinct == 3  # one word comes twice: it is measured once

    embedded = []
    with features.register_forward_pre_hook(lambda _, args: embedded.append(args[0])), torch.no_grad():
        model.set_execution(Execution())
        model(inputs)

    def loss(values):
        with features.register_forward_hook(lambda *_: values.view(1, 1, 5, 4)):
            return cross_entropy(model(inputs), targets)

    setting = {words[i]: number for number, (_, members) in enumerate(group_words(words)) for i in members}
    assert len(set(setting.values())) == 2
    values, covariances = [], []
    for row in embedded[0][0].numpy():
        state = qisa_unitary(angles) @ amplitude_state(row, 2)
        matrices = [word_matrix(word) for word in words]
        mean = np.array([(state.conj() @ m @ state).real for m in matrices])
        joint = np.array([[(state.conj() @ p @ q @ state).real for q in matrices] for p in matrices])
        same = np.array([[setting[p] == setting[q] for q in words] for p in words])
        values.append(mean)
        covariances.append(same * (joint - np.outer(mean, mean)))
    values = torch.from_numpy(np.concatenate(values))
    assert loss(values).item() == pytest.approx(subject.exact, abs=1e-12)
    hessian = torch.autograd.functional.hessian(loss, values).reshape(5, 4, 5, 4).numpy()
    slope = sum(np.sum(hessian[t, :, t] * covariance) for t, covariance in enumerate(covariances)) / 2

    rows = [subject.evaluate(Condition("shots", None, shots, r, seed=r), OPTIONS) for r in range(1, repetitions + 1)]
    bias = shots * np.mean([row.change for row in rows])
    error = shots * np.mean([row.change_error for row in rows]) / repetitions**0.5
    assert abs(slope) > 8 * error and abs(bias - slope) < 4 * error + 0.03 * abs(slope)  # and what is of the next order
    for row in rows:
        assert row.executions == copies * 5 * 2
        assert row.word_error == pytest.approx(row.word_error_expected, rel=0.02) and 0.9 < row.words_inside < 0.99


def test_conditions_have_seeds_of_their_own():
    options = dict(
        shots=[7, 11], repetitions=3, noise_shots=13, depolarizing=[0.1], amplitude_damping=[], readout=[0.1]
    )
    plan = list(conditions(Namespace(**options, seed=0)))
    assert [str(c) for c in plan[2:5:2]] == ["7 shots, repetition 3", "11 shots, repetition 2"]
    assert str(plan[6]) == "depolarizing 0.1, 13 shots, repetition 1"
    other = list(conditions(Namespace(**options, seed=1)))
    assert len({c.seed for c in plan + other}) == 2 * 4 * 3
    fewer = list(conditions(Namespace(**{**options, "shots": [11], "repetitions": 2}, seed=0)))
    assert set(fewer) < set(plan)
    exact = list(conditions(Namespace(**{**options, "noise_shots": None}, seed=0)))[6:]
    assert [(c.kind, c.seed, c.repetition) for c in exact] == [("depolarizing", None, None), ("readout", None, None)]
    assert plan[0].execution(OPTIONS) == Execution(shots=7, seed=plan[0].seed)
    noisy = Execution(device="default.mixed", noise=Noise(depolarizing=0.1))
    assert exact[0].execution(OPTIONS) == noisy


def test_the_same_seed_gives_the_same_values():
    torch.manual_seed(0)
    sizes = dict(num_layers=2, num_heads=1, embed_dim=4, block_size=3, dropout=0.0)
    model = LanguageModel(CharTokenizer("abc"), attention=QISA(), **sizes)
    tokens = torch.randint(3, (2, 3), generator=torch.Generator().manual_seed(1))
    subject = Subject(model, [(tokens, tokens)])
    first, again, other = (subject.evaluate(Condition("shots", None, 7, 1, seed), OPTIONS) for seed in (5, 5, 6))
    assert first.cross_entropy == again.cross_entropy != other.cross_entropy
    noisy = subject.evaluate(Condition("readout", 0.1), OPTIONS)
    assert noisy.change == pytest.approx(noisy.cross_entropy - subject.exact) and noisy.change
    assert noisy.executions == 6 * 2
