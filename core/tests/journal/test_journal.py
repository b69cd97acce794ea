"""The journal of a step: what is recorded comes again, what is not is made again, and effects are never guessed at."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from framework.errors import RunError, UnknownEffect, UnstorableValue
from framework.graph import journal_rows, journal_waits
from framework.graph.journal import AttemptJournal, CallSpec, StepJournal, in_thread, request_hash
from framework.graph.suspension import Suspended
from framework.storage import codec
from framework.storage.records import Message
from tests.journal.journal_kit import Crash, Life, Outside, Rows


async def crash(rows: Rows, outside: Outside, work: Any, at: int) -> None:
    """One life that ends in the middle of the ``at``-th call that reaches the outside."""
    outside.crash_at = outside.calls + at
    life = Life(rows, outside)
    with pytest.raises(Crash):
        await life.run(work)
    life.journal.close()
    outside.crash_at = None


async def ten_calls(life: Life) -> list[str]:
    return [await life.call(f"call {number % 7}") for number in range(10)]


@pytest.mark.parametrize("at", range(1, 11))
async def test_each_finished_call_is_made_once_wherever_the_process_ends(at: int) -> None:
    rows, outside = Rows(), Outside()
    await crash(rows, outside, ten_calls, at)
    life = Life(rows, outside)
    answers = await life.run(ten_calls)
    assert outside.calls == 11, "only the call in flight was made twice"
    assert len(set(answers)) == 10
    assert max(len(keys) for what, keys in outside.keys.items()) == (2 if outside.reached["call 0"] > 1 else 1)
    assert life.journal.problems == []


async def test_the_call_in_flight_has_the_same_key_again() -> None:
    rows, outside = Rows(), Outside()

    async def work(life: Life) -> str:
        await life.call("first")
        return await life.call("second")

    await crash(rows, outside, work, 2)
    await Life(rows, outside).run(work)
    assert outside.reached == {"first": 1, "second": 2}
    assert outside.keys["second"] == {f"run/n#1/get#{request_hash('second', '')[:12]}#1"}


async def concurrent(life: Life) -> list[str]:
    """Three rounds; in each, calls in an order of their own, equal ones among them."""

    async def one(what: str) -> str:
        for _ in range(life.order.randrange(4)):  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        return await life.call(what)

    answers = []
    for number in range(3):
        answers += await asyncio.gather(*(one(f"{number}.{each % 4}") for each in range(6)))
        answers.append(await life.call(f"between {number}"))
    return answers


@pytest.mark.parametrize("seed", range(40))
async def test_concurrent_calls_in_any_order_over_several_crashes(seed: int) -> None:
    order = random.Random(seed)
    rows, outside = Rows(), Outside()
    crashes = 0
    while True:
        life = Life(rows, outside)
        life.order = order  # type: ignore[attr-defined]
        outside.crash_at = outside.calls + order.randrange(1, 9)
        before = dict(outside.reached)
        try:
            answers = await life.run(concurrent)
        except Crash:
            crashes += 1
            life.journal.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            assert crashes < 40, before
            continue
        break
    assert life.journal.problems == [], "no life took another way"
    assert len(answers) == 21
    assert len(set(answers)) == 21
    # Two of each round's four are asked twice over; whatever was finished is never asked again.
    wanted = {f"{number}.{each}": 2 if each < 2 else 1 for number in range(3) for each in range(4)}
    wanted |= {f"between {number}": 1 for number in range(3)}
    finished = len(journal_rows.fold(journal_rows.parse(rows.read_journal("n#1").result())).rows)
    assert finished == 21
    assert set(outside.reached) == set(wanted)
    # At most what was in flight at a crash, five others of a gather included, is made again.
    assert sum(outside.reached.values()) <= 21 + 6 * crashes
    for what, keys in outside.keys.items():
        assert len(keys) <= wanted[what], "a call that is made again has the key it had"


async def test_another_way_ends_the_replay_with_a_warning_and_no_wrong_answer() -> None:
    rows, outside = Rows(), Outside()

    async def before(life: Life) -> None:
        await life.call("write 1")
        await life.call("read")
        await life.call("last")

    async def after(life: Life) -> list[str]:
        return [await life.call("write 2"), await life.call("read")]

    await crash(rows, outside, before, 3)
    life = Life(rows, outside)
    assert await life.run(after) == ["write 2 at 4", "read at 5"]
    assert len(life.journal.problems) == 1
    assert "took another way" in life.journal.problems[0]
    assert "'n#1/1'" in life.journal.problems[0]
    # What is recorded now is the new way, from its first call on.
    again = Life(rows, outside)
    assert await again.run(after) == ["write 2 at 4", "read at 5"]
    assert again.journal.problems == []


async def test_a_call_that_raised_raises_again_and_what_followed_is_answered() -> None:
    rows, outside = Rows(), Outside()
    tries: list[str] = []

    async def work(life: Life) -> str:
        async def make(key: str) -> str:
            tries.append(key)
            raise OSError(113, "no route")

        try:
            await life.journal.call("get", request_hash("x", ""), make, CallSpec())
        except OSError as error:
            assert (error.errno, error.strerror) == (113, "no route")
            return f"{await life.call('instead')} {await life.call('last')}"
        raise AssertionError

    await crash(rows, outside, work, 2)
    life = Life(rows, outside)
    assert await life.run(work) == "instead at 1 last at 3"
    assert len(tries) == 1
    assert life.journal.problems == []


@pytest.mark.parametrize("keep", [False, True])
async def test_what_failed_with_its_attempt_is_made_again_by_the_next_one(keep: bool) -> None:
    rows, outside = Rows(), Outside()

    async def work(life: Life) -> str:
        await life.call("look")

        async def make(key: str) -> str:
            outside.answer("flaky", key)
            if outside.reached["flaky"] == 1:
                raise ConnectionError("not today")
            return "there"

        return await life.journal.call("get", request_hash("flaky", ""), make, CallSpec())

    life = Life(rows, outside, keep_on_retry=keep)
    with pytest.raises(ConnectionError):
        await life.run(work)
    await life.journal.failed()
    life.journal = AttemptJournal(life.step)
    assert await life.run(work) == "there"
    assert outside.reached == {"look": 1 if keep else 2, "flaky": 2}
    assert life.journal.problems == []


async def effect(life: Life) -> str:
    await life.call("look")
    sent = await life.call("send", "ask", "mail")
    return f"{sent}, {await life.call('log')}"


async def unknown(policy: Any = "ask") -> tuple[Rows, Outside]:
    """A step that ended while its effect was in flight."""
    rows, outside = Rows(), Outside()

    async def work(life: Life) -> None:
        await life.call("look")
        await life.call("send", policy, "mail")

    await crash(rows, outside, work, 2)
    return rows, outside


def settle(rows: Rows, action: str, value: Any = None) -> None:
    (row,) = [each for each in journal_rows.parse(rows.read_journal("n#1").result()) if each.get("state") == "intent"]
    body = codec.encode({"action": action, "value": value})
    rows.messages.append(Message("run", journal_rows.settle_message("n#1", row), body, 0.0))


async def test_an_effect_is_announced_before_it_is_made_and_asked_about_after_a_crash() -> None:
    rows, outside = await unknown()
    for _ in range(2):
        life = Life(rows, outside)
        with pytest.raises(Suspended) as caught:
            await life.run(effect)
        (waiting,) = caught.value.waits
        assert (waiting.kind, waiting.name, waiting.call) == ("settle", "n#1/2", "n#1/2")
        with pytest.raises(Suspended):
            await life.journal.over()
    assert outside.reached == {"look": 1, "send": 1}


@pytest.mark.parametrize(
    ("action", "value", "sent", "reached"),
    [("done", "sent at noon", "sent at noon", 1), ("redo", None, "send at 3", 2), ("skip", None, "None", 1)],
)
async def test_a_settled_effect_goes_on_once(action: str, value: Any, sent: str, reached: int) -> None:
    rows, outside = await unknown()
    settle(rows, action, value)
    for _ in range(2):
        life = Life(rows, outside)
        assert (await life.run(effect)).startswith(f"{sent}, ")
        assert life.journal.problems == []
    assert outside.reached == {"look": 1, "send": reached, "log": 1}
    assert len(outside.keys["send"]) == 1


async def test_a_redone_effect_that_crashes_again_is_unknown_again() -> None:
    rows, outside = await unknown()
    settle(rows, "redo")
    await crash(rows, outside, effect, 1)
    with pytest.raises(Suspended):
        await Life(rows, outside).run(effect)
    assert outside.reached["send"] == 2
    settle(rows, "done", "twice")
    assert (await Life(rows, outside).run(effect)).startswith("twice, ")


async def test_the_policy_fail_raises_until_somebody_settles_it() -> None:
    rows, outside = await unknown("fail")

    async def work(life: Life) -> str:
        await life.call("look")
        return await life.call("send", "fail", "mail")

    for _ in range(2):
        life = Life(rows, outside)
        with pytest.raises(UnknownEffect, match="n#1/2") as caught:
            await life.run(work)
        assert caught.value.call == "n#1/2"
        await life.journal.failed()
        assert life.step.must_load, "another attempt must not take it for a new call"
    settle(rows, "done", "it was sent")
    assert await Life(rows, outside).run(work) == "it was sent"
    assert outside.reached == {"look": 1, "send": 1}


async def test_the_policy_rerun_makes_an_effect_again_with_its_key() -> None:
    rows, outside = await unknown()

    async def work(life: Life) -> str:
        await life.call("look")
        return await life.call("send", "rerun", "mail")

    assert await Life(rows, outside).run(work) == "send at 3"
    assert len(outside.keys["send"]) == 1


async def test_an_unknown_effect_of_a_left_way_is_still_unknown() -> None:
    """The model says something else the second time, and comes to the same effect by another way."""
    rows, outside = await unknown()

    async def other(life: Life) -> str:
        await life.call("look elsewhere")
        return await life.call("send", "ask", "mail")

    life = Life(rows, outside)
    with pytest.raises(Suspended) as caught:
        await life.run(other)
    assert "n#1/2" in life.journal.problems[0]
    assert caught.value.waits[0].name == "n#1/2"
    settle(rows, "done", "it was sent")
    for _ in range(2):
        assert await Life(rows, outside).run(other) == "it was sent"
    assert outside.reached["send"] == 1
    shown = journal_rows.describe("n#1", journal_rows.parse(rows.read_journal("n#1").result()), running=False)
    assert [(each.name, each.state) for each in shown] == [("get", "done"), ("mail", "done")]


async def test_an_attempt_that_failed_by_itself_starts_with_an_empty_journal_but_for_unknown_effects() -> None:
    rows, outside = Rows(), Outside()

    async def fails(life: Life) -> None:
        await life.call("look")
        raise RuntimeError("no good")

    life = Life(rows, outside)
    with pytest.raises(RuntimeError):
        await life.run(fails)
    await life.journal.failed()
    assert not life.step.must_load
    assert await Life(rows, outside).run(lambda life: life.call("look")) == "look at 2"

    rows, outside = await unknown()
    life = Life(rows, outside)
    with pytest.raises(RuntimeError):
        await life.run(fails)  # before it came to the effect
    await life.journal.failed()
    assert life.step.must_load
    with pytest.raises(Suspended):
        await Life(rows, outside).run(effect)
    assert outside.reached["send"] == 1


async def test_keep_on_retry_answers_the_next_attempt_from_the_journal_and_counts_tokens_once() -> None:
    from framework.graph.spending import NOTHING, Spent

    rows, outside = Rows(), Outside()

    async def model(life: Life) -> str:
        async def make(key: str) -> str:
            return outside.answer("model", key)

        return await life.journal.call("llm", request_hash("q", ""), make, CallSpec(spent=lambda _: Spent(30, 0, 10)))

    life = Life(rows, outside, keep_on_retry=True)
    await life.run(model)
    assert life.journal.of_attempt(NOTHING) == Spent(30, 0, 10)
    await life.journal.failed()
    again = AttemptJournal(life.step)
    life.journal = again
    await life.run(model)
    assert outside.calls == 1
    assert again.of_attempt(Spent(30, 5, 10)) == Spent(0, 5, 0)
    assert again.of_attempt(Spent(40, 5, 12)) == Spent(10, 5, 2)


async def test_calls_of_threads_and_inside_other_calls_are_recorded_too() -> None:
    rows, outside = Rows(), Outside()

    async def work(life: Life) -> list[str]:
        def in_a_thread() -> list[str]:
            def one(what: str) -> str:
                return life.journal.call_blocking(
                    "get", request_hash(what, ""), lambda key: outside.answer(what, key), CallSpec()
                )

            return [one(each) for each in ("t1", "t2", "t1")]

        async def make(key: str) -> list[str]:
            return [*await in_thread(in_a_thread), await life.call("inside")]

        whole = await life.journal.call("outer", request_hash("outer", ""), make, CallSpec())
        return [*whole, await life.call("t1"), *await asyncio.to_thread(in_a_thread)]

    for at in range(1, 9):
        rows, outside = Rows(), Outside()
        await crash(rows, outside, work, at)
        life = Life(rows, outside)
        answers = await life.run(work)
        assert (len(answers), len(set(answers))) == (8, 8)
        assert outside.calls == 9
        assert life.journal.problems == []


async def test_without_a_store_calls_are_only_made() -> None:
    outside = Outside()
    journal = AttemptJournal(StepJournal("n#1", "run/n#1"))
    await journal.begin()

    async def make(key: str) -> str:
        return outside.answer("x", key)

    assert await journal.call("get", "r", make, CallSpec("ask")) == "x at 1"
    await journal_waits.sleep(journal, 0)
    with pytest.raises(RunError, match="checkpoint_manager"):
        await journal_waits.wait_for(journal, "signal")
    with pytest.raises(RunError, match="checkpoint_manager"):
        await journal_waits.ask(journal, "Well?")


async def test_an_answer_that_cannot_be_stored_names_where_it_is() -> None:
    rows, outside = Rows(), Outside()
    life = Life(rows, outside)

    async def make(key: str) -> Any:
        return {"found": [object()]}

    with pytest.raises(UnstorableValue, match=r"the answer of call 'get'.found\[0\]"):
        await life.run(lambda life: life.journal.call("get", "r", make, CallSpec()))


async def test_an_attempt_that_is_over_takes_no_more_calls_and_records_none() -> None:
    rows, outside = Rows(), Outside()
    life = Life(rows, outside)
    go_on = asyncio.Event()

    async def make(key: str) -> str:
        await go_on.wait()
        return "late"

    await life.journal.begin()
    late = asyncio.create_task(life.journal.call("get", "r", make, CallSpec()))
    await asyncio.sleep(0)
    life.journal.close()
    go_on.set()
    assert await late == "late"
    assert rows.rows == {}
    with pytest.raises(RunError, match="is over"):
        await life.call("more")
