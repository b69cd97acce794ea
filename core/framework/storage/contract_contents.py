"""The storage contract on contents as bytes: every one is listed with its place, and replaced only where unchanged."""

from __future__ import annotations

from framework.schemas.decision import Decision
from framework.schemas.run import Run, RunState
from framework.storage.chunks import Chunk
from framework.storage.contract import (
    Check,
    StorageUnderTest,
    accept,
    commit,
    equal,
    journal,
    new_run,
    raises,
    require,
    snapshot,
)
from framework.storage.documents import document_bytes
from framework.storage.interface import Storage
from framework.storage.records import Content, Place


def _fill(store: Storage, run_id: str = "run_1") -> None:
    """A run with a content of every kind."""
    store.open_run(new_run(run_id, chunks=[Chunk("input", "set", b'"i"')]))
    first = [Chunk("a", "set", b"[1]"), Chunk("b", "set", b'"t"')]
    accept(store, commit(1, run_id, checkpoint_id="one", checkpoint=b'{"v": 1}', log=b'["l"]', chunks=first))
    second = [Chunk("a", "append", b"2"), Chunk("b", "delete", b"")]
    accept(store, commit(2, run_id, chunks=second), journal(("s\x00", 7, b'{"j": 1}'), run_id=run_id))
    store.send(run_id, "m/1", b'{"m": 1}')
    document = Run(id=run_id, goal_id="goal", narrative="told")
    document.add_decision(Decision(id="dec_0", node_id="node", intent="why"))
    store.save_run(document)
    accept(store, commit(3, run_id, state=RunState.FAILED, error="out of \u2603"))


def _places(store: Storage, run_id: str | None) -> dict[Place, bytes]:
    found = {content.place: content.data for content in store.read_contents(run_id)}
    # A store that keeps what a commit said of the error beside the commit may list it there as well.
    return {place: data for place, data in found.items() if not (place.kind == "error" and place.sequence)}


def every_content_is_listed(subject: StorageUnderTest) -> None:
    """``read_contents`` gives every content with its place, once; those of a run, and of no run the definitions."""
    store = subject.new()
    _fill(store)
    _fill(store, "run_2")
    for seen in subject.before_and_after_reopening(store):
        equal(list(seen.read_contents("nobody")), [], "the contents of an unknown run")
        listed = [content.place for content in seen.read_contents("run_1")]
        equal(len(listed), len(set(listed)), "places that are listed")
        found = _places(seen, "run_1")
        kinds = sorted({place.kind for place in found})
        wanted = ["checkpoint", "chunk", "document", "error", "header", "journal", "log", "message", "record"]
        equal(kinds, wanted, "kinds of contents")
        require(all(place.run_id == "run_1" for place in found), f"contents of other runs: {list(found)}")
        chunks = [place[2:] for place in found if place.kind == "chunk"]
        wanted_chunks = [(0, "input", "set"), (1, "a", "set"), (1, "b", "set"), (2, "a", "append"), (2, "b", "delete")]
        equal(sorted(chunks), wanted_chunks, "the chunks")
        equal({place.sequence for place in found if place.kind == "record"}, {1, 2, 3}, "the commits in the log")
        equal([place for place in found if place.kind == "log"], [Place("log", "run_1", 1)], "the logs")
        names = {(place.kind, place.sequence, place.key) for place in found}
        more = {("checkpoint", 1, "one"), ("journal", 7, "s\x00"), ("message", 0, "m/1"), ("document", 0, "")}
        require(more <= names, f"not listed: {more - names}")
        definitions = _places(seen, None)
        equal({place.kind for place in definitions}, {"definition"}, "what belongs to no run")
        equal([seen.definition(place.key) for place in definitions], [*definitions.values()], "the definitions")


def chunks_have_their_places(subject: StorageUnderTest) -> None:
    """``read_placed_chunks`` gives the chunks of a state with the sequences of their commits."""
    store = subject.new()
    _fill(store)
    for seen in subject.before_and_after_reopening(store):
        for sequence in range(4):
            placed = seen.read_placed_chunks("run_1", sequence)
            equal([chunk for _, chunk in placed], seen.read_chunks("run_1", sequence), f"the chunks at {sequence}")
        equal([(at, chunk.key) for at, chunk in placed], [(1, "a"), (2, "a"), (0, "input")], "their places")
        equal(seen.read_placed_chunks("nobody", 1), [], "the chunks of an unknown run")


def contents_are_replaced_where_unchanged(subject: StorageUnderTest) -> None:
    """``replace_contents`` puts other bytes where those that were read still are, and touches nothing else."""
    store = subject.new()
    _fill(store)
    _fill(store, "run_2")
    before, other = store.find_run("run_1"), snapshot(store, "run_2")
    old = [*store.read_contents("run_1"), *store.read_contents(None)]
    plain = {"document", "definition"}  # a document stays one; a definition is shared

    def changed(content: Content) -> bytes:
        if content.place.kind == "document":
            run = Run.model_validate_json(content.data)
            return document_bytes(run.model_copy(update={"narrative": "told anew"}))
        made = b'{"v": 1, "length": %d}' % len(content.data)
        return b"[%s]" % made if content.place.kind == "record" else made

    changes = [(content, changed(content)) for content in old]
    equal(store.replace_contents(changes), len(changes), "how many were replaced")
    equal(store.replace_contents(changes), 0, "how many of those that have changed since")
    for seen in subject.before_and_after_reopening(store):
        store = seen
        found = _places(store, "run_1") | _places(store, None)
        wanted = {one.place: data for one, data in changes if not (one.place.kind == "error" and one.place.sequence)}
        equal(
            {place: found[place] for place in found if place.kind not in plain},
            {place: wanted[place] for place in wanted if place.kind not in plain},
            "the contents",
        )
        document = store.load_run("run_1")
        equal(None if document is None else document.narrative, "told anew", "the document")
        equal(store.get_runs_by_node("node"), ["run_1", "run_2"], "how documents are found")
        equal(snapshot(store, "run_2"), other, "another run")
        now = store.find_run("run_1")
        require(now is not None and before is not None, "the run is gone")
        if now is not None and before is not None:
            kept = ("run_id", "state", "sequence", "created_at", "updated_at", "owner", "token", "lease_until")
            for name in kept:
                equal(getattr(now, name), getattr(before, name), f"the run's {name}")
        equal(store.verify().damage, (), "damage")
    missing = Content(Place("record", "nobody", 1), b"x")
    gone = [
        Content(place, data) for place, data in ((Place("chunk", "run_1", 9, "a", "set"), b"x"), (missing.place, b"x"))
    ]
    equal(store.replace_contents([(each, b"y") for each in gone]), 0, "contents that are not there")
    equal(store.replace_contents([]), 0, "no changes")


def forks_are_rewritten(subject: StorageUnderTest) -> None:
    """``fork_run`` passes each content it copies through ``rewrite``, and makes nothing when that raises."""
    store = subject.new()
    _fill(store)
    accept(store, commit(4, checkpoint_id="four", checkpoint=b'{"v": 1}'))
    seen: list[Place] = []

    def rewrite(place: Place, data: bytes) -> bytes:
        seen.append(place)
        return b'["anew"]' if place.kind != "chunk" or place.op == "set" else data

    first = commit(5, "fork", state=RunState.PAUSED, checkpoint_id="five")
    store.fork_run("run_1", 4, b"{}", first, rewrite)
    require({"record", "log", "checkpoint", "chunk"} == {place.kind for place in seen}, f"rewritten: {seen}")
    equal({place.run_id for place in seen}, {"run_1"}, "the run that places are in")
    for opened in subject.before_and_after_reopening(store):
        store = opened
        values = {chunk.key: chunk.data for chunk in store.read_chunks("fork", 4) if chunk.op == "set"}
        equal(values, {"a": b'["anew"]', "input": b'["anew"]'}, "the state of the fork")
        equal([row.record for row in store.read_log("fork")][:4], [b'["anew"]'] * 4, "its log")
        row = store.find_checkpoint_row("fork", "four")
        equal(None if row is None else row.body, b'["anew"]', "its checkpoint")

    def fail(place: Place, data: bytes) -> bytes:
        raise KeyError("no")

    with raises(KeyError, "a rewrite that raises"):
        store.fork_run("run_1", 4, b"{}", commit(5, "none", state=RunState.PAUSED), fail)
    equal((store.find_run("none"), store.read_log("none")), (None, []), "what is left of that")


CHECKS: list[Check] = [
    every_content_is_listed,
    chunks_have_their_places,
    contents_are_replaced_where_unchanged,
    forks_are_rewritten,
]
