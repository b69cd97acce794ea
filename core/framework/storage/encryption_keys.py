"""The keys of an encrypted store: an ordered ring of them, where they are read from, and what is derived from them."""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from framework._secrets import register_secret
from framework.errors import StorageError
from framework.storage.sealed import KEY_FILE_VARIABLE, KEYS_VARIABLE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
MAX_KEY_ID = 32
CHECK_BYTES = 4
"""Bytes in each ciphertext that tell a key from another of the same id; they say nothing about the key itself."""

_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_KEY_ID - 1}}}")
_INFO = b"surefoot/encryption/1/"
_MAX_CIPHERS = 4_096
_FORM = "write id:base64key,id:base64key, each key 32 bytes, the newest last"


class KeyRing:
    """Keys by id, oldest first. The last one encrypts; all decrypt.

    ``keys`` are pairs of an id (1 to 32 letters, digits, ``.``, ``_``, ``-``) and 32 random bytes. A ring never
    changes; it shows and pickles no key. Raises ``StorageError``.
    """

    def __init__(self, keys: Iterable[tuple[str, bytes]]) -> None:
        self._keys: dict[str, bytes] = {}
        for key_id, key in keys:
            if _ID.fullmatch(key_id) is None:
                raise StorageError(
                    f"The id of an encryption key has 1 to {MAX_KEY_ID} letters, digits, dots, underscores and "
                    "hyphens, and begins with a letter or a digit."  # not shown: it may be a key in the wrong place
                )
            if type(key) is not bytes or len(key) != KEY_BYTES:
                raise StorageError(f"The encryption key {key_id!r} must have {KEY_BYTES} bytes (AES-256).")
            if key_id in self._keys:
                raise StorageError(f"The key ring has two encryption keys with the id {key_id!r}; give each its own.")
            self._keys[key_id] = key
        if not self._keys:
            raise StorageError("A key ring needs at least one encryption key.")
        self._ciphers: dict[tuple[str, str], AESGCM] = {}
        self._checks: dict[str, bytes] = {}

    # --- where keys come from -----------------------------------------------------------------------------------

    @classmethod
    def from_text(cls, text: str, where: str = "the keys") -> KeyRing:
        """The ring in ``id:base64key,id:base64key``; lines and white space separate too, ``#`` begins a comment.

        ``where`` names the source in errors, which never show the text. Raises ``StorageError``.
        """
        keys = []
        lines = [line.partition("#")[0] for line in text.splitlines()]
        for number, entry in enumerate(re.split(r"[,\s]+", " ".join(lines).strip()), 1):
            if not entry:
                continue
            key_id, colon, encoded = entry.partition(":")
            key = _decoded(encoded)
            if not colon or key is None or _ID.fullmatch(key_id) is None:
                raise StorageError(f"Key {number} in {where} cannot be read; {_FORM}.")
            register_secret(encoded)
            keys.append((key_id, key))
        if not keys:
            raise StorageError(f"There is no key in {where}; {_FORM}.")
        try:
            return cls(keys)
        except StorageError as error:
            raise StorageError(f"In {where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KeyRing:
        """The ring in a file, one key a line or separated by commas, the newest last.

        The file must belong to this user (or root) and be closed to all others. Raises ``StorageError``.
        """
        name = os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                found = os.fstat(file.fileno())
                if os.name == "posix":
                    _check_private(name, found)
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else "it is not text"
            raise StorageError(f"The key file {name} cannot be read: {problem}.") from None
        return cls.from_text(text, f"the key file {name}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> KeyRing | None:
        """The ring in ``$SUREFOOT_ENCRYPTION_KEYS``, or in the file that ``$SUREFOOT_ENCRYPTION_KEY_FILE`` names.

        ``None`` when neither is set. Raises ``StorageError``, also when both are.
        """
        variables = os.environ if environment is None else environment
        text, file = variables.get(KEYS_VARIABLE, "").strip(), variables.get(KEY_FILE_VARIABLE, "").strip()
        if text and file:
            raise StorageError(f"Both {KEYS_VARIABLE} and {KEY_FILE_VARIABLE} are set; set one of them.")
        if file:
            return cls.from_file(file)
        return cls.from_text(text, f"${KEYS_VARIABLE}") if text else None

    # --- what it holds ------------------------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, oldest first."""
        return tuple(self._keys)

    @property
    def newest(self) -> str:
        """The id of the key that encrypts."""
        return self.ids[-1]

    def with_key(self, key_id: str, key: bytes | None = None) -> KeyRing:
        """This ring with one more key, which encrypts from now on. Without ``key``, 32 random bytes are made."""
        return KeyRing([*self._keys.items(), (key_id, secrets.token_bytes(KEY_BYTES) if key is None else key)])

    def without(self, key_id: str, in_use: Mapping[str, int]) -> KeyRing:
        """This ring without one of its keys. ``in_use`` counts contents by key id: ``EncryptedStorage.count_keys()``.

        Raises ``StorageError`` when a content still needs the key, and for the newest.
        """
        if key_id not in self._keys:
            raise StorageError(f"The key ring has no key {key_id!r}; it has {', '.join(self.ids)}.")
        if key_id == self.newest:
            raise StorageError(f"Key {key_id!r} is the newest, which encrypts; add another before it is dropped.")
        if in_use.get(key_id):
            raise StorageError(
                f"Key {key_id!r} is still needed: {in_use[key_id]:,} contents are encrypted with it. Encrypt them with "
                "the newest key first: surefoot storage rotate-keys, or EncryptedStorage.rotate_keys()."
            )
        return KeyRing([(each, key) for each, key in self._keys.items() if each != key_id])

    def lines(self) -> str:
        """The keys themselves, as ``from_file`` reads them. Whoever has this text can read the store."""
        return "".join(f"{key_id}:{base64.b64encode(key).decode('ascii')}\n" for key_id, key in self._keys.items())

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"KeyRing(ids={list(self._keys)!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A key ring is not pickled or copied: its keys must not end up in files.")

    # --- what is derived from it --------------------------------------------------------------------------------

    def cipher(self, key_id: str, run_id: str) -> AESGCM:
        """AES-256-GCM with the key of one run (``""``: of definitions), derived from a key of the ring.

        With a key of their own per run, the number of contents that one key may safely encrypt counts per run.
        """
        found = self._ciphers.get((key_id, run_id))
        if found is None:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            found = AESGCM(self._derive(key_id, b"run/" + run_id.encode("utf-8", "surrogatepass"), KEY_BYTES))
            if len(self._ciphers) >= _MAX_CIPHERS:
                self._ciphers.clear()
            self._ciphers[key_id, run_id] = found
        return found

    def check_of(self, key_id: str) -> bytes:
        """The bytes by which a key is told from another of the same id."""
        found = self._checks.get(key_id)
        if found is None:
            found = self._checks[key_id] = self._derive(key_id, b"check", CHECK_BYTES)
        return found

    def _derive(self, key_id: str, purpose: bytes, length: int) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), length, None, _INFO + purpose).derive(self._keys[key_id])


def require_library() -> None:
    """Raise ``StorageError`` unless the library that encrypts is installed."""
    try:
        import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401 - an optional library
    except ImportError:
        raise StorageError(
            "Encryption needs the package cryptography, which is not installed: pip install 'surefoot[encryption]'"
        ) from None


def _decoded(encoded: str) -> bytes | None:
    """32 bytes from base64 in either alphabet, or ``None``."""
    try:
        key = base64.b64decode(encoded.replace("-", "+").replace("_", "/") + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None


def _check_private(name: str, found: os.stat_result) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise StorageError(f"The key file {name} belongs to another user, who could read or change it; copy it.")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise StorageError(
            f"The key file {name} is open to other users (mode {mode:o}). Close it: chmod 600 {name}; and if others "
            "may have read it, change the keys."
        )


def write_key_file(path: Path, ring: KeyRing) -> None:
    """Put a ring into a file for this user alone, in one step and durably. Raises ``StorageError``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(ring.lines())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"The key file {path} cannot be written: {error.strerror}.") from None
