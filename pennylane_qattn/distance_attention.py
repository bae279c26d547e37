r"""Attention by distances, :math:`w_{ij} \propto \exp a_{ij}` with :math:`a_{ij} = \exp(-\lVert q_i - k_j \rVert^2)` or
:math:`-\beta \lVert q_i - k_j \rVert^2`, by kernels of the CPU: in one pass, and nothing is made of queries times keys.

The first is the score of QISA (arXiv 2603.03318) and QSANN (arXiv 2205.05625), the second that of `GaussianScore`.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pennylane_qattn import kernels
from pennylane_qattn.distance_kernels import attend_backward, attend_forward, attend_one
from pennylane_qattn.double_exponential import LEAST, exponentials, negative_distances
from pennylane_qattn.precision import cast
from pennylane_qattn.transforms import is_batched, without_autocast

#: Numbers of keys and values of a sequence that the cache holds; of more, products of matrices are faster.
MOST_NUMBERS = 2**17
_NUMBERS: dict[torch.dtype, type[np.floating]] = {torch.float32: np.float32, torch.float64: np.float64}
_LEAST = {dtype: number(LEAST[dtype]) for dtype, number in _NUMBERS.items()}
_ONE = {dtype: np.ones(1, number) for dtype, number in _NUMBERS.items()}


def serve(
    q: Float[Tensor, "batch heads queries features"],
    k: Float[Tensor, "batch heads keys features"],
    v: Float[Tensor, "batch heads keys values"],
) -> bool:
    """Whether kernels are there for these, and the fastest way: for a single query always, else for short sequences."""
    if not kernels.serve(q, k, v) or not q.dtype == k.dtype == v.dtype:
        return False
    return q.shape[2] == 1 or k.shape[2] * (k.shape[3] + v.shape[3]) <= MOST_NUMBERS


def attend(
    q: Float[Tensor, "batch heads queries features"],
    k: Float[Tensor, "batch heads keys features"],
    v: Float[Tensor, "batch heads keys values"],
    beta: Float[Tensor, " heads"] | None,
    is_causal: bool,
) -> Float[Tensor, "batch heads queries values"]:
    """The weighted sums.

    Args:
        q, k, v: queries, keys and values that `serve` is true of; queries are the last of the keys.
        beta: of each head; `None` for the published exponents.
        is_causal: a query sees no later key.
    """
    if beta is not None:
        beta = beta.to(q.dtype)
    if q.shape[2] == 1 and not torch.is_grad_enabled():
        return _of_one(q, k, v, beta)
    return _Attend.apply(q, k, v, beta, is_causal)


def plain_attend(
    q: Float[Tensor, "batch heads queries features"],
    k: Float[Tensor, "batch heads keys features"],
    v: Float[Tensor, "batch heads keys values"],
    beta: Float[Tensor, " heads"] | None,
    is_causal: bool,
) -> Float[Tensor, "batch heads queries values"]:
    """The same in operations of torch."""
    return _plain_weights(q, k, beta, is_causal) @ v


def _plain_weights(q: Tensor, k: Tensor, beta: Tensor | None, is_causal: bool) -> Tensor:
    distances = negative_distances(q, k)
    exponents = exponentials(distances) if beta is None else beta[:, None, None] * distances
    if is_causal:
        seen = torch.ones(exponents.shape[-2:], dtype=torch.bool, device=q.device)
        exponents = exponents.masked_fill(~seen.tril(k.shape[2] - q.shape[2]), float("-inf"))
    return exponents.softmax(-1)


def _plain_gradients(q, k, v, beta, is_causal, upstream) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The derivatives in operations that are differentiable themselves, and take many gradients at once."""
    weights, distances = _plain_weights(q, k, beta, is_causal), negative_distances(q, k)
    slopes = upstream @ v.transpose(2, 3)
    slopes = (slopes - (upstream * (weights @ v)).sum(-1, keepdim=True)) * weights
    by_beta = None if beta is None else (slopes * distances).sum((0, 2, 3))
    slopes = slopes * (exponentials(distances) if beta is None else beta[:, None, None])
    by_q = 2 * (slopes @ k - slopes.sum(-1, keepdim=True) * q)
    by_k = 2 * (slopes.transpose(2, 3) @ q - slopes.transpose(2, 3).sum(-1, keepdim=True) * k)
    return by_q, by_k, weights.transpose(2, 3) @ upstream, by_beta


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, is_causal: bool) -> Tensor:
        out = _empty_for(q, v)
        logarithms = q.new_empty(q.shape[0] * q.shape[1], q.shape[2] if any(ctx.needs_input_grad) else 0)
        if out.numel():
            held, places = _places(q, k, v, out)
            arguments = (places, logarithms, _sizes(q, k), *exponents(q.dtype, beta), is_causal)
            kernels.run(attend_forward, len(logarithms), *arguments, each=q.shape[2])
        ctx.save_for_backward(q, k, v, beta, out, logarithms)
        ctx.is_causal = is_causal
        return out

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, out, logarithms = ctx.saved_tensors
        with without_autocast(upstream.device):
            if torch.is_grad_enabled() or is_batched(upstream):
                return *_plain_gradients(q, k, v, beta, ctx.is_causal, upstream), None
            by_q, by_k, by_v = (_empty_like(t) for t in (q, k, v))
            by_beta = q.new_zeros(len(logarithms))
            if upstream.numel():
                held, places = _places(q, k, v, out, upstream.resolve_neg(), by_q, by_k, by_v)
                factors = exponents(q.dtype, beta)
                arguments = (places, logarithms, by_beta, _sizes(q, k), *factors, ctx.is_causal)
                kernels.run(attend_backward, len(logarithms), *arguments, each=q.shape[2])
        return by_q, by_k, by_v, None if beta is None else by_beta.view(q.shape[:2]).sum(0), None


def _of_one(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None) -> Tensor:
    out = _empty_for(q, v)
    if out.numel():
        held, places = _places(q, k, v, out)
        arguments = (places, _sizes(q, k), *exponents(q.dtype, beta))
        kernels.run(attend_one, q.shape[0] * q.shape[1], *arguments, each=k.shape[2])
    return out


# --- what kernels read ----------------------------------------------------------------------------------------------


def _empty_for(q: Tensor, v: Tensor) -> Tensor:
    """Room for the result, heads of a token beside one another, as the output projection reads them."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _empty_like(tensor: Tensor) -> Tensor:
    """Room in the tensor's own order of axes, the features last, so that `_places` makes no copy of it."""
    return torch.empty_like(
        tensor, memory_format=torch.preserve_format if tensor.stride(3) == 1 else torch.contiguous_format
    )


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return q.shape[1], q.shape[2], k.shape[2]


def exponents(dtype: torch.dtype, beta: Float[Tensor, " heads"] | float | None) -> tuple[np.ndarray, bool, np.floating]:
    """What kernels know of exponents: the inverse temperatures, whether exponents are exponentials, and the least."""
    if isinstance(beta, Tensor):
        return cast(beta, dtype).detach().numpy(), False, _LEAST[dtype]
    return _ONE[dtype] if beta is None else _ONE[dtype] * _NUMBERS[dtype](beta), beta is None, _LEAST[dtype]


def _places(*tensors: Tensor) -> tuple[list[Tensor], np.ndarray]:
    """What kernels read and write, which must live until they are done, and where it is (`distance_kernels.py`).

    Addresses, as an array of NumPy for each tensor would take longer than what generation has to do for a token.
    """
    held, places = [], []
    for tensor in tensors:
        (a, b, c, width), (by_a, by_b, by_c, by_one) = tensor.shape, tensor.stride()
        by_a, by_b, by_c = by_a if a > 1 else 0, by_b if b > 1 else 0, by_c if c > 1 else 0
        if (width > 1 and by_one != 1) or by_a % width or by_b % width or by_c % width:
            tensor = tensor.contiguous()
            by_a, by_b, by_c = b * c * width, c * width, width
        number = 1 + ((a - 1) * by_a + (b - 1) * by_b + (c - 1) * by_c) // width
        places.append((tensor.data_ptr(), number, width, by_a // width, by_b // width, by_c // width))
        held.append(tensor)
    return held, np.array(places)
