"""The path of a run while it runs: the nodes visited, in a form that takes one reference a step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

_Visit: TypeAlias = "str | tuple[str, tuple[str, ...]]"


class RunPath:
    """What ``checkpoints.path_of`` makes of a log, kept up step by step without keeping the log's records."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._visits: dict[str, list[_Visit]] = {}
        self._last: str | None = None
        self.count = 0
        """Steps added."""
        lists = self._visits
        record: Mapping[str, Any] | None = None
        for record in (each for each in records if each.get("kind") == "step"):  # as ``add``, for a log of thousands
            branch = record.get("branch", "")
            visits = lists.get(branch)
            if visits is None:
                visits = lists[branch] = []
            node = sys.intern(record["node"])
            visits.append((node, tuple(record["branches"])) if record.get("branches") else node)
            self.count += 1
        if record is not None:
            self._last = sys.intern(record["node"])

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the record of a finished step."""
        node = sys.intern(record["node"])
        branches = tuple(record.get("branches", ()))
        self._visits.setdefault(record.get("branch", ""), []).append((node, branches) if branches else node)
        self._last = node
        self.count += 1

    @property
    def last(self) -> str | None:
        """The node of the step added last."""
        return self._last

    def __iter__(self) -> Iterator[str]:
        """The nodes in the order the definition gives them: a branch's after its fan-out, branch by branch."""
        open_branches = [iter(self._visits.get("", ()))]
        while open_branches:
            for visit in open_branches[-1]:
                if isinstance(visit, str):
                    yield visit
                    continue
                node, branches = visit
                yield node
                open_branches.extend(iter(self._visits.get(branch, ())) for branch in reversed(branches))
                break
            else:
                open_branches.pop()
