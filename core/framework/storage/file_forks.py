"""The commit files of a new run that is made from another's checkpoint, for ``FileStorage``. Use both runs' locks."""

from __future__ import annotations

from dataclasses import replace

from framework.errors import CheckpointNotFound, CorruptData
from framework.storage.file_commits import CommitFile
from framework.storage.file_io import make_directory
from framework.storage.file_runs import RunFiles
from framework.storage.interface import Rewrite
from framework.storage.records import Place


def copy(source: RunFiles, target: RunFiles, upto: int, rewrite: Rewrite | None = None) -> None:
    """Write the files that make ``target`` what ``source`` was at its checkpoint ``upto``; ``rewrite`` gives the bytes
    of each copy.

    Nothing of this counts until the new run's record is written. Raises ``CheckpointNotFound``, ``CorruptData``.
    """
    entry = source.commits.get(upto)
    if entry is None or entry.checkpoint_id is None:
        raise CheckpointNotFound(source.run_id, upto, [each.sequence for each in source.retained()])
    source.state_chunks(upto)  # raises when any file that the state needs is damaged or gone
    source.state_chunks(0)
    missing = [sequence for sequence in range(upto + 1) if sequence not in source.commits]
    if missing:
        listing = "; ".join(damage.problem for damage in source.damage[:5]) or "their files are gone"
        raise CorruptData(f"Commits {missing[:5]} of run {source.run_id!r} cannot be read: {listing}")
    needed = source.needed(upto)
    copies = []
    for sequence in range(upto + 1):
        found = source.read_entry(source.commits[sequence])
        chunks = tuple(chunk for chunk in found.chunks if sequence == 0 or sequence in needed.get(chunk.key, ()))
        # What the copied commits once did to the source's record and lease is not to be done to the new run's.
        made = replace(found, run_id=target.run_id, chunks=chunks, state=None, error=None, release=False)
        made = replace(made, wake_at=None, journal_done=())
        made = made if sequence in (0, upto) else made.without(())
        copies.append(made if rewrite is None else _rewritten(made, source.run_id, rewrite))
    make_directory(target.history)
    make_directory(target.checkpoints)
    for made in copies:
        path = target.history_path(made.sequence)
        if made.checkpoint_id is not None:
            path = target.checkpoint_path(made.checkpoint_id)
        target.put(path, made)


def _rewritten(made: CommitFile, run_id: str, rewrite: Rewrite) -> CommitFile:
    """A copy with the contents that ``rewrite`` makes of those of the run ``run_id``."""
    at, checkpoint, checkpoint_id = made.sequence, made.checkpoint, made.checkpoint_id
    if checkpoint is not None and checkpoint_id is not None:
        checkpoint = rewrite(Place("checkpoint", run_id, at, checkpoint_id), checkpoint)
    return replace(
        made,
        record=rewrite(Place("record", run_id, at), made.record) if at else made.record,
        log=None if made.log is None else rewrite(Place("log", run_id, at), made.log),
        checkpoint=checkpoint,
        chunks=tuple(
            chunk._replace(data=rewrite(Place("chunk", run_id, at, chunk.key, chunk.op), chunk.data))
            for chunk in made.chunks
        ),
    )
