import dataclasses
import json

import pytest
import torch

from lightning_modules.gpt import GPT, preset
from lightning_modules.variants import (
    TOLERANCE,
    Variant,
    ablations_of,
    as_config,
    count_parameters,
    matched_classical,
    twins_of,
    without_equals,
)
from pennylane_qattn import ATTENTION, QISA, Classical, Gaussian, Overlap, QISAAbsorbed, ScaledDot

CONFIG = preset("qisa-16", vocab_size=65)


def parameters(config, mechanism):
    """Counted by building the model, as a reader would."""
    return sum(p.numel() for p in GPT(config, mechanism).parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "classical"])
@pytest.mark.parametrize(("embed_dim", "heads"), [(16, 1), (16, 2), (64, 1), (64, 4)])
def test_a_twin_has_as_many_parameters(name, embed_dim, heads):
    config = dataclasses.replace(CONFIG, embed_dim=embed_dim, num_heads=heads, feedforward_dim=None)
    wanted = parameters(config, ATTENTION.build(name))
    mechanism, model, mismatch = matched_classical(config, wanted)
    found = parameters(dataclasses.replace(config, **model), mechanism)
    assert abs(found / wanted - 1) < TOLERANCE == 0.02
    assert mismatch == pytest.approx(found / wanted - 1)


def test_the_head_size_is_the_nearest():
    # 6 layers: a head of one more costs 4 * 16 * 6 = 384 parameters
    wanted = count_parameters(CONFIG, Classical(head_dim=13)) + 100
    assert matched_classical(CONFIG, wanted)[0] == Classical(head_dim=13)
    assert matched_classical(CONFIG, wanted + 200)[0] == Classical(head_dim=14)


def test_classical_is_its_own_twin_and_that_of_its_like():
    plain = count_parameters(CONFIG, Classical())
    assert matched_classical(CONFIG, plain) == (Classical(), {}, 0.0)
    assert matched_classical(CONFIG, round(plain * 1.009))[0] == Classical()
    assert matched_classical(CONFIG, round(plain * 1.015))[0] == Classical(head_dim=17)


def test_another_width_where_no_head_size_will_do():
    small = count_parameters(CONFIG, Classical(head_dim=1)) // 2
    mechanism, model, mismatch = matched_classical(CONFIG, small)
    assert model["embed_dim"] < 16 and abs(mismatch) < TOLERANCE
    narrow = dataclasses.replace(CONFIG, **model, feedforward_dim=None)
    assert parameters(narrow, mechanism) == pytest.approx(small * (1 + mismatch))


def test_no_twin_within_the_tolerance():
    with pytest.raises(ValueError, match=r"no classical twin of 100 parameters within 2%.*leave twins out"):
        matched_classical(CONFIG, 100)


def variants(**mechanisms):
    return [
        Variant(name, mechanism, title=name, parameters=count_parameters(CONFIG, mechanism))
        for name, mechanism in mechanisms.items()
    ]


def test_twins_are_shared_and_made_once():
    found = {v.name: v for v in twins_of(variants(classical=Classical(), a=QISA(), b=QISA(seed=5)), CONFIG)}
    assert set(found) == {"classical", "a", "b", "classical-h13"}
    twin = found["classical-h13"]
    assert twin.role == "twin" and twin.of == ("a", "b") and twin.mechanism == Classical(head_dim=13)
    assert found["a"].twin == found["b"].twin == "classical-h13" and abs(found["a"].twin_mismatch) < TOLERANCE
    assert found["classical"].twin == ""
    assert twin.parameters == parameters(CONFIG, twin.mechanism)


def test_plain_classical_is_added_where_it_is_the_twin():
    found = {v.name: v for v in twins_of(variants(g=Gaussian()), CONFIG)}
    assert found["g"].twin == "classical" and found["classical"].role == "twin" and found["classical"].of == ("g",)


def test_a_mechanism_may_be_the_twin():
    found = {v.name: v for v in twins_of(variants(mine=Classical(head_dim=13), a=QISA()), CONFIG)}
    assert found["a"].twin == "mine" and "classical-h13" not in found


def test_the_name_of_a_twin_is_taken():
    with pytest.raises(ValueError, match="'classical-h13' is that of a matched classical twin"):
        twins_of(variants(a=QISA(), **{"classical-h13": Gaussian(values="circuit")}), CONFIG)


def ablated(mechanism, *names):
    (variant,) = variants(m=mechanism)
    return {v.name: v.mechanism for v in ablations_of(variant, CONFIG, list(names or ("frozen", "random", "linear")))}


def test_a_twin_matched_by_width():
    """Three times the parameters: a wider model, and heads of another size only for the rest."""
    plain = count_parameters(CONFIG, Classical())
    mechanism, model, mismatch = matched_classical(CONFIG, 3 * plain, "width")
    assert model["embed_dim"] > CONFIG.embed_dim and abs(mismatch) <= TOLERANCE
    wide = dataclasses.replace(CONFIG, **model)
    assert count_parameters(wide, mechanism) == pytest.approx(3 * plain, rel=TOLERANCE)
    assert abs((mechanism.head_dim or wide.embed_dim) - wide.embed_dim) <= wide.embed_dim // 2
    exact = count_parameters(dataclasses.replace(CONFIG, embed_dim=24), Classical())
    assert matched_classical(CONFIG, exact, "width") == (Classical(), {"embed_dim": 24}, 0.0)
    twin = twins_of([dataclasses.replace(variants(g=Gaussian())[0], parameters=exact)], CONFIG, "width")[1]
    assert (twin.name, twin.title, twin.model) == ("classical-d24", "classical, width 24", {"embed_dim": 24})


def test_each_mechanism_may_have_its_own_way_of_matching():
    large = count_parameters(dataclasses.replace(CONFIG, embed_dim=24), Classical())
    pair = [dataclasses.replace(v, parameters=large) for v in variants(a=Gaussian(), b=Gaussian())]
    found = {v.name: v for v in twins_of(pair, CONFIG, {"b": "width"})}
    assert found["b"].twin == "classical-d24" and found[found["a"].twin].model == {}


def test_ablations_leave_one_thing_out():
    assert ablated(QISA()) == {
        "m-frozen": QISA(trainable=False),
        "m-random": QISA(values="random-quadratic"),
        "m-linear": QISA(values="linear"),
    }
    assert ablated(QISAAbsorbed()) == {
        "m-random": QISAAbsorbed(values="random-absorbed"),
        "m-linear": QISAAbsorbed(values="linear"),
    }
    assert ablated(Overlap()) == {"m-frozen": Overlap(trainable=False)}
    assert ablated(Classical()) == ablated(Gaussian()) == {}
    assert ablated(QISA(), "linear") == {"m-linear": QISA(values="linear")}


def test_ablations_of_joint_tokens():
    pairs = ScaledDot(values="learned-quadratic", span=2, rank=3, temperature="learned")
    assert ablated(pairs, "frozen", "random", "linear", "rectified", "single") == {
        "m-random": dataclasses.replace(pairs, values="random-quadratic", rank=None),
        "m-linear": dataclasses.replace(pairs, values="linear", rank=None),
        "m-rectified": dataclasses.replace(pairs, values="rectified"),
        "m-single": dataclasses.replace(pairs, span=1),
    }
    assert ablated(QISA(), "rectified", "single") == {}


def test_an_ablation_says_of_what():
    (variant,) = variants(q=QISA())
    frozen = ablations_of(variant, CONFIG, ["frozen"])[0]
    assert frozen.role == "ablation" and frozen.of == ("q",) and frozen.title == "q, circuit frozen"


def test_counting_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    matched_classical(CONFIG, count_parameters(CONFIG, QISA()))
    assert torch.equal(torch.rand(2), expected)


def test_configs_build_the_same_mechanism(tmp_path):
    from lightning_modules.training_cli import TrainingCLI
    from pennylane_qattn import StronglyEntangling

    mechanism = Gaussian(values="circuit", ansatz=StronglyEntangling(), seed=7, beta=0.5)
    config = {"model": {"attention": as_config(mechanism)}, "data": {"corpus": "pydoc"}, "run": "x"}

    config["trainer"] = {"default_root_dir": str(tmp_path)}
    assert TrainingCLI("fit", ["--config", json.dumps(config)]).model.attention == mechanism


def test_seeds_follow_the_run_unless_given():
    assert Variant("a", QISA()).attention(5)["init_args"]["seed"] == 5
    assert Variant("a", QISA(seed=2), own_seed=True).attention(5)["init_args"]["seed"] == 2


def test_ablations_share_the_twin_of_their_mechanism():
    (variant,) = variants(q=QISA())
    near, far = (
        dataclasses.replace(variant, name=name, role="ablation", of=("q",), parameters=parameters)
        for name, parameters in (("near", variant.parameters - 60), ("far", 2 * variant.parameters))
    )
    found = {v.name: v for v in twins_of([variant, near, far], CONFIG)}
    assert found["near"].twin == found["q"].twin == "classical-h13" and found["far"].twin == ""
    assert found["classical-h13"].of == ("q",)
    expected = found["classical-h13"].parameters / near.parameters - 1
    assert found["near"].twin_mismatch == pytest.approx(expected)


def test_an_ablation_that_is_there_already_is_that_variant():
    found = variants(g=Gaussian(), c=Gaussian(values="circuit"), q=QISA(), a=QISAAbsorbed(), again=QISA())
    everything = [v for variant in found for v in (variant, *ablations_of(variant, CONFIG, ["frozen", "linear"]))]
    # Gaussian scores with linear values are `g`, and the published score with linear values stands under `q`
    expected = ["g", "c", "c-frozen", "q", "q-frozen", "q-linear", "a", "again"]
    kept = {v.name: v for v in without_equals(everything, CONFIG)}
    assert list(kept) == expected
    of = {name: variant.of for name, variant in kept.items() if variant.of}
    # `again` equals `q`, so that its ablations are those of `q`
    assert of == {"g": ("c",), "c-frozen": ("c",), "q-frozen": ("q", "again"), "q-linear": ("q", "a", "again")}
    assert kept["g"].role == "mechanism" and kept["q-linear"].role == "ablation"


def test_an_ablation_of_several_takes_the_twin_that_fits():
    found = variants(q=QISA(), a=QISAAbsorbed())
    everything = [v for variant in found for v in (variant, *ablations_of(variant, CONFIG, ["linear"]))]
    kept = [
        dataclasses.replace(v, parameters=parameters(CONFIG, v.mechanism)) for v in without_equals(everything, CONFIG)
    ]
    result = {v.name: v for v in twins_of(kept, CONFIG)}
    assert result["q"].twin == "classical-h13" and result["a"].twin == "classical"
    linear = result["q-linear"]  # more than 2 % from the twin of `q`
    assert abs(result["classical-h13"].parameters / linear.parameters - 1) > TOLERANCE
    assert linear.twin == "classical" and abs(linear.twin_mismatch) < TOLERANCE and linear.of == ("q", "a")
