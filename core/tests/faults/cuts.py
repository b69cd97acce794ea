"""PostgreSQL: the connection cut at every message, and the server restarted as after a crash at any.

The worker's store goes on by itself, or the run fails clearly and the next life goes on; either way nothing is lost and
nothing runs twice, also where a commit was made and its answer never came.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.faults.bench import Case, Lab, now
from tests.faults.processes import PATIENCE_SECONDS, Worker, spawn
from tests.faults.proxy import MODES, Mode, Proxy, Shared, listen
from tests.faults.work import WORKS
from tests.postgres_server import PostgresServer, running_postgres

CLEAR = frozenset(("StorageError", "LeaseLost", "RunBusy"))
RUNS_A_STORE = 25


@contextmanager
def proxied(lab: Lab, server: PostgresServer, mode: Mode, number: int) -> Iterator[tuple[int, Shared]]:
    """A proxy before the server: its port, and what it counts."""
    shared = Shared()
    with listen() as listener:
        proxy = Proxy(listener, server.port, mode, number, shared)
        worker = spawn(proxy.run, lab.errors)
        try:
            yield listener.getsockname()[1], shared
        finally:
            worker.kill()
            worker.close()


def _through(url: str, server: PostgresServer, port: int) -> str:
    return url.replace(f":{server.port}/", f":{port}/")


def _start(case: Case, url: str) -> Worker:
    return spawn(replace(case.next_life(), url=url).run, case.lab.errors)


def _told(case: Case, worker: Worker) -> None:
    result = worker.result()
    if result is None:
        case.fail("a worker was killed that nobody killed")
    elif result.get("success"):
        case.lab.notes["went on"] += 1
        case.result = result
    else:
        case.lab.notes["failed clearly"] += 1
        kind, text = result.get("raised", "a failed run"), str(result.get("text") or result.get("error"))
        if kind not in CLEAR and "database" not in text.lower():
            case.fail(f"an unclear failure: {kind}: {text}")


def cut_connections(lab: Lab, backend: str, size: int) -> None:
    """``size`` cuts: each message of a life in turn, in each way."""
    server = lab.server
    if server is None:
        raise RuntimeError("Cuts need a PostgreSQL server.")
    places = _places(lab, server, size)
    url = ""
    for index, (work, mode, number) in enumerate(places):
        if index % RUNS_A_STORE == 0:
            if url:
                lab.drop_store(url)
            url = lab.new_store(backend)
        case = Case(lab, url, work, f"run-{index}")
        case.story.append(f"cut {mode} message {number}")
        with proxied(lab, server, mode, number) as (port, shared):
            _told(case, _start(case, _through(url, server, port)))
            lab.notes[f"cut {mode}" if shared["reached"] else "ended before its cut"] += 1
        case.check()
        case.finish()
    lab.drop_store(url)


def _places(lab: Lab, server: PostgresServer, size: int) -> list[tuple[str, Mode, int]]:
    """Which messages are met, and how: all of a life's, as many as asked for."""
    places: list[tuple[str, Mode, int]] = []
    for work in WORKS:
        url = lab.new_store("postgres")
        case = Case(lab, url, work, "count")
        with proxied(lab, server, "none", 0) as (port, shared):
            case.take(_start(case, _through(url, server, port)).result())
            counts = {"before": shared["frontend"], "after": shared["frontend"], "answer": shared["backend"]}
        case.ledger.unlink()
        lab.drop_store(url)
        places += [(work, mode, number) for mode in MODES for number in range(1, counts[mode] + 1)]
    # The same in each task, so that tasks take other parts of it; how many messages there are varies a little.
    random.Random(lab.seed).shuffle(places)
    start = int(lab.name.rpartition("/")[2]) * size
    return [places[(start + index) % len(places)] for index in range(size)]


def restart_servers(lab: Lab, backend: str, size: int) -> None:
    """``size`` restarts of a server of its own, each at a random message of a life: stopped at once, or killed."""
    with running_postgres() as server:
        lab.server = server
        url = lab.new_store(backend)
        for index in range(size):
            case = Case(lab, url, lab.rng.choice(WORKS), f"run-{index}")
            number, how = lab.rng.randint(3, 120), lab.rng.choice(("immediate", "fast", "kill"))
            case.story.append(f"server restarted ({how}) at message {number}")
            with proxied(lab, server, "hold", number) as (port, shared):
                worker = _start(case, _through(url, server, port))
                begun = now()
                while not shared["reached"] and not worker.wait(0) and now() - begun < PATIENCE_SECONDS:
                    time.sleep(0.002)
                if shared["reached"]:
                    lab.notes[f"restarted ({how})"] += 1
                    _restart(server, how)
                shared["go_on"] = 1
                _told(case, worker)
            case.check()
            case.finish()


def _restart(server: PostgresServer, how: str) -> None:
    if how == "kill":
        server.kill()
        # What a killed server leaves in shared memory and on its socket is cleared by the next start.
        Path(server.data_dir, "postmaster.pid").unlink(missing_ok=True)
        server.start()
    else:
        server.restart("immediate" if how == "immediate" else "fast")
