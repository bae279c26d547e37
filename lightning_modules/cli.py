"""The command `qattn`: its subcommands, and how its errors read.

Nothing heavy is imported before a subcommand is known. A subcommand is a function that takes the arguments behind its
name and returns an exit status, or `None` for 0; it stands in `COMMANDS` by the name of its module and its own.

Exit status: 0; 1 if the work failed; 2 for bad input; 130 after Ctrl-C and 143 after SIGTERM. An error is one line on
stderr; with QATTN_DEBUG=1 in the environment its traceback comes first.
"""

import argparse
import importlib
import importlib.metadata
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

#: What qattn answers for mistakes of the user.
BAD_INPUT, FAILURE = 2, 1


class Command(NamedTuple):
    """A subcommand: where its function is, as `module:function`, what it does in one line, and an example."""

    function: str
    help: str
    example: str


COMMANDS: dict[str, Command] = {
    "fit": Command(
        "lightning_modules.training_cli:fit",
        "train a model, or continue a run that was stopped",
        "qattn fit --config configs/qisa-16.yaml",
    ),
    "validate": Command(
        "lightning_modules.training_cli:validate",
        "compute the metrics of a checkpoint on the validation text",
        "qattn validate --ckpt_path runs/qisa-16/checkpoints/best.ckpt",
    ),
    "test": Command(
        "lightning_modules.training_cli:test",
        "compute the metrics of a checkpoint on the test text",
        "qattn test --ckpt_path runs/qisa-16/checkpoints/best.ckpt",
    ),
    "predict": Command(
        "lightning_modules.training_cli:predict",
        "write what a checkpoint predicts for each window of the test text",
        "qattn predict --ckpt_path runs/qisa-16/checkpoints/best.ckpt --output predictions.jsonl",
    ),
    "generate": Command(
        "lightning_modules.cli:generate",
        "let a checkpoint write text",
        'qattn generate --checkpoint runs/qisa-16/checkpoints/best.ckpt --prompt "The "',
    ),
    "compare": Command(
        "lightning_modules.experiment:compare",
        "train the same model with several attentions, and report on them side by side",
        "qattn compare --config configs/quickstart.yaml",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `qattn` with these arguments, by default those of the process, and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status or 0
    except BaseException as error:
        return _report(error)


def _run(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        return print(overview())
    if argv[0] in ("-V", "--version"):
        return print(f"qattn {version()}")
    return function_of(argv[0])(argv[1:])


def overview() -> str:
    """What `qattn --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    examples = "\n".join(f"  {command.example}" for command in COMMANDS.values())
    return textwrap.dedent("""\
        usage: qattn COMMAND [OPTIONS]

        GPT-1 language models with quantum and quantum-inspired attention.

        commands:
        {}

        examples:
        {}

        qattn COMMAND --help lists the options of a command, qattn --version the version.""").format(commands, examples)


def version() -> str:
    """The installed version."""
    try:
        return importlib.metadata.version("pennylane-qattn")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def function_of(name: str) -> Callable[[list[str]], int | None]:
    """The function of a subcommand; `ValueError` with the known ones if there is none."""
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; choose from {', '.join(COMMANDS)}")
    module, function = COMMANDS[name].function.split(":")
    return getattr(importlib.import_module(module), function)


# --- errors -----------------------------------------------------------------------------------------------------


def _report(error: BaseException) -> int:
    """Writes an error as one line, and gives the exit status."""
    cause = error.__context__
    if isinstance(error, SystemExit) and isinstance(cause, KeyboardInterrupt):  # how Lightning ends then
        error = cause
    if isinstance(error, SystemExit) and not hasattr(error, "message"):
        return error.code if isinstance(error.code, int) else FAILURE if error.code else 0
    if os.environ.get("QATTN_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    if isinstance(error, KeyboardInterrupt):
        print("qattn: error: stopped by Ctrl-C", file=sys.stderr)
        return 130
    print(f"qattn: error: {one_line(error)}", file=sys.stderr)
    if isinstance(error, SystemExit):
        return error.code
    return BAD_INPUT if _is_bad_input(error) else FAILURE


def _is_bad_input(error: BaseException) -> bool:
    kinds = (ValueError, argparse.ArgumentError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, (*kinds, PermissionError)) or type(error).__name__ == "MisconfigurationException"


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror.lower()
    elif isinstance(error, argparse.ArgumentError):
        text = _argument_error(text)
    elif not isinstance(error, ValueError | FloatingPointError | SystemExit) and not _is_bad_input(error):
        text = f"{type(error).__name__}: {text} (QATTN_DEBUG=1 shows where)"
    return " ".join(text.split())


def _argument_error(text: str) -> str:
    """The gist of a message of jsonargparse, whose own go over many lines."""
    key = re.match(r'Parser key "([\w.]+)":\s*', text)
    text = text[key.end() :] if key else text
    given = re.search(r"(?:Given value|Got value): (.*)\s*$", text)
    bullets = re.findall(r"^\s*- (.*(?:\n {6,}.*)*)", text, re.MULTILINE)  # why it is none of several types
    reasons = bullets or [text]
    wanted = [_type_name(m[1]) for reason in reasons if (m := re.match(r"Expected an? (.*?)(?:\. Got .*)?$", reason))]
    others = [" ".join(reason.split()) for reason in reasons if not reason.startswith("Expected a")]
    if others:
        text = "; ".join(others)
    elif wanted:
        text = f"expected {' or '.join(wanted)}" + (f"; got {given[1]}" if given else "")
    return f"{key[1]}: {text}" if key else text


def _type_name(text: str) -> str:
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return f"one of {choices[1]}"
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    return {"NoneType": "null", "str": "text"}.get(text, text)


# --- generate ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _generate_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qattn generate",
        description="Lets a checkpoint write text, on stdout. Its vocabulary and sizes come from the checkpoint.",
        epilog=f"example: {COMMANDS['generate'].example}",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="F", help="the .ckpt file, or the folder of a run (its best one)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times")
    add("--prompt_file", metavar="F", help="file with one prompt per line; - reads stdin")
    add("--max_new_tokens", type=int, default=200, metavar="N", help="tokens to add (default: %(default)s)")
    add("--temperature", type=float, default=1.0, metavar="X", help="divides the logits; 0: most likely (default: 1)")
    add("--top_k", type=int, metavar="K", help="sample from the k most likely tokens only")
    add("--top_p", type=float, metavar="P", help="sample from the most likely tokens of total probability p only")
    add("--seed", type=int, default=0, metavar="N", help="of the random draws (default: %(default)s)")
    add("--num_samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    stream_help = "print each token as it comes (default: for a single text on a terminal)"
    add("--stream", action=argparse.BooleanOptionalAction, help=stream_help)
    return parser


def generate(argv: list[str]) -> int:
    """`qattn generate`."""
    options = _generate_parser().parse_args(argv)
    prompts = [*options.prompt, *_prompts_of(options.prompt_file)]
    if not prompts:
        raise ValueError('there is no prompt; give --prompt "TEXT" or --prompt_file F')
    if options.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {options.num_samples}")
    prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
    stream = len(prompts) == 1 and sys.stdout.isatty() if options.stream is None else options.stream
    if stream and len(prompts) > 1:
        raise ValueError(f"only one text can be streamed; got {len(prompts)}, so leave --stream out")

    from lightning_modules.checkpoints import resolve
    from lightning_modules.language_model import LanguageModel

    device = _device(options.device)
    model = LanguageModel.load_from_checkpoint(resolve(options.checkpoint), map_location=device)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = {name: getattr(options, name) for name in names}
    if stream:
        pieces = model.stream(prompts[0], **sampling)
        print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return 0
    for number, text in enumerate(model.generate(prompts, **sampling)):
        if len(prompts) > 1:
            prompt, sample = divmod(number, options.num_samples)
            print(f"--- prompt {prompt + 1}, sample {sample + 1} ---")
        print(text)
    return 0


def _prompts_of(file: str | None) -> Iterator[str]:
    if file is None:
        return
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file!r} is not UTF-8; convert the file") from None
    for line in text.splitlines():
        if line:
            yield line


def _device(name: str):
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose from cpu, cuda, mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device.type not in available:
        raise ValueError(f"unknown device {name!r}; choose from {', '.join(available)}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available[device.type] or (device.index or 0) >= count:
        raise ValueError(f"there is no device {name!r} on this machine; choose from {_present(available)}")
    return device


def _present(available: dict[str, bool]) -> str:
    return ", ".join(name for name, is_there in available.items() if is_there)
