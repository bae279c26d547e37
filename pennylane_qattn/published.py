r"""The published forms of QISA and QSANN, which see the future: for reproduction only.

As in the authors' public code (QISA, arXiv 2603.03318; QISA.py of github.com/Nikait/QISA): the rows of the weights
:math:`w` are masked and normalised rightly, and then the values are multiplied by the transpose,

.. math:: \mathrm{out}_j = \sum_{i \succeq j} w_{ij} v_i

so that token :math:`j` receives its own and all later values, and what it receives does not sum to one. The published
results are consistent with that leak. Everything else is the causal mechanism's: parameters, their names, options and
Pauli words, so that the `state_dict` of either loads into the other.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Shaped
from torch import Tensor

from pennylane_qattn.attention import Attention, Visibility
from pennylane_qattn.mechanisms import ATTENTION, QISA, QSANN, Mechanism, QISAAbsorbed, QSANNMulti


class PublishedAttention(Attention):
    """An attention whose weights are applied transposed. It LEAKS: a token's output depends on later tokens.

    `weights(x)` is what is truly applied, `[receiver, sender]`. There is no key/value cache, since every token changes
    the outputs of those before it.
    """

    has_cache = False

    def applied(
        self, weights: Shaped[Tensor, "batch _ queries keys"], visibility: Visibility
    ) -> Shaped[Tensor, "batch _ receivers senders"]:
        if visibility.padding is not None:  # queries are the senders here, and padding sends nothing
            weights = weights.masked_fill(visibility.padding[:, None, :, None], 0)
        return weights.transpose(-2, -1)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, LEAKS)"


class _Published(Mechanism):
    """A mechanism with the weights transposed."""

    is_published: ClassVar[bool] = True
    attention_class: ClassVar[type[Attention]] = PublishedAttention


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QISAPublished(_Published, QISA):
    """`qisa` as in the authors' public code. It LEAKS the future."""

    name = "qisa-published"


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QISAAbsorbedPublished(_Published, QISAAbsorbed):
    """`qisa-absorbed` as in the authors' public code. It LEAKS the future."""

    name = "qisa-absorbed-published"


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QSANNPublished(_Published, QSANN):
    """`qsann` as in the authors' public code of QISA, "v1". It LEAKS the future."""

    name = "qsann-published"


@ATTENTION.register
@dataclass(frozen=True, kw_only=True)
class QSANNMultiPublished(_Published, QSANNMulti):
    """`qsann-multi` as in the authors' public code of QISA, "v2". It LEAKS the future."""

    name = "qsann-multi-published"
