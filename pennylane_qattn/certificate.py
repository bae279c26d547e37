"""Certificates of causality as data: what was looked at, what was found, and the words for it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: What a certificate may say.
CAUSAL, LEAKS, UNDECIDED = "causal", "LEAKS", "undecided"


@dataclass(frozen=True)
class Leak:
    """An output that depends on what it must not see.

    Attributes:
        test: what found it: `"futures"`, `"jacobians"`, `"rows"`, `"single rows"`, `"cache"`, `"weights"` or
            `"large calls"`.
        mode: `"eval"` or `"train"`.
        layer: the first submodule to leak, by its path; the module's own name if the leak is in none of them.
        output: position of the output, the smallest that was found.
        input: position of the token that it depends on, the smallest; `None` where there is no one token to name.
        size: the largest change of that output when that token is changed; by `"jacobians"`, the largest entry of the
            gradient of a random combination of the output's features; by `"weights"`, the weight. At most the largest
            float.
        largest: the same of all pairs that were looked at.
        across: `"time"`, `"batch"` (another row) or `"cache"` (with a cache it computes something else).
        output_row, input_row: rows of the batch, where they differ.
    """

    test: str
    mode: str
    layer: str
    output: int
    input: int | None
    size: float
    largest: float
    across: str = "time"
    output_row: int | None = None
    input_row: int | None = None

    def __str__(self) -> str:
        if self.across == "cache":
            found = f"output {self.output} is another with a cache than without"
        elif self.test == "single rows":
            found = f"output {self.output} of row {self.output_row} is another when the row is alone"
        elif self.across == "batch":
            row = "another row" if self.input_row is None else f"row {self.input_row}"
            found = f"output {self.output} of row {self.output_row} depends on input {self.input} of {row}"
        else:
            found = f"output {self.output} depends on input {self.input}"
        return (
            f"in {self.layer}, {found}, by {self.size:.1e} ({self.test}, {self.mode} mode; largest {self.largest:.1e})"
        )


@dataclass(frozen=True)
class Check:
    """One test in one mode.

    Attributes:
        test, mode: which.
        done, total: how much of it was done.
        largest: the largest change, gradient or weight where there should be none.
        left_out: why it, or the rest of it, was not done; empty if nothing is missing.
        remark: what else there is to say.
    """

    test: str
    mode: str
    done: int
    total: int
    largest: float = 0.0
    left_out: str = ""
    remark: str = ""

    @property
    def is_begun(self) -> bool:
        """Whether there is anything to tell of it but why it was left out."""
        return self.done > 0 or (self.total > 0 and not self.left_out)

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total}"] if self.is_begun else []
        if self.largest:
            parts.append(f"largest {self.largest:.1e}")
        if self.left_out:
            parts.append(f"left out: {self.left_out}" if not self.done else f"the rest left out: {self.left_out}")
        if self.remark:
            parts.append(self.remark)
        return f"{self.mode:<5}  {self.test:<11}  {'; '.join(parts)}"


@dataclass(frozen=True)
class Certificate:
    """Whether a module sees a later token or another row of the batch; `str` says it in several lines.

    Attributes:
        name: of the module.
        verdict: `"causal"`, `"LEAKS"` or `"undecided"`.
        leak: the first one, if it leaks.
        reason: why it is undecided; of a leak that was not found by looking at the module, what tells of it.
        checks: what was done.
        form: what was looked at: the precision of the copy, and how its circuits were run.
        inputs: what it was given.
        remarks: what else there is to say; of a causal module, what was not looked at.
        tolerance: largest change, relative to the largest output, that counts as none.
        seed: of all random choices.
        seconds: how long it took.
    """

    name: str
    verdict: str
    leak: Leak | None = None
    reason: str = ""
    checks: tuple[Check, ...] = ()
    form: str = ""
    inputs: str = ""
    remarks: tuple[str, ...] = ()
    tolerance: float = 0.0
    seed: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def passes(self) -> bool:
        """Whether it is causal by all that was looked at."""
        return self.verdict == CAUSAL

    @property
    def is_partial(self) -> bool:
        """Whether it is causal by a part only of what there is to look at, as the remarks say."""
        return self.passes and bool(self.remarks)

    @property
    def label(self) -> str:
        """`"LEAKS"`, or `""`."""
        return LEAKS if self.verdict == LEAKS else ""

    @property
    def coverage(self) -> str:
        """How much of each test was done, all modes together."""
        sums: dict[str, tuple[int, int]] = {}
        for check in self.checks:
            if check.is_begun:
                done, total = sums.get(check.test, (0, 0))
                sums[check.test] = done + check.done, total + check.total
        return ", ".join(f"{done} of {total} {test}" for test, (done, total) in sums.items())

    def summary(self) -> str:
        """One line."""
        if self.leak is not None:
            return f"{self.name} LEAKS: {self.leak}"
        if self.verdict == LEAKS:
            return f"{self.name} LEAKS: {self.reason}"
        if self.verdict == UNDECIDED:
            return f"{self.name}: undecided: {self.reason}"
        said = "; ".join(filter(None, [self.inputs, self.coverage, self.form, *self.remarks]))
        return f"{self.name}: {self._words} ({said})"

    @property
    def _words(self) -> str:
        return f"{self.verdict} in part" if self.is_partial else self.verdict

    def __str__(self) -> str:
        lines = [f"{self.name} LEAKS" if self.verdict == LEAKS else f"{self.name}: {self._words}"]
        if self.leak is not None:
            lines.append(str(self.leak))
        lines += filter(None, [self.reason, "; ".join(filter(None, [self.inputs, self.form]))])
        lines += [str(check) for check in self.checks if self.leak is None or check.is_begun]
        lines += self.remarks
        lines.append(f"{self.seconds:.1f} s, seed {self.seed}, tolerance {self.tolerance:.0e} of the largest output")
        return "\n  ".join(lines)

    def to_plain(self) -> dict[str, Any]:
        """As plain data, for JSON and checkpoints."""
        plain = dataclasses.asdict(self)
        return plain | {"checks": list(plain["checks"]), "remarks": list(self.remarks)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> "Certificate":
        """The certificate that `to_plain` wrote.

        Raises:
            ValueError: if the data are none.
        """
        try:
            fields = dict(data)
            leak = fields.pop("leak")
            return cls(
                **fields
                | {
                    "leak": None if leak is None else Leak(**leak),
                    "checks": tuple(Check(**check) for check in fields["checks"]),
                    "remarks": tuple(fields["remarks"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no certificate: {error}") from None
