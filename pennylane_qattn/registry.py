"""Descriptions by name: registries of frozen dataclasses, and their plain-data form for configs and checkpoints.

A *description* (a mechanism, an ansatz, an encoding) is a value: it can be compared, printed, hashed and written
as numbers, strings, lists and dicts. Reading it back looks names up in a registry and never imports anything.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

Described = TypeVar("Described", bound="Description")


class Description:
    """Base of every registered description; subclasses are frozen dataclasses with a `name` and a `registry`.

    Attributes:
        is_plain: plain data may name it. Where building one imports what its options name, that must be `False`.
    """

    name: ClassVar[str]
    registry: ClassVar["Registry"]
    is_plain: ClassVar[bool] = True
    __dataclass_fields__: ClassVar[dict[str, Any]]  # of the subclasses

    def to_plain(self) -> dict[str, Any]:
        """This description as plain data: `{"kind": ..., "name": ..., option: value, ...}`."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"kind": self.registry.kind, "name": self.name, **{k: _plain(v) for k, v in options.items()}}

    @classmethod
    def from_plain(cls: type[Described], data: Mapping[str, Any]) -> Described:
        """The description that `to_plain` wrote.

        Raises:
            ValueError: if the data name nothing registered, or options that it does not have.
        """
        found = from_plain(data)
        if not isinstance(found, cls):
            raise ValueError(f"expected a description of a {cls.__name__}; got {data!r}")
        return found


class Registry(dict[str, type[Described]], Generic[Described]):
    """Names of descriptions of one kind.

    Args:
        kind: what the entries are, in the singular; used in error messages and in plain data.
    """

    all: ClassVar[dict[str, "Registry"]] = {}

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        Registry.all[kind] = self

    def register(self, cls: type[Described]) -> type[Described]:
        """Class decorator: enters `cls` under `cls.name`."""
        if cls.name in self:
            raise ValueError(f"{self.kind} {cls.name!r} is registered already, by {self[cls.name].__qualname__}")
        cls.registry = self
        self[cls.name] = cls
        return cls

    def lookup(self, name: str) -> type[Described]:
        """The class of that name; `ValueError` with the known names if there is none."""
        try:
            return self[name]
        except (KeyError, TypeError):
            raise ValueError(f"unknown {self.kind} {name!r}; choose from {', '.join(sorted(self))}") from None

    def build(self, what: "Described | str", /, **options: Any) -> Described:
        """A description from its name and options; one that is built already is returned as it is."""
        if isinstance(what, Description):
            if getattr(what, "registry", None) is self:
                return what
            known = ", ".join(sorted(self))
            raise ValueError(f"{type(what).__name__} is no registered {self.kind}; register it, or choose from {known}")
        cls = self.lookup(what)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        for option in options:
            if option not in fields:
                listed = ", ".join(sorted(fields)) or "none"
                raise ValueError(f"{self.kind} {what!r} has no option {option!r}; its options: {listed}")
            if isinstance(fields[option].default, bool) and not isinstance(options[option], bool):
                raise ValueError(f"{option} must be true or false; got {options[option]!r}")
        try:
            return cls(**options)
        except TypeError as error:
            raise ValueError(f"{self.kind} {what!r}: {error}") from None


def from_plain(data: Mapping[str, Any]) -> Description:
    """Reads what `Description.to_plain` wrote, nested descriptions included."""
    if (
        not isinstance(data, Mapping)
        or not {"kind", "name"} <= data.keys()
        or not all(isinstance(k, str) for k in data)
    ):
        raise ValueError(f"a description needs the keys 'kind' and 'name'; got {data!r}")
    if not isinstance(data["kind"], str) or data["kind"] not in Registry.all:
        raise ValueError(f"unknown kind of description {data['kind']!r}; known: {', '.join(sorted(Registry.all))}")
    registry = Registry.all[data["kind"]]
    if not isinstance(data["name"], str):
        raise ValueError(f"unknown {registry.kind} {data['name']!r}; choose from {', '.join(sorted(registry))}")
    if not registry.lookup(data["name"]).is_plain:
        raise ValueError(f"{registry.kind} {data['name']!r} is not read from data, since that would import code")
    options = {k: _unplain(v) for k, v in data.items() if k not in ("kind", "name")}
    return registry.build(data["name"], **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Description):
        return value.to_plain()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"cannot be written as plain data: {value!r}")


def _unplain(value: Any) -> Any:
    if isinstance(value, Mapping) and {"kind", "name"} <= value.keys():
        return from_plain(value)
    if isinstance(value, Mapping):
        return {k: _unplain(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_unplain(v) for v in value)
    return value
