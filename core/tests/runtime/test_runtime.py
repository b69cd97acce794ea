"""The runtime: runs, decisions, many runs at once, durable events, and data that cannot be saved."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import MagicMock

import pytest
from pydantic import BaseModel

from framework.errors import CorruptData, InvalidId, StorageError
from framework.runtime import Runtime
from framework.runtime.core import MARK
from framework.schemas.decision import DecisionType
from framework.schemas.run import Run, RunStatus
from framework.storage.backend import FileStorage, Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import NO_TOKEN

Sink = list[dict[str, Any]]

OPTIONS = [{"id": "a", "description": "the one"}, {"id": "b", "description": "the other"}]


class FailingStorage(MemoryStorage):
    """Refuses to save while ``failure`` is set."""

    failure: Exception | None = None

    def save_run(self, run: Run, token: int = NO_TOKEN) -> None:
        if self.failure is not None:
            raise self.failure
        super().save_run(run, token)


@pytest.fixture
def storage() -> Iterator[FailingStorage]:
    with FailingStorage() as opened:
        yield opened


@pytest.fixture
def runtime(storage: Storage) -> Runtime:
    return Runtime(storage)


def current(runtime: Runtime) -> Run:
    run = runtime.current_run
    assert run is not None
    return run


def saved(runtime: Runtime, run_id: str) -> Run:
    run = runtime.storage.load_run(run_id)
    assert run is not None
    return run


def in_thread(function: Any) -> Any:
    """Call ``function`` in a thread with an empty context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def decided_in(sink: Sink) -> list[str]:
    """The nodes of the decisions in ``sink``."""
    return [event["decision"]["node_id"] for event in sink if event["kind"] == "decision"]


@pytest.mark.parametrize("form", [str, Path])
def test_a_path_gives_a_file_storage(tmp_path: Path, form: type) -> None:
    runtime = Runtime(form(tmp_path / "store"))
    assert isinstance(runtime.storage, FileStorage)
    run_id = runtime.start_run("goal")
    runtime.end_run(True)
    assert saved(Runtime(tmp_path / "store"), run_id).status is RunStatus.COMPLETED


def test_the_life_of_a_run(runtime: Runtime) -> None:
    run_id = runtime.start_run(goal_id="goal", goal_description="Do it.", input_data={"x": 1})
    assert re.fullmatch(r"run_\d{8}_\d{6}_[0-9a-f]{8}", run_id)
    assert current(runtime).id == run_id
    assert saved(runtime, run_id).status is RunStatus.RUNNING, "an unfinished run can be found"

    runtime.end_run(success=True, output_data={"y": 2})
    run = saved(runtime, run_id)
    assert (run.status, run.goal_description) == (RunStatus.COMPLETED, "Do it.")
    assert (run.input_data, run.output_data) == ({"x": 1}, {"y": 2})
    assert "completed successfully" in run.narrative


@pytest.mark.parametrize(
    ("success", "status", "expected"),
    [(True, None, "completed"), (False, None, "failed"), (False, RunStatus.CANCELLED, "cancelled")],
)
def test_how_a_run_ends(runtime: Runtime, success: bool, status: RunStatus | None, expected: str) -> None:
    run_id = runtime.start_run("goal")
    runtime.end_run(success, "As it was.", status=status)
    assert (saved(runtime, run_id).status.value, saved(runtime, run_id).narrative) == (expected, "As it was.")


def test_without_a_run_nothing_is_recorded(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    assert runtime.decide("i", OPTIONS, "a", "r") == runtime.quick_decision("i", "act", "r") == ""
    assert runtime.report_problem("critical", "d") == ""
    runtime.record_outcome("dec_0", success=True)
    runtime.set_node("n")
    assert runtime.decide_and_execute("i", OPTIONS, "a", "r", lambda: 5) == ("", 5)
    assert not caplog.records
    runtime.end_run(success=True)
    runtime.end_run(success=True, run_id="run_x")
    runtime.abandon_run()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert runtime.storage.list_all_runs() == []


def test_decisions(runtime: Runtime) -> None:
    runtime.start_run("goal")
    assert runtime.decide("first", OPTIONS, "a", "because") == "dec_0"
    runtime.set_node("n1")
    given = {"id": "x", "action_type": "llm", "action_params": {"k": 1}, "confidence": 0.9, "extra": "kept"}
    more: dict[str, Any] = {"constraints": ["c"], "context": {"seen": 2}}
    assert runtime.decide("2nd", [given], "x", "why", decision_type=DecisionType.TOOL_SELECTION, **more) == "dec_1"
    assert runtime.decide("third", OPTIONS, "b", "r", node_id="n2") == "dec_2"

    one, two, three = current(runtime).decisions
    assert (one.node_id, two.node_id, three.node_id) == ("unknown", "n1", "n2")
    assert (one.options[0].action_type, one.options[0].confidence) == ("unknown", 0.5)
    assert one.chosen_option is not None
    assert one.chosen_option.description == "the one"
    assert two.options[0].model_dump() == {**given, "description": "", "pros": [], "cons": []}
    assert (two.decision_type, two.active_constraints) == (DecisionType.TOOL_SELECTION, ["c"])
    assert two.input_context == {"seen": 2}

    runtime.end_run(True)
    runtime.start_run("goal")
    with pytest.raises(ValueError, match="Option 1 has no 'id'"):
        runtime.decide("i", [{"id": "a"}, {"description": "nameless"}], "a", "r")
    assert runtime.decide("i", OPTIONS, "a", "r") == "dec_0"
    assert current(runtime).decisions[0].node_id == "unknown", "the node does not outlive its run"


def test_quick_decisions_and_problems(runtime: Runtime) -> None:
    runtime.start_run("goal")
    assert runtime.quick_decision("greet", "say hello", "politeness", node_id="n") == "dec_0"
    decision = current(runtime).decisions[0]
    assert [option.id for option in decision.options] == ["action"]
    assert (decision.chosen_option_id, decision.node_id, decision.reasoning) == ("action", "n", "politeness")

    assert runtime.report_problem("warning", "slow") == "prob_0"
    assert runtime.report_problem("critical", "full", "dec_0", root_cause="disk", suggested_fix="clean") == "prob_1"
    problem = current(runtime).problems[1]
    assert (problem.decision_id, problem.root_cause, problem.suggested_fix) == ("dec_0", "disk", "clean")


def test_outcomes(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    runtime.start_run("goal")
    decision_id = runtime.decide("i", OPTIONS, "a", "r")
    more: dict[str, Any] = {"result": {"v": 1}, "summary": "s", "state_changes": {"k": 2}, "tokens_used": 3}
    runtime.record_outcome(decision_id, success=True, latency_ms=4, **more)
    outcome = current(runtime).decisions[0].outcome
    assert outcome is not None
    assert outcome.model_dump(exclude={"timestamp"}) == {"success": True, "error": None, "latency_ms": 4, **more}
    assert current(runtime).metrics.total_tokens == 3
    runtime.record_outcome("dec_9", success=False)
    assert "no decision 'dec_9'" in caplog.text
    assert current(runtime).metrics.failed_decisions == 0


def test_decide_and_execute(runtime: Runtime) -> None:
    runtime.start_run("goal")
    assert runtime.decide_and_execute("i", OPTIONS, "a", "r", lambda: {"v": 1}, node_id="n") == ("dec_0", {"v": 1})

    def fail() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError):
        runtime.decide_and_execute("i", OPTIONS, "a", "r", fail)
    good, bad = (decision.model_dump() for decision in current(runtime).decisions)
    assert (good["outcome"]["success"], good["outcome"]["result"], good["node_id"]) == (True, {"v": 1}, "n")
    assert (bad["outcome"]["success"], bad["outcome"]["error"]) == (False, "KeyError: 'gone'")


def test_a_mock_of_the_class_has_what_executors_use() -> None:
    mock = MagicMock(spec=Runtime)
    mock.start_run.return_value = "run_1"
    assert mock.start_run(goal_id="g") == "run_1"
    assert mock.storage is not None


def test_concurrent_runs_do_not_mix(runtime: Runtime) -> None:
    async def execute(name: str, turn: asyncio.Barrier) -> str:
        run_id = runtime.start_run(f"goal_{name}", run_id=f"run_{name}")
        await turn.wait()
        runtime.set_node(name)
        await turn.wait()
        for number in range(3):
            decision_id = runtime.decide(f"{name} {number}", OPTIONS, "a", "r")
            assert decision_id == f"dec_{number}"
            await turn.wait()
            await asyncio.to_thread(runtime.record_outcome, decision_id, True, result=name)
        runtime.report_problem("warning", name)
        await turn.wait()
        assert current(runtime).id == run_id
        runtime.end_run(True, output_data={"name": name})
        await turn.wait()
        assert runtime.current_run is None
        assert runtime.report_problem("warning", "too late") == ""
        return run_id

    async def main() -> list[str]:
        turn = asyncio.Barrier(3)
        return await asyncio.gather(*(execute(name, turn) for name in "abc"))

    for run_id, name in zip(asyncio.run(main()), "abc", strict=True):
        run = saved(runtime, run_id)
        assert [decision.intent for decision in run.decisions] == [f"{name} {number}" for number in range(3)]
        assert {decision.node_id for decision in run.decisions} == {name}
        assert [decision.outcome and decision.outcome.result for decision in run.decisions] == [name] * 3
        assert ([problem.description for problem in run.problems], run.output_data) == ([name], {"name": name})


def test_a_nested_run_gives_the_current_run_back(runtime: Runtime) -> None:
    outer = runtime.start_run("outer")
    runtime.set_node("outer_node")
    inner = runtime.start_run("inner")
    assert current(runtime).id == inner
    runtime.quick_decision("i", "act", "r")
    runtime.set_node("inner_node")
    runtime.end_run(True)
    assert current(runtime).id == outer
    runtime.quick_decision("o", "act", "r")
    assert [(known.id, known.node_id) for known in current(runtime).decisions] == [("dec_0", "outer_node")]
    assert saved(runtime, inner).decisions[0].node_id == "unknown"
    runtime.end_run(False)
    assert runtime.current_run is None


def test_an_outer_run_may_be_ended_by_id_first(runtime: Runtime) -> None:
    outer = runtime.start_run("outer")
    inner = runtime.start_run("inner")
    runtime.end_run(True, run_id=outer)
    assert current(runtime).id == inner
    assert saved(runtime, outer).status is RunStatus.COMPLETED
    runtime.end_run(True)
    assert runtime.current_run is None


def test_a_plain_thread_sees_the_only_run(runtime: Runtime) -> None:
    first = runtime.start_run("goal")
    runtime.set_node("n")
    assert in_thread(lambda: current(runtime).id) == first
    assert in_thread(lambda: runtime.quick_decision("i", "act", "r")) == "dec_0"
    assert current(runtime).decisions[0].node_id == "n"
    runtime.start_run("goal")
    assert in_thread(lambda: runtime.current_run) is None, "with two runs nothing says which"


def test_a_task_of_an_ended_run_does_not_report_to_another(runtime: Runtime) -> None:
    async def main() -> None:
        async def leftover() -> str:
            return runtime.report_problem("warning", "late")

        runtime.start_run("first")
        late = asyncio.create_task(leftover())  # it begins at the next await
        runtime.end_run(True)
        second = runtime.start_run("second")
        assert await late == ""
        assert current(runtime).id == second
        assert not current(runtime).problems
        runtime.end_run(True)

    asyncio.run(main())


def test_two_runtimes_in_one_context_do_not_mix(runtime: Runtime) -> None:
    with MemoryStorage() as store:
        other = Runtime(store)
        first, second = runtime.start_run("goal"), other.start_run("goal")
        assert (current(runtime).id, current(other).id) == (first, second)
        runtime.set_node("n")
        other.quick_decision("i", "act", "r")
        assert current(other).decisions[0].node_id == "unknown"
        runtime.end_run(True)
        assert (runtime.current_run, current(other).id) == (None, second)
        other.end_run(True)


def test_a_run_that_never_ended_goes_with_its_runtime(storage: Storage) -> None:
    runtime = Runtime(storage)
    runtime.start_run("goal")
    forgotten = weakref.ref(current(runtime))
    del runtime
    Runtime(storage).start_run("goal")
    gc.collect()
    assert forgotten() is None


def test_threads_may_decide_at_once(runtime: Runtime) -> None:
    run_id = runtime.start_run("goal")

    def work() -> None:
        for _ in range(50):
            runtime.record_outcome(runtime.decide("i", OPTIONS, "a", "r"), success=True, tokens_used=1)
            runtime.report_problem("warning", "w")

    with ThreadPoolExecutor(4) as pool:
        for task in [pool.submit(work) for _ in range(4)]:
            task.result()
    runtime.end_run(True)
    run = saved(runtime, run_id)
    assert [decision.id for decision in run.decisions] == [f"dec_{number}" for number in range(200)]
    assert [problem.id for problem in run.problems] == [f"prob_{number}" for number in range(200)]
    assert (run.metrics.successful_decisions, run.metrics.total_tokens) == (200, 200)


def test_an_earlier_start_of_the_same_run_is_ignored(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        started, taken_over = asyncio.Event(), asyncio.Event()

        async def stale() -> None:
            runtime.start_run("goal", run_id="run_1")
            started.set()
            await taken_over.wait()
            assert runtime.decide("stale", OPTIONS, "a", "r") == ""
            runtime.end_run(False, run_id="run_1")
            runtime.end_run(False)

        async def owner() -> None:
            runtime.start_run("goal", run_id="run_1")
            taken_over.set()
            await task
            runtime.decide("fresh", OPTIONS, "a", "r")
            runtime.end_run(True)

        task = asyncio.create_task(stale())
        await started.wait()
        await owner()

    asyncio.run(main())
    run = saved(runtime, "run_1")
    assert (run.status, [decision.intent for decision in run.decisions]) == (RunStatus.COMPLETED, ["fresh"])
    assert "started again" in caplog.text


def test_an_abandoned_run_is_not_saved(runtime: Runtime) -> None:
    outer = runtime.start_run("outer")
    run_id = runtime.start_run("goal")
    runtime.quick_decision("i", "act", "r")
    runtime.abandon_run(run_id)
    assert current(runtime).id == outer
    assert saved(runtime, run_id).decisions == []


def work_in(runtime: Runtime, node: str) -> None:
    runtime.set_node(node)
    decision_id = runtime.decide(f"in {node}", OPTIONS, "a", "r", context={"when": datetime(2026, 1, 2, tzinfo=UTC)})
    runtime.record_outcome(decision_id, success=node != "b", result={"node": node}, tokens_used=7, latency_ms=3)
    runtime.report_problem("warning", f"from {node}")


def test_what_was_recorded_replays_to_the_same_record(runtime: Runtime) -> None:
    sink = Sink()
    run_id = runtime.start_run("goal", "Do it.", {"x": 1})
    with runtime.recording(sink):
        work_in(runtime, "a")
        work_in(runtime, "b")
    before = current(runtime)
    runtime.abandon_run()
    assert [event["kind"] for event in sink] == ["decision", "outcome", "problem"] * 2

    events = json.loads(json.dumps(sink, allow_nan=False))
    again = Runtime(runtime.storage)
    assert again.start_run("goal", "Do it.", {"x": 1}, run_id=run_id, earlier=events) == run_id
    after = current(again)
    assert after.model_dump_json() == before.model_dump_json()
    assert saved(again, run_id) == after, "the resumed run is durable with what came before"

    work_in(again, "c")
    assert [decision.id for decision in after.decisions] == ["dec_0", "dec_1", "dec_2"]
    assert [problem.id for problem in after.problems] == ["prob_0", "prob_1", "prob_2"]
    assert (after.metrics.total_decisions, after.metrics.total_tokens) == (3, 21)


def test_ids_continue_after_gaps(runtime: Runtime) -> None:
    sink = Sink()
    run_id = runtime.start_run("goal")
    with runtime.recording([]):
        work_in(runtime, "lost in the crash")
    with runtime.recording(sink):
        work_in(runtime, "a")
    runtime.abandon_run()
    runtime.start_run("goal", run_id=run_id, earlier=sink)
    work_in(runtime, "b")
    assert [decision.id for decision in current(runtime).decisions] == ["dec_1", "dec_2"]
    assert [problem.id for problem in current(runtime).problems] == ["prob_1", "prob_2"]
    run = current(runtime)
    assert run.started_at == run.decisions[0].timestamp, "the start was told in an event that is lost"


def test_a_fork_starts_when_it_starts(runtime: Runtime) -> None:
    sink = Sink()
    runtime.start_run("goal", run_id="parent")
    started = current(runtime).started_at
    with runtime.recording(sink):
        work_in(runtime, "a")
    runtime.end_run(True)
    runtime.start_run("goal", run_id="fork", earlier=sink)
    forked = current(runtime).started_at
    assert forked > started
    with runtime.recording(sink):
        work_in(runtime, "b")
    runtime.end_run(True)
    runtime.start_run("goal", run_id="fork", earlier=sink)
    assert (current(runtime).started_at, len(current(runtime).problems)) == (forked, 2)


def test_a_resumed_run_keeps_its_start_and_input(runtime: Runtime) -> None:
    runtime.start_run("goal", "Do it.", {"x": 1}, run_id="order-42")
    started = current(runtime).started_at
    runtime.end_run(False)
    runtime.start_run("goal", run_id="order-42")
    run = current(runtime)
    assert (run.started_at, run.goal_description, run.input_data) == (started, "Do it.", {"x": 1})
    assert (run.status, run.completed_at, run.narrative) == (RunStatus.RUNNING, None, "")
    runtime.end_run(True)
    runtime.start_run("goal", "Other.", {"x": 2}, run_id="order-42")
    assert (current(runtime).goal_description, current(runtime).input_data) == ("Other.", {"x": 2})


def test_events_that_cannot_be_replayed_become_a_problem(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    runtime.start_run("goal", run_id="run_1", earlier=[{"kind": "song"}, {"kind": "problem", "problem": 3}])
    assert [problem.severity for problem in current(runtime).problems] == ["warning"]
    assert "unknown kind 'song'" in current(runtime).problems[0].description
    assert "cannot be replayed" in caplog.text


@pytest.mark.parametrize("run_id", ["", "x\x00", "x" * 256])
def test_a_run_id_that_no_store_accepts_is_refused(runtime: Runtime, run_id: str) -> None:
    for earlier in ([], [{"kind": "problem"}]):
        with pytest.raises(InvalidId):
            runtime.start_run("goal", run_id=run_id, earlier=earlier)
    assert runtime.current_run is None


def test_an_unreadable_document_does_not_stop_a_run(
    runtime: Runtime, storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "load_run", MagicMock(side_effect=CorruptData("run_1 is damaged")))
        runtime.start_run("goal", run_id="run_1")
    runtime.end_run(True)
    assert "run_1 is damaged" in caplog.text
    assert saved(runtime, "run_1").status is RunStatus.COMPLETED


def test_nothing_is_recorded_outside_the_block(runtime: Runtime) -> None:
    sink = Sink()
    runtime.start_run("goal")
    work_in(runtime, "a")

    def fail() -> None:
        with runtime.recording(sink):
            work_in(runtime, "b")
            raise KeyError("gone")

    with pytest.raises(KeyError):
        fail()
    work_in(runtime, "c")
    assert decided_in(sink) == ["b"]


def test_branches_have_their_own_node_and_sink(runtime: Runtime) -> None:
    async def branch(name: str, turn: asyncio.Barrier) -> Sink:
        sink = Sink()
        with runtime.recording(sink):
            runtime.set_node(name)
            await turn.wait()
            await asyncio.to_thread(runtime.quick_decision, name, "act", "r")
            await turn.wait()
        return sink

    async def main() -> None:
        runtime.start_run("goal")
        runtime.set_node("before")
        turn, around = asyncio.Barrier(2), Sink()
        with runtime.recording(around):
            sinks = await asyncio.gather(branch("left", turn), branch("right", turn))
            runtime.quick_decision("after", "act", "r")
        assert [decided_in(sink) for sink in sinks] == [["left"], ["right"]]
        assert decided_in(around) == ["before"], "the innermost sink gets the event, once"

    asyncio.run(main())


def test_a_nested_run_is_not_recorded_with_the_outer_one(runtime: Runtime) -> None:
    outer, inner = Sink(), Sink()
    runtime.start_run("outer")
    with runtime.recording(outer):
        runtime.start_run("inner")
        work_in(runtime, "not recorded")
        with runtime.recording(inner):
            work_in(runtime, "inner")
            runtime.end_run(True)
            work_in(runtime, "outer")
    assert decided_in(outer) == ["outer"]
    assert decided_in(inner) == ["inner"]


def test_a_block_entered_without_a_run_records_the_run_that_follows(runtime: Runtime) -> None:
    sink = Sink()
    with MemoryStorage() as store, runtime.recording(sink):
        other = Runtime(store)
        other.start_run("goal")
        other.quick_decision("i", "act", "r")
        runtime.start_run("goal")
        runtime.quick_decision("i", "act", "r")
    assert len(sink) == 1


def test_a_plain_thread_is_recorded_when_one_step_is(runtime: Runtime) -> None:
    sink = Sink()
    runtime.start_run("goal")
    with runtime.recording(sink):
        in_thread(lambda: work_in(runtime, "thread"))
        assert len(sink) == 3
        with runtime.recording([]):
            in_thread(lambda: work_in(runtime, "thread"))
    assert len(sink) == 3, "with two steps recorded nothing says which"


def test_a_late_task_does_not_reach_a_closed_sink(runtime: Runtime) -> None:
    async def main() -> None:
        sink = Sink()

        async def leftover() -> None:
            work_in(runtime, "late")

        runtime.start_run("goal")
        with runtime.recording(sink):
            late = asyncio.create_task(leftover())  # it begins at the next await
        await late
        assert sink == []
        assert len(current(runtime).decisions) == 1

    asyncio.run(main())


class Colour(Enum):
    RED = "red"


class Model(BaseModel):
    handle: Any
    size: int = 3


@dataclass
class Point:
    x: int
    y: object


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


OPAQUE = {MARK: f"{Opaque.__module__}.Opaque", "repr": "<opaque>"}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, 2.5, None, True), [1, 2.5, None, True]),
        ({1: "a", None: "b", Colour.RED: "c"}, {"1": "a", "None": "b", "red": "c"}),
        (Colour.RED, "red"),
        ({"only"}, ["only"]),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (timedelta(seconds=90), 90.0),
        (Decimal("1.50"), "1.50"),
        (PurePosixPath("a/b"), "a/b"),
        (Model(handle=[Opaque()]), {"handle": [OPAQUE], "size": 3}),
        (Point(1, Opaque()), {"x": 1, "y": OPAQUE}),
        ("a\ud800", "a\\ud800"),
        (float("nan"), {MARK: "builtins.float", "repr": "nan"}),
        (2**64, {MARK: "builtins.int", "repr": str(2**64)}),
        (b"x", {MARK: "builtins.bytes", "repr": "b'x'"}),
        (Opaque, {MARK: "builtins.type", "repr": repr(Opaque)}),
        (Broken(), {MARK: f"{Broken.__module__}.Broken", "repr": "<Broken whose repr() fails>"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_recorded_as_json(runtime: Runtime, value: Any, plain: Any) -> None:
    sink = Sink()
    run_id = runtime.start_run("goal", input_data={"v": value})
    with runtime.recording(sink):
        option = {"id": "a", "action_params": {"v": value}}
        decision_id = runtime.decide("i", [option], "a", "r", context={"v": value})
        runtime.record_outcome(decision_id, success=True, result=[value], state_changes={"v": value})
    runtime.end_run(True, output_data={"v": value})

    json.dumps(sink, allow_nan=False).encode()
    assert sink[0]["decision"]["input_context"] == sink[0]["decision"]["options"][0]["action_params"] == {"v": plain}
    assert (sink[1]["outcome"]["result"], sink[1]["outcome"]["state_changes"]) == ([plain], {"v": plain})
    run = saved(runtime, run_id)
    assert run.input_data == run.output_data == {"v": plain}
    assert (run.decisions[0].input_context, run.status) == ({"v": plain}, RunStatus.COMPLETED)


def test_values_are_copied_and_iterators_not_consumed(runtime: Runtime) -> None:
    numbers, messages = iter([1, 2]), ["hello"]
    runtime.start_run("goal", input_data={"numbers": numbers})
    runtime.decide("i", OPTIONS, "a", "r", context={"messages": messages})
    messages.append("later")
    assert current(runtime).decisions[0].input_context == {"messages": ["hello"]}
    assert current(runtime).input_data["numbers"][MARK] == "builtins.list_iterator"
    assert list(numbers) == [1, 2]


def test_cycles_and_depths_end(runtime: Runtime) -> None:
    cycle: list[Any] = []
    cycle += [cycle, cycle]
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    run_id = runtime.start_run("goal", input_data={"cycle": cycle, "deep": deep})
    assert saved(runtime, run_id).input_data["cycle"] == [{MARK: "builtins.list", "repr": "[[...], [...]]"}] * 2


def test_lost_values_are_reported(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    run_id = runtime.start_run("goal", input_data={"fine": 1, "handles": [0, Opaque()]})
    runtime.end_run(True, output_data={str(number): Opaque() for number in range(7)})
    first, second = saved(runtime, run_id).problems
    assert (first.severity, second.severity) == ("warning", "warning")
    assert first.description.endswith("by their repr only: input_data.handles[1]")
    assert second.description.endswith("output_data.4 and 2 more")
    assert "input_data.handles[1]" in caplog.text


def test_texts_may_be_anything(runtime: Runtime) -> None:
    runtime.start_run("goal", "goal \ud800")
    runtime.decide("intent \ud800", OPTIONS, "a", "r\ud800")
    runtime.record_outcome("dec_0", success=False, error="name \udcff", summary="s\ud800")
    runtime.report_problem("warning", ValueError("given as it was raised"))  # type: ignore[arg-type]
    run = current(runtime)
    runtime.end_run(False, "narrative \ud800")
    assert saved(runtime, run.id) == run
    assert run.problems[0].description == "given as it was raised"


@pytest.mark.parametrize("failure", [StorageError("disk full"), OSError("disk full"), RuntimeError("disk full")])
def test_a_failure_to_save_breaks_nothing_and_is_told(
    runtime: Runtime, storage: FailingStorage, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    storage.failure = failure
    run_id = runtime.start_run("goal")
    assert "disk full" in current(runtime).problems[0].description
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    storage.failure = None
    runtime.end_run(True)
    assert [problem.severity for problem in saved(runtime, run_id).problems] == ["warning"]

    run_id = runtime.start_run("goal")
    run = current(runtime)
    storage.failure = failure
    runtime.end_run(True)
    assert "disk full" in run.problems[0].description
    assert (run.status, runtime.current_run) == (RunStatus.COMPLETED, None)
    assert saved(runtime, run_id).status is RunStatus.RUNNING


def test_what_was_put_on_the_run_directly_is_saved_degraded(runtime: Runtime) -> None:
    run_id = runtime.start_run("goal")
    current(runtime).input_data |= {"handle": Opaque(), "text": "\ud800"}
    runtime.quick_decision("i", "act", "r")
    runtime.end_run(True)
    run = saved(runtime, run_id)
    assert run.input_data == {"handle": OPAQUE, "text": "\\ud800"}
    assert (run.status, len(run.decisions)) == (RunStatus.COMPLETED, 1)
    assert "run.input_data.handle" in run.problems[0].description
