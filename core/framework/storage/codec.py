"""Values to bytes and back: JSON with tagged types, loading nothing that the program did not register.

A value of JSON's own types is stored as plain JSON. Everything else becomes an object with the key ``$t`` naming its
type: bytes, dates and times, UUID, Decimal, tuple, set, frozenset, dict with other keys than text, integers beyond
64 bits, non-finite floats, and instances of registered enums, dataclasses, pydantic models or any class registered
with its own pair of functions. ``decode(encode(v)) == v`` and has the same types, or ``encode`` raises.

Why the walk before orjson: orjson writes tuples as lists, enums as their values and NaN as null without a word.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
from collections.abc import Callable, Collection
from decimal import Decimal
from enum import Enum, Flag
from math import isfinite
from typing import Any, Final, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import orjson
from pydantic import BaseModel

from framework.errors import CodecError, CorruptData, UnknownType, UnstorableValue
from framework.storage.sealed import refuse_sealed

TAG = "$t"
MAX_DEPTH = 240
"""Nesting levels of JSON that are stored; orjson writes at most 254."""

_TAG_BYTES = b'"$t"'
_UNFIT: Final = (
    KeyError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    IndexError,
    OSError,  # a time zone's name that is a folder of the zone data
    RecursionError,  # far deeper than anything encode writes
)
_SIMPLE = frozenset({str, int, bool, type(None)})
_TEXT_ONLY = frozenset({str})
_FLOATS_ONLY = frozenset({float})
_SCALARS = _SIMPLE | _FLOATS_ONLY

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Registered:
    name: str
    cls: type
    to_plain: Callable[[Any], Any]
    from_plain: Callable[[Any], Any]


_by_class: dict[type, _Registered] = {}
_by_name: dict[str, _Registered] = {}


def register(
    cls: type[T],
    *,
    name: str | None = None,
    to_plain: Callable[[T], Any] | None = None,
    from_plain: Callable[[Any], T] | None = None,
) -> type[T]:
    """Let instances of exactly ``cls`` be stored. Returns ``cls``, so it also serves as a class decorator.

    Enums, dataclasses and pydantic models need no functions: their members, fields and private attributes are stored
    and put back without running ``__init__`` or validation. Other classes need ``to_plain`` (instance to a storable
    value) and ``from_plain`` (the way back). ``name`` is what the store says, by default the class's import path;
    give one when the class may move. Raises ``TypeError`` for a class that needs functions, ``ValueError`` for a name
    that belongs to another class.
    """
    label = name or f"{cls.__module__}.{cls.__qualname__}"
    if (to_plain is None) != (from_plain is None):
        raise TypeError(f"register({cls.__name__}): give both to_plain and from_plain, or neither.")
    entry: _Registered
    if to_plain is not None and from_plain is not None:
        entry = _Registered(label, cls, to_plain, from_plain)
    elif issubclass(cls, Enum):
        if issubclass(cls, Flag):  # a combination of flags has no name of its own
            entry = _Registered(label, cls, lambda member: member.value, cls)
        else:
            entry = _Registered(label, cls, lambda member: member.name, cls.__members__.__getitem__)
    elif issubclass(cls, BaseModel):
        entry = _Registered(label, cls, _model_to_plain, lambda plain: _model_from_plain(cls, plain))
    elif dataclasses.is_dataclass(cls):
        entry = _Registered(label, cls, _dataclass_to_plain, lambda plain: _dataclass_from_plain(cls, plain))
    else:
        raise TypeError(
            f"register({cls.__name__}): it is no enum, dataclass or pydantic model; give to_plain and from_plain."
        )
    other = _by_name.get(label)
    if (
        other is not None
        and other.cls is not cls
        and (other.cls.__module__, other.cls.__qualname__)
        != (
            cls.__module__,
            cls.__qualname__,
        )
    ):
        raise ValueError(f"register({cls.__name__}): the name {label!r} belongs to {other.cls!r}; give another name.")
    _by_class[cls] = entry
    _by_name[label] = entry
    return cls


@dataclasses.dataclass(frozen=True, slots=True)
class StateRef:
    """Stands for "the value of this stored key": two keys of a state that hold one object hold one after a restore."""

    key: str


def same(one: Any, other: Any) -> bool:
    """Whether two values are stored alike; also right for what is not equal to itself, such as NaN.

    Values with no stored form are compared as Python compares them, and taken as different when that fails.
    """
    if one is other:
        return True
    try:
        return encode(one) == encode(other)
    except UnstorableValue:
        try:
            return bool(one == other)
        except Exception:  # noqa: BLE001 - a class may refuse to be compared in any way it likes
            return False


def encode(value: Any, path: str = "value") -> bytes:
    """The stored bytes of ``value``. Equal values of equal types and order give equal bytes.

    Raises ``UnstorableValue`` naming the path, which starts with ``path``, of the first part with no stored form.
    """
    try:
        try:
            return orjson.dumps(value if type(value) in _SIMPLE else _plain(value, 0, False))
        except (TypeError, ValueError):
            # Integers beyond 64 bits and lone surrogates are too rare to be looked for at once: a second, slower walk.
            return orjson.dumps(_plain(value, 0, True))
    except _Unstorable as error:
        segments = error.segments[::-1]
        if len(segments) > 12:  # a value that contains itself: the first turns say enough
            segments = [*segments[:8], "..."]
        raise UnstorableValue(path + "".join(segments), error.problem) from None
    except (TypeError, ValueError) as error:
        raise UnstorableValue(path, f"cannot be written as JSON: {error}") from None


def decode(data: bytes) -> Any:
    """The value stored as ``data``.

    Raises ``CorruptData`` when the bytes are not what ``encode`` writes, ``UnknownType`` when they name a type that is
    not registered, or whose registered class cannot take what they hold, ``KeyNotFound`` for encrypted ones.
    """
    try:
        plain = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        refuse_sealed(data)
        raise CorruptData(f"Stored bytes are not valid JSON: {error}.") from None
    if _TAG_BYTES not in data:
        return plain
    try:
        return _rebuild(plain)
    except CodecError:
        raise
    except _UNFIT as error:
        raise CorruptData(f"Stored bytes hold a tagged value that cannot be rebuilt: {error!r}.") from error


class _Unstorable(Exception):
    """Carries the path outwards: each level adds its own segment, so the good case costs nothing."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        self.segments: list[str] = []


def _plain(value: Any, depth: int, careful: bool) -> Any:
    """``value`` itself when orjson writes it faithfully, else an equivalent that it does.

    ``careful`` also looks at each integer's size and each text's surrogates.
    """
    kind = type(value)
    if kind in _SIMPLE:
        return _careful_scalar(value) if careful else value
    if kind is float:
        return value if isfinite(value) else {TAG: "float", "v": repr(value)}
    if depth >= MAX_DEPTH:
        raise _Unstorable(f"nested deeper than {MAX_DEPTH} levels (does it contain itself?)")
    if kind is list:
        return _plain_list(value, depth, careful)
    if kind is dict:
        return _plain_dict(value, depth, careful)
    writer = _WRITERS.get(kind)
    if writer is not None:
        return writer(value, depth, careful)
    entry = _by_class.get(kind)
    if entry is not None:
        return {TAG: "obj", "c": entry.name, "v": _plain_object(entry, value, depth, careful)}
    raise _Unstorable(_no_stored_form(kind))


def _plain_object(entry: _Registered, value: Any, depth: int, careful: bool) -> Any:
    try:
        plain = entry.to_plain(value)
    except Exception as error:  # the program's own code, which may raise anything
        raise _Unstorable(f"to_plain of {entry.name} failed: {error!r:.200}") from error
    try:
        return _plain(plain, depth + 1, careful)
    except _Unstorable as error:
        if entry.to_plain is _model_to_plain and error.segments:
            error.segments.pop()  # ".fields" and the like: where the store keeps it, not where the program does
        raise


def _no_stored_form(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if issubclass(kind, (Enum, BaseModel)) or dataclasses.is_dataclass(kind):
        return f"type {name} is not registered; register it with framework.storage.codec.register({kind.__qualname__})"
    for base in (dict, list, str, int, float, tuple, set):
        if issubclass(kind, base):
            return (
                f"type {name} is a subclass of {base.__name__} and would come back as another type; convert it to "
                f"{base.__name__}, or register it with framework.storage.codec.register"
            )
    return (
        f"type {name} has no stored form; register it with framework.storage.codec.register({kind.__qualname__}, "
        "to_plain=..., from_plain=...), or keep it out of the state"
    )


def _careful_scalar(value: Any) -> Any:
    if type(value) is int and not -(2**63) <= value < 2**63:
        return {TAG: "int", "v": hex(value)}
    if type(value) is str and not _is_unicode(value):
        return {TAG: "str", "v": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain(values: Collection[Any]) -> bool:
    """Whether all of these are written by orjson as they are, without a closer look at texts and integers."""
    kinds = set(map(type, values))
    if kinds <= _SIMPLE:
        return True
    if not kinds <= _SCALARS:
        return False
    return all(map(isfinite, values if kinds == _FLOATS_ONLY else [each for each in values if type(each) is float]))


def _plain_list(value: list[Any], depth: int, careful: bool) -> list[Any]:
    if not careful and _is_plain(value):
        return value
    changed: list[Any] | None = None
    for index, item in enumerate(value):
        try:
            plain = _plain(item, depth + 1, careful)
        except _Unstorable as error:
            error.segments.append(f"[{index}]")
            raise
        if plain is not item:
            if changed is None:
                changed = list(value)
            changed[index] = plain
    return value if changed is None else changed


def _plain_dict(value: dict[Any, Any], depth: int, careful: bool) -> dict[str, Any]:
    if not set(map(type, value)) <= _TEXT_ONLY or TAG in value or (careful and not all(map(_is_unicode, value))):
        pairs = []
        for key, item in value.items():
            try:
                pairs.append([_plain(key, depth + 3, careful), _plain(item, depth + 3, careful)])
            except _Unstorable as error:
                error.segments.append(f"[{key!r:.60}]")
                raise
        return {TAG: "dict", "v": pairs}
    if not careful and _is_plain(value.values()):
        return value
    changed: dict[str, Any] | None = None
    for key, item in value.items():
        try:
            plain = _plain(item, depth + 1, careful)
        except _Unstorable as error:
            error.segments.append(f".{key}" if key.isidentifier() else f"[{key!r:.60}]")
            raise
        if plain is not item:
            if changed is None:
                changed = dict(value)
            changed[key] = plain
    return value if changed is None else changed


def _write_tuple(value: tuple[Any, ...], depth: int, careful: bool) -> dict[str, Any]:
    return {TAG: "tuple", "v": _plain_list(list(value), depth + 1, careful)}


def _write_set(value: set[Any] | frozenset[Any], depth: int, careful: bool) -> dict[str, Any]:
    # Sorted by bytes: a set has no order of its own, and equal sets must give equal bytes.
    items = []
    for item in value:
        try:
            items.append(_plain(item, depth + 2, careful))
        except _Unstorable as error:
            error.segments.append(f"{{{item!r:.60}}}")
            raise
    return {TAG: type(value).__name__, "v": sorted(items, key=orjson.dumps)}


def _write_datetime(value: dt.datetime, depth: int, careful: bool) -> dict[str, Any]:
    return _write_zoned("datetime", value)


def _write_time(value: dt.time, depth: int, careful: bool) -> dict[str, Any]:
    return _write_zoned("time", value)


def _write_zoned(tag: str, value: dt.datetime | dt.time) -> dict[str, Any]:
    plain: dict[str, Any] = {TAG: tag, "v": value.replace(tzinfo=None, fold=0).isoformat()}
    if value.fold:
        plain["fold"] = 1
    if value.tzinfo is not None:
        offset = value.utcoffset()
        if offset is not None:
            plain["offset"] = _timedelta_parts(offset)
        if isinstance(value.tzinfo, ZoneInfo) and value.tzinfo.key:
            plain["zone"] = value.tzinfo.key
        elif offset is None:
            raise _Unstorable(f"its time zone {value.tzinfo!r} has neither a fixed offset nor a name")
    return plain


def _timedelta_parts(value: dt.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _write_timedelta(value: dt.timedelta, depth: int, careful: bool) -> dict[str, Any]:
    return {TAG: "timedelta", "v": _timedelta_parts(value)}


def _write_bytes(value: bytes | bytearray, depth: int, careful: bool) -> dict[str, Any]:
    return {TAG: type(value).__name__, "v": base64.b64encode(value).decode("ascii")}


def _write_text(value: Any, depth: int, careful: bool) -> dict[str, Any]:
    return {TAG: type(value).__name__.lower(), "v": str(value)}


def _write_complex(value: complex, depth: int, careful: bool) -> dict[str, Any]:
    return {TAG: "complex", "v": [repr(value.real), repr(value.imag)]}


_WRITERS: dict[type, Callable[[Any, int, bool], Any]] = {
    tuple: _write_tuple,
    set: _write_set,
    frozenset: _write_set,
    dt.datetime: _write_datetime,
    dt.date: lambda value, depth, careful: {TAG: "date", "v": value.isoformat()},
    dt.time: _write_time,
    dt.timedelta: _write_timedelta,
    bytes: _write_bytes,
    bytearray: _write_bytes,
    UUID: _write_text,
    Decimal: _write_text,
    complex: _write_complex,
    StateRef: lambda value, depth, careful: {TAG: "ref", "v": value.key},
}


def _rebuild(plain: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise CorruptData(f"Stored bytes are nested deeper than {MAX_DEPTH} levels, which is never written.")
    if type(plain) is list:
        return [_rebuild(item, depth + 1) if type(item) in (list, dict) else item for item in plain]
    if type(plain) is not dict:
        return plain
    tag = plain.get(TAG)
    if tag is None:
        return {key: _rebuild(item, depth + 1) if type(item) in (list, dict) else item for key, item in plain.items()}
    reader = _READERS.get(tag)
    if reader is None:
        raise CorruptData(f"Stored bytes hold the unknown tag {tag!r}; were they written by a newer version?")
    return reader(plain)


def _read_zoned(plain: dict[str, Any]) -> Any:
    kind: Any = dt.datetime if plain[TAG] == "datetime" else dt.time
    value = kind.fromisoformat(plain["v"]).replace(fold=plain.get("fold", 0))
    offset = plain.get("offset")
    fixed = None if offset is None else dt.timezone(dt.timedelta(*offset))
    if "zone" in plain:
        try:
            return value.replace(tzinfo=ZoneInfo(plain["zone"]))
        except ZoneInfoNotFoundError:
            if fixed is None:  # a time of day, whose offset depends on the day
                raise UnknownType(
                    f"The store holds a time in the zone {plain['zone']!r}, which this machine's time zone data lacks. "
                    "Install the package tzdata; nothing was changed."
                ) from None
            # The same instant with a fixed offset.
            return value.replace(tzinfo=fixed)
    return value if fixed is None else value.replace(tzinfo=fixed)


def _read_object(plain: dict[str, Any]) -> Any:
    entry = _by_name.get(plain["c"])
    if entry is None:
        raise UnknownType(
            f"The store holds a value of type {plain['c']!r}, which this program has not registered. Call "
            "framework.storage.codec.register(...) for it before resuming; nothing was changed."
        )
    stored = _rebuild(plain["v"])
    try:
        return entry.from_plain(stored)
    except CodecError:
        raise
    except Exception as error:  # the program's own code, which may raise anything
        # The bytes were checked before: they are as they were written, so it is the class that does not fit them.
        raise UnknownType(
            f"The stored {entry.name} cannot be rebuilt by the class registered for it: {error!r:.200}. Has the class "
            "changed? Nothing in the store was changed."
        ) from error


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tuple": lambda plain: tuple(_rebuild(plain["v"])),
    "set": lambda plain: set(_rebuild(plain["v"])),
    "frozenset": lambda plain: frozenset(_rebuild(plain["v"])),
    "dict": lambda plain: {_rebuild(key): _rebuild(item) for key, item in plain["v"]},
    "int": lambda plain: int(plain["v"], 16),
    "float": lambda plain: float(plain["v"]),
    "complex": lambda plain: complex(float(plain["v"][0]), float(plain["v"][1])),
    "str": lambda plain: bytes.fromhex(plain["v"]).decode("utf-8", "surrogatepass"),
    "bytes": lambda plain: base64.b64decode(plain["v"], validate=True),
    "bytearray": lambda plain: bytearray(base64.b64decode(plain["v"], validate=True)),
    "datetime": _read_zoned,
    "time": _read_zoned,
    "date": lambda plain: dt.date.fromisoformat(plain["v"]),
    "timedelta": lambda plain: dt.timedelta(*plain["v"]),
    "uuid": lambda plain: UUID(plain["v"]),
    "decimal": lambda plain: Decimal(plain["v"]),
    "obj": _read_object,
    "ref": lambda plain: StateRef(plain["v"]),
}


def _dataclass_to_plain(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)}


def _dataclass_from_plain(cls: type, plain: dict[str, Any]) -> Any:
    value: Any = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in plain:
            item = plain[field.name]
        elif field.default is not dataclasses.MISSING:
            item = field.default
        elif field.default_factory is not dataclasses.MISSING:
            item = field.default_factory()
        else:
            raise UnknownType(
                f"The stored {cls.__qualname__} has no field {field.name!r}, which the class now requires; "
                "give the new field a default."
            )
        object.__setattr__(value, field.name, item)
    return value


def _model_to_plain(value: BaseModel) -> dict[str, Any]:
    plain: dict[str, Any] = {"fields": dict(value.__dict__), "set": sorted(value.model_fields_set)}
    if value.model_extra:
        plain["extra"] = dict(value.model_extra)
    if value.__pydantic_private__:
        plain["private"] = dict(value.__pydantic_private__)
    return plain


def _model_from_plain(cls: type[BaseModel], plain: dict[str, Any]) -> BaseModel:
    fields = dict(plain["fields"])
    for name, info in cls.model_fields.items():
        if name not in fields:
            if info.is_required():
                raise UnknownType(
                    f"The stored {cls.__qualname__} has no field {name!r}, which the class now requires; "
                    "give the new field a default."
                )
            fields[name] = info.get_default(call_default_factory=True)
    value: BaseModel = cls.__new__(cls)
    object.__setattr__(value, "__dict__", fields)
    object.__setattr__(value, "__pydantic_fields_set__", set(plain["set"]))
    allows_extra = cls.model_config.get("extra") == "allow"
    object.__setattr__(value, "__pydantic_extra__", dict(plain.get("extra", {})) if allows_extra else None)
    private = dict(plain["private"]) if "private" in plain else None
    if private is None and cls.__private_attributes__:
        private = {}
    object.__setattr__(value, "__pydantic_private__", private)
    return value
