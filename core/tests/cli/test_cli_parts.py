"""What a plan waits for with its sub-graphs, as the command shows it, answers it and settles it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from framework.graph.node import NodeContext
from framework.graph.plan import ExecutionStatus
from framework.storage.backend import open_storage
from tests.cli.cli_kit import Done, Site
from tests.plans.parts_kit import House, plan_of


async def waits(ctx: NodeContext) -> Any:
    return await ctx.wait_for("go")


def lost() -> None:
    raise TimeoutError("no reply")


async def pays(ctx: NodeContext) -> Any:
    return await ctx.call("pay", lost, policy="ask")


async def sleeps(ctx: NodeContext) -> Any:
    await ctx.sleep(10_000)


def execute(site: Site, *steps: str) -> Any:
    """What one call of the plan's run comes to."""
    with open_storage(site.url) as store:
        house = House(store, concurrency=3)
        for name, body in (("waits", waits), ("pays", pays), ("sleeps", sleeps)):
            house.graph(name, body)
        return asyncio.run(house.run(plan_of(*steps) if steps else None))


def test_a_plan_shows_what_its_sub_graphs_wait_for(site: Site, here: Callable[..., Done]) -> None:
    assert execute(site, "waits", "pays", "sleeps").status is ExecutionStatus.AWAITING_APPROVAL
    screen = here("runs", "show", "r").out
    assert "waits#1: the signal go (run r/waits#1)" in screen
    assert "pays#1: pays#1/1 to be settled, whose effect is unknown (run r/pays#1)" in screen
    assert "sleeps#1: sleeps until" in screen
    assert "surefoot runs send 'r/waits#1' go '<JSON>'" in screen
    assert "surefoot runs settle 'r/pays#1' 'pays#1/1' --done '<JSON>'" in screen
    [first, *_] = here("runs", "show", "r", "-o", "json").document["resume"]["waiting"]
    assert first["run"].startswith("r/")
    assert "paused" in here("runs", "list").out


def test_the_plan_takes_what_its_sub_graphs_wait_for(site: Site, here: Callable[..., Done]) -> None:
    execute(site, "waits", "pays")
    refused = here("runs", "send", "r", "stop", "1")
    assert refused.code == 1
    assert "'go' (run 'r/waits#1')" in refused.err
    assert here("runs", "send", "r", "go", "7").code == 0
    settled = here("runs", "settle", "r", "pays#1/1", "--done", '"by hand"', "-o", "json").document
    assert (settled["run_id"], settled["call"], settled["action"]) == ("r/pays#1", "pays#1/1", "done")
    assert settled["resume_command"] == "surefoot resume r", "the part goes on with the whole"
    result = execute(site)
    assert (result.status, result.results["waits_y"]) == (ExecutionStatus.COMPLETED, 7)
    assert result.results["pays_y"] == "by hand"


def test_a_part_that_was_cancelled_is_shown_so(site: Site, here: Callable[..., Done]) -> None:
    execute(site, "waits", "pays")
    assert here("runs", "cancel", "r/waits#1", "--yes").code == 0
    assert here("runs", "settle", "r", "pays#1/1", "--done", '"by hand"').code == 0
    assert execute(site).completed_steps == ["pays"]
    screen = here("runs", "show", "r").out
    assert "waits#1: was cancelled; it goes on when the plan is called (run r/waits#1)" in screen
    assert "It waits for a person: 'waits#1' was cancelled; it goes on" in " ".join(screen.split())


def test_a_call_of_a_part_with_the_id_of_one_of_the_plans_is_settled(site: Site, here: Callable[..., Done]) -> None:
    with open_storage(site.url) as store:
        house = House(store, keep_journal=True)
        house.graph("pay", pays)
        house.executor.register_function("paid", lambda: "paid", effects=True)
        own = {"id": "pay", "action": {"action_type": "function", "function_name": "paid"}}
        shop = {"id": "shop", "action": {"action_type": "sub_graph", "graph_id": "pay"}, "dependencies": ["pay"]}
        asyncio.run(house.run(plan_of(own, shop)))
    settled = here("runs", "settle", "r", "pay#1/1", "--done", '"by hand"', "-o", "json").document
    assert settled["run_id"] == "r/shop#1"
