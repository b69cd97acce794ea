"""How encrypted bytes are told from plain ones. Needs nothing of the library that encrypts.

Everything this library stores in the plain is JSON or a part of it, thus UTF-8, in which no byte is above 0xF7. So the
first byte of encrypted bytes, 0xF9 in version 1 of their form, says for certain which of the two they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from framework.errors import KeyNotFound

if TYPE_CHECKING:
    # pydantic's import takes longer than all that the code sandbox does, which uses the codec and thus this module.
    from framework.schemas.run import Run

KEYS_VARIABLE = "SUREFOOT_ENCRYPTION_KEYS"
KEY_FILE_VARIABLE = "SUREFOOT_ENCRYPTION_KEY_FILE"

VERSION_1 = 0xF9
_MARK = bytes((VERSION_1,))
ERROR_PREFIX = "surefoot-encrypted:"
"""What the error of a run begins with when it is encrypted; the rest is base64."""
DOCUMENT_KEY = "$encrypted"
"""The only entry in ``input_data`` of a ``Run`` document that is encrypted; its value is base64."""

NO_KEYS = (
    f"the store is encrypted, and no keys were given. On the command line set {KEYS_VARIABLE} or --key-file; in a "
    "program open it with open_storage(url, keys=KeyRing...)"
)


def is_sealed(data: bytes | None) -> bool:
    """Whether bytes are encrypted."""
    return data is not None and data[:1] == _MARK


def is_sealed_error(error: str | None) -> bool:
    """Whether the error of a run is encrypted."""
    return error is not None and error.startswith(ERROR_PREFIX)


def is_sealed_document(run: Run) -> bool:
    """Whether a ``Run`` document is encrypted."""
    return DOCUMENT_KEY in run.input_data


def refuse_sealed(data: bytes) -> None:
    """Raise ``KeyNotFound`` for bytes that are encrypted: they are no damage, and must not be passed over as such."""
    if is_sealed(data):
        raise KeyNotFound(None, f"Stored bytes cannot be read: {NO_KEYS}.")
