import numpy as np
import pytest
import torch

from pennylane_qattn import GaussianScore, OverlapScore, PublishedGaussianScore, ScaledDotScore


def sides(dtype, rng, features=5):
    q = torch.randn(2, 3, 7, features, dtype=dtype, generator=rng)
    k = torch.randn(2, 3, 11, features, dtype=dtype, generator=rng)
    return q, k


def compare(score, q, k):
    return score(score.queries(q), score.keys(k)).detach()


def test_scaled_dot(dtype, close, rng):
    q, k = sides(dtype, rng)
    close(compare(ScaledDotScore(3, 5), q, k), np.einsum("bhqf,bhkf->bhqk", q, k) / np.sqrt(5))


def test_published_gaussian(dtype, close, rng):
    q, k = sides(dtype, rng)
    squared = ((q[..., :, None, :] - k[..., None, :, :]) ** 2).sum(-1)
    close(compare(PublishedGaussianScore(3, 5), q, k), np.exp(-squared.numpy()), factor=5)


def test_gaussian_is_minus_beta_squared_distance_up_to_the_row(dtype, close, rng):
    q, k = sides(dtype, rng)
    score = GaussianScore(3, 5, beta=0.7).to(dtype)
    squared = ((q[..., :, None, :] - k[..., None, :, :]) ** 2).sum(-1)
    beta = score.beta.detach()[:, None, None]
    torch.testing.assert_close(beta.float(), torch.full((3, 1, 1), 0.7))
    close(compare(score, q, k).softmax(-1), (-beta * squared).softmax(-1), factor=5)


def test_gaussian_starts_as_sharp_as_scaled_dot():
    torch.testing.assert_close(GaussianScore(2, 16).beta, torch.full((2,), 1 / 8))


def test_gaussian_in_half_precision_keeps_the_norm(rng):
    q, k = (t.bfloat16() for t in sides(torch.float32, rng))
    k = k + 8  # a large common norm is what loses digits
    score = GaussianScore(3, 5, beta=0.7)
    queries, keys = score.sides(q, k)
    norm = -0.7 * k.float().square().sum(-1)
    carried = keys[..., 5].float() + keys[..., 6].float()
    assert keys.dtype == torch.bfloat16 and queries.dtype == torch.bfloat16
    assert ((carried - norm) / norm).abs().max() < 2**-15
    assert ((keys[..., 5].float() - norm) / norm).abs().max() > 2**-12


@pytest.mark.parametrize("is_complex", [False, True])
def test_overlap(is_complex, dtype, close, rng):
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in sides(dtype, rng, features=6))
    score = OverlapScore(3, 6, strength=2.5, complex_states=is_complex).to(dtype)
    a, b = q.double().numpy(), k.double().numpy()
    if is_complex:
        a, b = a[..., :3] + 1j * a[..., 3:], b[..., :3] + 1j * b[..., 3:]
    close(compare(score, q, k), 2.5 * np.abs(np.einsum("bhqf,bhkf->bhqk", a.conj(), b)) ** 2)


def test_fused_scores_are_padded_to_an_aligned_width(rng):
    q, k = sides(torch.float32, rng)
    score = GaussianScore(3, 5)
    assert [side.shape[-1] for side in score.sides(q, k)] == [8, 8]


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta must be positive and finite"):
        GaussianScore(1, 2, beta=beta)


def test_odd_complex_states():
    with pytest.raises(ValueError, match="got 5 in all"):
        OverlapScore(1, 5, complex_states=True)
