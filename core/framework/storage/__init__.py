"""Where runs live: the interface, the backends, the codec of values."""

from framework.storage.backend import FileStorage, Storage, open_storage
from framework.storage.codec import register

__all__ = ["FileStorage", "Storage", "open_storage", "register"]
