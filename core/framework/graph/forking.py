"""A new run from a checkpoint of another: what it stands at, what it is given instead, where it comes from. Blocks; see
``CheckpointManager.fork``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from framework.errors import CheckpointNotFound, CorruptData, RunNotFound, UnstorableValue
from framework.graph.checkpoint_rules import checkpoint_id as new_checkpoint_id
from framework.schemas.checkpoint import CheckpointStatus
from framework.schemas.run import RunState
from framework.storage import checkpoints as stored
from framework.storage import chunks as chunklib
from framework.storage import codec
from framework.storage.interface import Storage, check_id
from framework.storage.records import NO_TOKEN, CheckpointRow, Commit, Damage, Retention, RunRecord

logger = logging.getLogger(__name__)

_ATTEMPTS = 20


def fork_run(
    storage: Storage,
    run_id: str,
    at: int | str | None,
    changes: Mapping[str, Any] | None,
    new_run_id: str | None,
    make_run_id: Callable[[], str],
) -> str:
    """Make the new run; its id. Raises as ``CheckpointManager.fork``."""
    changed = stored.encode_state(changes or {})
    name = check_id(new_run_id if new_run_id is not None else make_run_id(), "new run id")
    for remaining in reversed(range(_ATTEMPTS)):
        run = storage.find_run(run_id)
        if run is None:
            raise RunNotFound(run_id)
        place = _newest(storage, run_id) if at is None else _place(storage, run_id, at)
        header, first = _first_commit(run, place, changed, name)
        try:
            storage.fork_run(run_id, place.row.sequence, header, first)
        except (CheckpointNotFound, CorruptData):
            # Its owner may go on meanwhile, and its retention with it: then look again.
            if stored.is_retained(storage, run_id, place.row) or not remaining:
                raise
        else:
            return name
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True, slots=True)
class _Place:
    """A checkpoint as read: its row, its body, its state, and whether the run paused there."""

    row: CheckpointRow
    body: dict[str, Any]
    state: stored.State
    paused: bool


def _read(storage: Storage, run_id: str, row: CheckpointRow) -> _Place:
    body = stored.parse_body(row)
    state = stored.load_state(storage, run_id, row.sequence, body.get("digest"))
    # A pause may have been recorded after the checkpoint, by a commit that is none.
    next_one = next(iter(stored.parse_log(storage.read_log(run_id, row.sequence))), {})
    paused = next_one.get("kind") == "end" and next_one.get("state") == RunState.PAUSED.value
    return _Place(row, body, state, paused)


def _newest(storage: Storage, run_id: str) -> _Place:
    """The newest readable checkpoint, as a resume would take it. Raises ``CheckpointNotFound``, ``CorruptData``."""
    damage: list[Damage] = []
    found = stored.read_newest(storage, run_id, lambda row: _read(storage, run_id, row), damage.append)
    for item in damage:
        logger.warning("Forking run %r: %s is damaged and was passed over: %s", run_id, item.where, item.problem)
    if found is None and damage:
        raise CorruptData(f"No checkpoint of run {run_id!r} can be read: {_listing(damage)}")
    if found is None:
        raise CheckpointNotFound(run_id, "newest", [])
    return found


def _place(storage: Storage, run_id: str, at: int | str) -> _Place:
    """The checkpoint of a sequence or an id. Raises ``CheckpointNotFound``, ``CorruptData``, ``TypeError``."""
    if isinstance(at, bool) or not isinstance(at, int | str):
        raise TypeError(f"at is a checkpoint's sequence or id, or None for the newest, not {type(at).__name__}.")
    damage: list[Damage] = []
    kept: list[int] = []
    for row in storage.read_checkpoint_rows(run_id, damage.append):
        if at in (row.sequence, row.checkpoint_id):
            return _read(storage, run_id, row)
        kept.append(row.sequence)
    if damage:  # which of them is meant cannot always be told from what is left of them
        raise CorruptData(
            f"Checkpoint {at!r} of run {run_id!r} is not among those that can be read, sequences {kept[::-1]}. "
            f"Damaged: {_listing(damage)}"
        )
    raise CheckpointNotFound(run_id, at, kept)


def _listing(damage: list[Damage]) -> str:
    return "; ".join(f"{item.where}: {item.problem}" for item in damage[:5])


def _first_commit(run: RunRecord, place: _Place, changed: Mapping[str, bytes], name: str) -> tuple[bytes, Commit]:
    """The new run's header, and the commit that says where it comes from and what is changed."""
    row, body, old = place.row, place.body, place.state
    chunks = chunklib.diff(old.values, _with(old.values, changed))
    chains = dict(old.chains)
    for chunk in chunks:
        chains[chunk.key] = chunklib.chain(chains.get(chunk.key, 0), chunk)
    forked_from = {"run_id": run.run_id, "checkpoint_id": row.checkpoint_id, "sequence": row.sequence}
    header = codec.decode(run.header) if run.header else {}
    header.pop("resumed_from", None)
    made = {**body, "at": datetime.now(), "digest": stored.format_digest(chains.values())}
    if place.paused:
        made["status"] = CheckpointStatus.PAUSED.value
    if isinstance(body.get("position"), dict):
        position = _with_new_inputs(body["position"], changed) if changed else dict(body["position"])
        # Journal and messages stay behind: steps in the middle of their calls start again, and say anew what they
        # wait for.
        position.pop("waits", None)
        made["position"] = position
    node = str(body.get("node") or body.get("step") or "unknown")
    record = {"kind": "fork", "from": forked_from, "changed": sorted(changed)}
    return codec.encode({**header, "forked_from": forked_from}, "header"), Commit(
        run_id=name,
        token=NO_TOKEN,
        sequence=row.sequence + 1,
        record=codec.encode([record], "record"),
        checkpoint_id=new_checkpoint_id(name, node, row.sequence + 1),
        checkpoint=stored.encode_parsed(made),
        chunks=chunks,
        state=RunState.PAUSED,
        # The copy has the other run's id in its own; and going back to it would lose the changes without a word.
        retention=Retention(1),
    )


def _with_new_inputs(position: Mapping[str, Any], changed: Mapping[str, bytes]) -> dict[str, Any]:
    """Where the run stands, its next steps given the changed values: an input of that name is the state's now.

    Inside a branch a step keeps what its branch was given, as the branch keeps its own state.
    """
    inputs = {}
    for key, given in position.get("inputs", {}).items():
        own = given.get("own", {})
        moved = [name for name in own if name in changed] if not given["branch"] else []
        if moved:
            left = {name: value for name, value in own.items() if name not in moved}
            given = {**given, "same": [*given["same"], *moved], "own": left}
        inputs[key] = given
    return {**position, "inputs": inputs} if inputs else dict(position)


# --- the changed state ----------------------------------------------------------------------------------------------


def _with(values: Mapping[str, bytes], changed: Mapping[str, bytes]) -> dict[str, bytes]:
    """The encoded state with changes.

    A key that shared its object with a changed one (a reference, see ``state_tracker``) keeps the old value: the first
    key that was nothing but the reference has it itself from now on, and the others refer to that one.
    """
    new = dict(values)
    waiting = [key for key in changed if key in values]
    while waiting:
        key = waiting.pop()
        heirs = [other for other, data in new.items() if other not in changed and _reference(key) in data]
        home = next((heir for heir in heirs if new[heir] == _reference(key)), None)
        for heir in heirs:
            if heir == home:
                new[heir] = values[key]
                # That may refer to other changed keys in turn.
                waiting += [each for each in changed if each in values and _reference(each) in values[key]]
            elif home is not None:
                new[heir] = new[heir].replace(_reference(key), _reference(home))
            else:
                new[heir] = orjson.dumps(_inlined(orjson.loads(new[heir]), key, values, ()))
    return {**new, **changed}


def _reference(key: str) -> bytes:
    return codec.encode(codec.StateRef(key))


def _inlined(plain: Any, key: str | None, values: Mapping[str, bytes], inside: tuple[str, ...]) -> Any:
    """``plain`` with the values of references to ``key`` in their place; ``None`` means to any key.

    ``inside`` are the keys whose values are being put in. Raises ``UnstorableValue`` for a value that contains itself.
    """
    if isinstance(plain, list):
        return [_inlined(item, key, values, inside) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.get(codec.TAG) != "ref":
        return {name: _inlined(item, key, values, inside) for name, item in plain.items()}
    wanted = plain["v"]
    if key is not None and wanted != key:
        return plain
    if wanted in inside:
        problem = "its value contains itself, by what other keys hold, so a fork cannot change it alone"
        raise UnstorableValue(f"state[{wanted!r}]", problem)
    # References count at the top of a value only, so what is put inside one must hold none itself.
    return _inlined(orjson.loads(values[wanted]), None, values, (*inside, wanted))
