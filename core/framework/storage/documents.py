"""``Run`` documents to bytes and back; the same for every backend."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from framework.errors import CorruptData, UnstorableValue
from framework.schemas.run import Run, RunStatus
from framework.storage.checks import check_id, check_index_key, check_text

Index = Literal["all", "goals", "by_goal", "by_status", "by_node"]


class FindsDocuments:
    """The look-ups of ``Storage`` among ``Run`` documents, over one query of the backend."""

    @abstractmethod
    def _document_ids(self, index: Index, key: str = "") -> list[str]:
        """Ids in an index, oldest first; of ``goals`` the goals' own."""

    def list_all_runs(self) -> list[str]:
        """See ``Storage``."""
        return self._document_ids("all")

    def list_all_goals(self) -> list[str]:
        """See ``Storage``."""
        return self._document_ids("goals")

    def get_runs_by_goal(self, goal_id: str) -> list[str]:
        """See ``Storage``."""
        return self._document_ids("by_goal", check_index_key(goal_id, "goal id"))

    def get_runs_by_status(self, status: str | RunStatus) -> list[str]:
        """See ``Storage``."""
        text = status.value if isinstance(status, RunStatus) else status
        return self._document_ids("by_status", check_index_key(text, "status"))

    def get_runs_by_node(self, node_id: str) -> list[str]:
        """See ``Storage``."""
        return self._document_ids("by_node", check_index_key(node_id, "node id"))


def document_bytes(run: Run) -> bytes:
    """The JSON of a ``Run``. Raises ``InvalidId``, ``UnstorableValue``."""
    check_id(run.id)
    check_text(run.goal_id, "goal id")
    for node_id in nodes_of(run):
        check_text(node_id, "node id")
    try:
        return run.model_dump_json().encode()
    except PydanticSerializationError as error:
        raise UnstorableValue(f"run {run.id!r}", f"its decisions or data cannot be written as JSON: {error}") from None


def parse_document(data: bytes, run_id: str, where: str) -> Run:
    """The ``Run`` in ``data``. Raises ``CorruptData`` when it is none, or another's."""
    try:
        run = Run.model_validate_json(data)
    except ValidationError as error:
        raise CorruptData(f"The document of run {run_id!r} in {where} is not readable: {error}") from None
    if run.id != run_id:
        raise CorruptData(f"The document in {where} is of run {run.id!r}, not {run_id!r}.")
    return run


def nodes_of(run: Run) -> list[str]:
    """The nodes under which a document is found."""
    return list(dict.fromkeys([*run.metrics.nodes_executed, *(decision.node_id for decision in run.decisions)]))
