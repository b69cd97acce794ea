"""Which record answers which call, with real tasks and threads: an unchanged step repeats nothing, and no call is ever
told what followed another way; also what calls raised, and where a call is made that is no place of the step's."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

from framework.graph import journal_rows
from framework.graph.journal import Call, CallSpec, request_hash
from framework.graph.journal_rows import Policy
from framework.graph.suspension import Suspended
from tests.journal.journal_kit import Life, Outside, Rows

Work = Callable[[Life], Awaitable[Any]]


async def lives(work: Work, *crash_at: int, patience: float = 30.0) -> tuple[Any, Life, Outside]:
    """Run ``work`` to a crash in the n-th call that reaches the outside, for each n, and then to its end. With much
    patience: what is repeated, or waits in vain, is then a mistake of the journal, not of its clock."""
    rows, outside = Rows(), Outside()
    for at in crash_at:
        await crashed(rows, outside, work, at, patience)
    life = Life(rows, outside, patience_seconds=patience)
    return await life.run(work), life, outside


async def crashed(rows: Rows, outside: Outside, work: Work, at: int, patience: float = 30.0) -> None:
    """One life that ends at the ``at``-th call that reaches the outside, or with its work: all at once, as it does."""
    outside.crash_at = outside.calls + at
    life = Life(rows, outside, patience_seconds=patience)
    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        life.journal.close()
        loop.call_soon_threadsafe(ended.set)

    outside.on_crash = end
    working = asyncio.create_task(life.run(work))
    working.add_done_callback(lambda task: ended.set())
    await ended.wait()
    life.journal.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    outside.crash_at, outside.on_crash = None, lambda: None


def blocking(life: Life, what: str) -> str:
    return life.journal.call_blocking(
        "get", request_hash(what, ""), lambda key: life.outside.answer(what, key), CallSpec()
    )


# --- steps as people write them ---------------------------------------------------------------------------------------


async def background(life: Life) -> list[str]:
    """The step's own calls beside a task that nobody waits for until the end."""

    async def other() -> list[str]:
        return [await life.call(f"other {each}") for each in range(4)]

    task = asyncio.create_task(other())
    own = [await life.call(f"own {each}") for each in range(4)]
    return [*own, *await task]


async def task_group(life: Life) -> list[str]:
    async def one(name: str) -> list[str]:
        return [await life.call(f"{name} {each}") for each in range(2)]

    found: list[str] = []
    for turn in range(2):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(f"{turn} {name}")) for name in "ab"]
        found += [answer for task in tasks for answer in task.result()]
    return found


async def completed(life: Life) -> list[str]:
    """What is stored follows what is done first; a semaphore lets two at a time."""
    room = asyncio.Semaphore(2)

    async def one(number: int) -> str:
        async with room:
            for _ in range(5 - number):
                await asyncio.sleep(0)
            return await life.call(f"page {number}")

    stored = []
    for done in asyncio.as_completed([asyncio.create_task(one(each)) for each in range(4)]):
        page = await done
        stored += [page, await life.call(f"store {page}")]
    return stored


async def workers(life: Life) -> list[str]:
    """Three workers that take from one queue."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    for each in range(8):
        queue.put_nowait(each)
    found: list[str] = []

    async def work() -> None:
        while not queue.empty():
            found.append(await life.call(f"item {queue.get_nowait()}"))

    await asyncio.gather(*(work() for _ in range(3)))
    return found


async def awaited(life: Life) -> list[str]:
    """Each call in a task of its own that is awaited at once, as ``asyncio.wait_for`` makes one."""
    found = [await asyncio.wait_for(life.call(f"step {each}"), 60) for each in range(4)]
    return [*found, *[await asyncio.create_task(life.call("same")) for _ in range(3)], await life.call("last")]


async def in_threads(life: Life) -> list[str]:
    """Threads that begin alike and go on each its own way, with the step's own calls around."""

    def one(name: str) -> list[str]:
        return [blocking(life, "log in") and "", blocking(life, f"{name} 1"), blocking(life, f"{name} 2")]

    first = await life.call("first")
    found = await asyncio.gather(*(asyncio.to_thread(one, name) for name in "abc"))
    return [first, *[answer for each in found for answer in each if answer], await life.call("last")]


async def in_a_pool(life: Life) -> list[str]:
    """Threads that copy no context, so that nothing is known of them."""

    def run() -> list[str]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda each: blocking(life, f"item {each}"), range(5)))

    return [*await asyncio.to_thread(run), await life.call("last")]


async def retried(life: Life) -> list[str]:
    async def one(number: int) -> str:
        for attempt in range(3):
            future = asyncio.ensure_future(life.call(f"try {number} {attempt}"))
            answer = await future
            if attempt == number:
                return answer
        raise AssertionError

    return [*await asyncio.gather(*map(one, range(3))), await life.call("last")]


STEPS = [background, task_group, completed, workers, awaited, retried]
TOTALS = {background: 8, task_group: 8, completed: 8, workers: 8, awaited: 8, retried: 7}


@pytest.mark.parametrize("work", STEPS, ids=lambda work: work.__name__)
async def test_an_unchanged_step_repeats_only_what_was_in_flight(work: Work) -> None:
    total = TOTALS[work]  # type: ignore[index]
    for at in range(1, total + 1):
        answers, life, outside = await lives(work, at)
        in_flight = {what for what, count in outside.reached.items() if count > (3 if what == "same" else 1)}
        assert len(in_flight) <= 3, "more than what was in flight was repeated"
        assert life.journal.problems == []
        assert len(set(answers)) == len(answers)
        keys = {what: len(found) for what, found in outside.keys.items() if what != "same"}
        assert set(keys.values()) == {1}, "a call that is made again has its key"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("work", STEPS, ids=lambda work: work.__name__)
async def test_an_unchanged_step_over_many_crashes(work: Work, seed: int) -> None:
    chance = random.Random(seed)
    crash_at = [chance.randrange(1, 9) for _ in range(chance.randrange(1, 5))]
    rows, outside = Rows(), Outside()
    finished: dict[str, str] = {}
    for at in crash_at:
        await crashed(rows, outside, work, at)
        known = journal_rows.parse(rows.read_journal("n#1").result())
        done = {row["key"]: row["answer"] for row in known if row.get("state") == "done"}
        assert {key: done.get(key) for key in finished} == finished, "a finished call was made again"
        finished = done
    life = Life(rows, outside, patience_seconds=30)
    await life.run(work)
    assert life.journal.problems == []
    known = journal_rows.parse(rows.read_journal("n#1").result())
    done = {row["key"]: row["answer"] for row in known if row.get("state") == "done"}
    assert {key: done[key] for key in finished} == finished, "a finished call was made again"
    assert len(done) == TOTALS[work]  # type: ignore[index]
    assert outside.calls <= TOTALS[work] + 3 * len(crash_at)  # type: ignore[index]


async def test_tasks_go_on_in_the_order_in_which_their_calls_had_ended() -> None:
    """The later task had its answer first, and comes first again although the other one waits already."""
    first = asyncio.Event()

    async def work(life: Life) -> list[str]:
        told: list[str] = []

        async def one(name: str) -> None:
            async def make(key: str) -> str:
                if name == "early":
                    await first.wait()
                first.set()
                return life.outside.answer(name, key)

            told.append(await life.journal.call("get", request_hash(name, ""), make, CallSpec()))

        await asyncio.gather(one("early"), one("late"))
        return [*told, await life.call("last")]

    answers, life, _ = await lives(work, 3)
    assert answers == ["late at 1", "early at 2", "last at 4"]
    assert life.journal.problems == []


@pytest.mark.parametrize("work", [in_threads, in_a_pool], ids=lambda work: work.__name__)
async def test_threads_repeat_only_what_was_in_flight(work: Work) -> None:
    """The process ends while a later call of the step's own is in flight, so all that threads asked has finished."""
    total = 11 if work is in_threads else 6
    answers, life, outside = await lives(work, total)
    assert outside.calls == total + 1
    assert life.journal.problems == []
    assert len(set(answers)) == len(answers)


name_now: ContextVar[str] = ContextVar("name_now")


def in_order(order: str, *, threads: bool) -> Work:
    """Tasks or threads that begin by the same call, in the given order, and go on each its own way."""

    async def work(life: Life) -> list[str]:
        gates = [threading.Event() for _ in order]
        gates[0].set()

        def pass_gate(name: str) -> None:
            if order.index(name) + 1 < len(order):
                gates[order.index(name) + 1].set()

        # The next one begins when this one's first call has come, which is before the journal lets it go on.
        arrived = life.journal._arrived

        def tells(kind: str, name: str, request: str, policy: Policy, key: str | None = None) -> Call:
            call = arrived(kind, name, request, policy, key)
            if call.key.request == request_hash("hello", ""):
                pass_gate(name_now.get())
            return call

        life.journal._arrived = tells  # type: ignore[method-assign]

        def row(name: str) -> list[str]:
            name_now.set(name)
            assert gates[order.index(name)].wait(30)
            return [blocking(life, each) for each in ("hello", f"{name} 1", f"{name} 2")]

        async def task(name: str) -> list[str]:
            name_now.set(name)
            while not gates[order.index(name)].is_set():
                await asyncio.sleep(0)

            async def call(what: str) -> str:
                async def make(key: str) -> str:
                    return life.outside.answer(what, key)

                return await life.journal.call("get", request_hash(what, ""), make, CallSpec())

            return [await call(each) for each in ("hello", f"{name} 1", f"{name} 2")]

        first = await life.call("first")
        names = sorted(order)
        rows = [asyncio.to_thread(row, name) if threads else task(name) for name in names]
        found = await asyncio.gather(*rows)
        return [first, *[answer for each in found for answer in each], await life.call("last")]

    return work


@pytest.mark.parametrize("kind", ["tasks", "threads"])
@pytest.mark.parametrize("orders", ["ab ba", "abc cab bca", "cba abc"], ids=lambda orders: orders.replace(" ", "-"))
async def test_tasks_that_begin_alike_in_another_order_repeat_nothing(orders: str, kind: str) -> None:
    """Each was answered something else. Every process but the last ends in the step's own call after them."""
    threads = kind == "threads"
    rows, outside = Rows(), Outside()
    *before, last = orders.split()
    total = 2 + 3 * len(last)
    for number, order in enumerate(before):
        await crashed(rows, outside, in_order(order, threads=threads), total if number == 0 else 1)
    life = Life(rows, outside, patience_seconds=30)
    answers = await life.run(in_order(last, threads=threads))
    assert outside.calls == total + len(before)
    assert outside.reached["last"] == 1 + len(before)
    assert len(set(answers)) == total
    assert life.journal.problems == []


async def test_a_silent_task_does_not_make_the_others_repeat_anything() -> None:
    """What one task does between its calls takes its time; nothing is made meanwhile that others might depend on."""
    go_on = asyncio.Event()
    order: list[str] = []

    async def work(life: Life) -> None:
        async def slow() -> None:
            await life.call("slow 1")
            await go_on.wait()
            await life.call("slow 2")
            order.append("slow")

        async def quick() -> None:
            await life.call("quick 1")
            if not go_on.is_set():
                await asyncio.sleep(0)
            await life.call("quick 2")
            order.append("quick")

        async with asyncio.TaskGroup() as group:
            group.create_task(slow())
            group.create_task(quick())
            if not order and life.outside.crash_at is not None:
                go_on.set()
            else:
                group.create_task(later())

    async def later() -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        order.append("later")
        go_on.set()

    rows, outside = Rows(), Outside()
    await crashed(rows, outside, work, 4)
    finished = journal_rows.fold(journal_rows.parse(rows.read_journal("n#1").result()))
    done = {each.key.request for each in finished.calls if each.answer is not None}
    go_on.clear()
    order.clear()
    life = Life(rows, outside, patience_seconds=30)
    await life.run(work)
    assert order[0] == "later"
    assert sum(outside.reached.values()) == 4 + 4 - len(done)
    assert life.journal.problems == []


def in_turns(order: list[int], policy: Policy) -> Work:
    """Five tasks that share a semaphore, and come to it in the given order; each changes, or reads, something."""

    async def work(life: Life) -> list[str]:
        semaphore = asyncio.Semaphore(1)
        come = {number: asyncio.Event() for number in order}
        told: list[str] = []

        async def one(number: int) -> None:
            await come[number].wait()
            async with semaphore:
                told.append(await life.call(f"thing {number}", policy, name=f"take {number}"))

        async with asyncio.TaskGroup() as group:
            for number in range(len(order)):
                group.create_task(one(number))
            for number in order:
                come[number].set()
                await asyncio.sleep(0)
        return sorted(told)

    return work


async def test_effects_that_take_turns_in_another_order_do_not_happen_again() -> None:
    """Which task gets a semaphore first may be chance. Recorded calls then wait behind new ones, and these are made."""
    rows, outside = Rows(), Outside()
    await crashed(rows, outside, in_turns([3, 1, 0, 2, 4], "ask"), 3)
    assert outside.reached == {"thing 3": 1, "thing 1": 1, "thing 0": 1}
    life = Life(rows, outside, patience_seconds=0.05)
    with pytest.raises(BaseExceptionGroup) as raised:
        await life.run(in_turns([2, 4, 1, 3, 0], "ask"))
    assert raised.group_contains(Suspended), "the one in flight is unknown, and asked about"
    assert outside.reached == {f"thing {number}": 1 for number in range(5)}
    assert life.journal.problems == []


async def test_reads_that_take_turns_in_another_order_are_made_anew() -> None:
    """What they read may have been changed by what was made before them."""
    rows, outside = Rows(), Outside()
    await crashed(rows, outside, in_turns([3, 1, 0, 2, 4], "rerun"), 3)
    life = Life(rows, outside, patience_seconds=0.05)
    told = await life.run(in_turns([2, 4, 1, 3, 0], "rerun"))
    assert told == ["thing 0 at 8", "thing 1 at 6", "thing 2 at 4", "thing 3 at 7", "thing 4 at 5"]
    assert "took another way" in life.journal.problems[0]


async def test_a_pause_between_calls_longer_than_the_patience_repeats_nothing() -> None:
    """The call that was in flight is made meanwhile; what another task then asks for was finished without it."""

    async def work(life: Life) -> list[str]:
        async def slowly() -> str:
            await life.call("first")
            await asyncio.sleep(0.3)
            return await life.call("second")

        async def late(key: str) -> str:
            while not life.outside.reached["second"]:
                await asyncio.sleep(0)
            return life.outside.answer("in flight", key)

        other = life.journal.call("get", request_hash("in flight", ""), late, CallSpec())
        return list(await asyncio.gather(slowly(), other))

    rows, outside = Rows(), Outside()
    await crashed(rows, outside, work, 3)
    life = Life(rows, outside, patience_seconds=0.05)
    await life.run(work)
    assert outside.reached == {"first": 1, "second": 1, "in flight": 2}
    assert life.journal.problems == []


async def test_a_call_that_was_given_up_in_time_repeats_nothing() -> None:
    async def work(life: Life) -> list[str]:
        async def slow(key: str) -> str:
            life.outside.answer("slow", key)
            await asyncio.sleep(60)
            return "never"

        async def asked() -> str:
            return str(await life.journal.call("get", request_hash("slow", ""), slow, CallSpec()))

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked(), 0.4)
        return [await life.call(each) for each in ("one", "two", "last")]

    rows, outside = Rows(), Outside()
    await crashed(rows, outside, work, 4)
    life = Life(rows, outside, patience_seconds=0.05)
    await life.run(work)
    assert outside.reached == {"slow": 2, "one": 1, "two": 1, "last": 2}


# --- another way ------------------------------------------------------------------------------------------------------


async def _write_and_read(life: Life, way: str, write: str) -> list[str]:
    async def both() -> list[str]:
        return [await life.call(write), await life.call("read")]

    match way:
        case "one task":
            return await asyncio.create_task(both())
        case "two tasks":
            return [await asyncio.create_task(life.call(each)) for each in (write, "read")]
        case "wait_for":
            return [await asyncio.wait_for(life.call(each), 60) for each in (write, "read")]
        case "queue":
            queue: asyncio.Queue[str] = asyncio.Queue()

            async def reads() -> list[str]:
                return [await queue.get(), await life.call("read")]

            reader = asyncio.create_task(reads())
            queue.put_nowait(await life.call(write))
            return await reader
        case "thread":
            return await asyncio.to_thread(lambda: [blocking(life, write), blocking(life, "read")])
        case _:
            with ThreadPoolExecutor(1) as pool:
                run = asyncio.get_running_loop().run_in_executor
                return [await run(pool, blocking, life, each) for each in (write, "read")]


@pytest.mark.parametrize("way", ["one task", "two tasks", "wait_for", "queue", "thread", "pool"])
async def test_a_read_after_a_different_write_is_made_anew(way: str) -> None:
    write = "write 1"

    async def work(life: Life) -> list[str]:
        return [*await _write_and_read(life, way, write), await life.call("last")]

    rows, outside = Rows(), Outside()
    await crashed(rows, outside, work, 3)
    write = "write 2"
    life = Life(rows, outside, patience_seconds=0.05)
    assert (await life.run(work))[:2] == ["write 2 at 4", "read at 5"]
    assert any("took another way" in problem for problem in life.journal.problems)
    # What is recorded now is the new way.
    again = Life(rows, outside, patience_seconds=30)
    assert (await again.run(work))[:2] == ["write 2 at 4", "read at 5"]
    assert again.journal.problems == []


async def test_what_had_ended_before_the_different_call_began_is_used() -> None:
    write = "write 1"

    async def work(life: Life) -> list[str]:
        early = await asyncio.gather(*(life.call(f"early {each}") for each in range(3)))
        return [*early, await life.call(write), await life.call("read"), await life.call("last")]

    rows, outside = Rows(), Outside()
    await crashed(rows, outside, work, 6)
    write = "write 2"
    await Life(rows, outside, patience_seconds=30).run(work)
    assert [outside.reached[f"early {each}"] for each in range(3)] == [1, 1, 1]
    assert (outside.reached["write 2"], outside.reached["read"]) == (1, 2)
