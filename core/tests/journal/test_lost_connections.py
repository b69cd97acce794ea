"""Effects whose connection was lost, by real clients and a real server: unknown, unless nothing can have been sent."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import smtplib
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from framework.errors import LLMRefused, LLMUnavailable, ToolOutcomeUnknown
from framework.graph.checkpoint_manager import CheckpointManager
from framework.graph.executor import GraphExecutor
from framework.graph.journal import CallSpec, request_hash
from framework.graph.journal_failures import leaves_unknown
from framework.graph.node import NodeSpec
from framework.graph.worker_errors import CONNECTION, TIMEOUT, transient_kind
from framework.llm.provider import ToolResult, ToolUse
from framework.runner.tool_registry import ToolRegistry
from framework.runtime.core import Runtime
from framework.storage.memory import MemoryStorage
from tests.graph.executor_kit import graph_of
from tests.journal.journal_kit import GOAL, Life, Outside, Rows

WAYS = ["drop", "cut", "delay"]
PATIENCE = 0.05
"""Seconds that a client waits for an answer; one that is delayed never comes."""


class Server:
    """An HTTP server that takes each request whole, and then drops the connection, cuts its reply, or gives none."""

    def __init__(self) -> None:
        self.way = "drop"
        self.reached = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/pay"
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            request = b""
            while b"\r\n\r\n" not in request or not request.endswith(b"x"):
                part = connection.recv(65536)
                if not part:
                    break
                request += part
            if not request:  # the last one, which ends the server
                return connection.close()
            self.reached += 1
            if self.way == "delay":
                self._held.append(connection)
                continue
            if self.way == "cut":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npaid")
            connection.close()

    def close(self) -> None:
        """Take what had come, and end."""
        if not self._thread.is_alive():
            return
        with socket.create_connection(self._socket.getsockname()):
            pass
        self._thread.join(20)
        for each in (*self._held, self._socket):
            each.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with contextlib.closing(made):
        yield made


def by_urllib(url: str) -> bytes:
    with urllib.request.urlopen(url, b"x", timeout=PATIENCE) as reply:
        return bytes(reply.read())


def by_http_client(url: str) -> bytes:
    with contextlib.closing(http.client.HTTPConnection(httpx.URL(url).netloc.decode(), timeout=PATIENCE)) as connection:
        connection.request("POST", "/pay", b"x")
        return bytes(connection.getresponse().read())


async def by_httpx(url: str) -> bytes:
    async with httpx.AsyncClient() as client:
        return (await client.post(url, content=b"x", timeout=httpx.Timeout(20, read=PATIENCE))).content


async def by_task_group(url: str) -> bytes:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(0))
        asked = group.create_task(by_httpx(url))
    return asked.result()


class PaymentError(Exception):
    """What a program says instead."""


def from_cause(url: str) -> bytes:
    try:
        return by_http_client(url)
    except (OSError, http.client.HTTPException) as error:
        raise PaymentError("no receipt") from error


def from_context(url: str) -> bytes:
    try:
        return by_http_client(url)
    except (OSError, http.client.HTTPException):
        raise PaymentError("no receipt") from None


CLIENTS = [by_urllib, by_http_client, by_httpx, by_task_group, from_cause, from_context]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
async def test_an_effect_that_lost_its_connection_is_not_made_again_by_itself(
    server: Server, client: Callable[[str], Any], way: str
) -> None:
    server.way = way
    manager = CheckpointManager(MemoryStorage())
    executor = GraphExecutor(Runtime(MemoryStorage()), checkpoint_manager=manager)
    executor.register_function("pay", lambda: client(server.url), effects=True)
    node = NodeSpec(id="pay", node_type="function", max_retries=3, retry_delay_seconds=0, output_keys=["y"])
    result = await executor.execute(graph_of(node), GOAL, {}, run_id="r")
    assert result.paused_at == "pay", result.error
    manager.settle("r", manager.journal("r")[0].id, done="receipt")
    assert (await executor.execute(graph_of(node), GOAL, {}, run_id="r")).output["y"] == "receipt"
    server.close()
    assert server.reached == 1


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
async def test_a_refused_connection_proves_that_nothing_happened(client: Callable[[str], Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/pay"
    with pytest.raises(Exception) as refused:
        value = client(url)
        await value
    assert not leaves_unknown(refused.value)


async def used(registry: ToolRegistry, name: str) -> ToolResult:
    given = registry.get_async_executor()(ToolUse("1", name, {}))
    assert not isinstance(given, ToolResult)
    return await given


@pytest.mark.parametrize("way", WAYS)
async def test_a_registered_tool_that_lost_its_connection_says_that_it_is_unknown(server: Server, way: str) -> None:
    server.way = way

    async def pay() -> str:
        """Pay."""
        return (await by_task_group(server.url)).decode()

    with ToolRegistry() as registry:
        registry.register_function(pay, effects=True)
        result = await used(registry, "pay")
    server.close()
    assert (result.is_error, result.outcome_unknown, server.reached) == (True, True, 1)


def client_class(name: str, module: str, *bases: type[Exception]) -> type[Exception]:
    """A class as a client that is not installed here has it, and one that a program derives from it."""
    base = type(name, bases or (Exception,), {"__module__": module})
    return type("Own", (base,), {"__module__": "program"})


CUT_OFF = [
    ("urllib3.exceptions", "ProtocolError", CONNECTION),
    ("urllib3.exceptions", "ReadTimeoutError", TIMEOUT),
    ("urllib3.exceptions", "IncompleteRead", CONNECTION),
    ("urllib3.exceptions", "MaxRetryError", CONNECTION),
    ("requests.exceptions", "ConnectionError", CONNECTION),
    ("requests.exceptions", "ReadTimeout", TIMEOUT),
    ("requests.exceptions", "ChunkedEncodingError", CONNECTION),
    ("aiohttp.client_exceptions", "ServerDisconnectedError", None),
    ("aiohttp.client_exceptions", "ClientConnectionError", CONNECTION),
    ("aiohttp.client_exceptions", "ClientPayloadError", CONNECTION),
    ("redis.exceptions", "ConnectionError", CONNECTION),
    ("redis.exceptions", "TimeoutError", TIMEOUT),
]
NOT_SENT = [
    ("urllib3.exceptions", "NewConnectionError"),
    ("urllib3.exceptions", "ConnectTimeoutError"),
    ("requests.exceptions", "ConnectTimeout"),
    ("aiohttp.client_exceptions", "ClientConnectorError"),
    ("aiohttp.client_exceptions", "ConnectionTimeoutError"),
]


@pytest.mark.parametrize(("module", "name", "kind"), CUT_OFF)
def test_the_words_of_other_clients_for_a_lost_connection(module: str, name: str, kind: str | None) -> None:
    lost = client_class(name, module)("gone")
    assert leaves_unknown(lost)
    assert kind is None or transient_kind(lost) == kind
    assert leaves_unknown(ExceptionGroup("all", [ValueError("no"), ExceptionGroup("some", [lost])]))


@pytest.mark.parametrize(("module", "name"), NOT_SENT)
def test_the_words_of_other_clients_for_no_connection(module: str, name: str) -> None:
    # As urllib3 wraps what the system said, without "from", and requests what urllib3 says, as its argument.
    unsent = client_class(name, module)("no way")
    unsent.__context__ = TimeoutError("timed out")
    outer = client_class("MaxRetryError", "urllib3.exceptions")("often tried")
    outer.reason = outer.__cause__ = unsent  # type: ignore[attr-defined]
    said = client_class("ConnectionError", "requests.exceptions")(outer)
    said.__context__ = outer
    assert not leaves_unknown(unsent)
    assert not leaves_unknown(said)
    assert leaves_unknown(ExceptionGroup("both", [said, ConnectionResetError()]))


def test_the_same_names_elsewhere_mean_other_things() -> None:
    for module, name in (
        ("xmlrpc.client", "ProtocolError"),
        ("tarfile", "ReadError"),
        ("pymongo.errors", "WriteError"),
    ):
        assert not leaves_unknown(client_class(name, module)("no"))


UNKNOWN = [
    urllib.error.URLError(TimeoutError("timed out")),
    urllib.error.URLError(ConnectionResetError()),
    http.client.RemoteDisconnected("gone"),
    http.client.IncompleteRead(b"paid"),
    OSError(errno.ETIMEDOUT, "timed out"),
    ssl.SSLEOFError("cut"),
    smtplib.SMTPServerDisconnected("gone"),
    subprocess.TimeoutExpired("pay", 5),
    ToolOutcomeUnknown("who knows"),
    LLMUnavailable("gone"),
]
KNOWN = [
    urllib.error.URLError(ConnectionRefusedError()),
    urllib.error.URLError(socket.gaierror(-2, "unknown name")),
    urllib.error.URLError("unknown url type"),
    ssl.SSLCertVerificationError("expired"),
    ssl.SSLWantReadError(),
    FileNotFoundError("no such file"),
    LLMRefused("no"),
    ExceptionGroup("both", [ValueError(), KeyError("k")]),
    httpx.ConnectTimeout("slow"),
]


@pytest.mark.parametrize("error", UNKNOWN, ids=lambda error: type(error).__name__)
def test_what_may_have_happened(error: Exception) -> None:
    assert leaves_unknown(error)


@pytest.mark.parametrize("error", KNOWN, ids=[str(number) for number in range(len(KNOWN))])
def test_what_did_not_happen(error: Exception) -> None:
    assert not leaves_unknown(error)


def raised(*errors: Exception) -> Exception:
    """The last of them, each raised while the one before was handled."""

    def step(number: int) -> None:
        if number == 0:
            raise errors[0]
        try:
            step(number - 1)
        except Exception:  # noqa: BLE001 - whichever it is
            raise errors[number]  # noqa: B904 - said by nothing but its context

    try:
        step(len(errors) - 1)
    except Exception as error:  # noqa: BLE001 - it is what is asked for
        return error
    raise AssertionError("nothing was raised")


def test_an_earlier_try_that_was_cut_off_counts_though_the_last_one_was_refused() -> None:
    assert leaves_unknown(raised(httpx.ReadTimeout("slow"), ConnectionRefusedError()))
    assert leaves_unknown(raised(TimeoutError(), ConnectionRefusedError()))
    last = httpx.ConnectError("refused")
    last.__cause__ = raised(TimeoutError(), ConnectionRefusedError())
    assert leaves_unknown(last)


def test_an_earlier_try_that_was_refused_proves_nothing_about_the_last_one() -> None:
    assert leaves_unknown(raised(ConnectionRefusedError(), TimeoutError()))
    assert not leaves_unknown(raised(ConnectionRefusedError(), ValueError("no such account")))


async def test_a_time_limit_of_its_own_cuts_off_what_it_was_doing() -> None:
    with pytest.raises(TimeoutError) as late:
        async with asyncio.timeout(0):
            try:
                raise ConnectionRefusedError
            except ConnectionRefusedError:
                await asyncio.Event().wait()  # the second try
    assert leaves_unknown(late.value)


def test_circles_and_very_long_chains_come_to_an_end() -> None:
    one, two = ValueError("one"), KeyError("two")
    one.__cause__, two.__cause__ = two, one
    assert not leaves_unknown(one)
    two.args = (one, ConnectionResetError())
    assert leaves_unknown(one)
    chain = ValueError("last")
    for _ in range(5_000):
        chain, chain.__cause__ = ValueError("next"), chain
    assert leaves_unknown(chain), "what is too much to be looked at proves nothing"


async def test_what_a_step_was_handling_before_the_call_says_nothing_about_it() -> None:
    rows, outside = Rows(), Outside()

    def refund(key: str) -> str:
        outside.answer("refund", key)
        raise ValueError("no such payment")

    async def work(life: Life) -> Any:
        try:
            raise TimeoutError("of something else")
        except TimeoutError:

            async def make(key: str) -> str:
                return refund(key)

            return await life.journal.call("refund", request_hash("refund", ""), make, CallSpec("ask"))

    for _ in range(2):
        with pytest.raises(ValueError, match="no such payment"):
            await Life(rows, outside).run(work)
    assert outside.calls == 1, "it is known to have failed"


async def test_what_a_step_was_handling_before_a_tool_was_used_says_nothing_about_it() -> None:
    def refund() -> str:
        """Refund."""
        raise ValueError("no such payment")

    async def refund_later() -> str:
        """Refund."""
        return refund()

    with ToolRegistry() as registry:
        registry.register_function(refund, effects=True)
        registry.register_function(refund_later, effects=True)
        try:
            raise TimeoutError("of something else")
        except TimeoutError:
            results = [registry.get_executor()(ToolUse("1", "refund", {}))]
            results.append(await used(registry, "refund_later"))
    assert [(each.is_error, each.outcome_unknown) for each in results] == [(True, False)] * 2
