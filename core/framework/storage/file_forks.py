"""The commit files of a new run that is made from another's checkpoint, for ``FileStorage``. Use both runs' locks."""

from __future__ import annotations

from dataclasses import replace

from framework.errors import CheckpointNotFound, CorruptData
from framework.storage.file_commits import RunFiles
from framework.storage.file_io import make_directory, write_atomic


def copy(source: RunFiles, target: RunFiles, upto: int) -> None:
    """Write the files that make ``target`` what ``source`` was at its checkpoint ``upto``.

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
    needed = _needed(source, upto)
    copies = []
    for sequence in range(upto + 1):
        found = source.read_entry(source.commits[sequence])
        chunks = tuple(chunk for chunk in found.chunks if sequence == 0 or sequence in needed.get(chunk.key, ()))
        # What the copied commits once did to the source's record and lease is not to be done to the new run's.
        made = replace(found, run_id=target.run_id, chunks=chunks, state=None, error=None, release=False)
        made = replace(made, wake_at=None, journal_done=())
        copies.append(made if sequence in (0, upto) else made.without(()))
    make_directory(target.history)
    make_directory(target.checkpoints)
    for made in copies:
        path = target.history_path(made.sequence)
        if made.checkpoint_id is not None:
            path = target.checkpoint_path(made.checkpoint_id)
        write_atomic(path, made.to_bytes())
    target.refresh()


def _needed(source: RunFiles, upto: int) -> dict[str, set[int]]:
    """For each key of the state the commits whose chunks of it decide what it is at ``upto``; deletes too."""
    needed: dict[str, set[int]] = {}
    for key, operations in source.keys.items():
        base = max((at for at, op in operations.items() if op != "append" and at <= upto), default=0)
        needed[key] = {at for at in operations if base <= at <= upto}
    return needed
