"""Angles and what is computed from them stay in float32 or better, whatever the precision of the model."""

from collections.abc import Callable

import torch
from torch import Tensor


def at_least_float32(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A conversion as `nn.Module._apply` takes it that moves to a device, but goes no lower than float32."""

    def converted(tensor: Tensor) -> Tensor:
        moved = convert(tensor)
        if moved.is_floating_point() and moved.dtype.itemsize < 4:
            return tensor.to(moved.device, torch.promote_types(tensor.dtype, torch.float32))
        return moved

    return converted


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the microsecond that it takes where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return cast(tensor, torch.promote_types(tensor.dtype, torch.float32))


def promoted(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that holds either."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return cast(one, dtype), cast(other, dtype)
