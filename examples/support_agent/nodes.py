"""The support agent's own steps: orders, refunds and the outbox."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from framework.runner import node_function

ORDERS = Path(__file__).parent / "orders.json"
LIMIT_EUROS = 50.0
"""A person decides on refunds above this."""


def _outbox() -> Path:
    folder = Path(os.environ.get("SUPPORT_OUTBOX", "outbox"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@node_function("look_up")
def look_up(message: str) -> dict[str, Any]:
    """The order whose number the message names."""
    orders = json.loads(ORDERS.read_text(encoding="utf-8"))
    named = re.search(r"[A-Z]-\d+", message)
    if named is None or named[0] not in orders:
        return {"order": {"id": None, "state": "unknown"}, "decision": "Ask which order it is about."}
    return {"order": {"id": named[0], **orders[named[0]]}, "decision": "Nothing was to be decided."}


@node_function("propose")
def propose(order: dict[str, Any]) -> dict[str, Any]:
    """The whole price for what came broken, a tenth for what came late."""
    share = {"delivered, broken": 1.0, "delivered late": 0.1}.get(order["state"], 0.0)
    refund = round(order.get("paid", 0.0) * share, 2)
    return {"refund": refund, "needs_person": refund > LIMIT_EUROS, "decision": f"{refund} euros may be due."}


@node_function("pay_back")
def pay_back(order: dict[str, Any], refund: float) -> dict[str, Any]:
    """Write a payment order. It is named after what it is for, and asked for twice, as after a kill between the payment
    and its checkpoint, it is paid once. A payment service takes such a name as its idempotency key."""
    key = f"refund-{order['id']}"
    path = _outbox() / f"{key}.json"
    receipt = {"key": key, "euros": refund, "to": order["customer"]}
    path.write_text(json.dumps(receipt), encoding="utf-8")
    with (_outbox() / "payments.log").open("a+", encoding="utf-8") as log:
        log.seek(0)
        paid = f"{key} {refund}\n"
        if paid not in log.readlines():
            log.write(paid)
    return {"receipt": receipt, "decision": f"We pay {refund} euros back."}


@node_function("decline")
def decline(order: dict[str, Any]) -> dict[str, Any]:
    """What the customer is told when a person said no."""
    return {"decision": "We cannot pay anything back."}


@node_function("reply")
def reply(order: dict[str, Any], draft: str) -> str:
    """Send the answer: here, into the outbox."""
    path = _outbox() / f"reply-{order['id'] or 'unknown'}.txt"
    path.write_text(draft + "\n", encoding="utf-8")
    return path.name
