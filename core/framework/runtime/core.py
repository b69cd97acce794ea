"""The runtime: records the decisions, outcomes and problems of runs while they go on."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from framework._secrets import mask, mask_error, masked_traceback
from framework.errors import CodecError, LeaseLost, StorageError
from framework.graph.run_events import RunEvent
from framework.runtime.events import EventHub
from framework.schemas.decision import Decision, DecisionType, Option, Outcome
from framework.schemas.run import Run, RunStatus
from framework.storage.backend import FileStorage, Storage
from framework.storage.interface import check_id

logger = logging.getLogger(__name__)

T = TypeVar("T")

UNKNOWN_NODE = "unknown"
MARK = "__unserialisable__"
"""Key of the JSON object that stands for a value with no JSON form: ``{MARK: type name, "repr": its repr}``."""

# Computed fields follow from the others, and defaults are filled in again: neither belongs in a durable event.
_COMPUTED = {"chosen_option", "was_successful", "was_good_decision"}
_MIN_INT, _MAX_INT = -(2**63), 2**63 - 1  # what every JSON reader takes
_MAX_DEPTH = 100
_MAX_REPR = 2_000


@dataclasses.dataclass(eq=False, slots=True)
class _Recorder:
    """A sink of events, open while its ``recording`` block lasts."""

    owner: weakref.ref[Runtime]
    sink: list[dict[str, Any]]
    active: _ActiveRun | None
    open: bool = True


@dataclasses.dataclass(eq=False, slots=True)
class _ActiveRun:
    """A run between ``start_run`` and ``end_run``. ``owner`` is its runtime; ``introduced`` says whether an event of
    this process has told when the run started. ``live`` lacks the decisions of ``earlier`` events until somebody reads
    the run: one with thousands of them goes on at once. ``token`` is that of ``fence_run``."""

    owner: weakref.ref[Runtime]
    live: Run
    earlier: Sequence[Mapping[str, Any]]
    next_decision: int
    node: str = UNKNOWN_NODE
    introduced: bool = False
    ended: bool = False
    token: int | None = None
    recorders: list[_Recorder] = dataclasses.field(default_factory=list)
    reading: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    before: tuple[Run, list[str]] | None = None


class _Frame(NamedTuple):
    """One run started in this context, and the node set for it in this context."""

    active: _ActiveRun
    node: str


# Shared by all runtimes (context variables are never collected, so there must not be one per instance); innermost
# last. An ended run keeps its frame until the next start: what a task reports too late belongs to no other run.
_frames: ContextVar[tuple[_Frame, ...]] = ContextVar("surefoot_runs", default=())
_recorders: ContextVar[tuple[_Recorder, ...]] = ContextVar("surefoot_recorders", default=())
_deferred: ContextVar[tuple[weakref.ref[Runtime], list[Callable[[], None]]] | None] = ContextVar(
    "surefoot_deferred", default=None
)


class Runtime:
    """Records what happens in runs. One runtime serves any number of runs at once, in tasks and threads.

    ``storage_path`` is the directory of a ``FileStorage``, or a storage. Each asyncio task has its own current run;
    calls without a run id mean that one. A context that never started a run (a plain thread) sees the only active
    run, if there is just one.

    A ``Run`` document is saved when a run starts and when it ends. Saving never raises: a failure is logged and
    reported as a problem of the run. What must survive a crash in between goes through ``recording``.
    """

    def __init__(self, storage_path: str | Path | Storage) -> None:
        self._storage = FileStorage(storage_path) if isinstance(storage_path, (str, os.PathLike)) else storage_path
        self._identity = weakref.ref(self)
        self._active: dict[str, _ActiveRun] = {}
        self._lock = threading.RLock()
        self._events = EventHub()

    @property
    def storage(self) -> Storage:
        """Where ``Run`` documents are saved."""
        return self._storage

    @property
    def current_run(self) -> Run | None:
        """The innermost active run of this context; without any, the only active run; else ``None``."""
        with self._lock:
            active = self._current()
            return None if active is None else self._whole(active)

    # --- those who watch --------------------------------------------------------------------------------------------

    def add_listener(self, callback: Callable[[RunEvent], None]) -> Callable[[], None]:
        """Call ``callback`` with each event of every run on this runtime; what is returned stops that when called.

        It is called in the thread that runs the executor and must not block. What it raises is logged.
        """
        return self._events.add(callback)

    @property
    def has_listeners(self) -> bool:
        """Whether anybody watches: without, nothing is told."""
        return self._events.watched

    def emit(self, event: RunEvent) -> None:
        """Tell every listener."""
        self._events.emit(event)

    # --- runs -----------------------------------------------------------------------------------------------------

    def start_run(
        self,
        goal_id: str,
        goal_description: str = "",
        input_data: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Start a run and make it this context's current one; returns its id, ``run_<date>_<time>_<8 hex>``.

        With ``run_id`` that is the id. To go on with a run, give the events that ``recording`` made in ``earlier``
        processes: its start time, decisions and problems are theirs, and numbering continues after them; input and
        description are to be given again. Without events, a document of the run in the store gives the start time,
        and those two unless given.

        Durable on return: the document with status running, unless saving failed. Raises ``InvalidId``.
        """
        if run_id is not None:
            check_id(run_id)
        plain = _Plain("input_data")
        run = Run(
            id=run_id if run_id is not None else _new_run_id(),
            goal_id=_text(goal_id),
            goal_description=_text(goal_description),
            input_data=plain.dict_of(input_data),
        )
        next_decision = run.begin_again(earlier)
        _report_lost(run, plain.lost)
        active = _ActiveRun(self._identity, run, earlier, next_decision)

        def save() -> None:
            # With events the document is not needed, and reading a long one would be most of the time a resume takes.
            stored = self._load(run.id) if run_id is not None and not earlier else None
            if stored is not None:
                run.started_at = stored.started_at
                run.goal_description = run.goal_description or stored.goal_description
                run.input_data = stored.input_data if input_data is None else run.input_data
            self._save(active)

        self._now_or_later(save)
        with self._lock:
            replaced = self._active.pop(run.id, None)
            if replaced is not None:
                # Who may run is decided by the lease in the store; here the newcomer is the one that holds it.
                replaced.ended = True
                logger.warning("Run %r was started again before it ended; its earlier start is ignored.", run.id)
            self._active[run.id] = active
        alive = tuple(frame for frame in _frames.get() if not frame.active.ended and frame.active.owner() is not None)
        _frames.set((*alive, _Frame(active, UNKNOWN_NODE)))
        return run.id

    def end_run(
        self,
        success: bool,
        narrative: str = "",
        output_data: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        status: RunStatus | None = None,
    ) -> None:
        """End the current run, or the one named, as completed or failed, or with ``status``; never raises for its data.

        The run it was started in, if any, is current again. Values with no JSON form are replaced by their repr,
        marked. Durable on return: the final document, unless saving failed. Without such a run: a logged warning.
        """
        plain = _Plain("output_data")
        output = plain.dict_of(output_data)
        with self._lock:
            active = self._find(run_id)
            if active is None:
                logger.warning("end_run: %s; nothing was saved.", _no_run(run_id))
                return
            self._forget(active)
        ended_at = datetime.now(active.live.started_at.tzinfo)

        def save() -> None:
            run = self._whole(active)
            if output_data is not None:
                run.output_data = output
            _report_lost(run, plain.lost)
            run.complete(status or (RunStatus.COMPLETED if success else RunStatus.FAILED), _text(narrative), ended_at)
            self._save(active)

        self._now_or_later(save)

    def fence_run(self, run_id: str, token: int) -> None:
        """Save the active run's document from now on as its owner, by the fencing token of its lease.

        Once the store has the run under another token it has another owner, who writes its document: what is saved here
        is refused then, with a logged warning. A run that the store does not have as one with a lease (it is another
        store than the checkpoints') has nobody to ask, and its document is saved.
        """
        with self._lock:
            active = self._find(run_id)
            if active is None:
                logger.warning("fence_run: %s.", _no_run(run_id))
                return
            active.token = token

    def abandon_run(self, run_id: str | None = None) -> None:
        """Drop the current run, or the one named, saving nothing: for an owner that has lost the run to another."""
        with self._lock:
            active = self._find(run_id)
            if active is None:
                logger.warning("abandon_run: %s.", _no_run(run_id))
                return
            self._forget(active)

    @contextmanager
    def deferring_saves(self, saves: list[Callable[[], None]]) -> Iterator[None]:
        """While in the block, what ``start_run`` and ``end_run`` of this context do with the store is put in ``saves``.

        For asynchronous code, which calls those in order from a thread: they block. Nothing is durable until then.
        """
        token = _deferred.set((self._identity, saves))
        try:
            yield
        finally:
            _deferred.reset(token)

    def set_node(self, node_id: str) -> None:
        """Name the node that later decisions of this run in this context belong to. Without a run: nothing."""
        node = _text(node_id)
        with self._lock:
            active = self._current()
            if active is None:
                return
            active.node = node
        _frames.set(tuple(frame._replace(node=node) if frame.active is active else frame for frame in _frames.get()))

    @contextmanager
    def recording(self, sink: list[dict[str, Any]]) -> Iterator[None]:
        """While in the block, append an event to ``sink`` for each decision, outcome and problem of the current run.

        Events are JSON objects that ``start_run(earlier=)`` accepts. Of nested blocks the innermost of the run gets
        them, so concurrent branches that each open one have their own. A run nested in the block is left out; a block
        entered without a run records whatever run follows.
        """
        with self._lock:
            recorder = _Recorder(self._identity, sink, self._current())
            if recorder.active is not None:
                recorder.active.recorders.append(recorder)
        token = _recorders.set((*_recorders.get(), recorder))
        try:
            yield
        finally:
            with suppress(ValueError):  # a coroutine that is being closed may be so from another context
                _recorders.reset(token)
            with self._lock:
                recorder.open = False
                if recorder.active is not None:
                    recorder.active.recorders.remove(recorder)

    # --- decisions ------------------------------------------------------------------------------------------------

    def decide(
        self,
        intent: str,
        options: Sequence[Mapping[str, Any]],
        chosen: str,
        reasoning: str,
        node_id: str | None = None,
        decision_type: DecisionType = DecisionType.CUSTOM,
        constraints: Sequence[str] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> str:
        """Record a decision before it is acted on; returns its id, ``dec_<n>``, or ``""`` without a run.

        An option needs an ``id``; ``description``, ``action_type`` ("unknown"), ``action_params``, ``pros``, ``cons``
        and ``confidence`` are optional. Raises ``ValueError`` for an option that is not valid.
        """
        with self._lock:
            active = self._current()
            if active is None:
                return ""
            decision = Decision(
                id=f"dec_{active.next_decision}",
                node_id=_text(node_id) if node_id is not None else self._node(active),
                intent=_text(intent),
                decision_type=decision_type,
                options=[_option(given, position) for position, given in enumerate(options)],
                chosen_option_id=_text(chosen),
                reasoning=_text(reasoning),
                active_constraints=[_text(constraint) for constraint in constraints or ()],
                input_context=_Plain("context").dict_of(context),
            )
            active.next_decision += 1
            active.live.add_decision(decision)
            self._record(active, "decision", lambda: {"decision": _dump(decision)})
            return decision.id

    def record_outcome(
        self,
        decision_id: str,
        success: bool,
        result: Any = None,
        error: str | None = None,
        summary: str = "",
        state_changes: Mapping[str, Any] | None = None,
        tokens_used: int = 0,
        latency_ms: int = 0,
    ) -> None:
        """Record what came of a decision of the current run; ``result`` is stored as JSON, by its value now.

        Without a run: nothing. A decision the run does not have: a logged warning.
        """
        with self._lock:
            active = self._current()
            if active is None:
                return
            outcome = Outcome(
                success=success,
                result=_Plain("result").of(result),
                error=None if error is None else _text(error),
                summary=_text(summary),
                state_changes=_Plain("state_changes").dict_of(state_changes),
                tokens_used=tokens_used,
                latency_ms=latency_ms,
            )
            # Of an earlier process's decision only if it is none of this one's.
            known = active.live.record_outcome(decision_id, outcome)
            if not known and not self._whole(active).record_outcome(decision_id, outcome):
                logger.warning("Run %r has no decision %r; its outcome was not recorded.", active.live.id, decision_id)
                return
            self._record(active, "outcome", lambda: {"decision_id": decision_id, "outcome": _dump(outcome)})

    def report_problem(
        self,
        severity: str,
        description: str,
        decision_id: str | None = None,
        root_cause: str | None = None,
        suggested_fix: str | None = None,
    ) -> str:
        """Record a problem of the current run; returns its id, ``prob_<n>``, or ``""`` without a run."""
        with self._lock:
            active = self._current()
            if active is None:
                return ""
            problem_id = active.live.add_problem(
                severity=_text(severity),
                description=_text(description),
                decision_id=decision_id,
                root_cause=None if root_cause is None else _text(root_cause),
                suggested_fix=None if suggested_fix is None else _text(suggested_fix),
            )
            problem = active.live.problems[-1]
            self._record(active, "problem", lambda: {"problem": _dump(problem)})
            return problem_id

    def decide_and_execute(
        self,
        intent: str,
        options: Sequence[Mapping[str, Any]],
        chosen: str,
        reasoning: str,
        executor: Callable[[], T],
        **kwargs: Any,
    ) -> tuple[str, T]:
        """Record a decision, call ``executor()`` (a plain function), record the outcome; returns the id and the value.

        ``kwargs`` are those of ``decide``. What ``executor`` raises is recorded as a failure and raised again.
        """
        decision_id = self.decide(intent, options, chosen, reasoning, **kwargs)
        started = time.perf_counter()
        try:
            value = executor()
        except BaseException as error:
            self.record_outcome(
                decision_id,
                success=False,
                error=_described(error),
                latency_ms=int((time.perf_counter() - started) * 1000),
            )
            raise
        latency_ms = int((time.perf_counter() - started) * 1000)
        self.record_outcome(decision_id, success=True, result=value, latency_ms=latency_ms)
        return decision_id, value

    def quick_decision(self, intent: str, action: str, reasoning: str, node_id: str | None = None) -> str:
        """Record a decision with a single option, ``action``; returns its id, or ``""`` without a run."""
        option = {"id": "action", "description": action, "action_type": "execute"}
        return self.decide(intent, [option], chosen="action", reasoning=reasoning, node_id=node_id)

    # --- which run ------------------------------------------------------------------------------------------------

    def _current(self) -> _ActiveRun | None:
        own = [frame.active for frame in _frames.get() if frame.active.owner is self._identity]
        if own:
            return next((active for active in reversed(own) if not active.ended), None)
        return next(iter(self._active.values())) if len(self._active) == 1 else None

    def _find(self, run_id: str | None) -> _ActiveRun | None:
        """The active run of this id, or the current one. A run started again elsewhere is no longer this context's."""
        if run_id is None:
            return self._current()
        for frame in reversed(_frames.get()):
            if frame.active.owner is self._identity and frame.active.live.id == run_id:
                return None if frame.active.ended else frame.active
        return self._active.get(run_id)

    def _whole(self, active: _ActiveRun) -> Run:
        """The run with all its decisions."""
        with active.reading:  # never taken by one who holds it and waits for the runtime's lock
            if active.earlier and active.before is None:
                before = Run(id=active.live.id, goal_id=active.live.goal_id)
                active.before = before, before.replay(active.earlier, problems=False)
        with self._lock:
            run = active.live
            if active.before is not None:
                before, unread = active.before
                active.earlier, active.before = (), None
                run.decisions[:0] = before.decisions
                run.metrics.add(before.metrics)
                if unread:
                    what = f"Part of the earlier record of run {run.id!r} cannot be replayed: {_listed(unread)}"
                    logger.warning("%s", what)
                    run.add_problem("warning", what)
            return run

    def _node(self, active: _ActiveRun) -> str:
        for frame in _frames.get():
            if frame.active is active and frame.node != UNKNOWN_NODE:
                return frame.node
        return active.node

    def _forget(self, active: _ActiveRun) -> None:
        active.ended = True
        del self._active[active.live.id]

    def _record(self, active: _ActiveRun, kind: str, body: Callable[[], dict[str, Any]]) -> None:
        here = [
            known
            for known in _recorders.get()
            if known.open and (known.active is active or (known.active is None and known.owner is self._identity))
        ]
        if not here and not any(frame.active is active for frame in _frames.get()):
            # A plain thread that works for the run: its event belongs to the step being recorded, if that is certain.
            here = active.recorders if len(active.recorders) == 1 else []
        if here:
            event = {"kind": kind, **body()}
            if not active.introduced:
                event["run"] = {"id": active.live.id, "started_at": active.live.started_at.isoformat()}
                active.introduced = True
            here[-1].sink.append(event)

    # --- the store ------------------------------------------------------------------------------------------------

    def _load(self, run_id: str) -> Run | None:
        try:
            return self._storage.load_run(run_id)
        except Exception as error:  # any storage may be plugged in, and an unreadable document must not stop a run
            logger.warning("The document of run %r cannot be read; a new one is begun: %s", run_id, _described(error))
            return None

    def _now_or_later(self, save: Callable[[], None]) -> None:
        deferred = _deferred.get()
        if deferred is not None and deferred[0] is self._identity:
            deferred[1].append(save)
        else:
            save()

    def _save(self, active: _ActiveRun) -> None:
        """Save, degraded if need be; a failure is logged and becomes a problem of the run."""
        whole = self._whole(active)
        with self._lock:  # its decisions go on while it is being written
            lists = {"decisions": list(whole.decisions), "problems": list(whole.problems)}
            run = whole.model_copy(update={**lists, "metrics": whole.metrics.model_copy(deep=True)})
        fence = {} if active.token is None else {"token": active.token}  # a store of others may know no tokens
        try:
            try:
                self._storage.save_run(run, **fence)
            except (CodecError, TypeError, ValueError, RecursionError) as error:
                if isinstance(error, StorageError):
                    raise
                # Something was put on the run directly that has no JSON form.
                plain = _Plain("run")
                degraded = Run.model_validate(plain.dict_of(dict(run)))
                _report_lost(degraded, plain.lost)
                self._storage.save_run(degraded, **fence)
        except LeaseLost:
            logger.warning("The document of run %r was not saved: another owner has taken the run over.", run.id)
        except Exception as error:  # any storage may be plugged in, and the caller's run goes on without its document
            what = f"The document of run {run.id!r} was not saved: {_described(error)}"
            logger.warning("%s\n%s", what, masked_traceback(error))
            fix = "Check the storage; the document is saved again at the end."
            with self._lock:
                whole.add_problem("warning", what, suggested_fix=fix)


def _new_run_id() -> str:
    return f"run_{datetime.now():%Y%m%d_%H%M%S}_{uuid.uuid4().hex[:8]}"


def _no_run(run_id: str | None) -> str:
    return "there is no current run" if run_id is None else f"run {run_id!r} is not active here"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {mask_error(error)}"


def _listed(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return f"{'; '.join(entries[:5])}{more}"


def _option(given: Mapping[str, Any], position: int) -> Option:
    option = _Plain("option").dict_of(given)
    if "id" not in option:
        raise ValueError(f"Option {position} has no 'id': {sorted(option)}. Give each option of decide() an id.")
    return Option(**{"description": "", "action_type": "unknown", **option})


# --- events -----------------------------------------------------------------------------------------------------------


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude=_COMPUTED, exclude_defaults=True)


# --- any value as JSON ------------------------------------------------------------------------------------------------


class _Plain:
    """Turns values into JSON data, always a copy, and never fails: what has no JSON form is replaced by a mark with its
    repr. ``lost`` holds the paths of those. Iterators are not consumed."""

    def __init__(self, name: str) -> None:
        self.lost: list[str] = []
        self._path: list[object] = [name]
        self._within: set[int] = set()

    def dict_of(self, value: Mapping[str, Any] | None) -> dict[str, Any]:
        """``value`` as a JSON object; ``None`` as an empty one."""
        plain = self.of({} if value is None else value)
        return plain if isinstance(plain, dict) else {"value": plain}

    def of(self, value: Any) -> Any:
        """``value`` as JSON data."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Enum):
            return self.of(value.value)
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, int):
            return int(value) if _MIN_INT <= value <= _MAX_INT else self._mark(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else self._mark(value)
        if isinstance(value, (datetime, date, time_of_day)):
            return value.isoformat()
        if isinstance(value, timedelta):
            return value.total_seconds()
        if isinstance(value, (uuid.UUID, Decimal, PurePath)):
            return _text(value)
        return self._container(value)

    def _container(self, value: Any) -> Any:
        if id(value) in self._within or len(self._within) >= _MAX_DEPTH:
            return self._mark(value)
        try:
            parts = _parts(value)
        except Exception:  # a mapping or a set may be anybody's code, which is no reason to fail a run
            parts = None
        if parts is None:
            return self._mark(value)
        self._within.add(id(value))
        self._path.append(None)
        if isinstance(parts, dict):
            plain: Any = {}
            for key, element in parts.items():
                name = self._path[-1] = _key(key)
                plain[name] = self.of(element)
        else:
            plain = []
            for index, element in enumerate(parts):
                self._path[-1] = index
                plain.append(self.of(element))
        self._path.pop()
        self._within.remove(id(value))
        return plain

    def _mark(self, value: Any) -> dict[str, str]:
        kind = type(value)
        self.lost.append("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self._path)[1:])
        return {MARK: f"{kind.__module__}.{kind.__qualname__}", "repr": _repr(value)}


def _parts(value: Any) -> dict[Any, Any] | list[Any] | None:
    """What a container holds, by name or in order; ``None`` for anything that is not one."""
    if isinstance(value, BaseModel):
        return dict(iter(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (list, tuple, Set)) else None


def _key(key: Any) -> str:
    if isinstance(key, Enum):
        key = key.value
    return _text(key) if isinstance(key, str) else _repr(key)


def _text(value: object) -> str:
    """``value`` as text (an error passed as a description must not fail the report), ``None`` as "". Known secrets are
    masked. Lone surrogates, which no UTF-8 file can hold, are written as escapes."""
    if not isinstance(value, str):
        value = "" if value is None else str(value)
    value = mask(value)
    if value.isascii():
        return str.__str__(value)
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _repr(value: Any) -> str:
    try:
        return _text(repr(value))[:_MAX_REPR]
    except Exception:  # a repr is anybody's code, and what it says only helps a reader
        return f"<{type(value).__name__} whose repr() fails>"


def _report_lost(run: Run, lost: Sequence[str]) -> None:
    if lost:
        what = f"Values with no JSON form were recorded by their repr only: {_listed(lost)}"
        logger.warning("Run %r: %s", run.id, what)
        run.add_problem("warning", what)
