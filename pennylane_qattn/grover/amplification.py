r"""Amplitude amplification of soft marks over the keys of a row, in closed form: exact, differentiable, no circuit.

Row :math:`i` may see :math:`n_i` keys, and key :math:`j` is marked by :math:`f_j \in [0, 1]`. The state is prepared on
the allowed keys alone and, with the amplitude oracle, on one ancilla qubit:

.. math::

    |s\rangle = \frac{1}{\sqrt{n_i}} \sum_j |j\rangle
                \left(\sqrt{1 - f_j}\,|0\rangle + \sqrt{f_j}\,|1\rangle\right).

:math:`R` times the sign of the ancilla's 1 is flipped and the state reflected about :math:`|s\rangle` (Grover,
quant-ph/9605043; Brassard, Hoyer, Mosca, Tapp, quant-ph/0005055). The state keeps its form, with :math:`a` before
:math:`\sqrt{f_j}` and :math:`b` before :math:`\sqrt{1 - f_j}`, so a row is two numbers, whatever its length:

.. math::

    a = b = 1; \quad \mu = -\bar f a + (1 - \bar f) b, \quad a \leftarrow 2\mu + a, \quad b \leftarrow 2\mu - b;
    \qquad p_j = \frac{f_j a^2 + (1 - f_j) b^2}{n_i}.

Given that the ancilla is found in 1, the distribution over keys is :math:`f_j / \sum f` whatever :math:`R` is; what
amplification raises is the probability of that outcome, :math:`\sin^2((2R + 1)\arcsin\sqrt{\bar f})`.

All functions take rows in any batch; `f` is 0 where a key is not allowed, and `num_keys` counts those that are.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pennylane_qattn.grover.products import prefix_sums
from pennylane_qattn.transforms import is_transformed


def sigmoid_marks(
    scores: Float[Tensor, "*rows keys"], threshold: float | Tensor, temperature: float | Tensor
) -> Float[Tensor, "*rows keys"]:
    r""":math:`f_j = \sigma((s_j - \tau)/T)`: 1/2 at the threshold, and a hard mark as :math:`T \to 0`."""
    return torch.sigmoid((scores - threshold) / temperature)


def mean_mark(f: Float[Tensor, "*rows keys"], num_keys: Float[Tensor, "*#rows 1"]) -> Float[Tensor, "*rows 1"]:
    r""":math:`\bar f`, the mean over a row's allowed keys: the probability of finding the ancilla in 1 with R = 0."""
    return (f.sum(-1, keepdim=True) / num_keys).clamp(max=1.0)  # rounding may leave a mean of ones above 1


def grover_iterations(
    marked: Float[Tensor, "*rows"], num_keys: Float[Tensor, "*rows"], least: float = 0.5
) -> Int[Tensor, "*rows"]:
    r"""The best number of iterations for so many marked keys of so many, :math:`R \leq \pi\sqrt{n}/4`.

    0 for fewer than `least` marked keys, else
    :math:`\max(0, \mathrm{round}(\pi / (4 \arcsin\sqrt{\max(m, 1)/n}) - 1/2))`. With hard marks the success probability
    is then at least :math:`\max(\lambda, 1 - \lambda)`, :math:`\lambda = m/n`.
    """
    angle = (marked.clamp(min=1.0) / num_keys).clamp(max=1.0).sqrt().asin()
    # Half of the keys marked is half way between two numbers. Rounding errors must not choose there: up, where it is a
    # row of two with less than one marked, and down elsewhere, which never puts small marks above large ones.
    nudge = torch.where(marked <= 1, 1e-5, -1e-5)
    best = (math.pi / (4 * angle) - 0.5 + nudge).round().clamp(min=0)
    return torch.where(marked < least, torch.zeros_like(best), best).long()


def most_iterations(num_keys: int) -> int:
    r"""An upper bound of `grover_iterations` for rows of up to so many keys."""
    return max(0, round(math.pi / (4 * math.asin(num_keys**-0.5)) - 0.5 + 1e-5)) if num_keys > 1 else 0


def amplified(
    mean: Float[Tensor, "*rows"], iterations: Int[Tensor, "*rows"], most: int
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """The factors `a` and `b` of each row after its own number of iterations.

    Args:
        mean: the mean mark.
        iterations: of each row; `most` at the most.
        most: how many are computed. A loop over iterations costs two numbers a row, and unlike the quotient of sines
            it has exact limits, and finite gradients, where the mean is 0 or 1.
    """
    a = b = torch.ones_like(mean)
    for done in range(most):
        mu = (1 - mean) * b - mean * a
        going = done < iterations
        a, b = torch.where(going, 2 * mu + a, a), torch.where(going, 2 * mu - b, b)
    return a, b


def keeps_order(mean: Float[Tensor, "*rows"], iterations: Int[Tensor, "*rows"], most: int) -> Bool[Tensor, "*rows"]:
    r"""Whether a key with a larger mark has the larger probability: exactly where :math:`P \geq \bar f`."""
    a, b = amplified(mean, iterations, most)
    return a.square() >= b.square() * (1 - 1e-12)


def amplify(
    f: Float[Tensor, "*rows keys"],
    allowed: Float[Tensor, "*#rows keys"],
    num_keys: Float[Tensor, "*#rows 1"],
    a: Float[Tensor, "*rows 1"],
    b: Float[Tensor, "*rows 1"],
) -> Float[Tensor, "*rows keys"]:
    r"""The unconditional distribution, :math:`p_j = (f_j |a|^2 + (1 - f_j) |b|^2) / n_i` on the allowed keys."""
    high, low = a.square() / num_keys, b.square() / num_keys
    return f * (high - low) + allowed * low


def success_probability(mean: Float[Tensor, "*rows"], iterations: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    r""":math:`P = \sin^2((2R+1)\arcsin\sqrt{\bar f})`: that the ancilla is found in 1."""
    return ((2 * iterations + 1) * mean.clamp(0, 1).sqrt().asin()).sin().square()


def masked_sigmoid(
    z: Float[Tensor, "batch heads queries keys"], offset: int | None, visible: Bool[Tensor, "batch keys"] | None
) -> Float[Tensor, "batch heads queries keys"]:
    r""":math:`\sigma(z)`, and 0 for keys that a query does not see.

    Args:
        z: what is marked by; it must not be used again, as the result takes its memory.
        offset: query `i` sees the keys `j <= i + offset`; `None`: every key.
        visible: `False` for keys that nobody sees.
    """
    if is_transformed():
        f = torch.sigmoid(z) if offset is None else torch.sigmoid(z).tril(offset)
        return f if visible is None else f * visible[:, None, None, :]
    return _MaskedSigmoid.apply(z, offset, visible)


class _MaskedSigmoid(torch.autograd.Function):
    """Written over its input, with one derivative for both: where a mark is 0, so is that."""

    @staticmethod
    def forward(ctx, z: Tensor, offset: int | None, visible: Tensor | None) -> Tensor:
        f = z.detach().sigmoid_()
        if offset is not None:
            f.tril_(offset)
        if visible is not None:
            f.mul_(visible[:, None, None, :])
        ctx.save_for_backward(f)
        return f

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (f,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return upstream * f * (1 - f), None, None
        return torch.ops.aten.sigmoid_backward(upstream, f), None, None


def sums_over_seen(
    v: Float[Tensor, "batch heads keys features"], queries: int, is_causal: bool
) -> Float[Tensor, "batch heads #queries features"]:
    """For every query the sum over the values that it sees; those that nobody sees are 0."""
    if not is_causal:
        return v.sum(-2, keepdim=True)
    return prefix_sums(v)[..., v.shape[-2] - queries :, :]


# --- phase oracle -----------------------------------------------------------------------------------------------


def amplify_phase(
    f: Float[Tensor, "*rows keys"],
    allowed: Float[Tensor, "*#rows keys"],
    num_keys: Float[Tensor, "*#rows 1"],
    iterations: Int[Tensor, "*rows 1"],
    most: int,
) -> Float[Tensor, "*rows keys"]:
    r"""The textbook oracle, without ancilla: :math:`\psi \leftarrow 2u\langle u, D\psi\rangle - D\psi`,
    :math:`D = e^{i\pi f}`, :math:`p = |\psi|^2`.

    With hard marks it does what the amplitude oracle does. With soft ones it does not keep the order of the marks.
    """
    start = (allowed / num_keys.sqrt()).expand_as(f)
    turned = torch.polar(torch.ones_like(f), math.pi * f)
    psi = torch.complex(start, torch.zeros_like(start))
    for done in range(most):
        phased = turned * psi
        step = 2 * start * (start * phased).sum(-1, keepdim=True) - phased
        psi = torch.where(done < iterations, step, psi)
    return psi.real.square() + psi.imag.square()


# --- fixed point ------------------------------------------------------------------------------------------------


def fixed_point_phases(length: int, delta: float) -> tuple[list[float], list[float]]:
    r"""The phases :math:`\alpha_j, \beta_j`, j = 1 to l, of fixed-point search (Yoder, Low, Chuang, arXiv 1409.3305).

    .. math::

        \alpha_j = -\beta_{l-j+1} = 2\,\mathrm{arccot}\left(\tan(2\pi j/L)\sqrt{1-\gamma^2}\right), \qquad
        1/\gamma = T_{1/L}(1/\delta)

    Args:
        length: :math:`L = 2l + 1`, odd: so often the preparation of the state is run.
        delta: the probability of failure is :math:`\delta^2` at most, for a share of marks from
            `fixed_point_width` on.

    Raises:
        ValueError: for a length that is not odd and positive, or a delta outside (0, 1).
    """
    if not isinstance(length, int) or length < 1 or length % 2 == 0:
        raise ValueError(f"the length of a fixed-point schedule must be odd and at least 1; got {length!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1; got {delta!r}")
    gamma = 1 / math.cosh(math.acosh(1 / delta) / length)
    root = math.sqrt(1 - gamma**2)
    half = (length - 1) // 2
    # arccot with values in (0, pi), which is continuous where the tangent changes its sign
    alphas = [2 * math.atan2(1.0, math.tan(2 * math.pi * j / length) * root) for j in range(1, half + 1)]
    return alphas, [-alphas[half - j] for j in range(1, half + 1)]


def fixed_point_width(length: int, delta: float) -> float:
    r""":math:`1 - \gamma^2`: the smallest share of marks for which the failure probability is bounded."""
    return 1 - math.cosh(math.acosh(1 / delta) / length) ** -2


def fixed_point_success(mean: float, length: int, delta: float) -> float:
    r""":math:`P = 1 - \delta^2\, T_L\!\left(T_{1/L}(1/\delta)\sqrt{1 - \lambda}\right)^2`."""
    argument = math.cosh(math.acosh(1 / delta) / length) * math.sqrt(1 - mean)
    chebyshev = math.cos(length * math.acos(argument)) if argument <= 1 else math.cosh(length * math.acosh(argument))
    return 1 - delta**2 * chebyshev**2


def fixed_point(mean: Float[Tensor, "*rows"], length: int, delta: float) -> tuple[Tensor, Tensor]:
    r"""The complex factors :math:`a`, :math:`b` after the fixed-point schedule, with the amplitude oracle.

    Each step is :math:`-S_s(\alpha_j) S_t(\beta_j)`, :math:`S_t(\beta) = 1 - (1 - e^{i\beta})\Pi_t` on the ancilla's 1,
    :math:`S_s(\alpha) = 1 - (1 - e^{-i\alpha})|s\rangle\langle s|`.
    """
    a = b = torch.complex(torch.ones_like(mean), torch.zeros_like(mean))
    for alpha, beta in zip(*fixed_point_phases(length, delta), strict=True):
        a = a * complex(math.cos(beta), math.sin(beta))
        overlap = (mean * a + (1 - mean) * b) * (1 - complex(math.cos(alpha), -math.sin(alpha)))
        a, b = overlap - a, overlap - b
    return a, b
