"""Where runs live: the interface, the backends, the codec of values. Each name is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.storage.backend import FileStorage, Storage, open_storage
    from framework.storage.codec import register

__all__ = ["FileStorage", "Storage", "open_storage", "register"]

_HOMES = {
    "FileStorage": "framework.storage.backend",
    "Storage": "framework.storage.backend",
    "open_storage": "framework.storage.backend",
    "register": "framework.storage.codec",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
