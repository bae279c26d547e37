"""GPT-1 language models with PennyLane's quantum-inspired attention, trained with Lightning.

The public names stand below by the module that defines them; a name is imported when it is first used, so that
`qattn --help` needs no torch.
"""

import importlib

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


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
