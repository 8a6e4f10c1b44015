from __future__ import annotations

from pathlib import Path

import pytest
from bundles import make_bundle

from sdruntime.bundle import Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A sound bundle made by hand, with no engine."""
    return make_bundle(tmp_path / "bundle")
