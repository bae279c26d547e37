"""The certificate: does a module see a later token, or another row of the batch?

A model that predicts the next token from what it should not see looks better than it is, on test text too. `certify`
takes any torch module from embeddings to embeddings or from tokens to logits and looks for that:

- `rows`: another row of the batch is changed;
- `futures`: a token, or all from it on, is changed, and what comes before must not move: in calls of one shape, where a
  causal model gives 0 exactly, or no more than rounding;
- `jacobians`: gradients of every output by later embeddings are 0: finds what is too small to be moved, and misses what
  has no gradient, which `futures` finds;
- `single rows`, `cache`: each row by itself, and token by token with a cache, give the same up to rounding;
- `weights`: attention weights, where they are shown, are 0 for what is later;
- `large calls`: some futures in calls as long as the module takes, and of as many rows as a run's.
"""

import collections
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pennylane_qattn.certificate import CAUSAL, LEAKS, UNDECIDED, Certificate, Check, Leak
from pennylane_qattn.leak_subject import ROUNDING, OutOfTime, Subject, Undecidable, apart, make_subject, one_line
from pennylane_qattn.leak_tests import LARGE_CALLS, TESTS, Progress
from pennylane_qattn.leak_trial import LeakFound, LeftOut, Trial
from pennylane_qattn.module_sizes import Reading, longest

__all__ = ["CAUSAL", "LEAKS", "UNDECIDED", "Certificate", "Check", "Leak", "certify"]

#: What a module may be looked at in.
MODES = ("eval", "train")
#: Rows of a call at full length.
FULL_LENGTH_ROWS = 2
#: Why a test, or the rest of it, was not done.
NO_TIME = "no time"


def certify(
    module: nn.Module | Callable[[], nn.Module],
    *,
    name: str | None = None,
    inputs: Tensor | None = None,
    length: int | None = None,
    vocab_size: int | None = None,
    embed_dim: int | None = None,
    batch_size: int = 3,
    run_batch_size: int | None = None,
    modes: Sequence[str] = MODES,
    tolerance: float | int = 1e-12,
    time_limit: float | int = 60.0,
    seed: int = 0,
) -> Certificate:
    """Looks for leaks in a module: an output that depends on a later token, or on another row of the batch.

    The module is copied and stays as it is, and so do all random states. The copy is on the CPU, in float64 if it runs
    so, and its circuits are folded, whatever device the module runs them on. Before each call the random state is set
    and buffers are put back, so that dropout drops the same. Where random numbers are drawn, only calls of one shape
    are compared. The cache is looked at in evaluation mode. Hooks on the module are a part of it, and run.

    The same seed gives the same leak. The time limit cuts off what is looked at, which the certificate then says: it is
    causal in part if every test had its least, and undecided if one had less. The least is a row, a row alone, three
    futures of one token and of all from it on, gradients of one output, the weights, and one way through the cache.

    Args:
        module: from embeddings `(batch, seq, embed)` to `(batch, seq, ...)`, or from tokens `(batch, seq)` to logits
            `(batch, seq, vocab)`, batch first; of an output with several tensors, `logits` or the first counts, and all
            others of batch and length are looked at in calls of one shape, but for caches. Or a function that builds
            one, where it cannot be copied.
        name: what it is called; by default its own `name`, or its class.
        inputs: an example to vary, `(batch, seq)` of integers or `(batch, seq, embed)`.
        length: tokens of a sequence, two or more; by default what the module takes, at most 128 and less for large
            models, with some futures at full length; or 16 if it does not tell.
        vocab_size: tokens there are, of a module that reads tokens; by default what it tells.
        embed_dim: width, of a module that reads embeddings; by default what it tells.
        batch_size: rows of the batch.
        run_batch_size: rows of a batch where the module is used. Some futures are looked at in calls of that many rows
            too, at full length, as a module may do something else where there is much to do.
        modes: `"eval"`, `"train"` or both.
        tolerance: largest change in calls of one shape, relative to the largest output, that is none: models that mix
            by Fourier transforms round. So are gradients, relative to the largest one.
        time_limit: seconds. What has begun is not cut short, and a leak that was found is still located.
        seed: draws inputs and what is put in their place, and sets the state of random layers.

    Returns:
        The certificate, whose verdict is causal, LEAKS, or undecided where less than the least could be done. One that
        `is_partial` says in its remarks what was not looked at.

    Raises:
        ValueError: if the module cannot be copied or called, what it reads cannot be told, or for a bad argument.

    >>> from pennylane_qattn import build_attention
    >>> certify(build_attention("qisa", embed_dim=6, num_heads=2, block_size=7)).verdict
    'causal'
    >>> print(certify(build_attention("qisa", embed_dim=6, num_heads=2, block_size=7, is_causal=False)).leak.input)
    1
    """
    _check(
        module, inputs, length, vocab_size, embed_dim, batch_size, run_batch_size, modes, tolerance, time_limit, seed
    )
    begun = time.monotonic()
    own = getattr(module, "name", None)
    name = name or (own if isinstance(own, str) and own else _class_name(module))
    wanted = _wanted(inputs, vocab_size, embed_dim)
    progresses: list[Progress] = []
    leak, reason, form, inputs_are, remarks = None, "", "", "", ()
    with apart():
        try:
            subject = make_subject(module, name, seed, wanted, length, inputs)
            form = subject.form
            is_short = length is None and inputs is None
            trial = _trial(subject, inputs, batch_size, float(tolerance), _sizes(subject, is_short, run_batch_size))
            inputs_are = f"{subject.reading}, {trial.rows} rows of {trial.length}"
            progresses = [
                Progress(test, mode)
                for mode in modes
                for test in TESTS
                if test != LARGE_CALLS and (test != "cache" or mode == "eval")
            ]
            if trial.sizes:
                progresses += [Progress(LARGE_CALLS, mode, has_least=True) for mode in modes]
            subject.deadline = begun + time_limit
            leak = _run(trial, progresses)
            remarks = _of_precision(trial, leak) if leak is not None else _of_gaps(trial, progresses, is_short)
        except Undecidable as error:
            reason = str(error)
    faults = list(dict.fromkeys(progress.undecided for progress in progresses if progress.undecided))
    missing = [f"{progress.test} ({progress.mode} mode)" for progress in progresses if not progress.has_least]
    if leak is None and not reason:
        reason = "; ".join(faults)
        if missing and not reason:
            reason = f"the time limit of {time_limit:g} s left out {', '.join(missing)}"
    return Certificate(
        name=name,
        verdict=LEAKS if leak is not None else UNDECIDED if reason else CAUSAL,
        leak=leak,
        reason=reason,
        checks=tuple(progress.check() for progress in progresses),
        form=form,
        inputs=inputs_are,
        remarks=remarks,
        tolerance=float(tolerance),
        seed=seed,
        seconds=time.monotonic() - begun,
    )


def _run(trial: Trial, progresses: Sequence[Progress]) -> Leak | None:
    """The least of every test, and then the rest of them, until there is a leak or no time."""
    tests = [(progress, TESTS[progress.test](trial, progress)) for progress in progresses]
    for is_least in (True, False):
        for progress, test in tests:
            try:
                if is_least:
                    next(test, None)
                else:
                    collections.deque(test, maxlen=0)
            except LeftOut as why:
                progress.left_out = str(why)
                progress.gap = str(why) if why.is_gap else ""
            except Undecidable as why:
                progress.undecided = progress.left_out = str(why)
            except LeakFound as found:
                _leave_out(progresses, "a leak was found before")
                return found.leak
            except OutOfTime:
                _leave_out(progresses, NO_TIME)
                return None
            except Exception as error:  # a module raises what it likes
                raised = f"it raises {type(error).__name__} in {progress.mode} mode: {one_line(error)}"
                progress.undecided = progress.left_out = raised
            progress.has_least = True
    return None


def _leave_out(progresses: Sequence[Progress], why: str) -> None:
    """Notes what is missing."""
    for progress in progresses:
        if not progress.has_least or progress.done < progress.total:
            progress.left_out = progress.left_out or why


# --- arguments --------------------------------------------------------------------------------------------------


def _wanted(inputs: Tensor | None, vocab_size: int | None, embed_dim: int | None) -> Reading | None:
    """What the arguments say that the module reads."""
    if embed_dim is not None:
        return Reading("embeddings", embed_dim)
    if vocab_size is not None:
        return Reading("tokens", vocab_size)
    if inputs is None:
        return None
    return Reading("embeddings", inputs.shape[2]) if inputs.is_floating_point() else Reading("tokens", None)


def _trial(
    subject: Subject, inputs: Tensor | None, rows: int, tolerance: float, sizes: tuple[tuple[int, int], ...]
) -> Trial:
    """A trial with what the module is given, and what is put in its place."""

    def draw(rows: int, length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(subject.seed)
        given = None if inputs is None else inputs.detach().cpu()[:rows]
        size, shape = subject.reading.size, (rows, length)
        if subject.reading.kind == "tokens":
            bases = torch.randint(size, shape, generator=generator)
            if given is not None:
                bases[: len(given)] = given
            steps = torch.randint(1, max(size, 2), shape, generator=generator)
            return bases, (bases + steps) % size
        bases, others = torch.randn(2, *shape, size, dtype=torch.float64, generator=generator)
        if given is not None:
            mean, spread = given.double().mean(), given.double().std()
            bases, others = (mean + (spread if spread > 0 else 1.0) * drawn for drawn in (bases, others))
            bases[: len(given)] = given
        return bases.to(subject.dtype), others.to(subject.dtype)

    return Trial(subject, *draw(rows, subject.length), tolerance, draw, sizes)


def _sizes(subject: Subject, is_short: bool, run_batch_size: int | None) -> tuple[tuple[int, int], ...]:
    """Rows and lengths of the calls that are larger than all others, the smaller first.

    Args:
        subject: what is called.
        is_short: nobody has said how long, so it may be less than the module takes.
        run_batch_size: rows of a batch of a run.
    """
    full = longest(subject.module) if is_short else None
    full = subject.length if full is None else full
    sizes = [(FULL_LENGTH_ROWS, full)] if full > subject.length else []
    if run_batch_size is not None and full > 1:
        sizes.append((run_batch_size, full))
    return tuple(dict.fromkeys(sizes))


def _of_gaps(trial: Trial, progresses: Sequence[Progress], is_short: bool) -> tuple[str, ...]:
    """A word on all that was not looked at."""
    told = longest(trial.subject.module)
    remarks = list(trial.subject.remarks)
    if is_short and told is not None and told > trial.length:
        remarks.append(f"{trial.length} of the {told} positions that it takes; length={told} looks at all")
    for progress in progresses:
        missing = progress.gap
        if progress.left_out == NO_TIME:
            missing = f"no time for {'the rest' if progress.done else 'it'}"
        if missing:
            done = f", {progress.done} of {progress.total}" if progress.total else ""
            remarks.append(f"{progress.test} ({progress.mode} mode{done}): {missing}")
    return tuple(remarks)


def _of_precision(trial: Trial, leak: Leak) -> tuple[str, ...]:
    """A word on leaks that may be rounding."""
    if leak.test not in ("rows", "futures", LARGE_CALLS) or (width := trial.precision(leak.mode)) >= 8:
        return ()
    if leak.size > ROUNDING[width]:
        return ()
    return (f"it computes in {8 * width} bits inside; if this is rounding, give tolerance={ROUNDING[width]:g}",)


def _class_name(module: object) -> str:
    inner = getattr(module, "_orig_mod", module)  # of a compiled module
    return type(inner).__name__ if isinstance(inner, nn.Module) else getattr(module, "__name__", "the module")


def _check(
    module, inputs, length, vocab_size, embed_dim, batch_size, run_batch_size, modes, tolerance, time_limit, seed
) -> None:
    def require(sound: bool, what: str) -> None:
        if not sound:
            raise ValueError(what)

    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    is_module = isinstance(module, nn.Module)
    require(is_module or callable(module), f"certify takes a torch module or what builds one; got {module!r}")
    least = {"length": (length, 2), "vocab_size": (vocab_size, 1), "embed_dim": (embed_dim, 1)}
    least["run_batch_size"] = run_batch_size, 1
    for what, (value, low) in {**least, "batch_size": (batch_size, 1), "seed": (seed, 0)}.items():
        sound = (value is None and what in least) or (whole(value) and value >= low)
        require(sound, f"{what} must be an integer of at least {low}; got {value!r}")
    require(vocab_size is None or embed_dim is None, "give vocab_size for tokens or embed_dim for embeddings, not both")
    require(
        bool(modes) and not isinstance(modes, str) and set(modes) <= set(MODES) and len(set(modes)) == len(modes),
        f"modes must be among {', '.join(MODES)}, each once; got {modes!r}",
    )
    require(0 <= tolerance < 1, f"tolerance must lie in [0, 1); got {tolerance}")
    require(0 < time_limit < math.inf, f"time_limit must be positive and finite, in seconds; got {time_limit}")
    if inputs is None:
        return
    is_tokens, shape = not (inputs.is_floating_point() or inputs.dtype == torch.bool), tuple(inputs.shape)
    require(
        inputs.numel() > 0 and len(shape) == (2 if is_tokens else 3) and not inputs.is_complex(),
        f"inputs must be tokens (batch, seq) or embeddings (batch, seq, embed); got {inputs.dtype} of shape {shape}",
    )
    require(bool(inputs.isfinite().all()), "inputs must be finite")
    require(shape[1] > 1, "inputs must have two positions or more, for there to be a future; got one")
    require(length is None or length == shape[1], f"inputs have {shape[1]} positions; got length {length}")
    require(vocab_size is None or is_tokens, f"inputs must be integers where vocab_size is given; got {inputs.dtype}")
    low, high = inputs.aminmax()
    has_tokens = vocab_size is None or (low >= 0 and high < vocab_size)
    require(bool(has_tokens), f"inputs must lie in [0, vocab_size={vocab_size}); got {low} to {high}")
    has_width = embed_dim is None or (not is_tokens and shape[2] == embed_dim)
    require(has_width, f"inputs must be embeddings of width embed_dim={embed_dim}; got {inputs.dtype} of shape {shape}")
