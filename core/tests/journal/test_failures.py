"""What calls raised comes again; what an exception leaves unknown; and rows that cannot be trusted."""

from __future__ import annotations

from typing import Any

import pytest

from framework.errors import CallFailed, LLMRateLimited, LLMTimeout, RunError
from framework.graph import journal_rows, journal_waits
from framework.graph.journal import AttemptJournal, CallSpec, request_hash
from framework.graph.journal_failures import error_of, plain_error
from framework.graph.suspension import Suspended
from framework.storage import codec
from framework.storage.records import Message
from tests.journal.journal_kit import Crash, Life, Outside, Rows


def raising(outside: Outside, error: Exception, times: int = 99) -> Any:
    """An effect that reaches the outside and raises, the first times."""

    async def work(life: Life) -> Any:
        async def make(key: str) -> str:
            answer = outside.answer("send", key)
            if outside.reached["send"] <= times:
                raise error
            return answer

        return await life.journal.call("mail", request_hash("send", ""), make, CallSpec("ask"))

    return work


async def next_attempt(life: Life) -> None:
    """The attempt failed by itself; the step is tried once more."""
    await life.journal.failed()
    life.journal = AttemptJournal(life.step)


async def test_an_effect_whose_caller_saw_it_fail_is_known_and_tried_again_by_a_retry() -> None:
    rows, outside = Rows(), Outside()
    work = raising(outside, RuntimeError("refused"), 1)
    for _ in range(2):
        life = Life(rows, outside)
        with pytest.raises(RuntimeError, match="refused"):
            await life.run(work)
    assert outside.calls == 1, "it is known that it failed, so it is neither made again nor asked about"
    await next_attempt(life)
    assert await life.run(work) == "send at 2"


UNCERTAIN = [TimeoutError("no answer"), ConnectionResetError("gone"), LLMTimeout("late"), EOFError("cut off")]


@pytest.mark.parametrize("error", UNCERTAIN, ids=lambda error: type(error).__name__)
async def test_an_effect_that_may_have_happened_all_the_same_is_unknown(error: Exception) -> None:
    rows, outside = Rows(), Outside()
    work = raising(outside, error)
    life = Life(rows, outside)
    with pytest.raises(type(error)):
        await life.run(work)
    await next_attempt(life)
    with pytest.raises(Suspended):
        await life.run(work)
    with pytest.raises(Suspended):
        await Life(rows, outside).run(work)
    assert outside.calls == 1


async def test_an_effect_that_was_refused_a_connection_did_not_happen() -> None:
    outside = Outside()
    work = raising(outside, ConnectionRefusedError(111, "Connection refused"), 1)
    life = Life(Rows(), outside)
    with pytest.raises(ConnectionRefusedError):
        await life.run(work)
    await next_attempt(life)
    assert await life.run(work) == "send at 2"


class OwnError(Exception):
    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"code {code} at {where}")
        self.code = code


ERRORS = [
    OwnError(7, "the gate"),
    LLMRateLimited("slow down", status=429, retry_after=2.5),
    KeyError("x"),
    FileNotFoundError(2, "No such file", "a.txt"),
    CallFailed("a.B", "c"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_exception_comes_again_as_what_it_was(error: Exception) -> None:
    again = error_of(codec.decode(codec.encode(plain_error(error))))
    assert isinstance(again, type(error))
    assert {name: getattr(again, name) for name in vars(error)} == vars(error)
    assert isinstance(again, CallFailed) == isinstance(error, OwnError | CallFailed)
    if not isinstance(error, FileNotFoundError):
        assert str(again) == str(error)


def test_an_exception_of_a_class_that_is_not_there_any_more_says_which_it_was() -> None:
    again = error_of({"type": "Gone", "module": "no.such.module", "text": "it broke", "args": ["it broke"]})
    assert type(again) is CallFailed
    assert (again.type, str(again)) == ("no.such.module.Gone", "it broke")


@pytest.mark.parametrize("wait", ["ask", "wait_for", "sleep"])
@pytest.mark.parametrize("policy", ["ask", "fail"])
async def test_an_effect_cannot_wait_inside(wait: str, policy: Any) -> None:
    rows, outside = Rows(), Outside()

    async def work(life: Life) -> Any:
        async def make(key: str) -> Any:
            what: Any = 100.0 if wait == "sleep" else "x"
            return await getattr(journal_waits, wait)(life.journal, what)

        return await life.journal.call("pay", request_hash("x", ""), make, CallSpec(policy))

    life = Life(rows, outside)
    with pytest.raises(RunError, match=f"inside call 'pay', whose policy is '{policy}'.*Wait before or after"):
        await life.run(work)
    await life.journal.failed()
    assert not life.step.must_load, "nothing of it is unknown"


async def effect(life: Life) -> str:
    return f"{await life.call('look')}, {await life.call('send', 'ask', 'mail')}, {await life.call('log')}"


async def in_flight(**options: Any) -> tuple[Rows, Outside]:
    """A step that ended while its effect was in flight."""
    rows, outside = Rows(), Outside()
    outside.crash_at = 2
    with pytest.raises(Crash):
        await Life(rows, outside, **options).run(effect)
    outside.crash_at = None
    return rows, outside


async def test_a_damaged_row_may_be_of_an_effect_so_somebody_is_asked() -> None:
    rows, outside = await in_flight()
    rows.rows[2] = b""
    for _ in range(2):
        with pytest.raises(Suspended) as caught:
            await Life(rows, outside).run(effect)
        assert caught.value.waits[0].kind == "settle"
    (intent,) = [
        each
        for each in journal_rows.parse(rows.read_journal("n#1").result(), lenient=True)
        if journal_rows.is_lost_effect(each)
    ]
    said = codec.encode({"action": "done", "value": "sent"})
    rows.messages.append(Message("run", journal_rows.settle_message("n#1", intent), said, 0.0))
    for _ in range(2):
        assert (await Life(rows, outside).run(effect)).startswith("look at 1, sent, ")
    assert outside.reached == {"look": 1, "send": 1, "log": 1}


def test_equal_requests_have_one_hash_in_whatever_order_their_dicts_were_filled() -> None:
    one = {"a": {"x": 1, "y": [{"p": 1, "q": 2}]}, 1: "one", (2, 3): "two"}
    other = {(2, 3): "two", 1: "one", "a": {"y": [{"q": 2, "p": 1}], "x": 1}}
    assert one == other
    assert request_hash(one, "") == request_hash(other, "")
    assert request_hash([1, 2], "") != request_hash([2, 1], "")


async def test_what_was_recorded_for_something_else_that_the_step_was_given_is_not_used() -> None:
    rows, outside = await in_flight(unsure=True, given=lambda: "before")
    with pytest.raises(Suspended):
        await Life(rows, outside, given=lambda: "before").run(effect)
    assert outside.reached == {"look": 1, "send": 1}, "given the same, what is recorded is used"
    life = Life(rows, outside, given=lambda: "after")
    with pytest.raises(Suspended):
        await life.run(effect)
    assert outside.reached == {"look": 2, "send": 1}, "and an unknown effect stays unknown"
    assert "an earlier step" in life.journal.problems[0]


async def test_tokens_of_a_failed_attempt_count_until_a_record_says_that_it_counts_them() -> None:
    from framework.graph.spending import Spent

    rows, outside = Rows(), Outside()

    async def model(life: Life) -> str:
        async def make(key: str) -> str:
            return outside.answer("model", key)

        return await life.journal.call("llm", request_hash("q", ""), make, CallSpec(spent=lambda _: Spent(30)))

    life = Life(rows, outside)
    await life.run(model)
    await life.journal.failed()
    # The process ends here, before the attempt's record is committed.
    again = Life(rows, outside)
    await again.journal.begin()
    assert again.step.spent == Spent(30)
    counted = Life(rows, outside, counted=life.step.counted)
    await counted.journal.begin()
    assert counted.step.spent == Spent()
