"""What an option that names something may be: read from the registries, so that a new entry is known by itself."""

import dataclasses
from collections.abc import Iterable

from lightning_modules.corpora import CORPORA
from lightning_modules.gpt import PRESETS
from lightning_modules.tokenizers import TOKENIZERS
from lightning_modules.watching import WATCHERS
from pennylane_qattn import ATTENTION
from pennylane_qattn.mechanisms import VALUES
from pennylane_qattn.registry import Registry

#: Names by option, for options that are called otherwise than what a registry holds.
NAMES: dict[str, Iterable[str]] = {
    "preset": PRESETS,
    "corpus": CORPORA,
    "tokenizer": TOKENIZERS,
    "values": VALUES,
    "watch": WATCHERS,
    "target": ATTENTION,
}


def names_of(option: str) -> list[str]:
    """The names that an option takes, by its last part; none if it names nothing.

    Left out are entries that need options of their own, such as an ansatz that is a function.

    >>> names_of("model.preset")
    ['gpt1', 'gpt1-tiny', 'qisa-16', 'qisa-128']
    """
    last = option.rsplit(".", 1)[-1]
    if last not in Registry.all:
        return list(NAMES.get(last, ()))
    return [name for name, cls in Registry.all[last].items() if not any(map(_is_required, dataclasses.fields(cls)))]


def _is_required(option: dataclasses.Field) -> bool:
    return option.init and option.default is option.default_factory is dataclasses.MISSING
