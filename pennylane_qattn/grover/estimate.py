r"""What a Grover search for a row's large keys would take on a fault-tolerant machine: qubits, T gates, depth, calls.

The search, for :math:`n` keys of :math:`d` coordinates at :math:`b` bits (:math:`m = db` bits a key), calls its oracle
:math:`C\sqrt n\,\sum_{t \le k} t^{-1/2}` times to find all :math:`k` marked keys of a row (Boyer, Brassard, Hoyer and
Tapp, quant-ph/9605034; C is measured by our own simulation). A call is the oracle and the reflection that follows it.

The oracle:

1. *Lookup* of the key by its index. Unary iteration (Babbush and others, 1805.03662) takes :math:`n - 2` Toffolis;
   select-swap (Low, Kliuchnikov and Schaeffer, 1812.00954) reads :math:`\lambda` keys at once and swaps the wanted one
   into place, :math:`\lceil n/\lambda\rceil - 2 + (\lambda - 1)m` Toffolis and :math:`(\lambda - 1)m` more qubits.
2. *Score.* A register of :math:`w = 2b + \lceil\log_2 d\rceil` bits starts at minus the threshold and takes up the
   inner product; its sign is then the comparison, which so costs nothing. Keys are stored as unsigned numbers, offset
   by :math:`2^{b-1}`: that shifts all scores of a row by a known number, which the threshold takes up. The query is
   `"known"` when the circuit is compiled, as it is when rows are searched one by one: a multiplication by a known
   number is one addition or subtraction for each nonzero digit of its non-adjacent form, at most
   :math:`\lceil b/2\rceil`, at shifts 0, 2, 4, ... in the worst case, :math:`w - 1 - 2i` Toffolis each (Gidney,
   1709.06648). Or it stands in a `"register"` of qubits, written there once and not counted: then a coordinate is a
   product of :math:`2b^2 - b` Toffolis (Su and others, 2105.12767, lemma 10), an addition of :math:`w - 1`, and the
   product undone. Several accumulators (`adders`) may work side by side; they are summed at the end.
3. *Phase flip*: Z on the sign.
4. Everything undone: the score by the same number of Toffolis, the table by measurement (Berry and others, 1902.02134,
   appendix C), which takes :math:`\lceil n/\kappa\rceil + \kappa - 3` Toffolis; :math:`\kappa` is the best power of
   two for which the registers of the lookup, empty by then, have room. What select-swap leaves in its spare registers
   is measured at once and mended along with the table, so these are free during the score.

A found key is unmarked in the classical table, at no cost. The reflection about the uniform state over :math:`n` keys
prepares that state, undone and done again, by one exact round of amplitude amplification where :math:`n = 2^j L` is no
power of two: a comparison and a phase on :math:`\ell = \lceil\log_2 L\rceil` qubits, :math:`2(\ell - 1)` Toffolis, and
two rotations (1805.03662, figure 12).

**There is no free lookup.** Without a QRAM a lookup among :math:`n` entries costs :math:`O(n/\lambda + \lambda b d)`
gates in every call: the machine has to touch the whole table, or hold it. With plain tables the search takes
:math:`n^{3/2}` gates, more than the scan it replaces; with :math:`\lambda = \sqrt{n/m}`, which needs
:math:`\sqrt{nm}` qubits, :math:`n`, like the scan; the :math:`\sqrt n` is lost. The optimistic case, `lookup="qram"`,
counts a lookup as one Toffoli and :math:`\lceil\log_2 n\rceil` layers and leaves the memory's own :math:`n` routers
and their error correction, and the writing of the keys, out of the count. It is nobody's machine.

Units: a Toffoli is 4 T gates (a logical AND, undone by measurement). Depth is in layers of Toffolis, a T gate of a
rotation counted as a layer; Clifford gates, fan-out included, and measurements are free, which favours the search.
Toffolis, rotations and qubits are counted by PennyLane's estimator (0.45) from the oracle built of its operators, depth
by formulas here, as the estimator knows none; `formula_counts` counts the rest once more, and the tests hold both to
each other and to real circuits (`qml.Select` by unary iteration takes one AND fewer than :math:`n - 2` at powers of two
and up to three more elsewhere). Of the estimator we do *not* use

- `IntegerComparator`, and `UniformStatePrep` which is made of it: a chain of multi-controlled X, quadratic in the
  number of bits, where a carry is linear; nor does the latter count the reflection about zero that it needs;
- `QROM`'s own width of select-swap, which weighs a swap's bit at 6 T against the 4 T that it is then counted with, and
  ties the width of the undoing to that of the reading;
- `BBQRAM`, which counts a QRAM as what it is, a circuit of :math:`4nm` controlled swaps.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pennylane.estimator as qre

#: How a key is read: a table in the circuit, one with swap registers, or a quantum memory taken for granted.
LOOKUPS = ("qrom", "select-swap", "qram")
#: How the query stands in the circuit.
QUERIES = ("known", "register")
#: Calls of a search that does not know how many keys are marked, in units of the square roots above.
CALLS_CONSTANT = 1.55
#: Error of each rotation: half a million calls add up to 0.002.
ROTATION_PRECISION = 1e-9
#: For tables and pages: what no estimate should be shown without.
WITHOUT_QRAM = (
    "Without a QRAM a lookup among n keys of d coordinates at b bits costs O(n/λ + λ·b·d) gates in every call, "
    "so the square root is lost: n^(3/2) gates in all with a plain table, n at the best λ, and a scan takes n. "
    "The column with a QRAM counts a lookup as one gate, and the n routers of the memory not at all."
)

_ZETA_HALF = -1.4603545088095868  # zeta(1/2)


# --- what is asked and what is answered ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchProblem:
    """Rows of attention whose large entries are to be found.

    Attributes:
        num_keys: keys of a row, n.
        dim: coordinates of a key, d.
        bits: bits of a coordinate, b, the sign included.
        num_marked: keys above the threshold in a row, k.
        rows: rows searched, one after the other; n for a whole attention that is not causal.
    """

    num_keys: int
    dim: int
    bits: int
    num_marked: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
        if self.num_marked > self.num_keys:
            raise ValueError(f"num_marked must be at most num_keys; got {self.num_marked} of {self.num_keys}")

    @property
    def inner_products(self) -> int:
        """Inner products of the classical scan of all rows."""
        return self.rows * self.num_keys

    @property
    def multiplications(self) -> int:
        """Multiplications of numbers of b bits in that scan, each with an addition."""
        return self.inner_products * self.dim


@dataclass(frozen=True)
class Counts:
    """Gates of one run of a circuit, and qubits while it runs.

    Attributes:
        toffolis: Toffolis and logical ANDs; undone by measurement they cost nothing.
        rotation_t: T gates of rotations.
        qubits: logical qubits, helpers included.
    """

    toffolis: int
    rotation_t: int
    qubits: int

    @property
    def t(self) -> int:
        """T gates, a Toffoli being 4."""
        return 4 * self.toffolis + self.rotation_t


@dataclass(frozen=True)
class Estimate:
    """What the search takes, beside the classical scan.

    Attributes:
        problem: what is searched.
        lookup, query, adders: how; see `estimate`.
        swap_width: keys read at once, lambda.
        unload_width: the same when the table is undone, kappa.
        oracle, reflection: gates and qubits of each, per call.
        oracle_depth, reflection_depth: layers of each, per call.
        parts: Toffolis of a call by what they do; they add up to those of oracle and reflection.
        calls: expected calls for one row.
    """

    problem: SearchProblem
    lookup: str
    query: str
    adders: int
    swap_width: int
    unload_width: int
    oracle: Counts
    reflection: Counts
    oracle_depth: int
    reflection_depth: int
    parts: dict[str, int]
    calls: float

    @property
    def logical_qubits(self) -> int:
        """Logical qubits, the routers of a QRAM left out."""
        return max(self.oracle.qubits, self.reflection.qubits)

    @property
    def table_bits(self) -> int:
        """Classical bits of the table of keys."""
        return self.problem.num_keys * self.problem.dim * self.problem.bits

    @property
    def qram_routers(self) -> int:
        """Routers of a bucket-brigade memory for that table, each of qubits of its own; 0 without one."""
        return 2 ** _bits_of(self.problem.num_keys) - 1 if self.lookup == "qram" else 0

    @property
    def total_calls(self) -> float:
        """Calls for all rows."""
        return self.calls * self.problem.rows

    @property
    def total_toffolis(self) -> float:
        """Toffolis for all rows; rotations come on top."""
        return self.total_calls * (self.oracle.toffolis + self.reflection.toffolis)

    @property
    def total_t(self) -> float:
        """T gates for all rows."""
        return self.total_calls * (self.oracle.t + self.reflection.t)

    @property
    def total_depth(self) -> float:
        """Layers for all rows."""
        return self.total_calls * (self.oracle_depth + self.reflection_depth)

    @property
    def toffolis_per_multiplication(self) -> float:
        """Toffolis of the search for each multiplication of the scan; a T gate of a rotation counts as a quarter."""
        return self.total_t / 4 / self.problem.multiplications

    @property
    def break_even_clock(self) -> float:
        """How many times faster than a multiply-accumulate a layer of Toffolis has to be for the search to win.

        Against one classical unit that does one after the other. Below 1 it may be slower by the inverse.
        """
        return self.total_depth / self.problem.multiplications


# --- the layout of the oracle ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Sizes of registers, from which both PennyLane's operators and the formulas are made."""

    problem: SearchProblem
    lookup: str
    query: str
    adders: int
    extra_qubits: int | None

    def __post_init__(self) -> None:
        for name, value, known in (("lookup", self.lookup, LOOKUPS), ("query", self.query, QUERIES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if not 1 <= self.adders <= self.problem.dim:
            raise ValueError(f"adders must lie between 1 and dim, {self.problem.dim}; got {self.adders}")
        if self.extra_qubits is not None:
            if self.lookup != "select-swap":
                raise ValueError(f"extra_qubits are for lookup='select-swap' only; got lookup={self.lookup!r}")
            if self.extra_qubits < 0:
                raise ValueError(f"extra_qubits must be at least 0; got {self.extra_qubits}")

    @property
    def index(self) -> int:
        return _bits_of(self.problem.num_keys)

    @property
    def key(self) -> int:
        return self.problem.dim * self.problem.bits

    @property
    def width(self) -> int:
        """Bits of an accumulator: |score - threshold| <= d 2^(b-1) (2^b - 1) < 2^(w-1)."""
        return 2 * self.problem.bits + _bits_of(self.problem.dim)

    @property
    def carries(self) -> int:
        """Helpers of an addition into an accumulator; two bits need none."""
        return self.width - 1 if self.width > 2 else 0

    @property
    def shifts(self) -> range:
        """Places of the nonzero digits of a query's coordinate; no two are neighbours, and lower ones cost more."""
        return range(0, self.problem.bits, 2)

    @cached_property
    def swap_width(self) -> int:
        n, key = self.problem.num_keys, self.key
        if self.lookup != "select-swap":
            return 1
        room = math.inf if self.extra_qubits is None else self.extra_qubits
        widths = [2**i for i in range(self.index + 1) if (2**i - 1) * key <= room]
        return min(widths, key=lambda width: _select(n, width) + (width - 1) * key)

    @cached_property
    def unload_width(self) -> int:
        n = self.problem.num_keys
        if self.lookup == "qram":
            return 1
        widths = [2**i for i in range(self.index + 1) if 2**i <= self.key * self.swap_width]
        return min(widths, key=lambda width: _select(n, width) + width - 1)

    @property
    def odd_bits(self) -> int:
        """Bits of the odd part of the number of keys; 0 for powers of two, which Hadamards alone prepare."""
        n = self.problem.num_keys
        return _bits_of(n // (n & -n))

    @property
    def standing(self) -> int:
        """Qubits that hold their value through the whole search."""
        return self.index + (self.key if self.query == "register" else 0)

    @property
    def working(self) -> int:
        """Qubits of the score beside the carries of one adder: accumulators, carries of the others, products."""
        products = 2 * self.problem.bits if self.query == "register" else 0
        return self.adders * (self.width + products) + (self.adders - 1) * self.carries


def _bits_of(count: int) -> int:
    """Bits that number so many things."""
    return (count - 1).bit_length()


def _select(n: int, width: int) -> int:
    """Toffolis of unary iteration over the columns of a table, so many keys in each."""
    return max(0, -(-n // width) - 2)


# --- counted by PennyLane ----------------------------------------------------------------------------------------


class _Circuit(qre.ResourceOperator):
    """A part of a call as one operator, which PennyLane's estimator takes apart."""

    resource_keys = {"layout"}

    def __init__(self, layout: _Layout) -> None:
        self.layout, self.num_wires = layout, layout.standing
        super().__init__()

    @property
    def resource_params(self) -> dict[str, Any]:
        return {"layout": self.layout}

    @classmethod
    def resource_rep(cls, layout: _Layout) -> qre.CompressedResourceOp:
        return qre.CompressedResourceOp(cls, layout.standing, {"layout": layout})


class _Oracle(_Circuit):
    """Lookup, score, phase, and all of it undone."""

    @classmethod
    def resource_decomp(cls, layout: _Layout) -> list:
        bits, dim = layout.problem.bits, layout.problem.dim
        if layout.lookup == "qram":
            load = unload = qre.Toffoli.resource_rep()  # one gate, by decree
        else:
            load = _table(layout, layout.swap_width)
            unload = qre.Adjoint.resource_rep(_table(layout, layout.unload_width))
        add = qre.SemiAdder.resource_rep
        score = [qre.GateCount(add(layout.width), 2 * (layout.adders - 1))]  # done, and undone
        if layout.query == "known":
            score += [qre.GateCount(add(layout.width - shift), 2 * dim) for shift in layout.shifts]
        else:
            product = qre.OutMultiplier.resource_rep(bits, bits)
            score += [qre.GateCount(product, 4 * dim), qre.GateCount(add(layout.width), 2 * dim)]
        return [
            qre.Allocate(layout.key),
            qre.GateCount(load),
            qre.Allocate(layout.working),
            *score,
            qre.GateCount(qre.Z.resource_rep()),
            qre.Deallocate(layout.working),
            qre.Deallocate(layout.key),  # measured; the phase that leaves behind is mended by what follows
            qre.GateCount(unload),
        ]


class _Reflection(_Circuit):
    """The reflection about the uniform state over all keys."""

    @classmethod
    def resource_decomp(cls, layout: _Layout) -> list:
        actions: list = [qre.GateCount(qre.Hadamard.resource_rep(), 2 * layout.index)]
        if layout.odd_bits:
            ladder = layout.odd_bits - 1
            both = qre.TemporaryAND.resource_rep()
            actions += [
                qre.GateCount(qre.SemiAdder.resource_rep(layout.odd_bits), 2),  # its carry compares with a known number
                qre.Allocate(ladder),
                qre.GateCount(both, 2 * ladder),
                qre.GateCount(qre.Adjoint.resource_rep(both), 2 * ladder),
                qre.Deallocate(ladder),
                qre.GateCount(qre.RZ.resource_rep(), 4),
            ]
        if layout.index:
            actions.append(qre.GateCount(qre.MultiControlledX.resource_rep(layout.index - 1, layout.index - 1)))
        return actions


def _table(layout: _Layout, width: int) -> qre.CompressedResourceOp:
    return qre.QROM.resource_rep(layout.problem.num_keys, layout.key, restored=False, select_swap_depth=width)


def _counted(circuit: _Circuit) -> Counts:
    config = qre.ResourceConfig()
    config.set_precision(qre.RZ, ROTATION_PRECISION)
    found = qre.estimate(circuit, config=config)
    gates = found.gate_counts
    qubits = found.algo_wires + found.zeroed_wires + found.any_state_wires
    return Counts(int(gates.get("Toffoli", 0)), int(gates.get("T", 0)), int(qubits))


# --- the same by formulas ----------------------------------------------------------------------------------------


def _parts(layout: _Layout) -> dict[str, int]:
    """Toffolis of a call by what they do."""
    n, dim = layout.problem.num_keys, layout.problem.dim
    odd = 4 * (layout.odd_bits - 1) if layout.odd_bits else 0
    return {
        "lookup": _lookup(layout),
        "score": 2 * (dim * _coordinate(layout) + (layout.adders - 1) * (layout.width - 1)),
        "unload": 1 if layout.lookup == "qram" else _select(n, layout.unload_width) + layout.unload_width - 1,
        "reflection": odd + max(0, layout.index - 2),
    }


def _lookup(layout: _Layout) -> int:
    if layout.lookup == "qram":
        return 1
    return _select(layout.problem.num_keys, layout.swap_width) + (layout.swap_width - 1) * layout.key


def _coordinate(layout: _Layout) -> int:
    """Toffolis of one coordinate's product and its sum."""
    bits = layout.problem.bits
    if layout.query == "known":
        return sum(layout.width - shift - 1 for shift in layout.shifts)
    return 2 * (2 * bits**2 - bits) + layout.width - 1


def formula_counts(
    problem: SearchProblem,
    lookup: str = "qrom",
    *,
    extra_qubits: int | None = None,
    query: str = "known",
    adders: int = 1,
) -> tuple[Counts, Counts]:
    """Oracle and reflection by the formulas of this file's head, without PennyLane; arguments as of `estimate`."""
    layout = _Layout(problem, lookup, query, adders, extra_qubits)
    parts = _parts(layout)
    columns = -(-problem.num_keys // layout.swap_width)
    rest = -(-problem.num_keys // layout.unload_width)
    tables = lookup != "qram"
    reading = layout.key * layout.swap_width + (_bits_of(columns) - 1 if columns > 1 else 0)
    scoring = layout.key + layout.working + layout.carries
    undoing = layout.unload_width + (_bits_of(rest) - 1 if rest > 1 else 0)
    peak = max(reading if tables else 0, scoring, undoing if tables else 0)
    oracle = Counts(sum(parts.values()) - parts["reflection"], 0, layout.standing + peak)
    turns = 4 * rotation_t_gates() if layout.odd_bits else 0
    helpers = max(0, layout.odd_bits - 1, layout.index - 3)
    return oracle, Counts(parts["reflection"], turns, layout.standing + helpers)


def rotation_t_gates(precision: float = ROTATION_PRECISION) -> int:
    r"""T gates of a rotation, :math:`1.149 \log_2(1/\epsilon) + 9.2` (Bocharov, Roetteler and Svore, 1404.5320)."""
    return round(1.149 * math.log2(1 / precision) + 9.2)


def _depths(layout: _Layout) -> tuple[int, int]:
    """Layers of the oracle and of the reflection."""
    n, parts = layout.problem.num_keys, _parts(layout)
    if layout.lookup == "qram":
        load = unload = layout.index
    else:
        # the swaps that one bit of the index controls run together, so there is one layer for each such bit
        load = _select(n, layout.swap_width) + _bits_of(layout.swap_width)
        unload = _select(n, layout.unload_width) + _bits_of(layout.unload_width)
    each = -(-layout.problem.dim // layout.adders) * _coordinate(layout)
    score = each + _bits_of(layout.adders) * (layout.width - 1)
    turns = 4 * rotation_t_gates() if layout.odd_bits else 0
    return load + 2 * score + unload, parts["reflection"] + turns


def calls_per_row(problem: SearchProblem, constant: float = CALLS_CONSTANT) -> float:
    r"""Expected oracle calls until all marked keys of a row are found, :math:`C\sqrt n\,\sum_{t \le k} t^{-1/2}`.

    Args:
        problem: what is searched.
        constant: C. 1.55 where the number of marked keys is unknown, about 1 where it is known.
    """
    if not 0 < constant < math.inf:
        raise ValueError(f"constant must be a positive number, 1.55 as measured; got {constant}")
    k = problem.num_marked
    if k <= 1000:
        harmonic = math.fsum(t**-0.5 for t in range(1, k + 1))
    else:  # Euler and Maclaurin, to 1e-13
        harmonic = 2 * k**0.5 + _ZETA_HALF + 0.5 * k**-0.5 - k**-1.5 / 24
    return constant * math.sqrt(problem.num_keys) * harmonic


# --- estimates ---------------------------------------------------------------------------------------------------


def estimate(
    problem: SearchProblem,
    lookup: str = "qrom",
    *,
    extra_qubits: int | None = None,
    query: str = "known",
    adders: int = 1,
    constant: float = CALLS_CONSTANT,
) -> Estimate:
    """What the search takes.

    Args:
        problem: what is searched.
        lookup: one of `LOOKUPS`: `"qrom"`, a plain table; `"select-swap"`; `"qram"`, the optimistic case.
        extra_qubits: most qubits for the swap registers of select-swap; `None`: as many as make the lookup cheapest.
        query: one of `QUERIES`: `"known"` when the circuit is compiled, or in a `"register"`.
        adders: accumulators that work side by side, from 1 to the dimension: less depth for more qubits.
        constant: C of `calls_per_row`.

    Raises:
        ValueError: for a choice there is not.
    """
    layout = _Layout(problem, lookup, query, adders, extra_qubits)
    oracle_depth, reflection_depth = _depths(layout)
    return Estimate(
        problem=problem,
        lookup=lookup,
        query=query,
        adders=adders,
        swap_width=layout.swap_width,
        unload_width=layout.unload_width,
        oracle=_counted(_Oracle(layout)),
        reflection=_counted(_Reflection(layout)),
        oracle_depth=oracle_depth,
        reflection_depth=reflection_depth,
        parts=_parts(layout),
        calls=calls_per_row(problem, constant),
    )


def estimates(
    ns: Iterable[int],
    dim: int,
    bits: int,
    num_marked: int = 1,
    rows: int | None = 1,
    lookup: str = "qrom",
    **options: Any,
) -> list[Estimate]:
    """Estimates for several numbers of keys.

    Args:
        ns: numbers of keys.
        dim, bits, num_marked: of each problem.
        rows: of each problem; `None`: as many as keys.
        lookup: see `estimate`.
        **options: more of `estimate`.
    """
    return [
        estimate(SearchProblem(n, dim, bits, num_marked, n if rows is None else rows), lookup, **options) for n in ns
    ]


def to_plain(found: Estimate) -> dict[str, Any]:
    """An estimate as one flat row of plain data, for tables and JSON."""
    return {
        **asdict(found.problem),
        "lookup": found.lookup,
        "query": found.query,
        "adders": found.adders,
        "swap_width": found.swap_width,
        "unload_width": found.unload_width,
        "logical_qubits": found.logical_qubits,
        "qram_routers": found.qram_routers,
        "table_bits": found.table_bits,
        **{f"toffolis_{name}": count for name, count in found.parts.items()},
        "oracle_toffolis": found.oracle.toffolis,
        "oracle_t": found.oracle.t,
        "oracle_depth": found.oracle_depth,
        "reflection_t": found.reflection.t,
        "reflection_depth": found.reflection_depth,
        "calls": found.calls,
        "total_calls": found.total_calls,
        "total_toffolis": found.total_toffolis,
        "total_t": found.total_t,
        "total_depth": found.total_depth,
        "classical_inner_products": found.problem.inner_products,
        "classical_multiplications": found.problem.multiplications,
        "toffolis_per_multiplication": found.toffolis_per_multiplication,
        "break_even_clock": found.break_even_clock,
    }
