"""What the kill test runs: ``python runner_program.py FOLDER STORAGE run|resume|recover``; prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

from framework.runner import AgentRunner


async def main(folder: str, storage: str, command: str) -> None:
    async with AgentRunner.load(folder, storage=storage, mock_mode=True) as runner:
        if command == "run":
            results = [await runner.run({"topic": "rivers"}, run_id="report-1")]
        elif command == "resume":
            results = [await runner.resume("latest")]
        else:
            results = await runner.recover()
    print(json.dumps([asdict(result) for result in results], default=str))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
