"""Checkpoints over any backend: what a checkpoint's stored body says, and how model and rows become each other.

The body of a checkpoint row holds the position, counters and totals, never the state (chunks) nor the path (log).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from framework.errors import (
    CommitConflict,
    CorruptData,
    RunExists,
    RunNotFound,
    StorageError,
    StoreTooNew,
    UnstorableValue,
)
from framework.schemas.checkpoint import FORMAT_VERSION, Checkpoint, CheckpointMetadata, CheckpointStatus, StepRecord
from framework.storage import chunks as chunklib
from framework.storage import codec
from framework.storage.checks import MAX_KEY, check_id
from framework.storage.chunks import Chunk
from framework.storage.compression import pack_all, unpack_all
from framework.storage.records import NO_TOKEN, CheckpointRow, Commit, Damage, LogRow, NewRun
from framework.storage.short_forms import SHORT_FORMAT, long_body, long_records, short_body, short_records

if TYPE_CHECKING:
    from framework.storage.interface import Storage

SCOPE_MARK = "\x00"
"""Separates a branch's id from a key of that branch's own state; keys of the run's state never hold it."""

_SAVE_ATTEMPTS = 20
_READ_ATTEMPTS = 300  # each beaten by a commit and its retention: a writer that does nothing else

T = TypeVar("T")


def body_of(checkpoint: Checkpoint, *, digest: str, path: Sequence[str] | None = None) -> bytes:
    """The stored body of a checkpoint. ``path`` only when the run's log does not tell it."""
    return encode_body(
        executor=checkpoint.executor_type.value,
        at=checkpoint.created_at,
        status=checkpoint.status.value,
        step_number=checkpoint.step_number,
        tokens=checkpoint.total_tokens,
        latency_ms=checkpoint.total_latency_ms,
        digest=digest,
        node=checkpoint.current_node_id,
        step=checkpoint.current_step_id,
        next_id=checkpoint.next_node_id,
        position=checkpoint.position,
        context=checkpoint.context,
        steps={key: record.model_dump() for key, record in checkpoint.steps.items()},
        extra=checkpoint.model_extra,
        cost=checkpoint.total_cost,
        path=path,
        version=checkpoint.format_version,
    )


def encode_body(
    *,
    executor: str,
    at: datetime,
    status: str,
    step_number: int,
    tokens: int,
    latency_ms: int,
    digest: str,
    node: str | None = None,
    step: str | None = None,
    next_id: str | None = None,
    position: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
    steps: Mapping[str, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
    cost: float = 0.0,
    path: Sequence[str] | None = None,
    version: int = FORMAT_VERSION,
    plain: bool = False,
) -> bytes:
    """The stored body of a checkpoint, from what it says; see ``schemas.checkpoint.Checkpoint``.

    ``plain`` promises that position, context, steps and extra hold nothing but JSON's own types, which saves a look at
    each. Raises ``UnstorableValue``.
    """
    body: dict[str, Any] = {
        "v": version,
        "executor": executor,
        "at": at,
        "status": status,
        "step_number": step_number,
        "tokens": tokens,
        "latency_ms": latency_ms,
        "digest": digest,
    }
    if node is not None:
        body["node"] = node
    if step is not None:
        body["step"] = step
    if next_id is not None:
        body["next"] = next_id
    if position:
        body["position"] = dict(position)
    if context:
        body["context"] = dict(context)
    if steps:
        body["steps"] = dict(steps)
    if extra:
        body["extra"] = dict(extra)
    if cost and (rounded := round(cost, 12)):
        body["cost"] = rounded
    if path:
        body["path"] = list(path)
    stored_form = body if version < SHORT_FORMAT else short_body(body)
    if plain and isfinite(cost) and type(stored_form["at"]) is str:
        try:
            return orjson.dumps(stored_form)
        except (TypeError, ValueError):
            pass  # integers beyond 64 bits, lone surrogates: the codec has a form for them
    return codec.encode(stored_form, "checkpoint")


def encode_parsed(body: Mapping[str, Any]) -> bytes:
    """The stored form of a body as ``parse_body`` gives it. Raises ``UnstorableValue``."""
    return codec.encode(body if body["v"] < SHORT_FORMAT else short_body(body), "checkpoint")


def parse_body(row: CheckpointRow) -> dict[str, Any]:
    """The body of a row. Raises ``CorruptData``, ``StoreTooNew``, ``UnknownType``."""
    return whole_body(row, codec.decode(row.body))


def whole_body(row: CheckpointRow, body: Any) -> dict[str, Any]:
    """What a row's decoded body says, whichever format it has. Raises ``CorruptData``, ``StoreTooNew``."""
    if not isinstance(body, dict) or "v" not in body:
        raise CorruptData(f"Checkpoint {row.checkpoint_id!r} has no readable body.")
    if body["v"] > FORMAT_VERSION:
        raise StoreTooNew(
            f"Checkpoint {row.checkpoint_id!r} has format version {body['v']}; this library reads up to "
            f"{FORMAT_VERSION}. Upgrade surefoot to resume it."
        )
    return body if body["v"] < SHORT_FORMAT else long_body(body)


def plain_body(row: CheckpointRow) -> dict[str, Any]:
    """The body of a row as the JSON it is, tags included, and whole. Raises ``CorruptData``, ``StoreTooNew``."""
    try:
        body = whole_body(row, orjson.loads(row.body))
    except orjson.JSONDecodeError as error:
        raise CorruptData(f"Checkpoint {row.checkpoint_id!r} is not valid JSON: {error}.") from None
    if isinstance(body.get("at"), datetime):
        body["at"] = orjson.loads(codec.encode(body["at"]))
    return body


def _model(cls: type[Any], row: CheckpointRow, **fields: Any) -> Any:
    try:
        return cls(**fields)
    except ValueError as error:
        raise CorruptData(f"Checkpoint {row.checkpoint_id!r} has an unreadable body: {error}") from None


def metadata(run_id: str, row: CheckpointRow) -> CheckpointMetadata:
    """The listing entry of a row. Raises ``CorruptData``, ``StoreTooNew``."""
    body = parse_body(row)
    made: CheckpointMetadata = _model(
        CheckpointMetadata,
        row,
        id=row.checkpoint_id,
        run_id=run_id,
        executor_type=body.get("executor"),
        node_id=body.get("node") or body.get("step") or "unknown",
        created_at=body.get("at"),
        step_number=body.get("step_number"),
        total_tokens=body.get("tokens"),
        total_latency_ms=body.get("latency_ms"),
        total_cost=body.get("cost", 0.0),
        sequence=row.sequence,
        status=body.get("status", CheckpointStatus.IN_PROGRESS),
    )
    return made


@dataclass(frozen=True, slots=True)
class State:
    """A state as stored: each key's encoded value and its chain (see ``chunks.chain``)."""

    values: Mapping[str, bytes]
    chains: Mapping[str, int]


def fold(chunks: Iterable[Chunk]) -> State:
    """The state that chunks, in order, make from nothing. Raises ``CorruptData`` when they do not fit together."""
    chunks = unpack_all(chunks)
    chains = chunklib.chains_of(chunks)
    try:
        values = chunklib.apply(chunks, {})
    except ValueError as error:
        raise CorruptData(f"The stored chunks do not make a state: {error}.") from None
    return State(values, {key: chains[key] for key in values})


def load_state(storage: Storage, run_id: str, sequence: int, digest: str | None = None) -> State:
    """The state at ``sequence``, checked against ``digest`` when given. Raises ``CorruptData``."""
    state = fold(storage.read_chunks(run_id, sequence))
    if digest is not None and digest != format_digest(state.chains.values()):
        raise CorruptData(
            f"The state of run {run_id!r} at sequence {sequence} does not match its digest: "
            "chunks are missing, altered or foreign."
        )
    return state


def read_newest(
    storage: Storage,
    run_id: str,
    build: Callable[[CheckpointRow], T],
    on_damage: Callable[[Damage], None],
) -> T | None:
    """What ``build`` makes of the newest checkpoint for which it does not raise ``CorruptData``, or ``None``.

    Older ones are tried after each damaged one, which is told to ``on_damage``. Other processes may commit and prune
    meanwhile: a checkpoint that went while it was being read is not damaged, and the newest is looked for again.
    """
    for _ in range(_READ_ATTEMPTS):
        damage: list[Damage] = []
        raced = False
        made: T | None = None
        for row in storage.read_checkpoint_rows(run_id, damage.append):
            try:
                made = build(row)
            except CorruptData as error:
                raced = not is_retained(storage, run_id, row)
                if raced:
                    break
                damage.append(Damage(run_id, row.sequence, f"checkpoint {row.checkpoint_id}", str(error)))
            else:
                break
        if not raced:
            for found in damage:
                on_damage(found)
            return made
    raise StorageError(f"The checkpoints of run {run_id!r} kept changing while they were read; call again.")


def is_retained(storage: Storage, run_id: str, row: CheckpointRow) -> bool:
    """Whether a checkpoint is still there, readable or not."""
    try:
        found = storage.find_checkpoint_row(run_id, row.checkpoint_id)
    except CorruptData:
        return True
    return found is not None and found.sequence == row.sequence


def format_digest(chains: Iterable[int]) -> str:
    """The digest of a state, as checkpoints record it."""
    return f"{chunklib.state_digest(chains):016x}"


def decode_state(values: Mapping[str, bytes]) -> dict[str, Any]:
    """The run's own state as live values; keys of branches are left out. Raises ``CorruptData``, ``UnknownType``."""
    return {key: value for key, value in decode_values(values).items() if SCOPE_MARK not in key}


def decode_values(values: Mapping[str, bytes]) -> dict[str, Any]:
    """A whole state as live values, by stored key. Raises ``CorruptData``, ``UnknownType``.

    A reference to another key, at the top or as an entry of a dict at the top, becomes that key's very object.
    """
    decoded = {key: codec.decode(data) for key, data in values.items()}

    def target(reference: codec.StateRef) -> Any:
        found = decoded.get(reference.key, reference)
        if isinstance(found, codec.StateRef):
            raise CorruptData(f"The state refers to key {reference.key!r}, which it does not hold.")
        return found

    references = [key for key, value in decoded.items() if isinstance(value, codec.StateRef)]
    resolved = {key: target(decoded[key]) for key in references}
    for value in decoded.values():
        if type(value) is dict:
            for name, item in value.items():
                if isinstance(item, codec.StateRef):
                    value[name] = target(item)
    return decoded | resolved


def encode_records(records: Iterable[Mapping[str, Any]]) -> bytes:
    """The records of one commit as its log row holds them. Raises ``UnstorableValue``."""
    return codec.encode(short_records(records), "record")


def parse_log(rows: Iterable[LogRow]) -> list[dict[str, Any]]:
    """The records of log rows, each with the ``sequence`` of its commit. Raises ``CorruptData``.

    A commit may hold several. Steps that a rewind undid are left out.
    """
    records: list[dict[str, Any]] = []
    rows = list(rows)
    for row, parsed in zip(rows, _parse_all(rows), strict=True):
        for record in _long_records(row, parsed):
            if record.get("kind") == "rewind":
                records = [earlier for earlier in records if earlier["sequence"] <= record["to"]]
            record["sequence"] = row.sequence
            records.append(record)
    return records


def plain_records(row: LogRow) -> list[dict[str, Any]]:
    """The records of a log row as the JSON they are, tags included, for types nobody has registered.

    Raises ``CorruptData``.
    """
    try:
        parsed = orjson.loads(row.record)
    except orjson.JSONDecodeError as error:
        raise CorruptData(f"The log row {row.sequence} is not valid JSON: {error}.") from None
    return _long_records(row, parsed)


def _long_records(row: LogRow, parsed: Any) -> list[dict[str, Any]]:
    try:
        return long_records(parsed)
    except CorruptData:
        raise CorruptData(f"The log row {row.sequence} does not hold records.") from None


def _parse_all(rows: Sequence[LogRow]) -> list[Any]:
    """The value of each row's record. A log of thousands is parsed as one text, several times as fast as row by row."""
    text = b"".join((b"[", b",".join([row.record for row in rows]), b"]"))
    try:
        whole = codec.decode(text)
    except CorruptData:
        whole = None  # one that is damaged is found by itself
    if type(whole) is list and len(whole) == len(rows):
        return whole
    return [codec.decode(row.record) for row in rows]


def path_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The nodes in the order the definition gives them: the steps of a branch follow its fan-out, branch by branch.

    Records come in the order of their commits, which among concurrent branches is chance.
    """
    by_branch: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("kind") == "step":
            by_branch.setdefault(record.get("branch", ""), []).append(record)

    path: list[str] = []

    def walk(branch: str) -> None:
        for record in by_branch.get(branch, ()):
            path.append(record["node"])
            for child in record.get("branches", ()):
                walk(child)

    walk("")
    return path


def build_checkpoint(
    storage: Storage, run_id: str, row: CheckpointRow, on_damage: Callable[[Damage], None]
) -> Checkpoint:
    """The whole checkpoint of a row. Raises ``CorruptData``, ``StoreTooNew``, ``UnknownType``.

    Damaged rows of the log, whose steps its path then lacks, are told to ``on_damage``.
    """
    body = parse_body(row)
    state = load_state(storage, run_id, row.sequence, body.get("digest"))
    run = storage.find_run(run_id)
    path = body.get("path")
    if path is None:
        log = parse_log(storage.read_log(run_id, on_damage=on_damage))
        path = path_of(record for record in log if record["sequence"] <= row.sequence)
    header = codec.decode(run.header) if run is not None and run.header else {}
    input_data = None
    if header.get("input_keys") is not None:
        initial = decode_state(load_state(storage, run_id, 0).values)
        input_data = {key: initial[key] for key in header["input_keys"] if key in initial}
    made: Checkpoint = _model(
        Checkpoint,
        row,
        **body.get("extra", {}),
        id=row.checkpoint_id,
        run_id=run_id,
        executor_type=body.get("executor"),
        created_at=body.get("at"),
        current_node_id=body.get("node"),
        current_step_id=body.get("step"),
        next_node_id=body.get("next"),
        memory_snapshot=decode_state(state.values),
        execution_path=path,
        step_number=body.get("step_number"),
        total_tokens=body.get("tokens"),
        total_latency_ms=body.get("latency_ms"),
        total_cost=body.get("cost", 0.0),
        context=body.get("context", {}),
        format_version=body["v"],
        sequence=row.sequence,
        status=body.get("status"),
        goal_id=run.goal_id or None if run is not None else None,
        definition_id=header.get("definition_id"),
        fingerprint=run.fingerprint or None if run is not None else None,
        input_data=input_data,
        position=body.get("position", {}),
        steps={key: StepRecord(**record) for key, record in body.get("steps", {}).items()},
        digest=body.get("digest"),
    )
    return made


def encode_state(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Each value's stored bytes. Raises ``UnstorableValue`` naming the path ``state.<key>...``."""
    encoded = {}
    for key, value in state.items():
        check_key(key)
        encoded[key] = codec.encode(value, f"state.{key}" if key.isidentifier() else f"state[{key!r}]")
    return encoded


def check_key(key: object) -> None:
    """Raise ``UnstorableValue`` unless ``key`` can be a key of the state."""
    if not isinstance(key, str):
        raise UnstorableValue(f"state[{key!r:.60}]", f"a key of the state is a str, not {type(key).__name__}")
    if not key or SCOPE_MARK in key or len(key) > MAX_KEY:
        raise UnstorableValue(
            f"state[{key!r:.60}]", f"a key of the state has 1 to {MAX_KEY} characters and no NUL; this has {len(key)}"
        )
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UnstorableValue(f"state[{key!r:.60}]", "a key of the state must not hold lone surrogates") from None


def save_checkpoint(storage: Storage, checkpoint: Checkpoint) -> None:
    """Store a checkpoint given whole: see ``Storage.save_checkpoint``."""
    run_id = check_id(checkpoint.run_id)
    check_id(checkpoint.id, "checkpoint id", MAX_KEY)
    new = encode_state(checkpoint.memory_snapshot)
    if storage.find_run(run_id) is None:
        _accept(storage, checkpoint)
    for remaining in reversed(range(_SAVE_ATTEMPTS)):
        run = storage.find_run(run_id)
        if run is None:
            raise RunNotFound(run_id)
        old = fold(storage.read_chunks(run_id, run.sequence))
        chunks = chunklib.diff(old.values, new)
        chains = dict(old.chains)
        for chunk in chunks:
            chains[chunk.key] = chunklib.chain(chains.get(chunk.key, 0), chunk)
        digest = format_digest(chains.values())
        replaced = storage.find_checkpoint_row(run_id, checkpoint.id)
        commit = Commit(
            run_id=run_id,
            token=NO_TOKEN,
            sequence=run.sequence + 1,
            record=codec.encode([{"kind": "save", "node": checkpoint.node_id}]),
            checkpoint_id=checkpoint.id,
            checkpoint=body_of(checkpoint, digest=digest, path=checkpoint.execution_path),
            chunks=pack_all(storage, chunks),
            replaces=None if replaced is None else replaced.sequence,
        )
        error = storage.commit([commit])[0]
        if error is None:
            return
        if not isinstance(error, CommitConflict) or not remaining:
            raise error
        # Another saver took this sequence: look again.


def _accept(storage: Storage, checkpoint: Checkpoint) -> None:
    try:
        storage.open_run(
            NewRun(
                run_id=checkpoint.run_id,
                executor_type=checkpoint.executor_type.value,
                goal_id=checkpoint.goal_id or "",
                fingerprint=checkpoint.fingerprint or "",
                definition=b"{}",
                header=codec.encode({"definition_id": checkpoint.definition_id}),
            )
        )
    except RunExists:
        return  # another saver was first, which is as good
