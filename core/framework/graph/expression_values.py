"""What operators, functions and methods of a condition do to values, each within a budget of work and size."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic import BaseModel

MAX_WORK = 2_000_000
"""Units of work per evaluation: one per element looked at, one per 64 characters."""
MAX_RESULT_LENGTH = 1_000_000
"""Characters or elements that joining or slicing may give."""
MAX_REPEATED_LENGTH = 10_000
"""Characters or elements that ``text * n`` may give."""
MAX_BITS = 4096
"""Size of an integer that an operation may give."""
MAX_DIGITS = 400
"""Digits that text turned into a number, or rounding, may have."""

_Sequence = (str, bytes, list, tuple)
_Elements = (str, bytes, list, tuple, set, frozenset, Mapping)
_Numbers = (int, float, Decimal)
_Moments = (datetime, date, timedelta)
_Printable = (type(None), str, int, float, Decimal, datetime, date, time, timedelta, UUID, Enum)


class Refused(Exception):
    """The language does not allow this operation on these values. The evaluator adds where and translates it."""


class Budget:
    """The work one evaluation may still do."""

    def __init__(self) -> None:
        self._left = MAX_WORK

    def spend(self, work: int) -> None:
        """Raises Refused once more is spent than there was."""
        self._left -= work
        if self._left < 0:
            raise Refused("The condition needs too much work: its values are too large")

    def spend_on(self, value: Any, times: int = 1) -> None:
        """Pay for looking ``times`` times at every element of ``value``, at any depth."""
        self.spend(times)
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, (str, bytes)):
                self.spend(times * (len(item) // 64))
            elif isinstance(item, Mapping):
                # Paid before the elements are listed, so listing them is bounded as well.
                self.spend(times * 2 * len(item))
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                self.spend(times * len(item))
                waiting.extend(item)


def _type(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _bounded(value: Any) -> Any:
    """``value`` unless it is a number no condition needs."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise Refused(f"The result is an integer of more than {MAX_BITS} bits")
    if isinstance(value, complex):
        raise Refused("The result is a complex number")
    return value


def number(value: Any) -> Any:
    """``value`` if it is a number; raises Refused otherwise."""
    if not isinstance(value, (*_Numbers, timedelta)):
        raise Refused(f"A number is needed here, not {_type(value)}")
    return _bounded(value)


def _calculable(sign: str, left: Any, right: Any) -> None:
    for value in (left, right):
        if not isinstance(value, (*_Numbers, *_Moments)):
            raise Refused(f"{sign!r} needs numbers, not {_type(left)} and {_type(right)}")
        _bounded(value)


def arithmetic(sign: str, function: Callable[[Any, Any], Any]) -> Callable[[Budget, Any, Any], Any]:
    """The operator ``sign`` on numbers, dates and durations. Text on the left of ``%`` is refused like any text."""

    def apply(budget: Budget, left: Any, right: Any) -> Any:
        _calculable(sign, left, right)
        return _bounded(function(left, right))

    return apply


def add(budget: Budget, left: Any, right: Any) -> Any:
    """``left + right`` for numbers, dates and durations, and for two texts, lists or tuples of the same type."""
    for kind in _Sequence:
        if isinstance(left, kind) and isinstance(right, kind):
            _fits(len(left) + len(right), MAX_RESULT_LENGTH)
            budget.spend(_copy_work(left, len(left) + len(right)))
            return operator.add(left, right)
    _calculable("+", left, right)
    return _bounded(operator.add(left, right))


def multiply(budget: Budget, left: Any, right: Any) -> Any:
    """``left * right``: the product, or a sequence repeated up to `MAX_REPEATED_LENGTH`."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, _Sequence):
            if not isinstance(count, int):
                raise Refused(f"'*' repeats {_type(sequence)} only a whole number of times")
            _fits(len(sequence) * max(count, 0), MAX_REPEATED_LENGTH)
            # By depth, not by length: nested repetition shares its parts and would grow without using memory yet.
            budget.spend_on(sequence, max(min(count, MAX_REPEATED_LENGTH), 1))
            return sequence * count
    _calculable("*", left, right)
    return _bounded(operator.mul(left, right))


def power(budget: Budget, left: Any, right: Any) -> Any:
    """``left ** right`` for int and float; the size is checked before it is computed."""
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        raise Refused(f"'**' needs numbers, not {_type(left)} and {_type(right)}")
    _calculable("**", left, right)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_BITS:
        raise Refused(f"The result of '**' is an integer of more than {MAX_BITS} bits")
    return _bounded(left**right)


def shift_left(budget: Budget, left: Any, right: Any) -> Any:
    """``left << right`` for int; the size is checked before it is computed."""
    if not isinstance(left, int) or not isinstance(right, int):
        raise Refused(f"'<<' needs whole numbers, not {_type(left)} and {_type(right)}")
    if left.bit_length() + right > MAX_BITS:
        raise Refused(f"The result of '<<' is an integer of more than {MAX_BITS} bits")
    return left << right


def bitwise(sign: str, function: Callable[[Any, Any], Any]) -> Callable[[Budget, Any, Any], Any]:
    """The operator ``sign`` on two whole numbers, or on two sets."""

    def apply(budget: Budget, left: Any, right: Any) -> Any:
        sets = (set, frozenset)
        if sign != ">>" and isinstance(left, sets) and isinstance(right, sets):
            budget.spend(len(left) + len(right))
            return function(left, right)
        if not isinstance(left, int) or not isinstance(right, int):
            raise Refused(f"{sign!r} needs whole numbers, not {_type(left)} and {_type(right)}")
        return _bounded(function(left, right))

    return apply


def comparison(function: Callable[[Any, Any], Any]) -> Callable[[Budget, Any, Any], Any]:
    """An ordering or equality. Comparing containers costs what the smaller of them holds."""

    def apply(budget: Budget, left: Any, right: Any) -> Any:
        if isinstance(left, _Elements) and isinstance(right, _Elements):
            budget.spend_on(left if len(left) <= len(right) else right)
        return function(left, right)

    return apply


def contains(budget: Budget, item: Any, container: Any) -> bool:
    """``item in container`` for text, lists, tuples, sets and the keys of mappings."""
    if not isinstance(container, _Elements):
        raise Refused(f"'in' needs a text, list, tuple, set or dict, not {_type(container)}")
    if isinstance(container, (str, bytes)):
        budget.spend_on(container)
    elif isinstance(container, (list, tuple)):
        budget.spend_on(item, max(len(container), 1))
    else:
        hashable(budget, item)
    return item in container


def hashable(budget: Budget, value: Any) -> Any:
    """``value``, paid for as a key: hashing looks at all of it."""
    budget.spend_on(value)
    return value


def field_of(receiver: Any, name: str) -> Any:
    """``receiver.name``: a key of a mapping, or a declared field of a pydantic model or dataclass instance."""
    if isinstance(receiver, Mapping):
        return item_of(receiver, name)
    if isinstance(receiver, type):
        raise Refused(f"Class {receiver.__name__!r} has no fields to read")
    if isinstance(receiver, BaseModel):
        declared: Iterable[str] = type(receiver).model_fields
    elif dataclasses.is_dataclass(receiver):
        declared = [field.name for field in dataclasses.fields(receiver)]
    else:
        raise Refused(f"{name!r} cannot be read from {_type(receiver)}: it has no keys")
    if name not in declared:
        raise Refused(f"{_type(receiver)} has no field {name!r}")
    return getattr(receiver, name)


def item_of(receiver: Any, index: Any) -> Any:
    """``receiver[index]`` of a mapping, or of a text, list or tuple."""
    if isinstance(receiver, Mapping):
        # Asked first: a defaultdict would otherwise grow by being read.
        if index not in receiver:
            raise Refused(f"There is no key {str(index)[:80]!r}" if isinstance(index, (str, int)) else "No such key")
        return receiver[index]
    if not isinstance(receiver, _Sequence):
        raise Refused(f"{_type(receiver)} has no elements to pick from")
    if not isinstance(index, int):
        raise Refused(f"An element of {_type(receiver)} is picked by a whole number, not {_type(index)}")
    if not -len(receiver) <= index < len(receiver):
        raise Refused(f"{_type(receiver)} of length {len(receiver)} has no element {str(index)[:20]}")
    return receiver[index]


def part_of(budget: Budget, receiver: Any, bounds: slice) -> Any:
    """``receiver[lower:upper:step]`` of a text, list or tuple."""
    if not isinstance(receiver, _Sequence):
        raise Refused(f"{_type(receiver)} cannot be sliced")
    length = len(range(*bounds.indices(len(receiver))))
    _fits(length, MAX_RESULT_LENGTH)
    budget.spend(_copy_work(receiver, length))
    return receiver[bounds]


def _fits(length: int, limit: int) -> None:
    if length > limit:
        raise Refused(f"The result has {length} characters or elements; at most {limit} are allowed")


def _copy_work(sequence: Any, length: int) -> int:
    """Characters are cheap; an element of a list is a pointer, eight times as large."""
    return 1 + (length // 64 if isinstance(sequence, (str, bytes)) else length)


# Functions. Each takes the budget first; wrong arguments raise TypeError, which the evaluator translates.


def _iterable(value: Any) -> Any:
    if not isinstance(value, _Elements):
        raise Refused(f"A list, tuple, set, dict or text is needed here, not {_type(value)}")
    return value


def _elements(budget: Budget, value: Any) -> Any:
    budget.spend(len(_iterable(value)))
    return value


def _len(budget: Budget, value: Any, /) -> int:
    if not isinstance(value, _Elements):
        raise Refused(f"{_type(value)} has no length")
    return len(value)


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(budget: Budget, *args: Any, **default: Any) -> Any:
        candidates = _iterable(args[0]) if len(args) == 1 else args
        budget.spend_on(candidates)
        return function(candidates, **default)

    return apply


def _sorted(budget: Budget, value: Any, /, *, reverse: bool = False) -> list[Any]:
    budget.spend(len(_iterable(value)))
    items = list(value)
    budget.spend_on(items, max(len(items).bit_length(), 1))
    return sorted(items, reverse=bool(reverse))


def _sum(budget: Budget, value: Any, /, start: Any = 0) -> Any:
    total = number(start)
    for item in _elements(budget, value):
        total = _bounded(total + number(item))
    return total


def _abs(budget: Budget, value: Any, /) -> Any:
    return abs(number(value))


def _int(budget: Budget, value: Any, /) -> int:
    if isinstance(value, str):
        _digits(value)
        return int(value)
    if not isinstance(value, _Numbers):
        raise Refused(f"int() needs a number or a text, not {_type(value)}")
    _sized(value)
    return int(value)


def _float(budget: Budget, value: Any, /) -> float:
    if isinstance(value, str):
        _digits(value)
        return float(value)
    if not isinstance(value, _Numbers):
        raise Refused(f"float() needs a number or a text, not {_type(value)}")
    return float(value)


def _round(budget: Budget, value: Any, /, ndigits: Any = None) -> Any:
    number(value)
    if ndigits is None:
        _sized(value)
        return round(value)
    if not isinstance(ndigits, int) or abs(ndigits) > MAX_DIGITS:
        raise Refused(f"round() takes up to {MAX_DIGITS} digits")
    return round(value, ndigits)


def _digits(text: str) -> None:
    if len(text) > MAX_DIGITS:
        raise Refused(f"The text is too long to be a number: {len(text)} characters, at most {MAX_DIGITS}")


def _sized(value: Any) -> None:
    """Raises Refused when ``value`` as an int would be huge: a Decimal's exponent costs nothing until then."""
    if isinstance(value, Decimal) and value.is_finite() and value.adjusted() > MAX_DIGITS:
        raise Refused(f"The number has more than {MAX_DIGITS} digits")
    _bounded(value)


def _str(budget: Budget, value: Any, /) -> str:
    budget.spend_on(value)
    _printable(value)
    text = str(value)
    _fits(len(text), MAX_RESULT_LENGTH)
    return text


def _printable(value: Any) -> None:
    waiting = [value]  # finite and within the budget: `_str` has just paid for the same walk
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, _Printable):
            _bounded(item)
        else:
            # A set has another order in each process; other objects may print anything, such as an address.
            raise Refused(f"str() does not take {_type(item)}")


def _bool(budget: Budget, value: Any, /) -> bool:
    return bool(value)


def _any(budget: Budget, value: Any, /) -> bool:
    return any(_elements(budget, value))


def _all(budget: Budget, value: Any, /) -> bool:
    return all(_elements(budget, value))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": _len,
    "min": _extreme(min),
    "max": _extreme(max),
    "abs": _abs,
    "int": _int,
    "float": _float,
    "str": _str,
    "bool": _bool,
    "any": _any,
    "all": _all,
    "round": _round,
    "sum": _sum,
    "sorted": _sorted,
}

_TEXT_METHODS: dict[str, Callable[..., Any]] = {
    "lower": str.lower,
    "upper": str.upper,
    "strip": str.strip,
    "startswith": str.startswith,
    "endswith": str.endswith,
    "split": str.split,
}
METHODS = frozenset({*_TEXT_METHODS, "get"})


def call_method(budget: Budget, receiver: Any, name: str, args: list[Any]) -> Any:
    """``receiver.name(*args)`` of exactly a str or a dict: a subclass could do anything in its place."""
    if name == "get":
        if type(receiver) is not dict:
            raise Refused(f"'get' is for dicts, not {_type(receiver)}")
        if not 1 <= len(args) <= 2:
            raise Refused("'get' takes a key and perhaps a default")
        hashable(budget, args[0])
        return receiver.get(*args)
    if type(receiver) is not str:
        raise Refused(f"{name!r} is for text, not {_type(receiver)}")
    # Splitting may give an element per character.
    budget.spend(1 + (len(receiver) if name == "split" else len(receiver) // 8))
    for arg in args:
        budget.spend_on(arg)
    return _TEXT_METHODS[name](receiver, *args)
