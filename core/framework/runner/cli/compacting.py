"""``surefoot storage compact``: write the store anew without what is free in it."""

from __future__ import annotations

import click

from framework.runner.cli.app import Command
from framework.runner.cli.confirming import agreed, consent_options
from framework.runner.cli.exits import Exit
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import open_store
from framework.runner.cli.text import size


@click.command("compact", cls=Command, short_help="Write the store anew, as small as it can be.")
@consent_options
@click.pass_obj
def compact(settings: Settings, yes: bool, dry_run: bool) -> int:
    """Write the store anew without the room in it that nothing uses.

    Sweeps give room back by themselves, in small steps. This is for files that cannot do that yet (made by another
    program, or by VACUUM with other settings), and afterwards they can. Nobody else can write to the store meanwhile,
    and the disk needs room for a second copy.
    """
    screen = settings.screen
    with open_store(settings) as storage:
        before = storage.usage()
        gain, total = before.free_bytes, before.used_bytes + before.free_bytes
        screen.note(
            f"The store is {size(total)}, of which {size(gain)} are free. It is written anew; runs wait meanwhile."
        )
        done = 0
        if agreed(settings, "Write it anew?", yes=yes, dry_run=dry_run):
            done = storage.compact()
        after = storage.usage()
    if screen.json:
        screen.document(
            {
                "would_free_bytes": gain,
                "freed_bytes": done,
                "bytes": after.used_bytes + after.free_bytes,
                "can_shrink": after.can_shrink,
            }
        )
    elif not dry_run:
        screen.say(f"The store is {size(after.used_bytes + after.free_bytes)} now, {size(done)} less than before.")
    return Exit.DONE
