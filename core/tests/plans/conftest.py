"""Fixtures of the tests of plans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plans.plan_kit import Places


@pytest.fixture(params=["sqlite", "file"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Places]:
    url = f"sqlite:///{tmp_path}/runs.db" if request.param == "sqlite" else f"file://{tmp_path}/store"
    made = Places(url)
    yield made
    for store in made.stores:
        store.close()
