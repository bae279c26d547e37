"""The texts to learn from: corpora by name, and any UTF-8 file.

``pydoc``
    The reference text about the Python language that every CPython carries in ``pydoc_data.topics`` (what
    ``help("lambda")`` shows), some 450,000 characters of English with code examples. The topics stand in the
    order of their keys. Removed are only lines drawn from rules (underlines of headings, borders of tables),
    blanks at line ends and repeated empty lines. The text belongs to the running Python: `Corpus.source`
    names its version.
``shakespeare``
    Tiny Shakespeare, 1,115,394 characters with 65 symbols, in the version of Karpathy's char-rnn (2015),
    known by its sha256. It is looked for in the folder of the option `data_dir`, in the folder that the
    environment variable ``QATTN_DATA`` names and in the cache, and downloaded to the cache otherwise. The
    cache is the folder that ``QATTN_CACHE`` names, or ``pennylane-qattn`` in the usual place of the platform.
``markov``, ``hidden-markov``
    Text of a random language whose entropy is known, drawn by the functions of the same names in
    `lightning_modules.sources`. Options may stand behind a colon: ``markov:order=3,symbols=8,seed=1``; besides
    theirs there is `length`, in characters. `Corpus.source_model` is the language itself.
"""

import hashlib
import http.client
import inspect
import os
import platform
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .files import atomic_write
from .sources import SOURCES, Source

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_FILE = "tinyshakespeare.txt"
TIMEOUT_SECONDS = 30

#: Characters of the text of a source, unless told otherwise, and at most.
LENGTH, MAX_LENGTH = 1_000_000, 100_000_000

_REMEDY = f"put {SHAKESPEARE_FILE} into the folder that QATTN_DATA names"
_RULES = re.compile(r"^[ \t]*[*=~^+|-][*=~^+| \t-]{2,}\n", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """A text, its name, where it came from (for the record of a run), and the language that it was drawn from."""

    name: str
    text: str = field(repr=False)
    source: str
    source_model: Source | None = field(default=None, repr=False, compare=False)


def cache_dir() -> Path:
    """The folder for downloads: ``QATTN_CACHE``, or ``pennylane-qattn`` in the platform's cache."""
    if named := os.environ.get("QATTN_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pennylane-qattn"


def load_corpus(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> Corpus:
    """Read a corpus by name, or a text file by path.

    Args:
        name_or_path: a name in `CORPORA`, for a source with options behind a colon if wanted; else the path of a
            UTF-8 file, whose text is kept exactly as it is.
        data_dir: the folder that holds the files of named corpora; it goes before ``QATTN_DATA``.
        download: whether a corpus that is nowhere on this machine may be downloaded to the cache.

    Raises:
        ValueError: one line, saying what is wrong and what to do: an unknown name, a file that is missing,
            empty or not UTF-8, a file or download with the wrong content, a failed download, a wrong option.
    """
    name, _, options = str(name_or_path).partition(":")
    if name in SOURCES:
        return _drawn(name, options)
    if (loader := CORPORA.get(str(name_or_path))) is not None:
        return loader(None if data_dir is None else Path(data_dir).expanduser(), download)
    path = Path(name_or_path).expanduser()
    if not os.path.exists(path):
        raise ValueError(
            f"unknown corpus {str(name_or_path)!r}: there is no such file; choose from {', '.join(CORPORA)} "
            "(the last two also with options, as in markov:order=2,seed=1), or give the path of a UTF-8 text file"
        )
    return Corpus(path.name, _read_text(path), str(path))


def _drawn(name: str, options: str) -> Corpus:
    """A source's text; the options are `option=value`, with commas between."""
    kinds = {option: parameter.annotation for option, parameter in inspect.signature(SOURCES[name]).parameters.items()}
    kinds["length"] = int
    values = {}
    for part in options.split(",") if options else ():
        option, is_given, value = (piece.strip() for piece in part.partition("="))
        if option not in kinds or not is_given:
            takes = f"it takes {', '.join(kinds)}, as in {name}:symbols=5,seed=1"
            raise ValueError(f"{part!r} is no option of the corpus {name}; {takes}")
        if option in values:
            raise ValueError(f"the corpus {name} has two values for its option {option}; give one")
        try:
            values[option] = kinds[option](value)
        except ValueError:
            kind = "an integer" if kinds[option] is int else "a number"
            raise ValueError(f"{option} of the corpus {name} must be {kind}; got {value!r}") from None
    length = values.pop("length", LENGTH)
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length of the corpus {name} must lie between 1 and {MAX_LENGTH}; got {length}")
    try:
        source = SOURCES[name](**values)
    except ValueError as error:
        raise ValueError(f"the corpus {name}: {error}") from None
    description = f"{source.description},length={length} (entropy rate {source.entropy_rate:.4f} nats)"
    return Corpus(name, source.sample_text(length), description, source)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else (error.strerror or str(error)).lower()
        raise ValueError(f"cannot read {str(path)!r}: {reason}; give the path of a UTF-8 text file") from error
    if not data:
        raise ValueError(f"{str(path)!r} is empty; give a file with text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert the file"
        ) from None


def _pydoc(data_dir: Path | None, download: bool) -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "the corpus 'pydoc' needs pydoc_data, which this Python lacks; install the whole standard "
            "library, or choose another corpus"
        ) from None
    text = "\n\n".join(topics[key].strip("\n") for key in sorted(topics)) + "\n"
    text = _RULES.sub("", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))
    return Corpus(
        "pydoc",
        re.sub(r"\n{3,}", "\n\n", text),
        f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}",
    )


def _shakespeare(data_dir: Path | None, download: bool) -> Corpus:
    folders = [cache_dir()]
    if named := os.environ.get("QATTN_DATA"):
        folders.insert(0, Path(named).expanduser())
    if data_dir is not None:
        if not (data_dir / SHAKESPEARE_FILE).is_file():
            raise ValueError(f"{str(data_dir)!r} holds no {SHAKESPEARE_FILE}; put it there or leave data_dir out")
        folders.insert(0, data_dir)
    for folder in folders:
        if (path := folder / SHAKESPEARE_FILE).is_file():
            text = _read_text(path)
            if wrong := _wrong_shakespeare(text.encode()):
                raise ValueError(f"{str(path)!r} is not Tiny Shakespeare: {wrong}; replace or remove it")
            return Corpus("shakespeare", text, str(path))
    if not download:
        looked = ", ".join(map(str, folders))
        raise ValueError(f"no {SHAKESPEARE_FILE} in {looked}; allow the download, or {_REMEDY}")
    data = _download(SHAKESPEARE_URL, SHAKESPEARE_BYTES)
    if wrong := _wrong_shakespeare(data):
        raise ValueError(f"the download of {SHAKESPEARE_URL} is not Tiny Shakespeare: {wrong}; {_REMEDY}")
    with atomic_write(cache_dir() / SHAKESPEARE_FILE) as file:
        file.write(data)
    return Corpus("shakespeare", data.decode("utf-8"), SHAKESPEARE_URL)


def _wrong_shakespeare(data: bytes) -> str:
    """What is wrong with the file's content; empty if nothing is."""
    found = hashlib.sha256(data).hexdigest()
    if found == SHAKESPEARE_SHA256:
        return ""
    if len(data) != SHAKESPEARE_BYTES:
        more = "more than " if len(data) > SHAKESPEARE_BYTES else ""
        return f"{more}{min(len(data), SHAKESPEARE_BYTES)} bytes instead of {SHAKESPEARE_BYTES}"
    return f"sha256 {found} instead of {SHAKESPEARE_SHA256}"


def _download(url: str, expected_bytes: int) -> bytes:
    """Fetch a small file into memory, with a progress bar on stderr; stop soon after `expected_bytes`."""
    request = urllib.request.Request(url, headers={"User-Agent": "pennylane-qattn"})
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    data = bytearray()
    try:
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            task = progress.add_task("Downloading Tiny Shakespeare", total=expected_bytes)
            while len(data) <= expected_bytes and (chunk := response.read(1 << 16)):
                data += chunk
                progress.update(task, completed=len(data))
    except (OSError, http.client.HTTPException) as error:  # OSError: URLError, HTTPError, time-outs
        reason = str(getattr(error, "reason", "") or error or type(error).__name__)
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            reason = f"HTTP {error.code} {reason}"
        raise ValueError(f"the download of {url} failed: {' '.join(reason.split())}; {_REMEDY}") from error
    return bytes(data)


def _source(name: str) -> Callable[[Path | None, bool], Corpus]:
    return lambda data_dir, download: _drawn(name, "")


#: Loaders by name, of a folder for data and whether to download.
CORPORA: dict[str, Callable[[Path | None, bool], Corpus]] = {
    "pydoc": _pydoc,
    "shakespeare": _shakespeare,
    **{name: _source(name) for name in SOURCES},
}
