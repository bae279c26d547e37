"""How features come about, for a kernel that makes them together with what is done with them (`token_attention.py`).

A recipe must say the same as `forward`, so whoever may have changed what `forward` does gets none: `is_as_written`.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from pennylane_qattn.word_kernels import WordPairs


class Affine(NamedTuple):
    """`weight @ x + bias`, the features of the heads after one another."""

    weight: Float[Tensor, "features embed"]
    bias: Float[Tensor, " features"] | None


class Forms(NamedTuple):
    """Quadratic forms of the states `matrices[head] @ a`: Pauli words, or sums of squares.

    Attributes:
        inputs: what is encoded, one set for all heads or one for each.
        is_raw: `a` is still to be made of the inputs, by dividing them by their norm.
        matrices: of each head, real rows and, where states are complex, imaginary ones below.
        readout: the words, or what the squares are multiplied by.
    """

    inputs: Float[Tensor, "#heads tokens amplitudes"]
    is_raw: bool
    matrices: Float[Tensor, "heads rows amplitudes"]
    readout: WordPairs | Float[Tensor, "heads rows forms"]

    @property
    def squares(self) -> Float[Tensor, "heads rows forms"] | None:
        """What the squares are multiplied by; `None` for words."""
        return self.readout if isinstance(self.readout, Tensor) else None


Recipe = Affine | Forms


def is_as_written(module: nn.Module, forward: Callable, **methods: Callable) -> bool:
    """Whether a call of the module runs this `forward`, and these methods where it calls them.

    It does not where there are hooks, where a subclass has its own, or where the module itself was given one.
    """
    own, kind = module.__dict__, type(module)
    if kind.forward is not forward or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if any(getattr(kind, name) is not method or name in own for name, method in methods.items()):
        return False
    return not (hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks)


def affine(linear: nn.Module | None) -> Affine | None:
    """The recipe of torch's linear layer; `None` if it is none, or not as torch has written it."""
    if type(linear) is not nn.Linear or not is_as_written(linear, nn.Linear.forward):
        return None
    # by way of the dictionary, as a module's own way to its parameters takes longer than a kernel
    parameters = linear._parameters
    if "bias" not in parameters or (weight := parameters.get("weight")) is None:
        return None  # kept in some other way
    return Affine(weight, parameters["bias"])
