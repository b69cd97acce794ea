"""A durable agent in one page: stop it at any moment, start it again, and it goes on where it was."""

import asyncio

from framework.graph import EdgeSpec, Goal, GraphExecutor, GraphSpec, NodeSpec
from framework.graph.checkpoint_manager import CheckpointManager
from framework.runtime import Runtime
from framework.schemas.checkpoint import CheckpointConfig
from framework.storage import open_storage


async def charge(amount: int) -> str:
    print(f"charging {amount} euros ...")
    await asyncio.sleep(0.5)  # stands for something slow and expensive
    return f"receipt for {amount} euros"


charging = NodeSpec(id="charge", node_type="function", input_keys=["amount"], output_keys=["receipt"])
shipping = NodeSpec(id="ship", node_type="function", input_keys=["receipt"], output_keys=["answer"])
then = EdgeSpec(id="then", source="charge", target="ship")
graph = GraphSpec(id="orders", goal_id="fulfil", entry_node="charge", nodes=[charging, shipping], edges=[then])
goal, input_data = Goal(id="fulfil", name="Fulfil", description="Charge once, ship once."), {"amount": 42}


async def main() -> None:
    with open_storage("sqlite:///quickstart.db") as storage:
        runtime = Runtime(storage)
        checkpoint_manager = CheckpointManager(storage, CheckpointConfig())  # opt-in
        executor = GraphExecutor(runtime=runtime, checkpoint_manager=checkpoint_manager)
        executor.register_function("charge", charge)
        executor.register_function("ship", lambda receipt: f"shipped, with the {receipt}")
        result = await executor.execute(graph, goal, input_data)
        print(f"{result.run_id}: {result.output['answer']}")
        result = await executor.execute(graph, goal, input_data, run_id="order-42")
        print(f"{result.run_id}: {result.output['answer']}; {result.steps_recovered} steps were done already")


asyncio.run(main())
