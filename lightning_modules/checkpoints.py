"""Checkpoints of qattn: plain data, read without running code, written whole or not at all.

A checkpoint is what Lightning writes, with `hyper_parameters` replaced by a description of the model in numbers,
strings, lists and dicts (`LanguageModel.to_plain`). Reading one never imports or calls anything that it names: torch
reads with `weights_only=True`, and the names in the description are looked up in registries.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from lightning_modules.files import atomic_write

FORMAT = "pennylane-qattn"
VERSION = 1
CHECKPOINTS, LAST, BEST = "checkpoints", "last.ckpt", "best.ckpt"

_CODE = re.compile(r"(?:GLOBAL|global:?|class|function)\s+([\w.]+\.[\w.]+)")


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of qattn.

    Args:
        path: the file.
        map_location: where its tensors go, as in `torch.load`.

    Raises:
        ValueError: if there is no such file, or it is damaged, comes from another program, or holds more than data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r}; give the path of a .ckpt file that qattn fit wrote")
    try:
        if zipfile.is_zipfile(path):  # torch itself does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location=map_location, weights_only=True)
    except PermissionError as error:
        raise ValueError(f"cannot read the checkpoint {str(path)!r}: {error.strerror.lower()}") from None
    except pickle.UnpicklingError as error:
        if code := _CODE.search(str(error)):
            raise ValueError(
                f"refused {str(path)!r}: it names {code[1]}, which reading it would run; checkpoints of qattn hold "
                "plain data only"
            ) from None
        raise ValueError(_damaged(path)) from None
    except Exception as error:  # torch raises several kinds for bytes that it cannot read
        if "cuda" in str(error).lower():
            raise
        raise ValueError(_damaged(path)) from None
    description = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is no checkpoint of qattn but of another program; give one that it wrote")
    if description.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} has version {description.get('version')!r} of the checkpoint format, and this qattn reads "
            f"version {VERSION}; use the release that wrote it"
        )
    if not isinstance(content.get("state_dict"), dict):
        raise ValueError(_damaged(path))
    return content


def read_state(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """As `read_checkpoint`, of a checkpoint that training can go on from."""
    content = read_checkpoint(path, map_location)
    if not {"optimizer_states", "loops", "callbacks", "global_step", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(
            f"{str(path)!r} holds a model and not the state of its training, so training cannot go on from it; give a "
            "last.ckpt or best.ckpt that qattn fit wrote"
        )
    return content


def rewrite(path: str | os.PathLike[str], **entries: Any) -> None:
    """Puts entries into a checkpoint that is there."""
    PlainCheckpointIO().save_checkpoint({**read_checkpoint(path), **entries}, path)


def resolve(path: str | os.PathLike[str]) -> Path:
    """The file that a path means: itself, or for the folder of a run its best checkpoint, else its last one."""
    path = Path(path).expanduser()
    for name in (BEST, LAST) if path.is_dir() else ():
        for folder in (path / CHECKPOINTS, path):
            if (folder / name).is_file():
                return folder / name
    return path


def _damaged(path: Path) -> str:
    return f"{str(path)!r} is damaged, or no checkpoint at all; use another copy of it, or train again"


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads all parameters and buffers into a model, which takes over their precision.

    Raises:
        ValueError: naming the first tensor that is missing, surplus or of another shape.
    """
    own = model.state_dict()
    for name in [*own, *state_dict]:
        if name not in state_dict:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        if name not in own:
            raise ValueError(f"the checkpoint has a tensor {name} that the model lacks")
        if not isinstance(state_dict[name], Tensor) or own[name].shape != state_dict[name].shape:
            shape = list(getattr(state_dict[name], "shape", "?"))
            raise ValueError(
                f"the checkpoint has a tensor {name} of shape {shape}; the model's is {list(own[name].shape)}"
            )
    take_precision(model, state_dict)
    model.load_state_dict(state_dict)


def take_precision(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Gives the parameters and buffers of a model the precision of those that are to be loaded into it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state_dict and tensor.is_floating_point():
            tensor.data = tensor.data.to(state_dict[name].dtype)


def first_difference(then: Any, now: Any, name: str = "") -> str | None:
    """Where two plain descriptions differ first, as `"name: A in the checkpoint, B here"`; `None` if nowhere."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*then, *now]):
            inner = f"{name}.{key}" if name else str(key)
            if key not in then or key not in now:
                return f"{inner} is missing {'in the checkpoint' if key not in then else 'here'}"
            if found := first_difference(then[key], now[key], inner):
                return found
        return None
    if isinstance(then, list | tuple) and isinstance(now, list | tuple):
        then, now = list(then), list(now)
    return None if then == now else f"{name} is {_short(then)} in the checkpoint and {_short(now)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class PlainCheckpointIO(TorchCheckpointIO):
    """Reads and writes the checkpoints of a Trainer: `Trainer(plugins=[PlainCheckpointIO()])`.

    A file takes its name only once it is complete and on the disk, and what could not be read back as plain data is
    not written.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if found := _not_plain(checkpoint):
            raise ValueError(f"a checkpoint holds plain data only, and {found}; keep it out of the saved state")
        with atomic_write(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's archive could not be closed, as nothing more could be written
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, "cpu" if map_location is None else map_location)


def _not_plain(value: Any, name: str = "checkpoint") -> str | None:
    """Says which part of nested data is neither a number, string or tensor, nor a dict, list or tuple of them."""
    if type(value) in (bool, int, float, str, type(None), Tensor, nn.Parameter, torch.dtype, torch.device):
        return None
    if isinstance(value, Mapping):
        parts = ((f"{name}[{key!r}]", part) for key, part in value.items())
    elif type(value) in (list, tuple, set):
        parts = ((f"{name}[{i}]", part) for i, part in enumerate(value))
    else:
        return f"{name} is a {type(value).__qualname__}"
    return next(filter(None, (_not_plain(part, inner) for inner, part in parts)), None)
