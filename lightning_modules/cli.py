"""The command `qattn`: its subcommands, and how its errors read.

Nothing heavy is imported before a subcommand is known. A subcommand is a function that takes the arguments behind its
name and returns an exit status, or `None` for 0; it stands in `COMMANDS` by the name of its module and its own.

Exit status: 0; 1 if the work failed or a check did; 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM and 141 where
the reader of a pipe is gone. An error is one line on stderr; with QATTN_DEBUG=1 in the environment its traceback comes
first.
"""

import argparse
import difflib
import errno
import importlib
import importlib.metadata
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

from lightning_modules.execution_options import add_execution_options, execution_of
from lightning_modules.labels import with_label

#: What qattn answers for mistakes of the user.
BAD_INPUT, FAILURE = 2, 1


class Command(NamedTuple):
    """A subcommand: where its function is, as `module:function`, what it does in one line, and an example."""

    function: str
    help: str
    example: str


COMMANDS: dict[str, Command] = {
    "new": Command(
        "lightning_modules.new_command:new",
        "write a config for fit, with a comment above every line",
        "qattn new --attention qsann --preset qisa-16 --output mine.yaml",
    ),
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
    "report": Command(
        "lightning_modules.run_report:report",
        "show runs that are there already side by side on one page",
        "qattn report runs/qisa-16 runs/classical-16 --output runs/report",
    ),
    "merge": Command(
        "lightning_modules.comparison_rows:merge",
        "join the parts of a comparison that --shard made, and report on all of it",
        "qattn merge runs/part-1 runs/part-2 --output runs/whole",
    ),
    "certify": Command(
        "lightning_modules.certify_command:certify",
        "certify that a model sees no later token, or show where it does: a checkpoint, or any torch module",
        "qattn certify runs/qisa-16",
    ),
    "cross-check": Command(
        "lightning_modules.cross_check:cross_check",
        "run a trained model on devices beside its folded self: losses, cross-entropy, gradients",
        "qattn cross-check --checkpoint runs/quickstart/qisa",
    ),
    "noise-sweep": Command(
        "lightning_modules.noise_sweep:noise_sweep",
        "evaluate a checkpoint with finite shots and with noise, and draw what they do",
        "qattn noise-sweep --checkpoint runs/qisa-16 --output runs/noise-sweep",
    ),
    "grover": Command(
        "lightning_modules.grover_command:grover",
        "count what Grover search would do for attention: calls, errors, resources; of a checkpoint or random rows",
        "qattn grover --checkpoint runs/classical-16",
    ),
    "draw": Command(
        "lightning_modules.circuit_commands:draw",
        "draw a circuit of a checkpoint or a preset, as text and as a picture",
        "qattn draw --preset qisa-16 --attention qisa --output circuit.png",
    ),
    "resources": Command(
        "lightning_modules.circuit_commands:resources",
        "count qubits, gates, settings, executions and shots of a checkpoint or a preset",
        "qattn resources --preset gpt1 --attention qisa",
    ),
    "devices": Command(
        "lightning_modules.device_table:devices",
        "list devices and methods: which work for which circuits, why not, and what auto picks",
        "qattn devices --try",
    ),
    "export-qasm": Command(
        "lightning_modules.circuit_commands:export_qasm",
        "write a trained circuit for one input as OpenQASM programs",
        'qattn export-qasm --checkpoint runs/qisa-16 --text "To be" --output qasm',
    ),
    "export-hf": Command(
        "lightning_modules.export_command:export_hf",
        "write a checkpoint as a folder of Hugging Face, with a model card",
        "qattn export-hf --checkpoint runs/qisa-16 --output qisa-16-hf",
    ),
    "completion": Command(
        "lightning_modules.completion_command:completion",
        "print a script with which bash or zsh completes commands, options and names",
        "qattn completion bash > ~/.qattn-completion.bash",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `qattn` with these arguments, by default those of the process, and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return reported(lambda: _run(argv))


def reported(work: Callable[[], int | None]) -> int:
    """Does the work of a command and returns its exit status; an error is told in one line on stderr."""
    try:
        status = work()
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


#: The commands in the order of a study, as `qattn --help` tells them.
GROUPS: dict[str, tuple[str, ...]] = {
    "begin": ("new", "completion"),
    "train": ("fit", "compare", "merge"),
    "use and judge": ("validate", "test", "predict", "generate", "report", "certify", "grover"),
    "circuits and quantum devices": ("draw", "resources", "devices", "cross-check", "noise-sweep"),
    "share": ("export-qasm", "export-hf"),
}

OVERVIEW = """\
usage: qattn COMMAND [OPTIONS]

GPT-1 language models with quantum and quantum-inspired attention.

first steps:
  qattn fit --config configs/qisa-16.yaml --data.corpus pydoc   trains; all of it goes into runs/qisa-16
  qattn test --ckpt_path runs/qisa-16                           measures it on text that it has not seen
  qattn generate --checkpoint runs/qisa-16 --prompt "The "      lets it write
  qattn report runs/qisa-16                                     draws it: losses, attention, circuit, samples

{commands}
examples:
{examples}

qattn COMMAND --help lists the options of a command, qattn --version the version.
Exit status: 0 done, 1 it failed or a check did, 2 bad input, 130 Ctrl-C, 141 closed pipe, 143 SIGTERM.
An error is one line; with QATTN_DEBUG=1 in the environment its traceback comes first.
The documentation is in docs/, from docs/start.md on; docs/errors.md says what to do about errors."""


def overview() -> str:
    """What `qattn --help` prints."""
    width = max(map(len, COMMANDS))
    commands = ""
    for group, names in GROUPS.items():
        commands += f"{group}:\n" + "".join(f"  {name:{width}}  {COMMANDS[name].help}\n" for name in names) + "\n"
    examples = "\n".join(f"  {command.example}" for command in COMMANDS.values())
    return OVERVIEW.format(commands=commands.rstrip("\n") + "\n", examples=examples)


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


# --- parsers ---------------------------------------------------------------------------------------------------


class Handed(Exception):
    """A parser on its way to `parser_of`."""

    def __init__(self, parser: Any):
        super().__init__(parser)
        self.parser = parser


class HandsOver:
    """Goes before the class of a command's parser, argparse's or jsonargparse's, so that `parser_of` can have it."""

    is_wanted: ClassVar[bool] = False

    def parse_args(self, *args: Any, **options: Any) -> Any:
        if HandsOver.is_wanted:
            raise Handed(self)
        parser: Any = super()
        return parser.parse_args(*args, **options)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, as it is about to read the command's arguments; nothing is run."""
    HandsOver.is_wanted = True
    try:
        function_of(name)([])
    except Handed as handed:
        return handed.parser
    finally:
        HandsOver.is_wanted = False
    raise TypeError(f"the command {name!r} has no parser that hands itself over; base it on HandsOver")


# --- errors -----------------------------------------------------------------------------------------------------


def _report(error: BaseException) -> int:
    """Writes an error as one line, and gives the exit status."""
    cause = error.__context__
    if isinstance(error, SystemExit) and isinstance(cause, KeyboardInterrupt):  # how Lightning ends then
        error = cause
    if isinstance(error, SystemExit) and not hasattr(error, "message"):
        return error.code if isinstance(error.code, int) else FAILURE if error.code else 0
    processes = sys.modules.get("lightning_modules.processes")  # loaded where there may be several
    if processes and processes.is_left_to_the_first(error):
        return 0  # Lightning kills the first process, which is about to tell, where another ends with a failure
    speaker = processes.speaker() if processes else ""
    if os.environ.get("QATTN_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    if isinstance(error, KeyboardInterrupt):
        print("qattn: error: stopped by Ctrl-C", file=sys.stderr)
        return 130
    label = getattr(error, "label", "")  # of the run that it ended
    line = one_line(error)
    if "pennylane_qattn.registry" in sys.modules:  # else no name was looked up
        from lightning_modules.trust import name_remedy

        line = name_remedy(line)
    print(f"qattn: error: {speaker}{with_label(line, label)}", file=sys.stderr)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILURE
    return BAD_INPUT if _is_bad_input(error) else FAILURE


def _is_bad_input(error: BaseException) -> bool:
    kinds = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    is_too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return is_too_long or isinstance(error, kinds) or type(error).__name__ == "MisconfigurationException"


def _is_told(error: BaseException) -> bool:
    """Whether its text alone says enough."""
    return _is_bad_input(error) or type(error).__name__ in (
        "ExecutionBudgetError",
        "LostProcessError",
        "NonCausalError",
    )


#: What to do about errors of the operating system.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "choose another place",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit on the size of files, or choose another place",
}


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(error.errno)
        text = error.strerror.lower() + (f"; {remedy}" if remedy else "")
        text = f"{error.filename}: {text}" if error.filename else text
    elif isinstance(error, UnicodeEncodeError):
        character = error.object[error.start]
        text = f"the output is {error.encoding}, which has no {character!a}; set PYTHONIOENCODING=utf-8"
    elif not (isinstance(error, ValueError | FloatingPointError | SystemExit) or _is_told(error)):
        text = f"{type(error).__name__}: {text} (QATTN_DEBUG=1 shows where)"
    return " ".join(text.split())


def unknown_option(name: str, known: Sequence[str], prog: str) -> str:
    """What is said of an option that a command does not have."""
    meant = difflib.get_close_matches(name, known, 1)
    return f"unknown option {name!r}; " + (f"did you mean {meant[0]!r}? " if meant else "") + f"see {prog} --help"


# --- generate ---------------------------------------------------------------------------------------------------


class Parser(HandsOver, argparse.ArgumentParser):
    """One whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: -*([^\s=]+)", message):
            raise ValueError(unknown_option(unknown[1], [action.dest for action in self._actions], self.prog))
        raise ValueError(f"{message}; see {self.prog} --help")


class _Import(argparse.Action):
    """Imports at once what `--trust` names, so that its names are known to whatever is read then."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from lightning_modules import trust

        _, prefixes = trust.split([f"{trust.OPTION}={values}"])
        for prefix in prefixes:
            trust.import_trusted(prefix)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Gives a command that reads a checkpoint, or takes the name of a mechanism, the option `--trust`."""
    parser.add_argument(
        "--trust",
        action=_Import,
        default=argparse.SUPPRESS,
        metavar="MODULE",
        help="import this module of yours, which runs it, for the names that it registers, as of an attention; may be "
        "given several times",
    )


def _generate_parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    add_trust(parser)
    add_execution_options(parser)
    stream_help = "print each token as it comes (default: for a single text on a terminal)"
    add("--stream", action=argparse.BooleanOptionalAction, help=stream_help)
    return parser


def generate(argv: list[str]) -> int:
    """`qattn generate`."""
    options = _generate_parser().parse_args(argv)
    prompts = [*options.prompt, *_prompts_of(options.prompt_file)]
    if not prompts:
        raise ValueError('there is no prompt; give --prompt "TEXT" or --prompt_file F')
    if "" in prompts:
        raise ValueError(f"prompt {prompts.index('') + 1} is empty; give at least one token")
    if options.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {options.num_samples}")
    prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
    stream = len(prompts) == 1 and sys.stdout.isatty() if options.stream is None else options.stream
    if stream and len(prompts) > 1:
        raise ValueError(f"only one text can be streamed; got {len(prompts)}, so leave --stream out")

    from lightning_modules.checkpoints import resolve
    from lightning_modules.executions import explain
    from lightning_modules.guard import say_if_leaking
    from lightning_modules.language_model import LanguageModel
    from lightning_modules.progress import counting

    device = _device(options.device)
    model = LanguageModel.load_from_checkpoint(resolve(options.checkpoint), map_location=device)
    model.set_execution(execution_of(options))
    say_if_leaking(model, options.checkpoint)
    explain(model)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = {name: getattr(options, name) for name in names}
    if stream:
        pieces = model.stream(prompts[0], **sampling)
        print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return 0
    with counting("writing", options.max_new_tokens) as count:
        texts = model.generate(prompts, on_token=count, **sampling)
    for number, text in enumerate(texts):
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
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ValueError(f"{file!r} is not UTF-8: {byte}; convert the file") from None
    # Not `splitlines`, which also cuts at form feeds, at U+2028 and others.
    yield from filter(None, re.split(r"\r\n|\r|\n", text))


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
