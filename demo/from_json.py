"""Dataclasses from what a JSON file holds, checked key by key.

Fields may be scalars, `Any`, lists, dicts with string keys, dataclasses, and unions of these with None. Of several
dataclasses in one union the one is taken whose fields are the keys.
"""

import dataclasses
import types
from typing import Any, TypeVar, Union, get_args, get_origin

from models.errors import UserError

Kind = TypeVar("Kind")
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}


def from_json(kind: type[Kind], value: Any, where: str, remedy: str) -> Kind:
    """An instance of the dataclass `kind`, whose annotations are types and not their names.

    Args:
        value: what `json.load` gave.
        where: what the value is called in a message.
        remedy: what stands at the end of a message.

    Raises:
        UserError: a key is missing, unknown, or has a value of another type.
    """
    return _Reader(remedy).value(kind, value, where)


class _Reader:
    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def value(self, kind: Any, value: Any, where: str) -> Any:
        if kind is Any:
            return value
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            return self._one_of(get_args(kind), value, where)
        if dataclasses.is_dataclass(kind):
            return self._fields(kind, value, where)
        if origin is list:
            self._check(isinstance(value, list), list, value, where)
            return [self.value(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
        if origin is dict:
            self._check(isinstance(value, dict), dict, value, where)
            return {key: self.value(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
        numbers = (int, float) if kind is float else kind  # JSON has one kind of number, Python counts a bool as one
        self._check(isinstance(value, numbers) and isinstance(value, bool) == (kind is bool), kind, value, where)
        return value

    def _one_of(self, kinds: tuple, value: Any, where: str) -> Any:
        if value is None and types.NoneType in kinds:
            return None
        others = [kind for kind in kinds if kind is not types.NoneType]
        if len(others) > 1 and isinstance(value, dict):
            others.sort(key=lambda kind: len(_names(kind) ^ set(value)))
        return self.value(others[0], value, where)

    def _fields(self, kind: type, value: Any, where: str) -> Any:
        self._check(isinstance(value, dict), dict, value, where)
        names = _names(kind)
        for what, wrong in (("has no", names - set(value)), ("has an unknown", set(value) - names)):
            if wrong:
                raise UserError(f"{where} {what} key {', '.join(sorted(wrong))}: {self.remedy}")
        fields = dataclasses.fields(kind)
        return kind(**{each.name: self.value(each.type, value[each.name], f"{where}.{each.name}") for each in fields})

    def _check(self, right: bool, kind: type, value: Any, where: str) -> None:
        if not right:
            shown = repr(value) if len(repr(value)) < 60 else repr(value)[:60] + ".."
            raise UserError(f"{where} is {shown}, not {NAMES.get(kind, 'an object')}: {self.remedy}")


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
