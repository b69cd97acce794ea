"""Where things go when nobody says otherwise: the user's data directory, by the XDG rules."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from framework.errors import StorageError

STORAGE_VARIABLE = "SUREFOOT_STORAGE"
"""Environment variable with the storage URL that the command line and a runner without a storage of its own use."""


def data_dir() -> Path:
    """``$XDG_DATA_HOME/surefoot``, or ``~/.local/share/surefoot``. Not created.

    A relative XDG_DATA_HOME is ignored, as its specification demands. Raises ``StorageError`` for a user without
    a home.
    """
    base = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "surefoot"
    try:
        return Path.home() / ".local" / "share" / "surefoot"
    except RuntimeError:
        raise StorageError(
            "There is no place to keep runs: HOME is not set, and this user has no home directory. Set HOME or "
            f"XDG_DATA_HOME, or name a store: --storage URL, or the variable {STORAGE_VARIABLE}."
        ) from None


def default_storage_url() -> str:
    """The URL in ``SUREFOOT_STORAGE``, else that of the SQLite file ``runs.db`` in the data directory.

    Raises ``StorageError`` as ``data_dir`` does.
    """
    return os.environ.get(STORAGE_VARIABLE, "").strip() or sqlite_url(data_dir() / "runs.db")


def sqlite_url(path: Path) -> str:
    """The storage URL of a SQLite file, absolute, for ``open_storage``."""
    return "sqlite:///" + quote(str(path.absolute()))


def documents_dir(agent_name: str) -> Path:
    """Where an agent's run documents go when it has no storage. Not created. Raises ``StorageError``."""
    return data_dir() / "storage" / agent_name
