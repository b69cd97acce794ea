"""Named points at which a test may end the process; no-ops unless a test installs a hook.

The points are part of the code's contract with its crash tests: each marks a moment at which a kill must be
survivable. ``framework.testing`` installs hooks; nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable

POINTS = (
    "node.before",  # the step is chosen, its body has not started
    "node.after",  # the body returned, nothing is routed or committed yet
    "routing",  # edges are being evaluated, inputs mapped
    "commit.before",  # the commit is built, not handed to the store
    "commit.inside",  # the store has written part of the transaction
    "commit.after",  # the commit is durable, the next step has not started
    "branch.between",  # one branch of a fan-out committed, siblings have not
    "retention",  # old checkpoints are being removed
)

SWEEP_POINTS = (
    "sweep.inside",  # a run is being taken out of sight, the transaction is not durable yet
    "sweep.retired",  # a run is gone, what it held is not removed yet
    "sweep.purge",  # some of what it held has been removed
)
"""Points of what keeps a store small, which no run reaches by itself."""

_hook: Callable[[str], None] | None = None


def install(hook: Callable[[str], None] | None) -> None:
    """Set the function called with each point's name, or remove it with ``None``."""
    global _hook
    _hook = hook


def installed() -> bool:
    """Whether there is a hook, for code that would otherwise not stop at its points."""
    return _hook is not None


def reach(point: str) -> None:
    """Tell the installed hook, if any, that execution is at ``point``."""
    if _hook is not None:
        _hook(point)
