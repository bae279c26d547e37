"""How features come about, for a kernel that makes them together with what is done with them (`token_attention.py`)."""

from typing import Any, NamedTuple

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


Recipe = Affine | Forms


def is_as_written(module: nn.Module, forward: Any, **methods: Any) -> bool:
    """Whether a call of the module does what this `forward` does, and what it calls are these methods: no subclass,
    hook or patch has it otherwise, so another way to the same result may be taken."""
    own, kind = module.__dict__, type(module)
    if kind.forward is not forward or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if any(getattr(kind, name) is not method or name in own for name, method in methods.items()):
        return False
    return not (hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks)


def affine(linear: nn.Module) -> Affine | None:
    """The recipe of torch's linear layer; `None` if it is none, or not as torch has written it."""
    # by way of the dictionary, as a module's own way to its parameters takes longer than a kernel
    if type(linear) is not nn.Linear or not is_as_written(linear, nn.Linear.forward):
        return None
    return Affine(linear._parameters["weight"], linear._parameters["bias"])
