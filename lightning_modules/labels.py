"""The word that everything carries which comes from a model that sees the future, and who says it.

A run says it on every line: what is printed while a `labelling` lasts, and the error that ends it, begin with the
label. Tables, plots, logs and checkpoints get it from `label_of` their model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: A leak: an output that depends on a later token, or on another row of the batch.
LEAKS = "LEAKS"

_labels: list[Callable[[], str]] = []


def label_of(model: object) -> str:
    """The label of a model that knows it, as `LanguageModel` does, else `""`."""
    return getattr(model, "label", "")


def leaks(certificate: Mapping[str, Any] | None) -> bool:
    """Whether a certificate, as plain data, tells of a leak."""
    return isinstance(certificate, Mapping) and certificate.get("verdict") == LEAKS


def is_partial(certificate: Mapping[str, Any] | None) -> bool:
    """Whether a certificate, as plain data, is causal by a part only of what there is to look at."""
    is_causal = isinstance(certificate, Mapping) and certificate.get("verdict") == "causal"
    return is_causal and bool(certificate.get("remarks"))


def with_label(text: str, label: str) -> str:
    """The text behind its label, or as it is without one."""
    return f"{label}: {text}" if label else text


@contextlib.contextmanager
def labelling(label: Callable[[], str]) -> Iterator[None]:
    """Within it, `current` is what `label()` gives; an error that leaves it takes the label along as `error.label`."""
    _labels.append(label)
    try:
        yield
    except BaseException as error:
        error.label = label()  # type: ignore[attr-defined]  # an attribute of ours
        raise
    finally:
        _labels.pop()


def current() -> str:
    """The label of the run that is going on; `""` if it needs none, or none is going on."""
    return _labels[-1]() if _labels else ""
