"""An agent's own runs in a store that other agents use too. Synchronous: callers in a loop use a thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from framework.errors import CorruptData, ResumeError, RunNotFound, UnknownType
from framework.graph.recovery import recoverable_runs
from framework.runner.agent_file import AGENT_FILE
from framework.schemas.checkpoint import ExecutorType
from framework.schemas.run import RunState
from framework.storage import codec
from framework.storage.interface import Storage
from framework.storage.ownership import effective_state
from framework.storage.records import RunRecord

LATEST = "latest"
_UNFINISHED = tuple(state for state in RunState if state is not RunState.COMPLETED)
_PAGE = 100


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run's header says of the agent it was started with; ``None`` where it says nothing."""

    graph_id: str | None
    name: str | None
    folder: str | None
    model: str | None
    base_url: str | None


def facts_of(run: RunRecord) -> RunFacts:
    """Raises ``CorruptData``, ``UnknownType`` for a header that cannot be read."""
    header = codec.decode(run.header) if run.header else {}
    given = header.get("metadata") if isinstance(header, dict) else None
    metadata: Mapping[str, Any] = given if isinstance(given, dict) else {}

    def text(value: Any) -> str | None:
        return value if isinstance(value, str) else None

    names = ("agent_name", "agent_path", "model", "base_url")
    graph_id = text(header.get("definition_id")) if isinstance(header, dict) else None
    return RunFacts(graph_id, *(text(metadata.get(name)) for name in names))


class AgentRuns:
    """The runs of the agent ``name`` with the graph ``graph_id`` in ``folder``; parts of other runs are none of them.

    An agent that has been moved keeps its runs: where the folder that a run was started from is gone, its name counts.
    """

    def __init__(self, storage: Storage, name: str, graph_id: str, folder: Path) -> None:
        self._storage = storage
        self._name = name
        self._graph_id = graph_id
        self._folder = folder

    def find(self, run_id: str) -> RunRecord:
        """The run of this id, or the newest unfinished one for ``latest``. Raises ``RunNotFound``, and ``ResumeError``
        for a run of another agent."""
        if run_id != LATEST:
            found = self._storage.find_run(run_id)
            if found is None:
                raise RunNotFound(run_id)
            self.check_own(found)
            return found
        newest = next(self.each(_UNFINISHED), None)
        if newest is None:
            raise RunNotFound(LATEST, f"Agent {self._name!r} has no unfinished run in this store.")
        return newest

    def each(self, states: Sequence[RunState] | None = None) -> Iterator[RunRecord]:
        """The agent's runs, newest first. A running run whose process certainly is gone is crashed."""
        last: RunRecord | None = None
        # The store has such a run as running until its lease ends.
        asked = None if states is None else [*states, *([RunState.RUNNING] if RunState.CRASHED in states else [])]
        while True:
            page = self._storage.list_runs(asked, limit=_PAGE, before=last)
            for run in page:
                shown = replace(run, state=effective_state(run))
                if (states is None or shown.state in states) and self._is_own(run):
                    yield shown
            if len(page) < _PAGE:
                return
            last = page[-1]

    def recoverable(self, *, failed: bool = False) -> list[RunRecord]:
        """The agent's runs to take up now: crashed ones, paused ones that can go on, and failed ones if asked for."""
        return recoverable_runs(self._storage, failed=failed, is_ours=self._is_own)

    def check_own(self, run: RunRecord) -> None:
        """Raise ``ResumeError`` if ``run`` belongs to another agent, saying to which.

        Less strict than what `each` lists, as somebody names this run and this agent: a copy of the agent may go on
        with it, and so may the agent after a change, which the executor then compares with the run's own definition.
        """
        if run.executor_type != ExecutorType.GRAPH.value:
            raise ResumeError(
                run.run_id, f"Run {run.run_id!r} executes a plan, and is none of agent {self._name!r}; see its program."
            )
        try:
            facts = facts_of(run)
        except (CorruptData, UnknownType):
            return  # whoever needs the header says what is wrong with it
        if self._is_here(facts):
            return
        other_graph = facts.graph_id is not None and facts.graph_id != self._graph_id
        other_name = facts.name is not None and facts.name != self._name
        there = _has_agent(facts.folder)
        if (other_name and (there or other_graph)) or (other_graph and (there or facts.name is None)):
            owner = f"agent {facts.name!r}" if facts.name is not None else f"the graph {facts.graph_id!r}"
            place = f" ({facts.folder})" if there else ""
            raise ResumeError(
                run.run_id,
                f"Run {run.run_id!r} belongs to {owner}{place}, not to agent {self._name!r} ({self._folder}); "
                "go on with it there, or choose another run id for this agent.",
            )

    def _is_own(self, run: RunRecord) -> bool:
        if run.executor_type != ExecutorType.GRAPH.value or run.parent_run_id is not None:
            return False
        try:
            facts = facts_of(run)
        except (CorruptData, UnknownType):
            return False  # what a damaged run was for cannot be told; `verify` reports it
        if facts.graph_id != self._graph_id:
            return False
        if self._is_here(facts):
            return True
        return (facts.name is None or facts.name == self._name) and not _has_agent(facts.folder)

    def _is_here(self, facts: RunFacts) -> bool:
        """Whether the run was started from this agent's folder, by this path or another one to the same place."""
        if facts.folder is None:
            return False
        there = Path(facts.folder)
        return there == self._folder or (there.exists() and self._folder.exists() and there.samefile(self._folder))


def _has_agent(folder: str | None) -> bool:
    return folder is not None and (Path(folder) / AGENT_FILE).is_file()
