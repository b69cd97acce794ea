"""MCP servers, each a real process: over its pipes and over HTTP on the loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from framework import _secrets
from framework.llm.provider import Tool, ToolResult, ToolUse
from framework.runner.tool_registry import ToolRegistry
from tests.runner.keys_kit import Calls, run_durably

PROGRAM = Path(__file__).with_name("mcp_server_program.py")
KEY = "sk-mcp-0987654321fedcba"


@pytest.fixture(autouse=True)
def no_secrets() -> Iterator[None]:
    yield
    _secrets.forget_secrets()


@pytest.fixture
def registry() -> Iterator[ToolRegistry]:
    with ToolRegistry() as made:
        yield made


def stdio_entry(folder: Path) -> dict[str, Any]:
    return {
        "name": "local",
        "transport": "stdio",
        "command": sys.executable,
        "args": [str(PROGRAM), "stdio"],
        "env": {"MCP_TEST_DIR": str(folder)},
    }


@pytest.fixture
def stdio(tmp_path: Path) -> dict[str, Any]:
    """The entry of a stdio server that is the test's own."""
    return stdio_entry(tmp_path)


class WebServer:
    """The test server over HTTP, in a process of its own; started again, it has the same port."""

    def __init__(self, folder: Path, mode: str, auth: str = "") -> None:
        self.folder = folder
        self.mode = mode
        self.environment = {**os.environ, "MCP_TEST_DIR": str(folder), "MCP_TEST_AUTH": auth}
        self.port = 0
        self.start()

    def start(self) -> None:
        told = self.folder / "port"
        told.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), self.mode, "port"],
            env={**self.environment, "MCP_TEST_PORT": str(self.port)},
            stderr=subprocess.DEVNULL,
        )
        self.port = int(wait_for(told, self.process))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def entry(self, **more: Any) -> dict[str, Any]:
        path = "mcp" if self.mode == "http" else "sse"
        url = f"http://127.0.0.1:{self.port}/{path}"
        auth = self.environment["MCP_TEST_AUTH"]
        return {"name": "web", "transport": self.mode, "url": url, "headers": {"Authorization": auth}, **more}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ToolRegistry, Path]]:
    """A stdio server that several tests share, and its folder: starting one takes most of a test's time."""
    folder = tmp_path_factory.mktemp("local")
    with ToolRegistry() as made:
        assert made.register_mcp_server(stdio_entry(folder)) == 14
        yield made, folder


@pytest.fixture(scope="module")
def shared_web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """An HTTP server that several tests share; it wants a key."""
    server = WebServer(tmp_path_factory.mktemp("web"), "http", f"Bearer {KEY}")
    yield server
    server.kill()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Callable[..., WebServer]]:
    started: list[WebServer] = []

    def start(mode: str = "http") -> WebServer:
        started.append(WebServer(tmp_path, mode))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> str:
    """The text of a file that another process is about to leave."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} was never written"
        assert process is None or process.poll() is None, "the server ended"
        time.sleep(0.005)
    return path.read_text()


def call(registry: ToolRegistry, tool: str, /, **arguments: Any) -> ToolResult:
    return registry.get_executor()(ToolUse("call-1", tool, arguments))


def text(registry: ToolRegistry, tool: str, /, **arguments: Any) -> str:
    result = call(registry, tool, **arguments)
    assert not result.is_error, result.content
    return result.content


def error(registry: ToolRegistry, tool: str, /, **arguments: Any) -> str:
    result = call(registry, tool, **arguments)
    assert result.is_error, result.content
    return str(json.loads(result.content)["error"])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One whose parent is dead may wait to be reaped, and where nobody does that, for ever.
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    return stat.rpartition(")")[2].split()[0] != "Z"


def each_kind_of_answer(registry: ToolRegistry) -> None:
    assert json.loads(text(registry, "add", a=1, b=2)) == {"result": 3}
    assert text(registry, "greet", name="Ada") == "Hello, Ada"
    assert json.loads(text(registry, "weather", city="Bonn")) == {"city": "Bonn", "degrees": 21.5}
    assert text(registry, "several") == "one\ntwo"
    picture = json.loads(text(registry, "picture"))["content"]
    assert picture == [
        {"type": "text", "text": "a dot"},
        {"type": "image", "data": "iVBORw==", "mimeType": "image/png"},
    ]
    assert error(registry, "refuse") == "not today"
    assert "fail" in error(registry, "fail", why="rain")
    assert "'b' is missing" in error(registry, "add", a=1)


# --- both transports --------------------------------------------------------------------------------------------------


def test_the_tools_of_a_stdio_server(local: tuple[ToolRegistry, Path]) -> None:
    registry, _ = local
    tools = registry.get_tools()
    assert tools["add"].description == "Add two numbers."
    assert tools["add"].parameters["required"] == ["a", "b"]
    assert [tools[name].effects for name in ("add", "weather", "fail")] == [True, False, True]
    each_kind_of_answer(registry)


def test_the_tools_of_an_http_server(registry: ToolRegistry, shared_web: WebServer) -> None:
    assert registry.register_mcp_server({**shared_web.entry(), "transport": "streamable_http"}) == 14
    each_kind_of_answer(registry)


@pytest.mark.slow
def test_the_tools_of_a_server_of_the_older_sse_transport(
    registry: ToolRegistry, web: Callable[..., WebServer]
) -> None:
    assert registry.register_mcp_server(web("sse").entry()) == 14
    each_kind_of_answer(registry)


@pytest.mark.parametrize("mode", ["stdio", "http", pytest.param("sse", marks=pytest.mark.slow)])
async def test_a_server_is_told_the_idempotency_key_of_each_call(
    registry: ToolRegistry, mode: str, stdio: dict[str, Any], web: Callable[..., WebServer]
) -> None:
    assert await asyncio.to_thread(registry.register_mcp_server, stdio if mode == "stdio" else web(mode).entry()) == 14
    executor = registry.get_executor()

    def blocking() -> str:
        return executor(ToolUse("1", "keyed", {})).content

    async def work() -> str:
        return (await executor.acall(ToolUse("1", "keyed", {}))).content

    node = Calls({"in a thread": blocking, "in the loop": work})
    await run_durably(node, run_id="run 1 ü")
    assert len(set(node.values.values())) == 2
    for name, value in node.values.items():
        in_meta, in_headers = value.rsplit(" ", 1)
        assert in_meta.startswith(f"run 1 ü/work#1/{name}#")
        assert in_headers == ("None" if mode == "stdio" else quote(in_meta, safe="/#"))
    assert blocking() == "None None", "outside of a call there is no key"


async def test_calls_run_at_the_same_time_and_from_any_loop(local: tuple[ToolRegistry, Path]) -> None:
    registry, _ = local
    executor = registry.get_executor()

    def in_another_loop(name: str, other: str) -> ToolResult:
        return asyncio.run(executor.acall(ToolUse(name, "meet", {"name": name, "other": other})))

    met = await asyncio.gather(
        executor.acall(ToolUse("a", "meet", {"name": "a", "other": "b"})),
        asyncio.to_thread(in_another_loop, "b", "c"),
        asyncio.to_thread(executor, ToolUse("c", "meet", {"name": "c", "other": "a"})),
    )
    assert [each.content for each in met] == ["a met b", "b met c", "c met a"]


@pytest.mark.parametrize("mode", ["stdio", "http"])
async def test_cancelling_a_call_reaches_the_server(
    registry: ToolRegistry, local: tuple[ToolRegistry, Path], shared_web: WebServer, mode: str
) -> None:
    registry.register_mcp_server(shared_web.entry())
    tools, folder = local if mode == "stdio" else (registry, shared_web.folder)
    running = asyncio.create_task(tools.get_executor().acall(ToolUse("1", "hang", {"name": "cancel"})))
    await asyncio.to_thread(wait_for, folder / "cancel.began")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.to_thread(wait_for, folder / "cancel.cancelled")


@pytest.mark.parametrize("mode", [pytest.param("stdio", marks=pytest.mark.slow), "http"])
def test_a_call_that_takes_too_long_is_told_to_stop_and_the_server_goes_on(
    registry: ToolRegistry, stdio: dict[str, Any], shared_web: WebServer, tmp_path: Path, mode: str
) -> None:
    entry, folder = (stdio, tmp_path) if mode == "stdio" else (shared_web.entry(), shared_web.folder)
    registry.register_mcp_server({**entry, "timeout_seconds": 2.0})
    before = text(registry, "pid")
    said = error(registry, "hang", name="late")
    assert "Tool 'hang' of MCP server" in said
    assert "no answer within 2 s" in said
    wait_for(folder / "late.cancelled")
    assert text(registry, "pid") == before


# --- servers that die -------------------------------------------------------------------------------------------------


def killed_during_a_call(registry: ToolRegistry, tmp_path: Path, kill: Callable[[int], None]) -> str:
    def watch() -> None:
        kill(int(wait_for(tmp_path / "h.began")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = error(registry, "hang", name="h")
    watcher.join()
    return said


def test_a_stdio_server_killed_during_a_call_is_named_and_started_again(
    registry: ToolRegistry, stdio: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register_mcp_server(stdio)
    first = text(registry, "pid")
    said = killed_during_a_call(registry, tmp_path, lambda pid: os.kill(pid, signal.SIGKILL))
    assert "Tool 'hang' of MCP server 'local'" in said
    assert "unknown" in said
    second = text(registry, "pid")
    assert second != first
    assert text(registry, "pid") == second
    assert "MCP server 'local' had ended; it is started again" in caplog.text


@pytest.mark.slow
def test_many_calls_to_a_dead_server_start_it_once(
    registry: ToolRegistry, stdio: dict[str, Any], tmp_path: Path
) -> None:
    registry.register_mcp_server(stdio)
    killed_during_a_call(registry, tmp_path, lambda pid: os.kill(pid, signal.SIGKILL))

    async def all_at_once() -> set[str]:
        uses = [ToolUse(str(number), "pid", {}) for number in range(5)]
        return {each.content for each in await asyncio.gather(*map(registry.get_executor().acall, uses))}

    assert len(asyncio.run(all_at_once())) == 1


@pytest.mark.slow
def test_an_http_server_killed_during_a_call_is_reached_again(
    registry: ToolRegistry, web: Callable[..., WebServer], tmp_path: Path
) -> None:
    server = web()
    registry.register_mcp_server(server.entry())
    assert "Tool 'hang' of MCP server 'web'" in killed_during_a_call(registry, tmp_path, lambda _: server.kill())
    assert "MCP server 'web'" in error(registry, "pid")
    server.start()
    assert text(registry, "pid") == str(server.process.pid)


@pytest.mark.slow
def test_a_server_that_does_not_come_back_gives_an_error_for_each_call(
    registry: ToolRegistry, stdio: dict[str, Any], tmp_path: Path
) -> None:
    program = tmp_path / "once.py"
    program.write_text(f"""
import pathlib, runpy, sys
pathlib.Path({str(tmp_path / "ran")!r}).open("x").close()
sys.argv = [{str(PROGRAM)!r}, "stdio"]
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
""")
    registry.register_mcp_server({**stdio, "args": [str(program)]})
    killed_during_a_call(registry, tmp_path, lambda pid: os.kill(pid, signal.SIGKILL))
    for _ in range(2):
        said = error(registry, "pid")
        assert "MCP server 'local'" in said
        assert "FileExistsError" in said  # what it wrote on its stderr


# --- processes and their output ---------------------------------------------------------------------------------------


def test_cleanup_ends_the_process_and_later_calls_say_so(registry: ToolRegistry, stdio: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    registry.register_mcp_server(stdio)
    pid = int(text(registry, "pid"))
    registry.cleanup()
    assert not is_alive(pid)
    assert "was closed" in error(registry, "pid")
    registry.cleanup()
    assert not [thread for thread in set(threading.enumerate()) - before if "mcp" in thread.name]


def test_a_program_that_forgets_to_clean_up_leaves_no_process_and_no_warning(tmp_path: Path) -> None:
    program = f"""
import sys
from framework.llm.provider import ToolUse
from framework.runner.tool_registry import ToolRegistry
registry = ToolRegistry()
registry.register_mcp_server({{"name": "local", "transport": "stdio", "command": sys.executable,
    "args": [{str(PROGRAM)!r}, "stdio"], "env": {{"MCP_TEST_DIR": {str(tmp_path)!r}}}}})
print(registry.get_executor()(ToolUse("1", "pid", {{}})).content)
registry.get_executor()(ToolUse("1", "shout", {{"text": "not for the terminal"}}))
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=PROGRAM.parents[2],
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not is_alive(int(ended.stdout))


def test_what_a_server_writes_on_stderr_goes_to_the_log_masked(
    local: tuple[ToolRegistry, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    _secrets.register_secret(KEY)
    registry, _ = local
    deadline = time.monotonic() + 30
    with caplog.at_level(logging.INFO, logger="framework.runner.mcp_client"):
        text(registry, "shout", text=f"using {KEY} now")
        while "now" not in caplog.text:
            assert time.monotonic() < deadline, "nothing was logged"
            time.sleep(0.005)
    assert "MCP server 'local' says: using *** now" in caplog.text
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_call_that_runs_during_cleanup_gets_an_error(
    registry: ToolRegistry, stdio: dict[str, Any], tmp_path: Path
) -> None:
    registry.register_mcp_server(stdio)
    assert "'local'" in killed_during_a_call(registry, tmp_path, lambda _: registry.cleanup())
    wait_for(tmp_path / "h.began")


@pytest.mark.slow
def test_a_program_that_is_killed_leaves_no_server_behind(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from framework.llm.provider import ToolUse
from framework.runner.tool_registry import ToolRegistry
registry = ToolRegistry()
registry.register_mcp_server({{"name": "local", "transport": "stdio", "command": sys.executable,
    "args": [{str(PROGRAM)!r}, "stdio"], "env": {{"MCP_TEST_DIR": {str(tmp_path)!r}}}}})
print(registry.get_executor()(ToolUse("1", "pid", {{}})).content, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, cwd=PROGRAM.parents[2]
    )
    assert killed.returncode == -signal.SIGKILL
    ended_soon(int(killed.stdout))


def ended_soon(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.005)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_values_from_the_environment_reach_the_server_and_nobody_else(
    registry: ToolRegistry,
    stdio: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WEATHER_KEY", KEY)
    monkeypatch.setenv("NOT_FOR_IT", "inherited")
    stdio["env"]["SERVICE"] = "${WEATHER_KEY}"
    stdio["env"]["REGION"] = "${NO_SUCH_REGION:-north}"
    with caplog.at_level(logging.DEBUG):
        registry.register_mcp_server(stdio)
        assert text(registry, "variable", name="REGION") == "north"
        assert text(registry, "variable", name="NOT_FOR_IT") == "(not set)"
        # The server has it, and what it says of it is masked.
        assert text(registry, "variable", name="SERVICE") == "***"
    assert KEY not in caplog.text


def test_headers_are_sent_and_never_shown(
    registry: ToolRegistry,
    shared_web: WebServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = shared_web
    monkeypatch.setenv("WEB_TOKEN", KEY)
    with caplog.at_level(logging.DEBUG, logger="framework"):
        assert registry.register_mcp_server(server.entry(headers={"Authorization": "Bearer ${WEB_TOKEN}"})) == 14
        assert text(registry, "greet", name="Ada") == "Hello, Ada"
        wrong = server.entry(headers={"Authorization": "Bearer wrong-token-of-mine"})
        assert registry.register_mcp_server({**wrong, "name": "second"}) == 0
    assert "MCP server 'second' is not used" in caplog.text
    assert KEY not in caplog.text
    assert "wrong-token-of-mine" not in caplog.text


def test_the_session_context_fills_parameters_whatever_the_model_says(
    registry: ToolRegistry, shared_web: WebServer
) -> None:
    registry.register_mcp_server(shared_web.entry())
    registry.register("own", Tool("own", "", {"properties": {"session_id": {}}}), lambda arguments: arguments)
    registry.set_session_context(session_id="s-1", unknown="x")
    assert text(registry, "who", question="why", session_id="forged") == "s-1:why"
    assert "session_id" not in registry.get_tools()["who"].parameters["properties"]
    assert registry.get_tools()["who"].parameters["required"] == []
    assert text(registry, "own") == "{}"  # only the tools of MCP servers are given it
    registry.set_session_context()
    assert "session_id" in registry.get_tools()["who"].parameters["properties"]
    assert "'session_id' is missing" in error(registry, "who")


def test_a_name_that_is_taken_gets_the_servers_name_in_front(
    registry: ToolRegistry, shared_web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    entry = shared_web.entry()
    registry.register("add", Tool("add", "Mine"), lambda _: "mine")
    assert registry.register_mcp_server(entry) == 14
    assert text(registry, "add") == "mine"
    assert json.loads(text(registry, "web_add", a=1, b=2)) == {"result": 3}
    assert "there is a tool 'add' already; its own is called 'web_add'" in caplog.text
    assert registry.register_mcp_server(entry) == 13  # `web_add` is taken too
    assert "tool 'add' is left out" in caplog.text


def test_a_policy_for_a_tool_that_the_server_does_not_have_is_a_warning(
    registry: ToolRegistry, shared_web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    policies = {"weather": "ask", "Shout": "fail", "no_such_thing": "rerun"}
    assert registry.register_mcp_server(shared_web.entry(policies=policies)) == 14
    shout, other = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "MCP server 'web': policies names a tool 'Shout' that it does not have" in shout
    assert "'fail' counts for none; did you mean 'shout'?" in shout
    assert "'no_such_thing'" in other
    assert "its tools are add, fail," in other
    tools = registry.get_tools()
    assert (tools["weather"].policy, tools["shout"].policy, tools["shout"].effects) == ("ask", None, True)


def test_an_mcp_servers_file_connects_all_that_work_and_warns_of_the_rest(
    registry: ToolRegistry, shared_web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ends.py").write_text("import sys\nsys.exit('no database')\n")
    file = tmp_path / "mcp_servers.json"
    file.write_text(
        json.dumps(
            {
                "servers": [
                    {"name": "absent", "transport": "stdio", "command": "no-such-program-anywhere"},
                    {"name": "ends", "transport": "stdio", "command": "python", "args": ["ends.py"]},
                    {"name": "nobody", "transport": "http", "url": "http://127.0.0.1:1/mcp"},
                    {"name": "odd", "transport": "pigeon"},
                    shared_web.entry(),
                ]
            }
        )
    )
    assert registry.load_mcp_config(file) == 14
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 4
    assert "'absent' is not used" in warnings[0]
    assert "'no-such-program-anywhere'" in warnings[0]
    assert "'ends' is not used" in warnings[1]
    assert "no database" in warnings[1]
    assert "'nobody' is not used: http://127.0.0.1:1/mcp" in warnings[2]
    assert f"{file.resolve()}: servers[3].transport: 'pigeon'" in warnings[3]


def test_a_server_that_never_answers_is_given_up(
    registry: ToolRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mute.py").write_text(
        "import os, pathlib, sys\npathlib.Path('pid').write_text(str(os.getpid()))\nsys.stdin.read()\n"
    )
    entry = {
        "name": "mute",
        "command": sys.executable,
        "args": ["mute.py"],
        "cwd": str(tmp_path),
        "connect_timeout_seconds": 1.0,
    }
    assert registry.register_mcp_server(entry) == 0
    assert "it gave no answer within 1 s" in caplog.text
    assert not is_alive(int((tmp_path / "pid").read_text()))
