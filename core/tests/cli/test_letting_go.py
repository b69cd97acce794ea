"""A run whose task is cancelled with ``LET_GO`` is left to the next process: no end, no lease, nothing lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from framework.graph.cancelling import LEFT, LET_GO, lets_go
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.executor import GraphExecutor
from framework.graph.flexible_executor import ExecutorConfig, FlexibleGraphExecutor
from framework.graph.run_view import view_run
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.schemas.run import RunState, RunStatus
from framework.storage import codec
from framework.storage.backend import Storage, open_storage
from tests.graph.executor_kit import GOAL
from tests.graph.run_view_kit import letter, spread
from tests.plans.plan_kit import plan, step

RUN_ID = "run-1"
ANSWERED = {"to": "reader", "approved": True, "by": "me"}


def executor_for(storage: Storage, functions: dict[str, Any], **config: Any) -> GraphExecutor:
    manager = CheckpointManager(storage, CheckpointConfig.model_validate({"retention_strategy": "all", **config}))
    executor = GraphExecutor(Runtime(storage), checkpoint_manager=manager)
    for node_id, function in functions.items():
        executor.register_function(node_id, function)
    return executor


async def let_go_inside(work: Any, inside: asyncio.Event) -> None:
    """Run ``work``, and let it go once a step of it waits inside."""
    task = asyncio.create_task(work)
    await inside.wait()
    task.cancel(LET_GO)
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert lets_go(caught.value)


def last_record(storage: Storage, run_id: str = RUN_ID) -> Any:
    return codec.decode(storage.read_log(run_id)[-1].record)[-1]


@pytest.mark.parametrize("config", [{}, {"durability": "exit"}, {"durability": "async"}], ids=str)
@pytest.mark.parametrize("scheme", ["sqlite:///{}/runs.db", "file://{}/runs"])
async def test_the_next_process_goes_on_at_once_and_repeats_nothing(
    tmp_path: Path, config: dict[str, Any], scheme: str
) -> None:
    inside, drafts = asyncio.Event(), list[str]()

    def draft(**_: Any) -> str:
        drafts.append("draft")
        return "Dear reader"

    async def hangs(**_: Any) -> None:
        inside.set()
        await asyncio.Event().wait()

    with open_storage(scheme.format(tmp_path)) as storage:
        executor = executor_for(storage, {"draft": draft, "send": hangs}, **config)
        await let_go_inside(executor.execute(letter(), GOAL, ANSWERED, run_id=RUN_ID), inside)
        record = storage.find_run(RUN_ID)
        assert record is not None
        assert (record.state, record.owner, record.error) == (RunState.CRASHED, None, None)
        assert last_record(storage) == {"kind": LEFT}
        document = storage.load_run(RUN_ID)
        assert document is not None
        assert document.status is RunStatus.RUNNING
        why = [each.why for each in view_run(storage, RUN_ID).resume.again]
        assert len(why) == 1
        assert "its process left the run" in why[0]
        executor = executor_for(storage, {"draft": draft, "send": lambda **_: "sent"}, **config)
        result = await executor.execute(letter(), GOAL, run_id=RUN_ID)
    assert result.output["sent"] == "sent"
    assert drafts == ["draft"]


async def test_a_fan_out_is_let_go_with_its_branches(tmp_path: Path) -> None:
    inside = asyncio.Event()

    async def hangs(**_: Any) -> None:
        inside.set()
        await asyncio.Event().wait()

    functions = {"begin": lambda **_: {}, "a": lambda **_: 1, "b": hangs, "c": hangs, "end": lambda **_: 1}
    with open_storage(f"sqlite:///{tmp_path}/runs.db") as storage:
        executor = executor_for(storage, functions)
        await let_go_inside(executor.execute(spread(), GOAL, run_id=RUN_ID), inside)
        record = storage.find_run(RUN_ID)
        assert record is not None
        assert record.state is RunState.CRASHED
        assert record.owner is None


async def test_a_plan_is_let_go_and_that_is_no_crash(tmp_path: Path) -> None:
    inside, calls = asyncio.Event(), list[str]()

    async def work(name: str, wait: bool = False) -> str:
        calls.append(name)
        if wait and not inside.is_set():
            inside.set()
            await asyncio.Event().wait()
        return name

    def executor(storage: Storage) -> FlexibleGraphExecutor:
        made = FlexibleGraphExecutor(
            Runtime(storage), config=ExecutorConfig(), checkpoint_manager=CheckpointManager(storage)
        )
        made.register_function("work", work)
        return made

    made = plan(step("a", args={"name": "a"}), step("b", "a", args={"name": "b", "wait": True}))
    with open_storage(f"sqlite:///{tmp_path}/runs.db") as storage:
        await let_go_inside(executor(storage).execute_plan(made, GOAL, run_id=RUN_ID), inside)
        record = storage.find_run(RUN_ID)
        assert record is not None
        assert (record.state, record.owner) == (RunState.CRASHED, None)
        result = await executor(storage).execute_plan(None, GOAL, run_id=RUN_ID)
    assert result.status.value == "completed"
    assert calls == ["a", "b", "b"]
    assert result.attempts_interrupted == 0


async def test_any_other_cancellation_ends_the_run_as_cancelled(tmp_path: Path) -> None:
    inside = asyncio.Event()

    async def hangs(**_: Any) -> None:
        inside.set()
        await asyncio.Event().wait()

    with open_storage(f"sqlite:///{tmp_path}/runs.db") as storage:
        executor = executor_for(storage, {"draft": hangs, "send": hangs})
        task = asyncio.create_task(executor.execute(letter(), GOAL, ANSWERED, run_id=RUN_ID))
        await inside.wait()
        task.cancel("another reason")
        with pytest.raises(asyncio.CancelledError):
            await task
        record = storage.find_run(RUN_ID)
        assert record is not None
        assert record.state is RunState.CANCELLED
