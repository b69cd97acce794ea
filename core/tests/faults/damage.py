"""Bit flips in the files of a store: what is read is what was written, or the damage is reported.

A store with a finished run and one that was killed half-way is copied, and a bit or a few are flipped at random places
of one of its files. Then every row that can still be read must be the row that was written; a state that differs from
the run's newest must have been reported, with one exception that is SQLite's own: a damaged frame of its log ends the
log, so the store is as it was before that transaction, which nothing in the file tells from a log that ended there. At
the end both runs are called again, and must come to the result that they always come to, or fail clearly.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from framework.errors import SurefootError
from framework.storage import codec
from framework.storage.backend import open_storage
from framework.storage.records import Damage
from tests.faults.bench import SAME, Case, Lab, reference
from tests.faults.ledger import Entry, read_log
from tests.faults.processes import run_apart
from tests.faults.syscalls import kill_at, run_watched
from tests.faults.torn import store_url
from tests.faults.work import WORKS

FLIPS_A_STORE = 40
RUNS = ("finished", "half-way")


def flip_bits(lab: Lab, backend: str, size: int) -> None:
    """``size`` damaged copies of a store."""
    done = 0
    while done < size:
        folder = lab.folder / f"whole{done}"
        folder.mkdir()
        works = _fill(lab, backend, folder)
        # Looked at in a copy: SQLite writes when it closes, and its log is what is to be met as well.
        copy = lab.folder / "truth"
        shutil.copytree(folder, copy)
        truth = run_apart(lambda copy=copy, works=works: _read(store_url(backend, copy), works), lab.errors)  # type: ignore[misc]
        shutil.rmtree(copy)
        if truth["raised"] or truth["damage"]:
            lab.violation(f"{lab.name}: the undamaged store is damaged: {truth}")
            return
        for _ in range(min(FLIPS_A_STORE, size - done)):
            done += 1
            _flip_once(lab, backend, folder, works, truth)
        shutil.rmtree(folder)


def _fill(lab: Lab, backend: str, folder: Path) -> dict[str, str]:
    """A finished run and one that was killed; the work of each."""
    works = {}
    for run_id in RUNS:
        work = works[run_id] = lab.rng.choice(WORKS)
        case = Case(lab, store_url(backend, folder), work, run_id)
        if run_id == "finished":
            case.take(case.start().result())
        else:
            run_watched(case.next_life().run, lab.errors, kill_at(lab.rng.randint(90, 140)))[0].result()
        case.ledger.unlink()
    return works


def _flip_once(lab: Lab, backend: str, folder: Path, works: dict[str, str], truth: dict[str, Any]) -> None:
    rng = lab.rng
    damaged = lab.folder / "damaged"
    shutil.copytree(folder, damaged)
    files = [path for path in sorted(damaged.rglob("*")) if path.is_file() and path.stat().st_size]
    files = [path for path in files if not path.name.endswith(("-shm", ".lock"))]  # made anew, or empty
    victim = rng.choice(files)
    data = bytearray(victim.read_bytes())
    # Most of SQLite's pages are empty: where something is written is chosen more often.
    written = [place for place, byte in enumerate(data) if byte] if rng.random() < 0.7 else []
    places = [rng.choice(written or range(len(data))) for _ in range(rng.choice((1, 1, 2, 8)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    where = f"{victim.relative_to(damaged)} at {places}"
    url = store_url(backend, damaged)
    found = run_apart(lambda: _read(url, works), lab.errors)
    lab.count += 1
    lab.notes["reported" if found["raised"] or found["damage"] else "not noticed"] += 1
    log_ends = backend == "sqlite" and victim.name.endswith("-wal")
    for text in _differences(truth, found, log_ends):
        lab.violation(f"{lab.name}: bits flipped in {where}: {text}")
    for run_id, work in works.items():
        case = Case(lab, url, work, run_id)
        result = case.start().result()
        case.ledger.unlink(missing_ok=True)
        if result is None or "raised" in result or not result["success"]:
            lab.notes["failed clearly"] += 1
        elif result["output"] != reference(work, lab)["output"]:
            lab.violation(f"{lab.name}: bits flipped in {where}: {run_id} ended with {[result[key] for key in SAME]}")
        else:
            lab.notes["went on"] += 1
    shutil.rmtree(damaged)


def _read(url: str, works: dict[str, str]) -> dict[str, Any]:
    """In a process of its own: all that a store says of its runs, and what it says is damaged."""
    damage: list[str] = []
    raised: list[str] = []
    runs: dict[str, Any] = {}

    def told(item: Damage) -> None:
        damage.append(f"{item.where}: {item.problem}")

    try:
        with open_storage(url) as store:
            report = store.verify()
            for item in report.damage:
                told(item)
            for run_id, work in works.items():
                try:
                    record = store.find_run(run_id)
                    checkpoint = store.load_latest_checkpoint(run_id, told)
                    runs[run_id] = {
                        "record": None if record is None else [record.state.value, record.token, record.sequence],
                        "log": [entry.to_json() for entry in read_log(store, run_id, work)],
                        "at": None if checkpoint is None else checkpoint.sequence,
                        "state": None
                        if checkpoint is None
                        else codec.encode(dict(sorted(checkpoint.memory_snapshot.items()))).decode(),
                    }
                except SurefootError as error:
                    raised.append(f"{run_id}: {type(error).__name__}: {error}")
    except SurefootError as error:
        raised.append(f"{type(error).__name__}: {error}")
    return {"damage": damage, "raised": raised, "runs": runs}


def _differences(truth: dict[str, Any], found: dict[str, Any], log_ends: bool) -> list[str]:
    """What was silently wrong."""
    wrong = []
    reported = bool(found["damage"] or found["raised"])
    for run_id, known in truth["runs"].items():
        read = found["runs"].get(run_id)
        if read is None:
            continue  # it raised
        rows = [Entry.from_json(each) for each in known["log"]]
        seen = [Entry.from_json(each) for each in read["log"]]
        if [row for row in seen if row not in rows]:
            wrong.append(f"{run_id} has rows in its log that were never written")
        if log_ends:
            continue  # an earlier moment of the store
        if read["at"] == known["at"] and read["state"] != known["state"]:
            wrong.append(f"{run_id} has another state at {read['at']}: {read['state']}")
        if read != known and not reported:
            wrong.append(f"{run_id} is silently {_without_state(read)}, and was {_without_state(known)}")
    return wrong


def _without_state(run: dict[str, Any]) -> dict[str, Any]:
    return {"record": run["record"], "at": run["at"], "log": len(run["log"])}
