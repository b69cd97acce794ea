"""Runs that end their process again and again: how the executors say that they gave one up, and how that is known."""

from __future__ import annotations

from collections.abc import Sequence

from framework.schemas.run import RunState
from framework.storage.records import RunRecord

_IN_A_ROW = " times in a row with nothing finished in between"


def too_often(run_id: str, times: int, limit: str, at: Sequence[str]) -> str:
    """The error of a run that is given up. ``limit`` names the setting, ``at`` the steps that were in flight."""
    steps = ", ".join(map(repr, at)) or "none"
    return (
        f"Run {run_id!r} ended its process {times}{_IN_A_ROW}, more often than {limit} allows. Steps that were in "
        f"flight: {steps}. See what ends the process there (memory, a native library, a kill), then call again: the "
        "count begins anew."
    )


def is_given_up(record: RunRecord) -> bool:
    """Whether the run failed because it ended its process too often: nobody takes it up unasked."""
    return record.state is RunState.FAILED and _IN_A_ROW in (record.error or "")
