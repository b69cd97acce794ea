"""Large answers of calls, over every store: above 50 MB they are stored; above a store's limit refused, naming it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.graph.node import NodeContext
from framework.storage.backend import open_storage
from framework.storage.interface import MAX_VALUE_BYTES, Storage
from tests.journal.journal_kit import Bench

LARGE = 52_000_000


@pytest.fixture(params=["memory", "sqlite", "files"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    urls = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/runs.db", "files": f"file://{tmp_path}/runs"}
    with open_storage(urls[request.param]) as opened:
        yield opened


@pytest.mark.parametrize(
    "storage",
    ["sqlite", *(pytest.param(other, marks=pytest.mark.slow) for other in ("memory", "files"))],
    indirect=True,
)
async def test_an_answer_above_50_megabytes_is_stored_and_answered(storage: Storage) -> None:
    made: list[str] = []

    def fetch() -> dict[str, Any]:
        made.append("fetch")
        return {"text": "x" * LARGE, "bytes": b"\x00\xff"}

    async def stop() -> None:
        made.append("stop")
        if made.count("stop") == 1:
            raise asyncio.CancelledError  # the step ends here, as far as one process can end by itself

    async def body(ctx: NodeContext) -> list[object]:
        found = await ctx.call("fetch", fetch)
        await ctx.call("stop", stop)
        return [len(found["text"]), set(found["text"]), found["bytes"]]

    bench = Bench(storage)
    await bench.cancelled(body)
    [largest] = [len(row.record) for row in storage.read_journal("run") if len(row.record) > 1_000]
    assert largest > LARGE
    result = await bench.run(body)
    assert result.error is None
    assert (result.output.get("value"), made) == ([LARGE, {"x"}, b"\x00\xff"], ["fetch", "stop", "stop"])


async def test_an_answer_above_the_limit_is_refused_naming_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a smaller limit; the store's own refusal of 500 MB is in the contract of stores."""
    limit = 10_000
    for name, module in list(sys.modules.items()):
        ours = name.startswith(("framework.graph.", "framework.storage."))
        if ours and getattr(module, "MAX_VALUE_BYTES", None) == MAX_VALUE_BYTES:
            monkeypatch.setattr(module, "MAX_VALUE_BYTES", limit)
    sizes = [limit + 1, 10]

    async def body(ctx: NodeContext) -> int:
        return len(await ctx.call("fetch", lambda: "x" * sizes.pop(0)))

    bench = Bench(storage)
    result = await bench.run(body)
    assert result.error is not None
    assert "call 'fetch'" in result.error
    assert "10,000 (MAX_VALUE_BYTES)" in result.error
    assert all(len(row.record) < limit for row in storage.read_journal("run"))
    assert storage.verify().ok
    result = await bench.run(body)
    assert (result.output.get("value"), sizes) == (10, []), result.error
