"""Checkpoint recovery as a user sees it: the documented example, run ids, session states, and the manager's methods."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock, patch

import pytest

from framework.errors import InvalidId, RunBusy
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.edge import EdgeCondition, EdgeSpec, GraphSpec
from framework.graph.executor import ExecutionResult, GraphExecutor
from framework.graph.goal import Goal
from framework.graph.node import NodeContext, NodeProtocol, NodeResult, NodeSpec, SharedMemory
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState, RunStatus
from framework.storage.backend import FileStorage, Storage
from framework.storage.memory import MemoryStorage
from framework.storage.sqlite import SQLiteStorage

GOAL = Goal(id="goal", name="Report", description="Write a report.")
CORE = Path(__file__).parents[1]


class Service:
    """What the agent's second node depends on: down while ``broken``; ``hold`` makes it wait."""

    def __init__(self) -> None:
        self.broken = False
        self.calls: list[str] = []
        self.began = asyncio.Event()
        self.hold: asyncio.Event | None = None

    def search(self, topic: str) -> list[str]:
        self.calls.append("search")
        return [f"{topic} 1", f"{topic} 2"]

    async def write(self, sources: list[str]) -> str:
        self.calls.append("write")
        self.began.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.broken:
            raise ConnectionError("the service is down")
        return "; ".join(sources)

    def publish(self, report: str) -> str:
        self.calls.append("publish")
        return f"published {report}"


def make_graph() -> GraphSpec:
    def node(node_id: str, source: str, target: str) -> NodeSpec:
        return NodeSpec(
            id=node_id,
            node_type="function",
            input_keys=[source],
            output_keys=[target],
            max_retries=2,
            retry_delay_seconds=0,
        )

    return GraphSpec(
        id="report",
        goal_id="goal",
        entry_node="search",
        terminal_nodes=["publish"],
        nodes=[
            node("search", "topic", "sources"),
            node("write", "sources", "report"),
            node("publish", "report", "url"),
        ],
        edges=[
            EdgeSpec(id="1", source="search", target="write", condition=EdgeCondition.ON_SUCCESS),
            EdgeSpec(id="2", source="write", target="publish", condition=EdgeCondition.ON_SUCCESS),
        ],
    )


def make_executor(service: Service, runtime: Any, manager: CheckpointManager | None) -> GraphExecutor:
    executor = GraphExecutor(runtime=runtime, checkpoint_manager=manager)
    executor.register_function("search", service.search)
    executor.register_function("write", service.write)
    executor.register_function("publish", service.publish)
    return executor


OUTPUT = {
    "topic": "rivers",
    "sources": ["rivers 1", "rivers 2"],
    "report": "rivers 1; rivers 2",
    "url": "published rivers 1; rivers 2",
    "result": "published rivers 1; rivers 2",
}
INPUT = {"topic": "rivers"}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="framework")


@pytest.fixture(params=["file", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    opened: Storage
    opened = FileStorage(tmp_path / "store") if request.param == "file" else SQLiteStorage(tmp_path / "runs.db")
    with opened:
        yield opened


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def execute(storage: Storage, service: Service) -> Callable[..., Any]:
    """The agent, each time by an executor, a manager and a runtime of its own, as in a new process."""

    async def run(input_data: dict[str, Any] | None = INPUT, **arguments: Any) -> ExecutionResult:
        service.calls.clear()
        executor = make_executor(service, Runtime(storage), CheckpointManager(storage))
        return await executor.execute(make_graph(), GOAL, input_data, **arguments)

    return run


# --- the documented example ---------------------------------------------------------------------------------------


async def test_the_documented_example_runs_as_written(storage: Storage, service: Service) -> None:
    runtime, graph, goal, input_data = Runtime(storage), make_graph(), GOAL, dict(INPUT)

    checkpoint_manager = CheckpointManager(storage, CheckpointConfig())
    executor = GraphExecutor(runtime=runtime, checkpoint_manager=checkpoint_manager)
    executor.register_function("search", service.search)
    executor.register_function("write", service.write)
    executor.register_function("publish", service.publish)
    result = await executor.execute(graph, goal, input_data)
    assert result.success
    assert result.output == OUTPUT
    assert result.run_id is not None
    assert result.run_id.startswith("run_")
    assert executor.checkpoint_manager is checkpoint_manager

    result = await executor.execute(graph, goal, input_data, run_id="order-42")
    assert result.success
    assert result.run_id == "order-42"
    again = await executor.execute(graph, goal, input_data, run_id="order-42")
    assert again.output == result.output
    assert service.calls == ["search", "write", "publish"] * 2
    assert {run.run_id for run in storage.list_runs([RunState.COMPLETED])} == {"order-42", again.run_id} | {
        each for each in storage.list_all_runs() if each.startswith("run_")
    }


async def test_the_run_record_tells_of_all_processes(
    execute: Callable[..., Any], service: Service, storage: Storage
) -> None:
    service.broken = True
    await execute(run_id="order-42")
    service.broken = False
    await execute(run_id="order-42")
    run = storage.load_run("order-42")
    assert run is not None
    assert run.status is RunStatus.COMPLETED
    assert [decision.node_id for decision in run.decisions] == ["search", "write", "write", "write", "publish"]
    assert any("failed after 2 attempts" in problem.description for problem in run.problems)


async def test_without_a_manager_nothing_is_written_and_nothing_differs(tmp_path: Path, service: Service) -> None:
    def comparable(result: ExecutionResult) -> dict[str, Any]:
        ours = {"run_id", "checkpoint_id", "resumed_from", "total_latency_ms", "session_state"}
        return {key: value for key, value in dataclasses.asdict(result).items() if key not in ours}

    before = sorted(tmp_path.rglob("*"))  # noqa: ASYNC240
    with MemoryStorage() as memory, SQLiteStorage(tmp_path / "runs.db") as storage:
        storage.close()
        with SQLiteStorage(tmp_path / "runs.db") as opened:
            for broken in (False, True):
                service.broken = broken
                without = await make_executor(service, Runtime(memory), None).execute(make_graph(), GOAL, dict(INPUT))
                disabled = CheckpointManager(opened, CheckpointConfig(enabled=False))
                off = await make_executor(service, Runtime(memory), disabled).execute(make_graph(), GOAL, dict(INPUT))
                assert opened.list_runs() == []
                manager = CheckpointManager(opened)
                with_one = await make_executor(service, Runtime(memory), manager).execute(
                    make_graph(), GOAL, dict(INPUT)
                )
                assert comparable(without) == comparable(with_one) == comparable(off)
                opened.delete_run(with_one.run_id or "")
    assert before == []


async def test_no_file_appears_without_a_manager(tmp_path: Path, service: Service, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with MemoryStorage() as memory:
        assert (await make_executor(service, Runtime(memory), None).execute(make_graph(), GOAL, dict(INPUT))).success
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240


# --- run ids ------------------------------------------------------------------------------------------------------


async def test_an_unknown_id_starts(execute: Callable[..., Any], service: Service) -> None:
    result = await execute(run_id="order-42")
    assert result.success
    assert (result.resumed_from, result.steps_recovered) == (None, 0)
    assert service.calls == ["search", "write", "publish"]


async def test_a_failed_run_goes_on(execute: Callable[..., Any], service: Service, storage: Storage) -> None:
    service.broken = True
    first = await execute(run_id="order-42")
    assert "failed after 2 attempts: the service is down" in first.error
    assert first.path == ["search", "write"]
    assert first.output == {**INPUT, "sources": OUTPUT["sources"], "result": OUTPUT["sources"]}
    run = storage.find_run("order-42")
    assert run is not None
    assert run.state is RunState.FAILED
    assert "the service is down" in (run.error or "")
    service.broken = False
    second = await execute(run_id="order-42")
    assert service.calls == ["write", "publish"]
    assert second.path == ["search", "write", "publish"]
    assert second.output == OUTPUT
    assert second.resumed_from == first.checkpoint_id


async def test_a_completed_run_is_returned_and_nothing_runs(execute: Callable[..., Any], service: Service) -> None:
    first = await execute(run_id="order-42")
    second = await execute(run_id="order-42")
    assert service.calls == []
    same = (
        "success",
        "output",
        "path",
        "steps_executed",
        "total_tokens",
        "total_latency_ms",
        "run_id",
        "checkpoint_id",
    )
    assert [getattr(first, name) for name in same] == [getattr(second, name) for name in same]
    assert second.steps_recovered == 3


async def test_a_cancelled_run_goes_on(execute: Callable[..., Any], service: Service, storage: Storage) -> None:
    service.hold = asyncio.Event()
    task = asyncio.create_task(execute(run_id="order-42"))
    await service.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run = storage.find_run("order-42")
    assert run is not None
    assert run.state is RunState.CANCELLED
    service.hold = None
    assert (await execute(run_id="order-42")).output == OUTPUT
    assert service.calls == ["write", "publish"]


async def test_a_run_that_is_running_is_busy(execute: Callable[..., Any], service: Service) -> None:
    service.hold = asyncio.Event()
    task = asyncio.create_task(execute(run_id="order-42"))
    await service.began.wait()
    with pytest.raises(RunBusy, match="order-42"):
        await execute(run_id="order-42")
    service.hold.set()
    assert (await task).output == OUTPUT


async def test_two_executors_start_one_id_at_once_and_one_wins(execute: Callable[..., Any], service: Service) -> None:
    service.hold = asyncio.Event()
    both = [asyncio.create_task(execute(run_id="order-42")) for _ in range(2)]
    done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    assert [type(task.exception()) for task in done] == [RunBusy]
    service.hold.set()
    results = await asyncio.gather(*both, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["ExecutionResult", "RunBusy"]


@pytest.mark.parametrize("run_id", ["", "x" * 300, "nul\x00", "\ud800"])
async def test_ids_that_cannot_be_are_refused_before_anything_runs(
    execute: Callable[..., Any], service: Service, storage: Storage, run_id: str
) -> None:
    with pytest.raises(InvalidId):
        await execute(run_id=run_id)
    assert service.calls == []
    assert storage.list_runs() == []


@pytest.mark.parametrize("run_id", ["../x", "a/b", "/etc/passwd", "..", ".", "a\\b", "CON", "ä ö", "x" * 255, "%2e%2e"])
async def test_strange_ids_work_and_stay_in_the_store(
    execute: Callable[..., Any], service: Service, storage: Storage, tmp_path: Path, run_id: str
) -> None:
    outside = {path.name for path in tmp_path.iterdir()}  # noqa: ASYNC240
    service.broken = True
    await execute(run_id=run_id)
    service.broken = False
    result = await execute(run_id=run_id)
    assert service.calls == ["write", "publish"]
    assert result.output == OUTPUT
    assert [run.run_id for run in storage.list_runs()] == [run_id]
    inside = {path.name for path in tmp_path.iterdir()}  # noqa: ASYNC240
    assert {name.partition("-")[0] for name in inside} == {name.partition("-")[0] for name in outside}
    assert storage.verify().ok


# --- session states -----------------------------------------------------------------------------------------------


async def test_the_session_state_of_a_failed_result_goes_on(execute: Callable[..., Any], service: Service) -> None:
    service.broken = True
    first = await execute()
    assert first.session_state["recovered_from_failure"] is True
    assert first.session_state["resume_from"] == "write"
    service.broken = False
    second = await execute(session_state=first.session_state)
    assert second.run_id == first.run_id
    assert service.calls == ["write", "publish"]
    assert second.path == ["search", "write", "publish"]


async def test_a_checkpoint_as_session_state_goes_on(
    execute: Callable[..., Any], service: Service, storage: Storage
) -> None:
    service.broken = True
    first = await execute()
    checkpoint = CheckpointManager(storage).get_checkpoint(first.run_id)
    assert checkpoint is not None
    assert (checkpoint.node_id, checkpoint.next_node_id) == ("search", "write")
    service.broken = False
    second = await execute(session_state=checkpoint.to_session_state())
    assert second.run_id == first.run_id
    assert service.calls == ["write", "publish"]


# --- runtimes -----------------------------------------------------------------------------------------------------


class Minimal:
    """The runtime double that offers the least, with only the arguments that the contract names."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def start_run(self, goal_id: str, goal_description: str, input_data: dict[str, Any]) -> str:
        return "run_of_the_double"

    def end_run(self, **given: Any) -> None:
        assert "success" in given

    def report_problem(self, **given: Any) -> str:
        self.problems.append(given["description"])
        return "prob_0"


@pytest.mark.parametrize("run_id", [None, "order-42"])
@pytest.mark.parametrize("make", [lambda: MagicMock(spec=Runtime), MagicMock, Minimal])
async def test_runtime_doubles_work(make: Callable[[], Any], run_id: str | None, service: Service) -> None:
    with MemoryStorage() as storage:
        for manager in (None, CheckpointManager(storage)):
            executor = make_executor(service, make(), manager)
            assert executor.checkpoint_manager is manager
            result = await executor.execute(make_graph(), GOAL, dict(INPUT), run_id=run_id)
            assert result.success, result.error
            assert result.output == OUTPUT
            assert isinstance(result.run_id, str)
            if isinstance(executor.runtime, Minimal) and run_id is None:
                assert result.run_id == "run_of_the_double"


async def test_back_off_goes_through_asyncio_sleep(service: Service) -> None:
    service.broken = True
    graph = make_graph()
    graph.nodes[1].max_retries = 4
    graph.nodes[1].retry_delay_seconds = 100.0
    graph.nodes[1].retry_max_delay_seconds = 300.0
    with MemoryStorage() as storage, patch("asyncio.sleep", AsyncMock()) as sleep:
        executor = make_executor(service, Minimal(), CheckpointManager(storage))
        result = await executor.execute(graph, GOAL, dict(INPUT))
    assert "failed after 4 attempts" in (result.error or "")
    waited = [call.args[0] for call in sleep.await_args_list]
    assert len(waited) == 3
    for seconds, (low, high) in zip(waited, [(50, 100), (100, 200), (150, 300)], strict=True):
        assert low <= seconds <= high


async def test_many_runs_at_once_do_not_mix(storage: Storage) -> None:
    runtime = Runtime(storage)
    manager = CheckpointManager(storage)
    barrier = asyncio.Barrier(20)

    class Meet(NodeProtocol):
        async def execute(self, ctx: NodeContext) -> NodeResult:
            await barrier.wait()
            decision = ctx.runtime.decide(intent=f"of {ctx.run_id}", options=[], chosen="", reasoning="", node_id="a")
            await barrier.wait()
            ctx.runtime.record_outcome(decision, True, summary=ctx.run_id or "")
            return NodeResult(True, {"mine": ctx.input_data["n"]}, tokens_used=1)

    graph = GraphSpec(id="g", goal_id="goal", entry_node="a", nodes=[NodeSpec(id="a", node_type="custom")])
    executor = GraphExecutor(runtime=runtime, checkpoint_manager=manager, node_registry={"a": Meet()})
    async with asyncio.timeout(30):
        results = await asyncio.gather(*(executor.execute(graph, GOAL, {"n": n}, run_id=f"run-{n}") for n in range(20)))
    for n, result in enumerate(results):
        assert (result.run_id, result.output["mine"], result.total_tokens) == (f"run-{n}", n, 1)
        run = storage.load_run(f"run-{n}")
        assert run is not None
        assert [decision.intent for decision in run.decisions] == [f"of run-{n}"]
        assert run.decisions[0].outcome is not None
        assert run.decisions[0].outcome.summary == f"run-{n}"
    assert storage.verify().ok


# --- the manager beside a run ---------------------------------------------------------------------------------------


def memory_of(**values: Any) -> SharedMemory:
    memory = SharedMemory()
    for key, value in values.items():
        memory.write(key, value)
    return memory


async def test_a_manager_does_not_save_into_a_run_that_is_running(
    execute: Callable[..., Any], service: Service, storage: Storage
) -> None:
    service.hold = asyncio.Event()
    task = asyncio.create_task(execute(run_id="order-42"))
    await service.began.wait()
    assert CheckpointManager(storage).save_checkpoint("order-42", "elsewhere", memory_of(a=1)) is None
    service.hold.set()
    assert (await task).output == OUTPUT


async def test_deleted_checkpoints_mean_starting_over(
    execute: Callable[..., Any], service: Service, storage: Storage
) -> None:
    service.broken = True
    await execute(run_id="order-42")
    assert CheckpointManager(storage).delete_checkpoints("order-42") == 1
    service.broken = False
    result = await execute(run_id="order-42")
    assert service.calls == ["search", "write", "publish"]
    assert result.path == ["search", "write", "publish"]
    assert result.output == OUTPUT
