"""The path kept step by step is the one that the log tells."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from framework.graph.run_path import RunPath
from framework.storage.checkpoints import path_of


@st.composite
def logs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Records of nested fan-outs whose branches commit in any order."""
    records: list[dict[str, Any]] = []
    open_branches = [""]
    count = 0
    for _ in range(draw(st.integers(0, 25))):
        branch = draw(st.sampled_from(open_branches))
        record: dict[str, Any] = {"kind": "step", "node": draw(st.sampled_from("abc")), "visit": 1}
        if branch:
            record["branch"] = branch
        children = [f"{branch}/{count + index}" for index in range(draw(st.sampled_from([0, 0, 0, 2])))]
        count += len(children)
        if children:
            record["branches"] = children
            open_branches += children
        records.append(record)
        if draw(st.booleans()):
            records.append({"kind": "attempt", "node": "a"})
    return records


@given(logs(), st.integers(0, 30))
def test_the_path_is_that_of_the_log(records: list[dict[str, Any]], restored: int) -> None:
    path = RunPath(records[:restored])
    for record in records[restored:]:
        if record["kind"] == "step":
            path.add(record)
    assert list(path) == path_of(records)
    steps = [record["node"] for record in records if record["kind"] == "step"]
    assert path.count == len(steps)
    assert path.last == (steps[-1] if steps else None)
