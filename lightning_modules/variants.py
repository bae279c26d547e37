"""What is compared: mechanisms, for each a classical twin with as many parameters, and its ablations.

A gain over classical attention says little as long as the models differ in size, and little about circuits as long as
anything quadratic would do as well. So each mechanism can be compared with

- its *twin*: classical attention whose heads are made wider or narrower until the whole model has as many parameters
  (within `TOLERANCE`), and if no head size will do, or where that is asked for, a model of another width;
- its *ablations* (`ABLATIONS`): the same mechanism without the part that is said to help.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_modules.gpt import GPT, GPTConfig
from pennylane_qattn import Classical, LinearFeatureMap, Mechanism
from pennylane_qattn.features import circuit_within
from pennylane_qattn.mechanisms import RANKED
from pennylane_qattn.registry import Description

#: By how much the number of parameters of a twin may differ.
TOLERANCE = 0.02
#: As it is, classical attention is the twin of whatever differs from it by no more than this.
ALIKE = 0.01
#: What is changed first to give a twin its number of parameters: the size of its heads, which leaves the rest of the
#: model as it is, or its width, which makes better use of many more of them.
Matching = Literal["head", "width"]
MATCHING: tuple[Matching, ...] = get_args(Matching)
ROLES = ("mechanism", "twin", "ablation")


@dataclass(frozen=True)
class Variant:
    """One model of a comparison, apart from its seed.

    Attributes:
        name: unique within corpus and size, and part of file names.
        mechanism: its attention.
        role: one of `ROLES`.
        of: the variants that it is the twin or the ablation of; of a mechanism, those whose ablation it equals.
        title: what it is called in tables and plots.
        model: options of `LanguageModel` in which it differs from the others of its size.
        own_seed: the mechanism's random draws were asked for, and do not follow the seed of the run.
        parameters: trainable ones of the whole model.
        twin: the name of its matched classical twin, if it has one.
        twin_mismatch: by which part of its own parameters the twin has more.
    """

    name: str
    mechanism: Mechanism
    role: str = "mechanism"
    of: tuple[str, ...] = ()
    title: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    own_seed: bool = False
    parameters: int = 0
    twin: str = ""
    twin_mismatch: float | None = None

    def attention(self, seed: int) -> dict[str, Any]:
        """The mechanism as options of `qattn fit`, its random draws from that seed."""
        mechanism = self.mechanism if self.own_seed else dataclasses.replace(self.mechanism, seed=seed)
        return as_config(mechanism)


def as_config(description: Description) -> dict[str, Any]:
    """A description as the configs of `qattn fit` have it, without the options that are as by default.

    So an option that is added to a mechanism later changes nothing about runs that do not use it.
    """
    cls, fields = type(description), [f for f in dataclasses.fields(description) if f.init]
    changed = {f.name: getattr(description, f.name) for f in fields}
    if not any(f.default is f.default_factory is dataclasses.MISSING for f in fields):
        default = cls()
        changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return {
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": {name: _as_option(value) for name, value in changed.items()},
    }


def _as_option(value: Any) -> Any:
    if isinstance(value, Description):
        return as_config(value)
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else value


# --- ablations --------------------------------------------------------------------------------------------------


def _frozen(mechanism: Mechanism, attention: nn.Module) -> Mechanism | None:
    """The circuits stay at the random angles that they began with."""
    maps = (attention.query_map, attention.key_map, attention.value_map)
    if not getattr(mechanism, "trainable", False) or all(circuit_within(m) is None for m in maps):
        return None
    return dataclasses.replace(mechanism, trainable=False)


def _random(mechanism: Mechanism, attention: nn.Module) -> Mechanism | None:
    """Values that are random quadratic forms instead of Pauli words or learned observables, as many and as large."""
    counterparts = {
        "circuit": "random-quadratic",
        "quadratic": "random-absorbed",
        "learned-quadratic": "random-quadratic",
    }
    counterpart = counterparts.get(_values(mechanism))
    return _with_values(mechanism, counterpart) if counterpart else None


def _rectified(mechanism: Mechanism, attention: nn.Module) -> Mechanism | None:
    """Values of one hidden layer with a rectifier instead of learned observables, as many and as large."""
    return _with_values(mechanism, "rectified") if _values(mechanism) == "learned-quadratic" else None


def _single(mechanism: Mechanism, attention: nn.Module) -> Mechanism | None:
    """Values that read their own token alone."""
    return dataclasses.replace(mechanism, span=1) if mechanism.value_span > 1 else None


def _linear(mechanism: Mechanism, attention: nn.Module) -> Mechanism | None:
    """Linear values, as many."""
    if _values(mechanism) is None or isinstance(attention.value_map, LinearFeatureMap):
        return None
    return _with_values(mechanism, "linear")


def _with_values(mechanism: Mechanism, values: str) -> Mechanism:
    rank = mechanism.rank if values in RANKED else None
    return dataclasses.replace(mechanism, values=values, rank=rank)


def _values(mechanism: Mechanism) -> str | None:
    return getattr(mechanism, "values", None)


#: Ablations by name: a mechanism and an attention that it built give the mechanism without something, or `None` where
#: there is nothing to leave out.
ABLATIONS: dict[str, Callable[[Mechanism, nn.Module], Mechanism | None]] = {
    "frozen": _frozen,
    "random": _random,
    "linear": _linear,
    "rectified": _rectified,
    "single": _single,
}
_TITLES = {
    "frozen": "circuit frozen",
    "random": "random quadratic values",
    "linear": "linear values",
    "rectified": "rectified values",
    "single": "values of one token",
}


def ablations_of(variant: Variant, config: GPTConfig, names: list[str]) -> list[Variant]:
    """The ablations of a variant, those that make sense for it."""
    sizes = config.embed_dim, config.num_heads, config.block_size
    attention = _undrawn(lambda: variant.mechanism(*sizes))
    found = []
    for name in names:
        mechanism = ABLATIONS[name](variant.mechanism, attention)
        if mechanism is not None:
            found.append(
                dataclasses.replace(
                    variant,
                    name=f"{variant.name}-{name}",
                    mechanism=mechanism,
                    role="ablation",
                    of=(variant.name,),
                    title=f"{variant.title or variant.name}, {_TITLES[name]}",
                )
            )
    return found


def without_equals(variants: list[Variant], config: GPTConfig) -> list[Variant]:
    """The variants, with one for all ablations that are equal.

    An ablation that is, under another name, a variant that is there already is trained once: that variant is `of` its
    mechanism, too.
    """
    fingerprints = [_fingerprint(variant.mechanism, config) for variant in variants]
    first: dict[str, int] = {}
    for index in sorted(range(len(variants)), key=lambda i: variants[i].role != "mechanism"):
        first.setdefault(fingerprints[index], index)
    kept = {i: v for i, v in enumerate(variants) if v.role == "mechanism" or first[fingerprints[i]] == i}
    for index, variant in enumerate(variants):
        if index not in kept:
            other = kept[first[fingerprints[index]]]
            more = [name for name in variant.of if name not in (*other.of, other.name)]
            kept[first[fingerprints[index]]] = dataclasses.replace(other, of=(*other.of, *more))
    return list(kept.values())


def _fingerprint(mechanism: Mechanism, config: GPTConfig) -> str:
    """What an attention is made of, and what is drawn for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = mechanism(config.embed_dim, config.num_heads, config.block_size)
    parts = [type(module).__name__ for name, module in attention.named_modules() if name]
    tensors = [(name, tensor.sum().item(), tuple(tensor.shape)) for name, tensor in attention.state_dict().items()]
    trained = [name for name, parameter in attention.named_parameters() if parameter.requires_grad]
    return repr((type(attention).__name__, parts, tensors, trained, attention.dropout, attention.is_causal))


# --- parameters -------------------------------------------------------------------------------------------------


def count_parameters(config: GPTConfig, mechanism: Mechanism) -> int:
    """The trainable parameters of a GPT with that attention."""
    model = _undrawn(lambda: GPT(config, mechanism))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _undrawn(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return build()


def matched_classical(config: GPTConfig, parameters: int, by: str = "head") -> tuple[Classical, dict[str, int], float]:
    """Classical attention in a GPT of about that many parameters.

    Args:
        config: the GPT of the mechanism to be matched.
        parameters: trainable parameters of that GPT.
        by: one of `MATCHING`: what is changed first, the size of heads or the width of the model.

    Returns:
        The mechanism, options of `LanguageModel` in which its GPT differs from `config`, and by which part it has more
        parameters.

    Raises:
        ValueError: if neither another head size nor another width comes within `TOLERANCE`.
    """

    def mismatch(embed_dim: int, head_dim: int | None) -> float:
        feedforward = config.feedforward_dim
        if feedforward == 4 * config.embed_dim:
            feedforward = None
        sized = dataclasses.replace(config, embed_dim=embed_dim, feedforward_dim=feedforward)
        return count_parameters(sized, Classical(head_dim=head_dim)) / parameters - 1

    width, heads = config.embed_dim, config.num_heads
    if width % heads == 0 and abs(found := mismatch(width, None)) <= ALIKE:
        return Classical(), {}, found
    nearest = float("inf")
    distance = {"head": lambda d: abs(d - width), "width": lambda d: abs(mismatch(d, None))}[by]
    for candidate in sorted(range(heads, 2 * width + 1, heads), key=distance):
        model = {} if candidate == width else {"embed_dim": candidate}
        if by == "width" and abs(found := mismatch(candidate, None)) <= ALIKE:
            return Classical(), model, found
        one, two = mismatch(candidate, 1), mismatch(candidate, 2)  # the number grows linearly with the size of a head
        head_dim = max(1, round(1 - one / (two - one)))
        found = mismatch(candidate, head_dim)
        if abs(found) <= TOLERANCE:
            return Classical(head_dim=head_dim), model, found
        nearest = min(nearest, found, key=abs)
    raise ValueError(
        f"no classical twin of {parameters:,} parameters within {TOLERANCE:.0%}: the nearest is {nearest:+.1%} off; "
        "leave twins out, or give another size"
    )


def twins_of(variants: list[Variant], config: GPTConfig, by: str | Mapping[str, str] = MATCHING[0]) -> list[Variant]:
    """The variants, and the classical twins of the mechanisms that are not among them.

    They are matched by one of `MATCHING`, or each as `by` has it under the mechanism's name, the rest by the first.
    An ablation shares the twin of its mechanism, of several the first, that has as many parameters as it has, too.
    """
    result = {variant.name: variant for variant in variants}
    for variant in (v for v in variants if v.role == "mechanism"):
        own = by if isinstance(by, str) else by.get(variant.name, MATCHING[0])
        mechanism, model, mismatch = matched_classical(config, variant.parameters, own)
        same = [other for other in result.values() if _is_same(other, mechanism, model)]
        if same:
            twin = same[0]
        else:
            name, title = "classical", "classical"
            if model:
                name, title = f"{name}-d{model['embed_dim']}", f"{title}, width {model['embed_dim']}"
            if mechanism.head_dim is not None:
                name, title = f"{name}-h{mechanism.head_dim}", f"{title}, head size {mechanism.head_dim}"
            twin = Variant(
                name=name,
                mechanism=mechanism,
                role="twin",
                title=title,
                model=model,
                parameters=round(variant.parameters * (1 + mismatch)),
            )
            if twin.name in result:
                raise ValueError(f"the name {twin.name!r} is that of a matched classical twin; rename the mechanism")
        if twin.name == variant.name:
            continue
        if twin.role == "twin":
            twin = dataclasses.replace(twin, of=(*twin.of, variant.name))
        result[twin.name] = twin
        result[variant.name] = dataclasses.replace(variant, twin=twin.name, twin_mismatch=mismatch)
        for ablation in (v for v in variants if v.role == "ablation" and variant.name in v.of):
            mismatch = twin.parameters / ablation.parameters - 1
            if abs(mismatch) <= TOLERANCE and not result[ablation.name].twin:
                result[ablation.name] = dataclasses.replace(ablation, twin=twin.name, twin_mismatch=mismatch)
    return list(result.values())


def _is_same(variant: Variant, mechanism: Mechanism, model: Mapping[str, Any]) -> bool:
    """Whether a variant is that mechanism, its seed apart, which classical attention does not use."""
    own = dataclasses.replace(variant.mechanism, seed=mechanism.seed)
    return own == mechanism and dict(variant.model) == dict(model)
