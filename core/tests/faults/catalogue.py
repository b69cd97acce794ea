"""Which faults there are, on which stores, and how many of each make the whole suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import cuts, damage, disks, fleets, kills, models, torn, zombies
from tests.faults.bench import BACKENDS, Lab


@dataclass(frozen=True, slots=True)
class Fault:
    """``run(lab, backend, size)`` does ``size`` of it. ``whole`` is the size of all backends' tasks together.

    ``chunk`` is a task's size. One that is ``fixed`` has that size in a smaller suite as well.
    """

    run: Callable[[Lab, str, int], None]
    whole: int
    chunk: int
    backends: tuple[str, ...] = BACKENDS
    fixed: bool = False
    slow: bool = False


FAULTS: dict[str, Fault] = {
    "kills": Fault(kills.kill_runs, whole=10_000, chunk=50),
    "stopped": Fault(zombies.stop_owners, whole=300, chunk=20),
    "two-workers": Fault(fleets.race_two, whole=60, chunk=5),
    "eight-workers": Fault(fleets.race_eight, whole=30, chunk=2),
    "disk-full": Fault(disks.fill_disks, whole=600, chunk=50, backends=("sqlite", "files")),
    "sync-fails": Fault(disks.break_syncs, whole=300, chunk=50, backends=("sqlite", "files")),
    "cut": Fault(cuts.cut_connections, whole=1_200, chunk=50, backends=("postgres",)),
    "server-restart": Fault(cuts.restart_servers, whole=80, chunk=20, backends=("postgres",), slow=True),
    "power-failure": Fault(torn.fail_power, whole=1_000, chunk=50, backends=("sqlite", "files")),
    "torn-file": Fault(torn.cut_files, whole=300, chunk=50, backends=("sqlite", "files")),
    "bit-flips": Fault(damage.flip_bits, whole=2_000, chunk=80, backends=("sqlite", "files")),
    "lease-model": Fault(
        models.check_models, whole=len(models.MODELS), chunk=1, backends=("model",), fixed=True, slow=True
    ),
    "lease-adversary": Fault(models.drive_stores, whole=400, chunk=20, backends=("memory", *BACKENDS)),
    "clock-jumps": Fault(fleets.jump_clocks, whole=45, chunk=5),
}
