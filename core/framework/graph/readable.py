"""Stored values as plain JSON that people can read. Needs no registered type, so any program can look at any run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from pydantic_core import to_jsonable_python

from framework._secrets import MASK
from framework.errors import CorruptData, UnknownType
from framework.graph.text import shorten, text_of
from framework.storage import codec
from framework.storage.codec import TAG, StateRef

TYPE = "$type"
"""The key under which the readable form of an object names its class."""


_TAG_BYTES = b'"$t"'


def plain_json(data: bytes) -> Any:
    """Stored bytes as the JSON they are, tags included. Raises ``CorruptData``."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise CorruptData(f"Stored bytes are not valid JSON: {error}.") from None


def readable(plain: Any) -> Any:
    """``plain_json`` without its tags: a tuple or set is a list, a time its text, an object a dict with ``$type``."""
    if type(plain) is list:
        return [readable(item) for item in plain]
    if type(plain) is not dict:
        return plain
    tag = plain.get(TAG)
    if tag is None:
        return {key: readable(item) for key, item in plain.items()}
    reader = _READERS.get(tag)
    return reader(plain) if reader is not None else {TYPE: str(tag), "value": readable(plain.get("v"))}


def readable_state(values: Mapping[str, bytes]) -> dict[str, Any]:
    """A whole state in readable form, by key; what two keys share is shown under both. Raises ``CorruptData``."""
    plain = {key: plain_json(data) for key, data in values.items()}

    def shared(value: Any) -> Any:
        return plain.get(str(value.get("v")), value) if type(value) is dict and value.get(TAG) == "ref" else value

    shown = {}
    for key, value in plain.items():
        if _TAG_BYTES not in values[key]:
            shown[key] = value
            continue
        value = shared(value)
        if type(value) is dict and TAG not in value:
            value = {name: shared(item) for name, item in value.items()}
        shown[key] = readable(value)
    return shown


def lenient_state(values: Mapping[str, bytes]) -> dict[str, Any]:
    """A whole state as live values; in readable form where a type is not registered. Raises ``CorruptData``."""
    decoded = {key: _lenient(data) for key, data in values.items()}

    def shared(value: Any) -> Any:
        return decoded.get(value.key) if isinstance(value, StateRef) else value

    for key, value in decoded.items():
        if type(value) is dict:
            decoded[key] = {name: shared(item) for name, item in value.items()}
    return {key: shared(value) for key, value in decoded.items()}


def _lenient(data: bytes) -> Any:
    try:
        return codec.decode(data)
    except UnknownType:
        return readable(plain_json(data))


def not_rebuilt(data: bytes) -> str | None:
    """Why this program cannot rebuild a value whose bytes are whole (a type is not registered), or ``None``."""
    if _TAG_BYTES not in data:
        return None
    try:
        codec.decode(data)
    except UnknownType as error:
        return str(error)
    return None


def preview(value: Any, limit: int) -> str:
    """At most ``limit`` characters of a readable value as text or JSON; never builds the text of a whole container."""
    return shorten(text_of(_trimmed(value, limit, 4)), limit)


def _trimmed(value: Any, limit: int, depth: int) -> Any:
    most = limit // 2 + 1  # an entry takes two characters at least
    if isinstance(value, str):
        return value[: 2 * limit]
    if type(value) is list:
        return [_trimmed(item, limit, depth - 1) for item in value[:most]] if depth else "..."
    if type(value) is dict:
        pairs = zip(range(most), value.items(), strict=False)
        return {key: _trimmed(item, limit, depth - 1) for _, (key, item) in pairs} if depth else "..."
    return value


def type_in(data: bytes, shown: Any) -> str:
    """``type_of`` a stored value, whose readable form is at hand."""
    return type_of(plain_json(data) if _TAG_BYTES in data else shown)


def type_of(plain: Any) -> str:
    """What ``plain_json`` is, in a word or three: ``str``, ``list of 3``, ``dict with 2 keys``, ``datetime``."""
    if type(plain) is dict:
        tag = plain.get(TAG)
        if tag is None:
            return f"dict with {len(plain)} keys" if len(plain) != 1 else "dict with 1 key"
        if tag == "obj":
            return str(plain.get("c", "object")).rpartition(".")[2]
        if tag == "ref":
            return f"same as {plain.get('v')}"
        inner = plain.get("v")
        return f"{tag} of {len(inner)}" if type(inner) is list and tag != "timedelta" else str(tag)
    if type(plain) is list:
        return f"list of {len(plain)}"
    return "None" if plain is None else type(plain).__name__


def _items(plain: Mapping[str, Any]) -> Any:
    return [readable(item) for item in plain.get("v", ())]


def _dict(plain: Mapping[str, Any]) -> Any:
    shown = {}
    for key, value in plain.get("v", ()):
        name = readable(key)
        shown[name if isinstance(name, str) else orjson.dumps(name).decode()] = readable(value)
    return shown


def _object(plain: Mapping[str, Any]) -> Any:
    value = plain.get("v")
    if type(value) is dict and type(value.get("fields")) is dict and "set" in value:  # a pydantic model
        value = {**value["fields"], **value.get("extra", {})}
    shown = readable(value)
    name = str(plain.get("c", "object"))
    return {TYPE: name, **shown} if type(shown) is dict else {TYPE: name, "value": shown}


def _rebuilt(plain: Mapping[str, Any]) -> Any:
    """By the codec, as text: its own types need no registration."""
    try:
        return str(codec.decode(orjson.dumps(plain)))
    except (CorruptData, UnknownType):  # such as a time zone that this machine does not know
        return str(plain.get("v"))


def _integer(plain: Mapping[str, Any]) -> Any:
    # As text: other programs read JSON numbers of this size wrongly.
    return _rebuilt(plain)


def _text(plain: Mapping[str, Any]) -> Any:
    raw = bytes.fromhex(str(plain.get("v", "")))
    return raw.decode("utf-8", "surrogatepass").encode("utf-8", "backslashreplace").decode()


def _time(plain: Mapping[str, Any]) -> Any:
    """A time as ISO 8601, the way that results have it when they are written as JSON."""
    try:
        return to_jsonable_python(codec.decode(orjson.dumps(plain)))
    except (CorruptData, UnknownType):  # such as a time zone that this machine does not know
        return str(plain.get("v"))


def _float(plain: Mapping[str, Any]) -> Any:
    """JSON has no such numbers; they are texts, the same wherever JSON is written."""
    text = str(plain.get("v"))
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)


_SECRET_KEY = re.compile(
    r"(^|_)(password|passwd|passphrase|passcode|pwd|secret|credentials?|creds|authorization|bearer|cookie|jwt|token|pat"
    r"|apikey|api_?keys?|(access|secret|private|signing|encryption|account|auth)_?keys?|connection_?string|dsn)$"
)


def holds_secret(key: str) -> bool:
    """Whether a value of this name is a secret by its last words: ``db_password``, ``apiKey``, ``access_token``.

    Narrower than for settings of the environment: ``keys`` and ``tokens`` are what many programs work with.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").replace(" ", "_").replace(".", "_").lower()
    return _SECRET_KEY.search(words) is not None


def masked_state(shown: Any) -> Any:
    """A readable state, or any part of one, with the texts under secret names replaced by ``***``, at any depth. For
    showing; what a program asks for, it gets as it is. Values are never changed; without secrets this returns ``shown``
    itself."""
    if type(shown) is list:
        items = [masked_state(item) for item in shown]
        return shown if all(one is other for one, other in zip(items, shown, strict=True)) else items
    if type(shown) is not dict:
        return shown
    pairs = {
        key: _masked_texts(value) if isinstance(key, str) and holds_secret(key) else masked_state(value)
        for key, value in shown.items()
    }
    return shown if all(pairs[key] is value for key, value in shown.items()) else pairs


def _masked_texts(value: Any) -> Any:
    if type(value) is list:
        return [_masked_texts(item) for item in value]
    if type(value) is dict:
        return {key: item if key == TYPE else _masked_texts(item) for key, item in value.items()}
    return MASK if type(value) is str and value else value


_READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "tuple": _items,
    "set": _items,
    "frozenset": _items,
    "dict": _dict,
    "int": _integer,
    "float": _float,
    "complex": _rebuilt,
    "str": _text,
    "bytes": lambda plain: f"base64:{plain.get('v')}",
    "bytearray": lambda plain: f"base64:{plain.get('v')}",
    "datetime": _time,
    "time": _time,
    "date": _time,
    "timedelta": _time,
    "uuid": lambda plain: str(plain.get("v")),
    "decimal": lambda plain: str(plain.get("v")),
    "obj": _object,
    "ref": lambda plain: f"same as {plain.get('v')}",
}
