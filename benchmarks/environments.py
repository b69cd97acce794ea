"""The environments of the peers: one each, made from its lock file, kept until that changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / "peers"
FOLDER = ROOT / ".venv-bench"


class EnvironmentUnavailable(Exception):
    """The packages of an environment cannot be installed; the text has pip's own words."""


def python_of(environment: str, say: Callable[[str], None]) -> Path:
    """The interpreter of an environment, which is made first when it is missing or its lock file has changed.

    Raises ``EnvironmentUnavailable`` when the packages cannot be installed.
    """
    lock = (PEERS / f"{environment}.lock").read_text()
    folder = FOLDER / environment
    python = folder / "bin" / "python"
    stamp = folder / "installed.lock"
    version = f"# Python {sys.version_info.major}.{sys.version_info.minor}\n"
    if stamp.exists() and stamp.read_text() == version + lock:
        return python
    say(f"installing {environment}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError as error:
        raise EnvironmentUnavailable(f"The environment of {environment} cannot be made: {error}") from None
    command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--require-hashes"]
    done = subprocess.run([*command, "-r", PEERS / f"{environment}.lock"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentUnavailable(f"The packages of {environment} cannot be installed:\n{done.stdout}{done.stderr}")
    stamp.write_text(version + lock)
    return python
