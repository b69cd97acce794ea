"""SIGSTOP past the lease, another takes the run over, SIGCONT: whatever the first still writes must be refused.

Every worker passes for one of a machine of its own, so that only the lease tells whether it lives.
"""

from __future__ import annotations

import signal
import time
from typing import Any

from framework.storage.postgres_database import IDLE_TRANSACTION_SECONDS
from tests.faults.bench import Case, Lab, at_point, die, now, stop
from tests.faults.ledger import tenures
from tests.faults.processes import Worker
from tests.faults.work import CALL_INSIDE, NODE_INSIDE, WORKS

LEASE_SECONDS = 0.25
POLL_SECONDS = 0.02
OUTSIDE = ("node.before", "node.after", "routing", "commit.before", "commit.after", NODE_INSIDE, CALL_INSIDE)
"""Where a worker that is stopped holds no lock of the store."""

INSIDE = ("commit.inside", "retention")
"""Where it is in the middle of a write: whoever wants to write waits for it."""

HELD_UP_SECONDS = 1.5
RUNS_A_STORE = 20
SLACK_SECONDS = 2.0
"""What a busy machine may add to the time of a failover before it counts as a violation."""


def stop_owners(lab: Lab, backend: str, size: int) -> None:
    """``size`` times."""
    url = ""
    for number in range(size):
        if number % RUNS_A_STORE == 0:
            if url:
                lab.drop_store(url)
            url = lab.new_store(backend)
        case = Case(lab, url, lab.rng.choice(WORKS), f"run-{number}", lease=LEASE_SECONDS)
        _stop_one(case, inside=lab.rng.random() < 0.15)
    lab.drop_store(url)


def _stop_one(case: Case, inside: bool) -> None:
    lab, rng = case.lab, case.lab.rng
    point, number = rng.choice(INSIDE if inside else OUTSIDE), rng.randint(1, 8)
    case.story.append(f"stopped at {point}:{number}")
    zombie = case.start(elsewhere=True, fault=at_point(point, number, stop))
    if not zombie.wait_stopped():
        lab.notes["ended before its stop"] += 1
        case.take(zombie.result())
        case.finish()
        return
    stopped = now()
    if inside:
        _held_up(case, zombie, case.start(elsewhere=True))
        return
    how = rng.choice(("finishes", "is stopped too", "is killed"))
    case.story.append(f"the next one {how}")
    fault = None
    if how != "finishes":
        fault = at_point(rng.choice(OUTSIDE), rng.randint(1, 4), stop if how == "is stopped too" else die)
    taker, held_up, transaction = _taker(case, fault, zombie)
    if held_up:
        return
    if taker is None:  # it was stopped when all was done: there is nothing to take over
        zombie.signal(signal.SIGCONT)
        case.take(zombie.result())
        case.finish()
        return
    _failed_over(case, stopped, transaction)
    if how == "is stopped too" and taker.wait_stopped():
        zombie.signal(signal.SIGCONT)  # the run is in the middle of its second owner's work
        if zombie.wait(HELD_UP_SECONDS):
            case.check()
        else:
            lab.notes["stopped inside a write"] += 1  # now the second one holds up everybody
        taker.signal(signal.SIGCONT)
        _refused(case, zombie)
        case.take(taker.result())
    else:
        taken = taker.result()
        if taken is not None:
            case.take(taken)
        else:
            lab.kills += 1
            case.check()
            case.take(_until_free(case))
        zombie.signal(signal.SIGCONT)
        _refused(case, zombie)
    case.finish()


def _taker(case: Case, fault: Any, zombie: Worker) -> tuple[Worker | None, bool, bool]:
    """A worker that has claimed the run; those before it found it busy. None when the run is completed.

    And whether the stopped worker held everybody up: it may be that another thread of it was just writing. Locks of
    files are then not free before it goes on or dies, which is how far a store in files can go. A server ends a
    transaction that stands still by itself, after ``IDLE_TRANSACTION_SECONDS``; the last of the three is whether it had
    to.
    """
    before, transaction = _claims(case), False
    while True:
        begun = now()
        worker = case.start(elsewhere=True, fault=fault)
        while _claims(case) == before and not worker.wait(POLL_SECONDS):
            if now() - begun <= HELD_UP_SECONDS:
                continue
            if case.url.startswith("postgresql:"):
                transaction = transaction or _stands_still(case.url)
                continue
            worker.kill()
            worker.close()
            case.lab.kills += 1
            _held_up(case, zombie, case.start(elsewhere=True))
            return None, True, False
        if _claims(case) > before:
            return worker, False, transaction
        result = worker.result()
        if result is not None and "success" in result:
            return None, False, False
        if result is None or result["raised"] != "RunBusy":
            case.fail(f"a second worker ended with {result} before it had the run")
        time.sleep(POLL_SECONDS)


def _stands_still(url: str) -> bool:
    """Whether the server waits for a client in the middle of a transaction of this database."""
    import psycopg

    with psycopg.connect(url.partition("?")[0], autocommit=True) as connection:
        found = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
            "AND (state LIKE 'idle in transaction%' OR (state = 'active' AND wait_event = 'ClientRead'))"
        ).fetchone()
    return found is not None and found[0] > 0


def _claims(case: Case) -> int:
    return sum(event["e"] == "claim" for event in case.events())


def _until_free(case: Case) -> dict[str, Any] | None:
    """Work on the run, as soon as it is free."""
    while True:
        result: dict[str, Any] | None = case.start(elsewhere=True).result()
        if result is None or result.get("raised") != "RunBusy":
            return result
        time.sleep(POLL_SECONDS)


def _failed_over(case: Case, stopped: float, transaction: bool) -> None:
    """The time from the owner's stop to the next owner's claim: at most the lease and one poll.

    If a thread of the owner was stopped in a transaction, a lease that is shorter than the server's patience with it
    counts as that.
    """
    seconds, lease = now() - stopped, LEASE_SECONDS
    case.lab.notes["failovers"] += 1
    if transaction:
        case.lab.notes["stopped inside a transaction"] += 1
        lease = max(lease, IDLE_TRANSACTION_SECONDS)
    if seconds > lease + POLL_SECONDS + SLACK_SECONDS:
        case.fail(f"the run was taken over only {seconds:.2f} s after its owner was stopped")


def _refused(case: Case, zombie: Worker) -> None:
    """The stopped worker, which goes on, must be told at its next write that the run is another's.

    That nothing of it was committed is for the ledger to say: a commit that was confirmed after the other one's claim.
    """
    result = zombie.result()
    if result is None or result.get("raised") != "LeaseLost":
        case.fail(f"a worker that was replaced ended with {result}")
    case.lab.notes["zombies refused"] += 1


def _held_up(case: Case, zombie: Worker, second: Worker) -> None:
    """It was stopped inside a write. A second worker is held up, at the latest until the first goes on; then both
    end as they may: the log says whose commits count."""
    second.wait(LEASE_SECONDS * 2)
    zombie.signal(signal.SIGCONT)
    results = [zombie.result(), second.result()]
    for result in results:
        if "raised" in result and result["raised"] not in ("LeaseLost", "RunBusy", "CommitConflict"):
            case.fail(f"a worker ended with {result}")
    case.check()
    if not any("success" in result for result in results):
        case.take(_until_free(case))
    case.lab.notes["stopped inside a write"] += 1
    if not tenures(case.events()):
        case.fail("nobody ever claimed the run")
    case.finish()
