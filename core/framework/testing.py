"""For tests of programs that use this library: the storage contract, and faults at named points.

A new storage backend is right when ``check_storage`` raises nothing::

    def test_my_storage(tmp_path):
        check_storage(lambda: MyStorage(tempfile.mkdtemp(dir=tmp_path)), reopen=lambda store: MyStorage(store.path))

or, with a test for each requirement::

    @pytest.mark.parametrize("check", storage_checks(), ids=lambda check: check.__name__)
    def test_my_storage(check, tmp_path):
        with StorageUnderTest(lambda: MyStorage(tempfile.mkdtemp(dir=tmp_path))) as subject:
            check(subject)

Crash tests end a process at one of ``FAULT_POINTS``: with ``install_fault`` inside it, or from outside through the
environment variable ``SUREFOOT_FAULT``, which a test program obeys by ``install_faults_from_environment``.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from framework import _faults
from framework.storage import (
    contract_commits,
    contract_contents,
    contract_forks,
    contract_journal,
    contract_messages,
    contract_models,
    contract_retention,
    contract_runs,
)
from framework.storage.contract import Check, Factory, ManualClock, StorageUnderTest

__all__ = [
    "FAULT_POINTS",
    "Check",
    "ManualClock",
    "StorageUnderTest",
    "check_storage",
    "clear_faults",
    "die",
    "install_fault",
    "install_faults_from_environment",
    "storage_checks",
]

FAULT_POINTS = (*_faults.POINTS, *_faults.SWEEP_POINTS)
"""The points at which a test may end the process; what each means is said in ``framework._faults``."""

FAULT_VARIABLE = "SUREFOOT_FAULT"


# --- the storage contract -------------------------------------------------------------------------------------------


def storage_checks() -> list[Check]:
    """The requirements on a storage backend, each a function that raises ``AssertionError`` when it is not met."""
    parts = (
        *(contract_runs, contract_commits, contract_journal, contract_messages, contract_forks, contract_models),
        *(contract_contents, contract_retention),
    )
    return [check for part in parts for check in part.CHECKS]


def check_storage(factory: Factory, *, reopen: Factory | None = None) -> None:
    """Check a storage backend against every requirement of ``framework.storage.interface``.

    ``factory()`` gives a fresh, empty store. ``reopen(store)`` closes it and opens it again; without one, what must
    outlive the process is not checked. Either is given a clock to use if it has a parameter ``clock``. Raises
    ``ExceptionGroup`` with one exception for each requirement that is not met, noted with its name.
    """
    failures: list[Exception] = []
    for check in storage_checks():
        try:
            with StorageUnderTest(factory, reopen) as subject:
                check(subject)
        except Exception as error:
            error.add_note(f"in the storage check {check.__name__}: {check.__doc__}")
            failures.append(error)
    if failures:
        raise ExceptionGroup("The store does not meet the storage contract", failures)


# --- faults ---------------------------------------------------------------------------------------------------------


def die() -> None:
    """End this process as a crash does: at once, with no clean-up (SIGKILL; where there is none, ``os._exit``)."""
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(137)


class _Faults:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._actions: dict[tuple[str, int], Callable[[], None]] = {}

    def add(self, point: str, nth: int, action: Callable[[], None]) -> None:
        with self._lock:
            self._actions[point, nth + self._counts.get(point, 0)] = action

    def reach(self, point: str) -> None:
        with self._lock:
            count = self._counts[point] = self._counts.get(point, 0) + 1
            action = self._actions.pop((point, count), None)
        if action is not None:
            action()


_installed: _Faults | None = None


def install_fault(point: str, nth: int = 1, action: Callable[[], None] = die) -> None:
    """Call ``action`` the ``nth`` time from now that execution is at ``point``; by default the process dies.

    Raises ``ValueError`` for a point that does not exist.
    """
    global _installed
    if point not in FAULT_POINTS:
        raise ValueError(f"There is no fault point {point!r}. The points are: {', '.join(FAULT_POINTS)}.")
    if nth < 1:
        raise ValueError(f"A fault happens the 1st, 2nd ... time that its point is reached, not the {nth}th.")
    if _installed is None:
        _installed = _Faults()
        _faults.install(_installed.reach)
    _installed.add(point, nth, action)


def clear_faults() -> None:
    """Take all faults away, and the counts with them."""
    global _installed
    _installed = None
    _faults.install(None)


def install_faults_from_environment() -> None:
    """Install what ``SUREFOOT_FAULT`` asks for: ``point:nth``, several separated by commas. Nothing when it is unset.

    For programs that tests start; the library itself never reads the variable. Raises ``ValueError``.
    """
    for text in filter(None, os.environ.get(FAULT_VARIABLE, "").split(",")):
        point, _, nth = text.strip().partition(":")
        try:
            count = int(nth or "1")
        except ValueError:
            raise ValueError(f"{FAULT_VARIABLE}={text!r}: write point:nth, such as commit.before:3.") from None
        install_fault(point, count)
