from __future__ import annotations

from pathlib import Path

import pytest
from bundles import make_bundle, with_fake_engines


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_fake_engines(make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")).folder
