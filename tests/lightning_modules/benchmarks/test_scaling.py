"""Exponents by hand, theory by what an attention is made of, and sweeps of tiny sizes."""

import math

import pytest

from lightning_modules.benchmarks import scaling
from lightning_modules.benchmarks.result import Result
from lightning_modules.benchmarks.scaling import fit_exponent, upper_half
from pennylane_qattn import Attention, build_attention
from pennylane_qattn.published import PublishedAttention

TINY = ("scaling", "--rounds", "2", "--width", "4", "--length", "5", "--batch", "2")
SIZES = ("--widths", "8", "2", "4", "--lengths", "3", "6", "12", "--heads", "1", "2", "4", "--qubits", "1", "2", "3")


def test_a_power_law_is_found_exactly():
    sizes = [3, 6, 12, 48]
    fit = fit_exponent(sizes, [0.7 * size**1.5 for size in sizes])
    assert fit.exponent == pytest.approx(1.5) and fit.error == pytest.approx(0, abs=1e-12)


def test_a_fit_worked_out_by_hand():
    """Logarithms to base 2: x = 0, 1, 2 and y = 0, 1, 3. The slope is 3/2; residuals 1/6, -1/3, 1/6."""
    fit = fit_exponent([1, 2, 4], [1.0, 2.0, 8.0])
    assert fit.exponent == pytest.approx(1.5)
    assert fit.error == pytest.approx(math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 1 / 2))


def test_few_sizes():
    fit = fit_exponent([2, 4], [1.0, 8.0])
    assert fit.exponent == pytest.approx(3) and fit.error is None
    assert fit_exponent([2], [1.0]) is None and fit_exponent([], []) is None


def test_the_upper_half():
    assert upper_half([1, 2, 3, 4, 5, 6], list("abcdef")) == ([4, 5, 6], list("def"))
    assert upper_half([1, 2, 3, 4, 5], list("abcde")) == ([3, 4, 5], list("cde"))


@pytest.mark.parametrize(
    "name, options, heads, written_out",
    [
        ("classical", {}, 0, False),
        ("gaussian", {}, 0, False),
        ("gaussian", {"values": "circuit"}, 1, False),
        ("gaussian", {"values": "circuit", "split": True}, 0, False),
        ("gaussian", {"values": "mixed-circuit"}, 1, False),
        ("qisa", {}, 1, False),
        ("qisa", {"split": True}, 1, False),
        ("qisa-absorbed", {}, 1, False),
        ("overlap", {"split": True}, 1, False),
        ("qisa-published", {}, 1, True),
        ("grover-sparse", {"k": 2}, 1, False),
    ],
)
def test_theory_follows_from_the_parts(name, options, heads, written_out):
    attention = build_attention(name, 4, 2, 5, **options)
    assert scaling.by_heads(attention).exponent == heads
    assert scaling.writes_weights(attention) == written_out
    for theory in (scaling.by_width, scaling.by_length, scaling.by_qubits):
        assert theory(attention).exponent == 2 and theory(attention).reason


def test_the_sparse_scan_is_told():
    reason = scaling.by_length(build_attention("grover-sparse", 4, 2, 5, k=2)).reason
    assert reason == "a scan of all pairs finds the keys that are kept"


def test_sweeps(run):
    status, out, err = run(*TINY, *SIZES, "--mechanisms", "classical", "qisa")
    assert (status, err) == (0, "")
    result = Result.read(run.folder / "scaling.json")
    assert (run.folder / "scaling.png").exists()
    rows = {(row["mechanism"], row["sweep"]): row for row in result.rows}
    assert [sweep for name, sweep in rows if name == "classical"] == ["width d", "tokens T", "heads H"]
    assert rows["qisa", "amplitudes 2^n"]["sizes"] == [2, 4, 8]
    width = rows["classical", "width d"]
    assert width["sizes"] == [2, 4, 8] and [len(spent) for spent in width["seconds"]] == [2, 2, 2]
    fit = fit_exponent([4, 8], [min(spent) for spent in width["seconds"][1:]])
    assert width["fitted"] == fit.exponent and width["range"] == "4 to 8" and width["error"] is None
    assert "width d: 2 in theory, since every token" in out


def test_each_size_is_built_as_told():
    class Options:
        width, length, batch, device = 6, 5, 3, "cpu"

    from lightning_modules.benchmarks.options import variant

    for key, size, expected in (("d", 7, (7, 5, 1)), ("T", 11, (6, 11, 1)), ("H", 3, (6, 5, 3)), ("n", 4, (4, 5, 1))):
        layer, x = scaling._layer(variant("qisa"), key, size, Options)
        assert (layer.embed_dim, layer.block_size, layer.num_heads) == expected
        assert x.shape == (3, expected[1], expected[0])
    assert layer.value_map.num_wires == 4 and layer.value_map.out_features == scaling.OBSERVABLES


def test_what_does_not_fit_is_left_out_and_told(run):
    # 8 tensors of 2 x 12^2 numbers of 4 bytes are 9,216 bytes; of 2 x 6^2 they are 2,304
    limit = str(5000 / 2**30)
    status, _, _ = run(*TINY, *SIZES, "--sweeps", "T", "--mechanisms", "qisa-published", "classical", "--memory", limit)
    assert status == 0
    result = Result.read(run.folder / "scaling.json")
    published, classical = result.rows
    assert published["sizes"] == [3, 6] and classical["sizes"] == [3, 6, 12]
    (left_out,) = [note for note in result.notes if "left out" in note]
    assert left_out.startswith("qisa-published: T = 12 is left out; its weights would take 8.58e-06 GiB")
    assert left_out.endswith(", more than the 4.65661e-06 of --memory.")


class Detached(Attention):
    def forward(self, x, **context):
        return super().forward(x.detach(), **context) + 0 * x


class Shorter(Attention):
    def forward(self, x, **context):
        return super().forward(x, **context)[:, 1:]


class Twice(Attention):
    def forward(self, x, **context):
        return 2 * x


class Last(Attention):
    """Every token has what the last one has."""

    def forward(self, x, **context):
        return super().forward(x, **context) + x[:, -1:]


class Frozen(Attention):
    def __init__(self, *maps, **options):
        super().__init__(*maps, **options)
        self.value_map.register_forward_hook(lambda module, inputs, output: output.detach())


class Wrong(Attention):
    def forward(self, x, **context):
        return 1.05 * super().forward(x, **context)


@pytest.mark.parametrize(
    "planted, message",
    [
        (Detached, "the input gets no gradient"),
        (Shorter, "(2, 5, 2) became (2, 4, 2)"),
        (Twice, "does not attend: the last token's outputs do not depend on those before it"),
        (Last, "sees the future: outputs move by "),
        (Frozen, "the parameter value_map.linear.weight gets no gradient"),
        (Wrong, "from softmax(ScaledDotScore) written out"),
    ],
)
def test_a_layer_of_another_kind_ends_the_run(run, plant, planted, message):
    status, _, err = run(*TINY, *SIZES, "--sweeps", "d", "--mechanisms", plant(planted))
    assert status == 1
    assert err.startswith("benchmark.py: error: planted: width d = 2") and message in err


def test_a_published_form_may_see_the_future_and_has_its_formula(run, monkeypatch):
    sizes = (*TINY, *SIZES, "--sweeps", "d", "--mechanisms", "qisa-published")
    assert run(*sizes)[0] == 0
    right = PublishedAttention.applied
    monkeypatch.setattr(PublishedAttention, "applied", lambda *inputs: right(*inputs).tril())
    status, _, err = run(*sizes)
    assert status == 1 and "from softmax(PublishedGaussianScore) written out" in err
