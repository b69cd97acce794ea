"""The pipeline's own steps: a folder in, a table out."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from framework.runner import node_function

INBOX = Path(__file__).parent / "inbox"


@node_function("list")
def list_documents(folder: str = str(INBOX)) -> dict[str, Any]:
    """The names of the documents, in order, and an empty table."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; give the folder of the documents as the input 'folder'.")
    return {"folder": folder, "waiting": sorted(each.name for each in path.glob("*.txt")), "rows": [], "unclear": []}


@node_function("take")
def take(folder: str, waiting: list[str]) -> dict[str, Any]:
    """The first that waits, with its text."""
    name = waiting[0]
    return {"name": name, "text": (Path(folder) / name).read_text(encoding="utf-8"), "waiting": waiting[1:]}


@node_function("file")
def file(
    name: str, rows: list[dict[str, Any]], unclear: list[str], sender: Any = None, date: Any = None, total: Any = None
) -> dict[str, Any]:
    """One more row; or one more name, when something could not be read."""
    if sender is None or date is None or not isinstance(total, int | float):
        return {"rows": rows, "unclear": [*unclear, name]}
    return {"rows": [*rows, {"document": name, "sender": sender, "date": date, "total": total}], "unclear": unclear}


@node_function("summarise")
def summarise(rows: list[dict[str, Any]], unclear: list[str]) -> str:
    """Write the table and say what it comes to."""
    path = Path(os.environ.get("PIPELINE_TABLE", "invoices.csv"))
    with path.open("w", encoding="utf-8", newline="") as table:
        writer = csv.DictWriter(table, ["document", "sender", "date", "total"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    total = sum(row["total"] for row in rows)
    return f"{len(rows)} invoices, {total:.2f} euros in all; to look at: {', '.join(unclear) or 'none'}"
