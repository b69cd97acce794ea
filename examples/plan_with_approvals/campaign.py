"""A plan with approvals and a new revision: an offer is drafted, priced, approved by a person, and sent.

Run it again and again with the same store; each run does what can be done and says what it waits for:

    python campaign.py run                     # drafts and prices, then waits for the approval
    python campaign.py pending                 # what is asked, by any process
    python campaign.py answer reject --reason "too expensive"
    python campaign.py run                     # the rejection is recorded; what depends on it is skipped
    python campaign.py replan                  # a cheaper offer as the plan's next revision; the draft is kept
    python campaign.py answer approve
    python campaign.py run                     # sends it, and archives it as a sub-graph run of its own

No key and no network: the model is scripted. ``python campaign.py demo`` does all of the above.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from framework.graph import (
    ApprovalDecision,
    ApprovalResult,
    EdgeCondition,
    EdgeSpec,
    ExecutorConfig,
    FlexibleGraphExecutor,
    Goal,
    GraphExecutor,
    GraphSpec,
    NodeSpec,
    Plan,
    PlanExecutionResult,
)
from framework.graph.checkpoint_manager import CheckpointManager
from framework.llm.scripted import ScriptedLLM
from framework.runtime import Runtime
from framework.storage import open_storage

RUN_ID = "campaign-1"
GOAL = Goal(id="offer", name="Send an offer", description="Draft an offer, price it, have it approved, send it.")


def make_plan(discount: int) -> Plan:
    """What a planner outside would write; ``discount`` in percent is what it changes after a rejection."""
    return Plan.from_json(
        {
            "id": "offer",
            "goal_id": "offer",
            "description": "An offer for one customer",
            "steps": [
                {
                    "id": "draft",
                    "description": "Write the offer",
                    "action": {"action_type": "llm_call", "prompt": "Write an offer for {customer}. Answer as JSON."},
                    "inputs": {"customer": "$customer"},
                    "expected_outputs": ["offer"],
                },
                {
                    "id": "price",
                    "description": "Work out the price",
                    "action": {
                        "action_type": "code_execution",
                        "code": "total = sum(hours) * rate * (100 - discount) // 100\nresult = total",
                    },
                    "inputs": {"discount": discount},
                    "expected_outputs": ["price"],
                },
                {
                    "id": "send",
                    "description": "Send it to the customer",
                    "action": {"action_type": "function", "function_name": "send"},
                    "inputs": {"to": "$customer", "subject": "$draft.offer.subject", "price": "$price.total"},
                    "dependencies": ["draft", "price"],
                    "requires_approval": True,
                    "approval_message": "Send this offer?",
                },
                {
                    "id": "archive",
                    "description": "File it away",
                    "action": {"action_type": "sub_graph", "graph_id": "archive"},
                    "inputs": {"document": "$send.result"},
                    "dependencies": ["send"],
                },
            ],
        }
    )


ARCHIVE = GraphSpec(
    id="archive",
    goal_id="offer",
    entry_node="label",
    nodes=[
        NodeSpec(id="label", node_type="function", input_keys=["document"], output_keys=["label"]),
        NodeSpec(id="store", node_type="function", input_keys=["label"], output_keys=["archived"]),
    ],
    edges=[EdgeSpec(id="next", source="label", target="store", condition=EdgeCondition.ON_SUCCESS)],
)


def send(to: str, subject: str, price: int, idempotency_key: str) -> str:
    """A real one would give the key to the mail service, so that a crash in between sends nothing twice."""
    print(f"  sending {subject!r} to {to} for {price} EUR (key {idempotency_key})")
    return f"{subject}, {price} EUR, to {to}"


def make_executor(url: str) -> FlexibleGraphExecutor:
    """Everything a process needs to work on the run."""
    storage = open_storage(url)
    runtime = Runtime(storage)
    manager = CheckpointManager(storage)

    def model(messages: object, system: object, tools: object) -> str:
        print("  asking the model")
        return '{"subject": "A garden for you", "text": "We plant it in spring."}'

    executor = FlexibleGraphExecutor(
        runtime, llm=ScriptedLLM(model), config=ExecutorConfig(max_concurrency=2), checkpoint_manager=manager
    )
    executor.register_function("send", send)
    graphs = GraphExecutor(runtime, checkpoint_manager=manager)
    graphs.register_function("label", lambda document: f"offer: {document}")
    graphs.register_function("store", lambda label: f"archived ({label})")
    executor.register_graph("archive", ARCHIVE, GOAL, graphs)
    return executor


def tell(result: PlanExecutionResult) -> None:
    """What came of it, in a few lines."""
    print(f"  {result.status.value}, revision {result.revision}: {result.feedback or 'done'}")
    print(f"  completed: {', '.join(result.completed_steps) or 'nothing'}; found done: {result.steps_recovered}")


async def run(url: str, discount: int, replan: bool = False) -> PlanExecutionResult:
    """Start the plan or go on with it."""
    context = {"customer": "Ada", "hours": [3, 5], "rate": 100}
    executor = make_executor(url)
    assert executor.checkpoint_manager is not None
    known = executor.checkpoint_manager.storage.find_run(RUN_ID) is not None
    plan = None if known and not replan else make_plan(discount)  # a known run's plan comes from the store
    result = await executor.execute_plan(plan, GOAL, context, run_id=RUN_ID, replan=replan)
    tell(result)
    return result


async def pending(url: str) -> None:
    """Show what is asked."""
    for request in await make_executor(url).pending_approvals(RUN_ID):
        print(f"  {request.step_id}: {request.approval_message} {request.preview}")


async def answer(url: str, decision: str, reason: str | None) -> None:
    """Answer the open request; the run goes on when it is run again."""
    executor = make_executor(url)
    for request in await executor.pending_approvals(RUN_ID):
        result = ApprovalResult(decision=ApprovalDecision(decision), reason=reason)
        await executor.answer_approval(RUN_ID, request.step_id, result, request.request_id)
        print(f"  {request.step_id}: {decision}")


async def demo(url: str) -> bool:
    """The whole story, each part as a process of its own would do it."""
    print("run:")
    await run(url, 0)
    print("pending:")
    await pending(url)
    print("answer reject:")
    await answer(url, "reject", "too expensive")
    print("run:")
    await run(url, 0)
    print("replan with a discount:")
    await run(url, 10, replan=True)
    print("answer approve:")
    await answer(url, "approve", None)
    print("run:")
    result = await run(url, 10)
    print(f"  {result.results.get('archived')}")
    return result.status.value == "completed"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("command", choices=["run", "replan", "pending", "answer", "demo"])
    parser.add_argument("decision", nargs="?", choices=["approve", "reject", "abort"], default="approve")
    parser.add_argument("--reason")
    parser.add_argument("--storage", default=f"sqlite:///{Path('campaign.db')}")
    given = parser.parse_args()
    if given.command == "demo":
        return 0 if asyncio.run(demo(given.storage)) else 1
    if given.command in ("run", "replan"):
        again = given.command == "replan"
        asyncio.run(run(given.storage, 10 if again else 0, replan=again))
    elif given.command == "pending":
        asyncio.run(pending(given.storage))
    else:
        asyncio.run(answer(given.storage, given.decision, given.reason))
    return 0


if __name__ == "__main__":
    sys.exit(main())
