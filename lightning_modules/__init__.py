"""GPT-1 language models with PennyLane's quantum-inspired attention, trained with Lightning.

The public names stand below by the module that defines them; a name is imported when it is first used, so that
`qattn --help` needs no torch. For those who check types they are imported here, too.
"""

import importlib
from typing import TYPE_CHECKING, Any

_MODULES = {
    "annealing": ("AnnealTemperature",),
    "checkpoints": ("PlainCheckpointIO", "read_checkpoint"),
    "callbacks": ("RandomState", "RunCheckpoint"),
    "corpora": ("CORPORA", "Corpus", "load_corpus"),
    "data": ("TextDataModule",),
    "generation": ("generate", "stream"),
    "guard": ("CausalityGuard", "NonCausalError"),
    "gpt": ("GPT", "PRESETS", "GPTConfig", "preset"),
    "language_model": ("LanguageModel",),
    "metrics": ("TextMetrics",),
    "sources": ("Source",),
    "tokenizers": ("BPETokenizer", "CharTokenizer", "Tokenizer", "tokenizer_from_plain"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from lightning_modules.annealing import AnnealTemperature as AnnealTemperature
    from lightning_modules.callbacks import RandomState as RandomState
    from lightning_modules.callbacks import RunCheckpoint as RunCheckpoint
    from lightning_modules.checkpoints import PlainCheckpointIO as PlainCheckpointIO
    from lightning_modules.checkpoints import read_checkpoint as read_checkpoint
    from lightning_modules.corpora import CORPORA as CORPORA
    from lightning_modules.corpora import Corpus as Corpus
    from lightning_modules.corpora import load_corpus as load_corpus
    from lightning_modules.data import TextDataModule as TextDataModule
    from lightning_modules.generation import generate as generate
    from lightning_modules.generation import stream as stream
    from lightning_modules.gpt import GPT as GPT
    from lightning_modules.gpt import PRESETS as PRESETS
    from lightning_modules.gpt import GPTConfig as GPTConfig
    from lightning_modules.gpt import preset as preset
    from lightning_modules.guard import CausalityGuard as CausalityGuard
    from lightning_modules.guard import NonCausalError as NonCausalError
    from lightning_modules.language_model import LanguageModel as LanguageModel
    from lightning_modules.metrics import TextMetrics as TextMetrics
    from lightning_modules.sources import Source as Source
    from lightning_modules.tokenizers import BPETokenizer as BPETokenizer
    from lightning_modules.tokenizers import CharTokenizer as CharTokenizer
    from lightning_modules.tokenizers import Tokenizer as Tokenizer
    from lightning_modules.tokenizers import tokenizer_from_plain as tokenizer_from_plain


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
