"""Which endpoint an agent asks: chosen by ``base_url``, recorded without its secrets, asked again by a resume."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework import _secrets
from framework.errors import SurefootError
from framework.llm.anthropic import AnthropicProvider
from framework.llm.choose import missing_key, provider_for
from framework.llm.openai import OpenAIProvider
from framework.llm.scripted import ScriptedLLM
from framework.runner import AgentRunner
from framework.storage import codec
from framework.storage.memory import MemoryStorage
from tests.runner.agent_kit import LLM_NODE, chain, function, write_agent

URL = "http://127.0.0.1:9/v1"
SECRET_URL = "http://bob:hunter-2-hunter@127.0.0.1:9/v1?tenant=abcdefgh-1234"
SECRETS = ("hunter-2-hunter", "abcdefgh-1234", base64.b64encode(b"bob:hunter-2-hunter").decode())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    _secrets.forget_secrets()
    yield
    _secrets.forget_secrets()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The (model, base_url) of each provider that was made; each answers."""
    made: list[tuple[str, str | None]] = []

    def provider(model: str, *, base_url: str | None = None) -> ScriptedLLM:
        made.append((model, base_url))
        return ScriptedLLM(lambda messages, system, tools: "said")

    monkeypatch.setattr("framework.llm.choose.provider_for", provider)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An agent whose last step fails the first time in each process, after the model was asked."""
    graph = chain(LLM_NODE, function("send", "text", "sent", max_retries=1), {**LLM_NODE, "id": "again"})
    return write_agent(tmp_path / "a", graph)


def send_fails(text: str) -> str:
    raise ValueError("no line")


async def started(folder: Path, storage: Any, **options: Any) -> None:
    async with AgentRunner.load(folder, storage=storage, **options) as runner:
        runner.register_function("send", send_fails)
        assert "no line" in str((await runner.run({"topic": "t"}, run_id="r")).error)


def runner_for(folder: Path, storage: Any, **options: Any) -> AgentRunner:
    runner = AgentRunner.load(folder, storage=storage, **options)
    runner.register_function("send", lambda text: True)
    return runner


@pytest.mark.parametrize("way", ["resume", "recover", "fork", "run"])
async def test_a_run_goes_on_where_it_was_started(folder: Path, asked: list[tuple[str, str | None]], way: str) -> None:
    storage = MemoryStorage()
    await started(folder, storage, model="llama3", base_url=SECRET_URL)
    async with runner_for(folder, storage) as runner:
        if way == "recover":
            storage.claim_run("r", "somebody", 1e-9)
            [result] = await runner.recover()
        elif way == "fork":
            result = await runner.resume(runner.fork("r"))
        else:
            result = await (runner.resume("r") if way == "resume" else runner.run(run_id="r"))
        assert result.success, result.error
        assert asked == [("llama3", SECRET_URL), ("llama3", URL)]
        assert (await runner.run({"topic": "t"}, run_id="new")).success
    assert asked[2:] == [("claude-haiku-4-5-20251001", None)]  # a new run is this runner's own


async def test_what_the_caller_names_goes_before_what_is_recorded(
    folder: Path, asked: list[tuple[str, str | None]]
) -> None:
    storage = MemoryStorage()
    await started(folder, storage, model="llama3", base_url=URL)
    async with runner_for(folder, storage, model="qwen3", base_url="http://127.0.0.1:8/") as runner:
        assert (await runner.resume("r")).success
    fork = runner.fork("r", at=1)
    async with runner_for(folder, storage, model="qwen3") as runner:
        assert (await runner.resume(fork)).success
    async with runner_for(folder, storage, llm=ScriptedLLM(["mine"])) as runner:
        assert (await runner.resume(runner.fork("r", at=1))).output["text"] == "mine"
    assert asked[1:] == [("qwen3", "http://127.0.0.1:8/"), ("qwen3", URL)]


async def test_the_secrets_of_the_endpoint_are_in_no_record(
    tmp_path: Path, folder: Path, asked: list[tuple[str, str | None]]
) -> None:
    async with AgentRunner.load(folder, storage=f"sqlite:///{tmp_path}/runs.db", base_url=SECRET_URL) as runner:

        def send(text: str) -> str:
            raise ValueError(f"{SECRET_URL} refused Basic {SECRETS[2]}")

        runner.register_function("send", send)
        result = await runner.run({"topic": "t"}, run_id="r")
        header = codec.decode(runner.runs()[0].header)
    assert header["metadata"]["base_url"] == URL
    assert "***" in (result.error or "")
    stored = b"".join((tmp_path / name).read_bytes() for name in os.listdir(tmp_path) if name.startswith("runs.db"))
    assert b"refused Basic" in stored
    for secret in SECRETS:
        assert secret not in str(result)
        assert secret.encode() not in stored


def test_an_endpoint_speaks_openais_protocol_unless_the_model_says_anthropic() -> None:
    for model in ("claude-haiku-4-5", "llama3", "gpt-4o"):
        assert isinstance(provider_for(model, base_url=URL), OpenAIProvider)
        assert missing_key(model, URL) is None
    assert isinstance(provider_for("anthropic/claude-x", api_key="k" * 9, base_url=URL), AnthropicProvider)
    assert isinstance(provider_for("claude-x", api_key="k" * 9), AnthropicProvider)
    assert missing_key("anthropic/claude-x", URL) == missing_key("claude-x") == "ANTHROPIC_API_KEY"
    assert missing_key("gpt-4o", "https://api.openai.com/v1") == "OPENAI_API_KEY"


def test_what_is_missing_is_said_as_it_will_be_met(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner_for(folder, None, base_url=URL).validate().missing_credentials == []
    found = runner_for(folder, None, base_url=URL, model="anthropic/claude-x").validate()
    assert found.missing_credentials == ["ANTHROPIC_API_KEY"]
    monkeypatch.setenv("OPENAI_BASE_URL", URL)
    assert runner_for(folder, None, model="gpt-4o").validate().missing_credentials == []


@pytest.mark.parametrize("url", ["http://[bad", "nowhere", "http://host:port/"])
async def test_an_endpoint_that_is_none_is_a_failed_result(folder: Path, url: str) -> None:
    async with runner_for(folder, None, base_url=url) as runner:
        result = await runner.run({"topic": "t"})
    assert not result.success
    assert result.error


def test_the_provider_itself_keeps_the_secrets_of_its_url() -> None:
    provider_for("llama3", base_url=SECRET_URL)
    assert _secrets.mask(" ".join(SECRETS)) == "*** *** ***"
    with pytest.raises(SurefootError):
        provider_for("gemini/no-such-provider-here")
