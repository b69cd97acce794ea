"""The short forms of bodies and records: nothing is lost in them, and those of format 1 are still read."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import CorruptData, StoreTooNew
from framework.schemas.checkpoint import FORMAT_VERSION
from framework.storage import checkpoints as stored
from framework.storage.codec import encode
from framework.storage.records import CheckpointRow, LogRow
from framework.storage.short_forms import long_body, long_records, short_body, short_records

names = st.sampled_from(["a", "b", "", "a#1", "f#1/0", "x:y"])
scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(0, 9), names)
plain = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
step_rows = st.tuples(names, st.integers(1, 3), names).map(list)


@st.composite
def positions(draw: st.DrawFn) -> dict[str, Any]:
    """A graph's position, or something much like it."""
    ready = draw(st.lists(step_rows, max_size=3))
    keys = [f"{row[2]}:{row[0]}#{row[1]}" if row[2] else f"{row[0]}#{row[1]}" for row in ready]
    inputs = {}
    for key, row in zip(keys, ready, strict=True):
        if draw(st.booleans()):
            inputs[key] = {
                "branch": draw(st.sampled_from([row[2], "other"])),
                "same": draw(st.lists(names, max_size=2)),
            }
            if draw(st.booleans()):
                inputs[key]["own"] = draw(plain)
    position = {"ready": ready, "steps_taken": draw(st.integers(0, 3)), "inputs": inputs}
    position |= draw(st.dictionaries(st.sampled_from(["held", "branches", "waits"]), plain, max_size=2))
    spoilt = draw(st.sampled_from(["", *position]))
    return {**position, spoilt: draw(plain)} if spoilt else position


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    body: dict[str, Any] = {
        "v": FORMAT_VERSION,
        "executor": draw(st.sampled_from(["graph", "flexible"])),
        "at": draw(st.sampled_from([datetime(2026, 1, 2, 3, 4, 5, 6), datetime(2026, 1, 2, tzinfo=UTC), None])),
        "status": draw(st.sampled_from(["in_progress", "paused", "completed"])),
        "step_number": draw(st.integers(0, 3)),
        "tokens": draw(st.integers(0, 2)),
        "latency_ms": draw(st.integers(0, 2)),
        "digest": "0123456789abcdef",
    }
    for name in ("node", "step", "next"):
        if draw(st.booleans()):
            body[name] = draw(names)
    if draw(st.booleans()):
        body["position"] = draw(positions() | plain)
    return body


def typed(value: Any) -> str:
    """Text in which True and 1, and 1 and 1.0, differ, and in which the order of keys does not count."""
    if isinstance(value, dict):
        return str(sorted((key, typed(item)) for key, item in value.items()))
    return str([typed(item) for item in value]) if isinstance(value, list) else repr(value)


@given(bodies())
def test_a_body_comes_back_as_it_was(body: dict[str, Any]) -> None:
    before = copy.deepcopy(body)
    data = stored.encode_parsed(body)
    assert typed(body) == typed(before), "it is not changed"
    assert typed(stored.parse_body(CheckpointRow(1, "c", data))) == typed(before)
    assert typed(long_body(short_body(body))) == typed(before)


def test_what_a_body_would_repeat_is_left_out() -> None:
    position = {
        "ready": [["work", 21, ""], ["side", 1, "f#1/0"]],
        "steps_taken": 20,
        "inputs": {"work#21": {"branch": "", "same": ["n"]}, "held#1": {"branch": "", "same": [], "own": {"x": 1}}},
        "held": [["held", 1, ""]],
    }
    at = datetime(2026, 11, 23, 22, 53, 59, 133109)
    common: dict[str, Any] = {"executor": "graph", "at": at, "status": "in_progress", "step_number": 20}
    common |= {"tokens": 0, "latency_ms": 0, "digest": "f36f594a9dc13184", "node": "work", "next_id": "work"}
    for is_plain in (True, False):
        body = stored.encode_body(**common, position=position, plain=is_plain)
        assert orjson.loads(body) == {
            "v": 2,
            "at": "2026-11-23T22:53:59.133109",
            "digest": "f36f594a9dc13184",
            "node": "work",
            "ready": [["work", 21, ["n"]], ["side", 1, "f#1/0"]],
            "taken": 20,
            "inputs": {"held#1": {"branch": "", "same": [], "own": {"x": 1}}},
            "rest": {"held": [["held", 1, ""]]},
        }
        assert stored.parse_body(CheckpointRow(1, "c", body))["position"] == position


def test_bodies_of_format_1_are_read_and_written_in_it() -> None:
    old = (
        b'{"v":1,"executor":"graph","at":{"$t":"datetime","v":"2026-11-23T22:53:59.078305"},"status":"in_progress",'
        b'"step_number":1,"tokens":0,"latency_ms":0,"digest":"9b2ed9ab78f45d37","node":"work","next":"work","position":'
        b'{"ready":[["work",2,""]],"steps_taken":1,"inputs":{"work#2":{"branch":"","same":["n","messages"]}}}}'
    )
    body = stored.parse_body(CheckpointRow(1, "c", old))
    assert (body["v"], body["next"], body["position"]["ready"]) == (1, "work", [["work", 2, ""]])
    assert stored.encode_parsed(body) == old
    assert {**stored.parse_body(CheckpointRow(1, "c", stored.encode_parsed({**body, "v": 2}))), "v": 1} == body
    with pytest.raises(StoreTooNew):
        stored.parse_body(CheckpointRow(1, "c", old.replace(b'"v":1,', b'"v":3,')))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"at": "no time"},
        {"at": None, "ready": 1},
        {"at": None, "ready": [["a"]], "taken": 1},
        {"at": None, "ready": []},
    ],
)
def test_a_body_that_was_never_written_is_damaged(broken: dict[str, Any]) -> None:
    with pytest.raises(CorruptData):
        stored.parse_body(CheckpointRow(1, "c", encode({"v": 2, **broken})))


nodes = st.one_of(names, st.integers(1, 2), st.sampled_from(["\x00", "ü", "[", '"']))
records = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["step", "attempt", "end"])},
        optional={"node": nodes, "visit": scalars, "at": scalars, "tokens": scalars, "error": nodes},
    ),
    max_size=3,
)


@given(records)
def test_records_come_back_as_they_were(given_records: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(given_records)
    row = LogRow(7, stored.encode_records(given_records), None)
    assert typed(given_records) == typed(before), "they are not changed"
    assert typed(stored.plain_records(row)) == typed(before)
    assert typed(stored.parse_log([row])) == typed([{**record, "sequence": 7} for record in before])
    assert typed(long_records(encode_free(short_records(given_records)))) == typed(before)


def encode_free(value: Any) -> Any:
    return orjson.loads(orjson.dumps(value))


def test_the_record_of_a_step_is_a_list() -> None:
    step = {"kind": "step", "node": "work", "visit": 20, "at": 1795474439.133}
    assert stored.encode_records([step]) == b'["work",20,1795474439.133]'
    assert stored.encode_records([{**step, "tokens": 5}]) == b'["work",20,1795474439.133,{"tokens":5}]'
    end = {"kind": "end", "state": "completed"}
    assert stored.encode_records([step, end]) == b'[["work",20,1795474439.133],{"kind":"end","state":"completed"}]'
    assert stored.encode_records([end]) == b'[{"kind":"end","state":"completed"}]'
    old = LogRow(1, b'[{"kind":"step","node":"work","visit":20,"at":1795474439.133}]', None)
    assert stored.parse_log([old]) == [{**step, "sequence": 1}]


def test_a_record_of_a_node_whose_name_is_no_text_is_an_object() -> None:
    record = {"kind": "step", "node": "\ud800", "visit": 1, "at": 1.0}
    row = LogRow(1, stored.encode_records([record]), None)
    assert stored.parse_log([row]) == [{**record, "sequence": 1}]
    assert [each["visit"] for each in stored.plain_records(row)] == [1]


@pytest.mark.parametrize("broken", [b"1", b'["a"]', b'["a",1,2,3]', b'["a",1,2,{},4]', b"[[1]]", b"[1]", b'[{},"a"]'])
def test_a_row_that_holds_no_records_is_damaged(broken: bytes) -> None:
    for read in (lambda row: stored.parse_log([row]), stored.plain_records):
        with pytest.raises(CorruptData, match="row 3 does not hold records"):
            read(LogRow(3, broken, None))
