"""Values survive storing with their types, or are refused by name; no bytes whatever can do harm."""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import math
import string
import zoneinfo
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, PrivateAttr

from framework.errors import CodecError, CorruptData, KeyNotFound, UnknownType, UnstorableValue
from framework.storage import codec
from framework.storage.sealed import is_sealed

QUICK = settings(max_examples=80, deadline=None, database=None)
MANY = settings(max_examples=5_000, deadline=None, database=None)


# --- classes that programs register ---------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "r"
    CRIMSON = "r"  # an alias
    BLUE = ("b", 1)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2
    RUN = 4


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0


@dataclass
class Tree:
    name: str
    children: list[Tree] = field(default_factory=list)
    secret: int = field(default=0, compare=True, init=False, repr=False)


@dataclass(slots=True)
class Slotted:
    value: Any


class Author(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    tags: set[str] = set()
    born: dt.date | None = None
    _seen: int = PrivateAttr(default=0)


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return hash(self.cents)


class Unregistered(BaseModel):
    x: int = 1


class Sub(str):  # noqa: SLOT000
    pass


Pair = namedtuple("Pair", "a b")

for _cls in (Color, Level, Rights, Point, Tree, Slotted, Author):
    codec.register(_cls)
codec.register(Money, name="money", to_plain=lambda money: money.cents, from_plain=Money)


# --- every type ---------------------------------------------------------------------------------------------------

ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"]

text = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["$t", "", "\x00", '"\\'])
any_text = st.text(max_size=8)  # lone surrogates too
fixed_zone = st.builds(dt.timezone, st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)))
zone: st.SearchStrategy[Any] = st.none() | fixed_zone | st.sampled_from([zoneinfo.ZoneInfo(name) for name in ZONES])
datetimes = st.datetimes(dt.datetime(1950, 1, 1), dt.datetime(2200, 1, 1), timezones=zone, allow_imaginary=False)

hashable_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**66), 2**66),
    st.floats(allow_nan=False),
    text,
    any_text,
    st.binary(max_size=6),
    datetimes,
    st.dates(),
    st.times(timezones=st.none() | fixed_zone),
    st.timedeltas(),
    st.uuids(allow_nil=True),
    st.decimals(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.sampled_from([*Color, *Level, Rights.READ, Rights.READ | Rights.RUN, Rights(0)]),
    st.builds(Point, st.integers(), st.floats(allow_nan=False)),
    st.builds(Money, st.integers()),
)
hashables = st.recursive(
    hashable_scalars,
    lambda inner: st.tuples(inner, inner) | st.tuples() | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
scalars = hashable_scalars | st.builds(bytearray, st.binary(max_size=6))


def author(name: str, tags: set[str], extra: Any, seen: int) -> Author:
    made = Author(name=name, tags=tags, extra=extra)
    made._seen = seen
    return made


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(st.integers(-5, 5), max_size=4),
        st.lists(st.floats(allow_nan=False), max_size=4),
        st.tuples(inner),
        st.tuples(inner, inner),
        st.dictionaries(text, inner, max_size=4),
        st.dictionaries(any_text, st.integers(), max_size=3),
        st.dictionaries(hashables, inner, max_size=3),
        st.sets(hashables, max_size=3),
        st.builds(Tree, text, st.lists(st.builds(Tree, text), max_size=2)),
        st.builds(Slotted, inner),
        st.builds(author, text, st.sets(text, max_size=2), inner, st.integers()),
    )


values = st.recursive(scalars, containers, max_leaves=12)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset):
        # 1, 1.0 and True are equal: which of them it is must survive too.
        return a == b and {(type(item), item) for item in a} == {(type(item), item) for item in b}
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and a == b
    if isinstance(a, dt.datetime | dt.time):
        return bool(a == b) and a.fold == b.fold and str(a.tzinfo) == str(b.tzinfo)
    if isinstance(a, BaseModel):
        return same(a.__dict__, b.__dict__) and a == b and a.model_fields_set == b.model_fields_set
    if isinstance(a, Tree | Slotted):
        return all(same(getattr(a, name), getattr(b, name)) for name in type(a).__dataclass_fields__)
    return bool(a == b)


def check_round_trip(value: Any) -> None:
    data = codec.encode(value)
    back = codec.decode(data)
    assert same(back, value), (back, value)
    assert codec.encode(back) == data
    assert orjson.dumps(orjson.loads(data)) == data, "file storage shows values as JSON"


@QUICK
@given(values)
def test_round_trip(value: Any) -> None:
    check_round_trip(value)


@pytest.mark.slow
@MANY
@given(values)
def test_round_trip_of_many(value: Any) -> None:
    check_round_trip(value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        1e16,
        5e-324,
        float("inf"),
        2**63,
        2**64,
        -(2**63) - 1,
        [2**63, 2**64],
        {2**64, 1},
        {"\ud800", "a"},
        {"\ud800": ["\udfff"]},
        {1: "a", "1": "b", 1.5: "c", None: "d", (1, 2): "e"},
        {"$t": "tuple", "v": [1]},
        {"$t": {"$t": 1}},
        [True, 1, 1.0, None],
        {frozenset({1}), frozenset()},
        (((),),),
        dt.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
        dt.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        dt.time(1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        dt.time(1, 2, fold=1),
        dt.datetime.min,
        dt.datetime.max.replace(tzinfo=dt.UTC),
        dt.timedelta.min,
        Decimal("1.10"),
        Decimal("-0"),
        Decimal("Infinity"),
        UUID(int=0),
        complex(-0.0, float("inf")),
        bytearray(b"\x00"),
        Color.CRIMSON,
        Rights.READ | Rights.WRITE,
        Author(name="a"),
        Author.model_construct(name="unchecked", tags={"x"}, _fields_set={"name"}),
        Tree("a", [Tree("b")]),
        {"deep": [[[[[({1: 2},)]]]]]},
    ],
    ids=lambda value: f"{type(value).__name__} of {len(value)}" if isinstance(value, set) else repr(value),
)
def test_particular_values(value: Any) -> None:
    check_round_trip(value)


def test_nan_comes_back_as_nan() -> None:
    back = codec.decode(codec.encode({"x": [float("nan"), 1.0], "d": Decimal("NaN")}))
    assert math.isnan(back["x"][0])
    assert back["x"][1] == 1.0
    assert back["d"].is_nan()
    assert b"null" not in codec.encode(float("nan"))


def test_private_attributes_and_unset_fields_survive() -> None:
    made = author("a", {"x"}, (1, 2), 7)
    made.born = dt.date(1970, 1, 1)
    back = codec.decode(codec.encode(made))
    assert (back, back._seen, back.extra) == (made, 7, (1, 2))
    assert back.model_fields_set == made.model_fields_set
    tree = Tree("a")
    tree.secret = 5
    assert codec.decode(codec.encode(tree)).secret == 5


def test_rebuilding_runs_no_validation_and_no_init() -> None:
    unchecked = Author.model_construct(name=3)  # type: ignore[arg-type]
    assert codec.decode(codec.encode(unchecked)).name == 3


def test_equal_sets_give_equal_bytes() -> None:
    names = list(string.ascii_letters)
    other = {"a set", "that was", "larger once"}
    other.update(reversed(names))
    other -= {"a set", "that was", "larger once"}
    assert codec.encode(set(names)) == codec.encode(other)


@given(st.lists(st.integers(), max_size=4), st.lists(st.integers(), min_size=1, max_size=3))
@QUICK
def test_a_list_that_grew_starts_with_the_same_bytes(old: list[int], tail: list[int]) -> None:
    assert codec.encode([*old, *tail]).startswith(codec.encode(old)[:-1])


# --- what is refused ------------------------------------------------------------------------------------------------


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def containing_itself() -> list[Any]:
    value: list[Any] = [1]
    value.append({"again": value})
    return value


@pytest.mark.parametrize(
    ("value", "path", "problem"),
    [
        (object(), "state", "object has no stored form"),
        ({"report": {"sections": [1, {"author": Unregistered()}]}}, "state.report.sections[1].author", "register"),
        ([1, 2, lambda: 0], "state[2]", "function"),
        (({"a b": {1, Sub("x")}},), "state[0]['a b']{'x'}", "subclass of str"),
        ({(1, 2): [object()]}, "state[(1, 2)][0]", "object"),
        ({object(): 1}, "state[<object object", "object"),
        (Pair(1, 2), "state", "subclass of tuple"),
        (OrderedDict(a=1), "state", "subclass of dict"),
        (True.__class__, "state", "type"),
        (Slotted([object()]), "state.value[0]", "object"),
        (Author(name="x", other=[object()]), "state.other[0]", "object"),
        (Tree("a", [Tree("b", [object()])]), "state.children[0].children[0]", "object"),  # type: ignore[list-item]
        (deep(300), "state[0][0][0]", "deeper than 240"),
        (containing_itself(), "state[1].again[1].again", "contain itself"),
    ],
    # The values' own texts hold addresses, which differ between the processes that share the tests.
    ids=lambda value: value[:30] if isinstance(value, str) else "value",
)
def test_refused_values_are_named(value: Any, path: str, problem: str) -> None:
    with pytest.raises(UnstorableValue) as caught:
        codec.encode(value, "state")
    assert caught.value.path.startswith(path)
    assert problem in caught.value.problem
    assert str(caught.value).startswith(path)
    assert isinstance(caught.value, CodecError)


def test_a_failing_to_plain_is_named() -> None:
    class Broken:
        pass

    def fail(value: Broken) -> Any:
        raise RuntimeError("no luck")

    codec.register(Broken, to_plain=fail, from_plain=lambda plain: Broken())
    with pytest.raises(UnstorableValue, match=r"state\[0\]: .*no luck"):
        codec.encode([Broken()], "state")


def test_the_depth_that_is_allowed_is_stored() -> None:
    value = deep(codec.MAX_DEPTH - 1)
    assert codec.decode(codec.encode(value)) == value
    assert codec.decode(codec.encode([value[0], (dt.timedelta(1),)])) == [value[0], (dt.timedelta(1),)]


# --- registering ----------------------------------------------------------------------------------------------------


def test_only_registered_types_are_rebuilt() -> None:
    with pytest.raises(UnknownType, match=r"'os\.system'"):
        codec.decode(b'{"$t":"obj","c":"os.system","v":"true"}')


def test_register_refuses_what_it_cannot_store() -> None:
    class Plain:
        pass

    with pytest.raises(TypeError, match="to_plain"):
        codec.register(Plain)
    with pytest.raises(TypeError, match="both"):
        codec.register(Plain, to_plain=str)
    with pytest.raises(ValueError, match="belongs to"):
        codec.register(Plain, name="money", to_plain=str, from_plain=lambda plain: Plain())


def test_register_serves_as_a_decorator_and_may_be_repeated() -> None:
    def define() -> type:
        @codec.register
        @dataclass
        class Again:
            x: int

        return Again

    first, second = define(), define()
    assert type(codec.decode(codec.encode(first(1)))) is second


def test_a_class_that_gained_a_field_takes_its_default() -> None:
    name = "tests.grown"

    @dataclass
    class Old:
        x: int

    codec.register(Old, name=name)
    data = codec.encode(Old(1))

    def renamed(cls: type) -> type:
        cls.__module__, cls.__qualname__ = Old.__module__, Old.__qualname__
        return codec.register(cls, name=name)

    @renamed
    @dataclass
    class WithDefault:
        x: int
        y: list[int] = field(default_factory=lambda: [7])

    assert codec.decode(data) == WithDefault(1, [7])

    @renamed
    @dataclass
    class Without:
        x: int
        z: int

    with pytest.raises(UnknownType, match="'z'"):
        codec.decode(data)


def test_a_class_that_no_longer_fits_is_not_damage() -> None:
    with pytest.raises(UnknownType, match="changed"):
        codec.decode(b'{"$t":"obj","c":"%s.Color","v":"GREEN"}' % __name__.encode())


# --- bytes that nobody wrote ----------------------------------------------------------------------------------------

TAGS = [
    "tuple", "set", "frozenset", "dict", "int", "float", "complex", "str", "bytes", "bytearray", "datetime", "time",
    "date", "timedelta", "uuid", "decimal", "obj", "unknown",
]  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | text
    | st.sampled_from(["money", f"{__name__}.Color", f"{__name__}.Point", f"{__name__}.Author", "Europe", "..", "NaN"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["$t", "v", "c", "offset", "zone", "fold", "x"]), inner, max_size=4)
    | st.builds(lambda tag, value, more: {**more, "$t": tag, "v": value}, st.sampled_from(TAGS), inner,
                st.dictionaries(st.sampled_from(["c", "offset", "zone", "fold"]), inner, max_size=2)),
    max_leaves=10,
)  # fmt: skip


def check_hostile(data: bytes) -> None:
    encrypted = (KeyNotFound,) if is_sealed(data) else ()
    with contextlib.suppress(CorruptData, UnknownType, *encrypted):  # the only ones that are allowed
        codec.decode(data)


@QUICK
@given(json_values.map(orjson.dumps) | st.binary(max_size=40))
@example(b"\xf9")
def test_hostile_bytes_raise_only_what_is_promised(data: bytes) -> None:
    check_hostile(data)


@pytest.mark.slow
@MANY
@given(json_values.map(orjson.dumps) | st.binary(max_size=40))
def test_many_hostile_bytes(data: bytes) -> None:
    check_hostile(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nul",
        b"[1,",
        b"\xff",
        b'{"$t":[]}',
        b'{"$t":"tuple"}',
        b'{"$t":"set","v":[[]]}',
        b'{"$t":"bytes","v":"$"}',
        b'{"$t":"datetime","v":"2026-01-01","zone":"../../etc/passwd"}',
        b'{"$t":"datetime","v":"2026-01-01","zone":"/etc/passwd"}',
        b'{"$t":"timedelta","v":[1e308]}',
        b'{"$t":"int","v":"0x"}',
        b'{"$t":"decimal","v":"x"}',
        b'{"$t":"time","v":"25:00","offset":[9,9,9]}',
        b"[" * 900 + b'{"$t":"tuple","v":[]}' + b"]" * 900,
        b"[" * 5_000 + b'"$t"' + b"]" * 5_000,
    ],
    ids=lambda data: repr(data[:40]),
)
def test_damaged_bytes_are_reported(data: bytes) -> None:
    with pytest.raises(CorruptData):
        codec.decode(data)


def test_a_time_in_an_unknown_zone_is_refused() -> None:
    with pytest.raises(UnknownType, match="tzdata"):
        codec.decode(b'{"$t":"time","v":"00:00:00","zone":"Mars/Olympus"}')


def test_an_unknown_zone_keeps_the_instant() -> None:
    data = b'{"$t":"datetime","v":"2026-01-01T00:00:00","offset":[0,3600,0],"zone":"Mars/Olympus"}'
    assert codec.decode(data) == dt.datetime(2025, 12, 31, 23, tzinfo=dt.UTC)
