"""The check of what is timed: every mechanism passes, and every planted fault is found and named."""

import copy
import os

import pytest
import torch

from lightning_modules.benchmarks.checks import check_formula, check_fused, check_maps, check_model
from lightning_modules.benchmarks.options import variant
from lightning_modules.benchmarks.result import CheckFailed
from lightning_modules.gpt import GPT, GPTConfig
from pennylane_qattn import (
    ATTENTION,
    Attention,
    GaussianScore,
    LinearFeatureMap,
    OverlapScore,
    PublishedGaussianScore,
    ScaledDotScore,
    build_attention,
    kernels,
)
from pennylane_qattn.features import CircuitFeatureMap, QuadraticFeatureMap, StateFeatureMap
from pennylane_qattn.grover.score import AmplificationScore
from pennylane_qattn.grover.sparse_score import SparseDotScore
from pennylane_qattn.published import PublishedAttention
from pennylane_qattn.value_maps import LearnedQuadraticFeatureMap

CONFIG = GPTConfig(vocab_size=11, block_size=7, num_layers=2, num_heads=2, embed_dim=6)


def model_of(mechanism, **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**(CONFIG.to_plain() | changes)), mechanism)


@pytest.fixture
def baseline():
    return model_of(ATTENTION.build("classical"))


@pytest.fixture
def tokens():
    return torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ATTENTION)
def test_every_mechanism_passes(name, baseline, tokens):
    mechanism = ATTENTION.build(name)
    model = model_of(mechanism)
    check_model(name, model, baseline, tokens, leaks=mechanism.is_published)
    assert all(parameter.grad is None for parameter in model.parameters())
    if mechanism.is_published:
        with pytest.raises(CheckFailed, match=f"^{name} sees the future: logits move by "):
            check_model(name, model, baseline, tokens)


def test_values_of_several_tokens_pass(baseline, tokens):
    check_model("joint", model_of(ATTENTION.build("gaussian", values="circuit", span=2)), baseline, tokens)


class Zeros(Attention):
    def forward(self, x, **context):
        return 0 * super().forward(x, **context)


class OwnToken(Attention):
    def forward(self, x, **context):
        return self.out_proj(self.value_map(x).transpose(1, 2).flatten(2))


class Ahead(Attention):
    """The values of the next token are used, so a token sees one token ahead."""

    def forward(self, x, **context):
        return super().forward(x.roll(-1, 1), **context)


class NotFinite(Attention):
    def forward(self, x, **context):
        return super().forward(x, **context) / 0


class TwiceAsLong(Attention):
    def forward(self, x, **context):
        return super().forward(x, **context).repeat(1, 2, 1)


class Detached(Attention):
    def forward(self, x, **context):
        return super().forward(x.detach(), **context).detach()


class KeysAsTheyAre(Attention):
    """The keys' map is run and not trained."""

    def __init__(self, *maps, **options):
        super().__init__(*maps, **options)
        self.key_map.register_forward_hook(lambda module, inputs, output: output.detach())


class KeysWithoutEffect(Attention):
    """The keys' map gets a gradient, which is 0."""

    def __init__(self, *maps, **options):
        super().__init__(*maps, **options)
        self.key_map.register_forward_hook(lambda module, inputs, output: output.detach() + 0 * output)


class InfiniteGradient(Attention):
    def forward(self, x, **context):
        root = (x - x.detach()).abs().sum().sqrt()  # 0, with an infinite slope
        return super().forward(x, **context) + root


@pytest.mark.parametrize(
    "attention, message",
    [
        (Zeros, "does not attend: the last token's logits do not depend on the first token"),
        (OwnToken, "does not attend"),
        (Ahead, "sees the future: logits move by"),
        (NotFinite, "gives logits that are not finite"),
        (TwiceAsLong, "does not run on the tokens: RuntimeError"),
        (Detached, r"the parameter blocks\.0\.attention\.\S+ gets no gradient"),
        (KeysAsTheyAre, r"the parameter blocks\.0\.attention\.key_map\.linear\.weight gets no gradient"),
        (KeysWithoutEffect, r"the parameter blocks\.0\.attention\.key_map\.linear\.weight gets no gradient"),
        (InfiniteGradient, "the gradient of .* is not finite"),
    ],
)
def test_a_fault_is_named(attention, message, plant, baseline, tokens):
    model = model_of(ATTENTION.build(plant(attention)))
    with pytest.raises(CheckFailed, match=f"^planted:? {message}"):
        check_model("planted", model, baseline, tokens)


def test_a_model_whose_attention_is_another_formula(baseline, tokens, monkeypatch):
    model = model_of(ATTENTION.build("gaussian"))
    right = GaussianScore.queries
    monkeypatch.setattr(GaussianScore, "queries", lambda self, q: 1.1 * right(self, q))
    with pytest.raises(CheckFailed, match="^planted differs by .* from softmax"):
        check_model("planted", model, baseline, tokens)


def test_values_that_are_right_for_few_tokens_alone(baseline, tokens, monkeypatch):
    model = model_of(ATTENTION.build("qisa"))
    right = CircuitFeatureMap.per_head
    zeroed = lambda self, x: right(self, x) * (0 if x.shape[1] > 14 else 1)  # noqa: E731  # two rows are 14 tokens
    monkeypatch.setattr(CircuitFeatureMap, "per_head", zeroed)
    check_model("planted", model, baseline, tokens[:2])
    with pytest.raises(CheckFailed, match="^planted: the parameter .* gets no gradient"):
        check_model("planted", model, baseline, tokens)
    halved = lambda self, x: right(self, x) * (0.5 if x.shape[1] > 14 else 1)  # noqa: E731
    monkeypatch.setattr(CircuitFeatureMap, "per_head", halved)
    with pytest.raises(CheckFailed, match="^planted, in the whole batch: the logits differ by "):
        check_model("planted", model, baseline, tokens)


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda values: 1.01 * values, "the logits differ by "),
        (lambda values: values + 0.1 * (values - values.detach()), "the gradient of .* differs by "),
    ],
)
def test_a_kernel_that_computes_something_else(fault, message, baseline, tokens, monkeypatch):
    """What is wrong with kernels alone, though every other call is right."""
    model = model_of(ATTENTION.build("qisa-absorbed"))
    right = QuadraticFeatureMap.per_head

    def per_head(self, x):
        values = right(self, x)
        return values if os.environ.get(kernels.SWITCH) == "0" else fault(values)

    monkeypatch.setattr(QuadraticFeatureMap, "per_head", per_head)
    with pytest.raises(CheckFailed, match=f"^planted, in the whole batch: {message}.* its first rows without kernels"):
        check_model("planted", model, baseline, tokens)
    assert kernels.SWITCH not in os.environ


@pytest.mark.parametrize(
    "name, feature_map, method, what",
    [
        ("classical", LinearFeatureMap, "forward", "queries"),
        ("qisa", CircuitFeatureMap, "per_head", "values"),
        ("qisa:split=true", CircuitFeatureMap, "per_head", "values"),
        ("qsann", CircuitFeatureMap, "per_head", "queries"),
        ("overlap", StateFeatureMap, "per_head", "queries"),
        ("scaled-dot", QuadraticFeatureMap, "per_head", "values"),
        ("scaled-dot:split=true", QuadraticFeatureMap, "per_head", "values"),
        ("ngram", LearnedQuadraticFeatureMap, "per_head", "values"),
    ],
)
def test_another_feature_map_is_found(name, feature_map, method, what, monkeypatch):
    torch.manual_seed(0)
    attention = variant(name).mechanism(6, 2, 7)
    check_maps(name, attention)
    right = getattr(feature_map, method)
    monkeypatch.setattr(feature_map, method, lambda self, x: 3 * right(self, x) + 1)
    with pytest.raises(CheckFailed, match=f"^{name}: the {what} differ by .* from {feature_map.__name__} written out"):
        check_maps(name, attention)


def test_a_model_with_another_value_map(baseline, tokens, monkeypatch):
    model = model_of(ATTENTION.build("qisa"))
    right = CircuitFeatureMap.per_head
    monkeypatch.setattr(CircuitFeatureMap, "per_head", lambda self, x: 3 * right(self, x) + 1)
    with pytest.raises(CheckFailed, match="^planted: the values differ by .* from CircuitFeatureMap written out"):
        check_model("planted", model, baseline, tokens)


def test_logits_of_another_kind(baseline, tokens):
    other = model_of(ATTENTION.build("classical"), vocab_size=13)
    with pytest.raises(
        CheckFailed, match=r"^x gives logits \(2, 7, 13\) of torch.float32, and the baseline \(2, 7, 11\)"
    ):
        check_model("x", other, baseline, tokens)
    with pytest.raises(CheckFailed, match="^x gives logits .* of torch.float64, and the baseline .* of torch.float32"):
        check_model("x", copy.deepcopy(baseline).double(), baseline, tokens)


# --- formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, score, method",
    [
        ("gaussian", GaussianScore, "queries"),
        ("classical", ScaledDotScore, "queries"),
        ("overlap", OverlapScore, "forward"),
        ("qisa", PublishedGaussianScore, "attend_by_kernel"),
    ],
)
def test_another_formula_is_found(name, score, method, monkeypatch):
    attention = build_attention(name, 6, 2, 7)
    check_formula(name, attention)
    right = getattr(score, method)
    monkeypatch.setattr(score, method, lambda self, *inputs: 1.05 * right(self, *inputs))
    with pytest.raises(CheckFailed, match=rf"^{name} differs by .* from softmax\({score.__name__}\) written out"):
        check_formula(name, attention)


def test_the_last_tokens_of_a_long_block_are_compared_too(monkeypatch):
    attention = build_attention("gaussian", 6, 2, 41)
    check_formula("gaussian", attention)
    right = type(attention).forward

    def late(self, x, **context):
        return torch.cat((right(self, x)[:, :37], 1.01 * right(self, x)[:, 37:]), dim=1)

    monkeypatch.setattr(type(attention), "forward", late)
    with pytest.raises(CheckFailed, match=r"^gaussian differs by .* from softmax\(GaussianScore\) written out"):
        check_formula("gaussian", attention)


@pytest.mark.parametrize("name, score", [("grover", AmplificationScore), ("grover-sparse", SparseDotScore)])
def test_without_a_formula_the_weights_are_written_out(name, score, monkeypatch):
    attention = build_attention(name, 6, 2, 41)
    check_formula(name, attention)
    right = score.attend
    monkeypatch.setattr(score, "attend", lambda self, *inputs: 1.01 * right(self, *inputs))
    with pytest.raises(CheckFailed, match=f"^{name} differs by .* from its weights and values written out"):
        check_formula(name, attention)


def test_the_published_forms_have_their_formula(baseline, tokens, monkeypatch):
    model = model_of(ATTENTION.build("qisa-published"))
    monkeypatch.setattr(PublishedAttention, "applied", lambda self, weights, visibility: 1.0 * weights)
    with pytest.raises(CheckFailed, match=r"^planted differs by .* from softmax\(PublishedGaussianScore\) written out"):
        check_model("planted", model, baseline, tokens, leaks=True)


def test_the_gaussian_formula_by_hand():
    """Two tokens of width 1: softmax of -beta (q - k)^2, worked out with pencil and paper."""
    attention = build_attention("gaussian", 1, 1, 2, beta=0.5, out_bias=False)
    for feature_map, weight in ((attention.query_map, 1.0), (attention.key_map, 2.0), (attention.value_map, 3.0)):
        torch.nn.init.constant_(feature_map.linear.weight, weight)
    torch.nn.init.constant_(attention.out_proj.weight, 1.0)
    # q2 = 2, k = (2, 4), v = (3, 6): scores 0 and -2, weights 1 and e^-2 over their sum
    weight = 0.1353352832366127 / 1.1353352832366127
    expected = [3.0, 3.0 + 3.0 * weight]
    assert attention(torch.tensor([[[1.0], [2.0]]])).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    check_formula("gaussian", attention)


def test_the_baseline_has_to_be_fused(baseline, tokens, monkeypatch):
    check_fused(baseline, tokens)
    with pytest.raises(CheckFailed), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check_fused(baseline, tokens)
    monkeypatch.setattr(ScaledDotScore, "is_dot_product", False)
    with pytest.raises(CheckFailed, match="^classical attention did not run on torch's fused kernels"):
        check_fused(baseline, tokens)
