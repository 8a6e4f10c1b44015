"""A bundle that is changed is the old or the new one, whatever happens: SIGKILL, an I/O error or a power cut at any operation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crash import Recorder, visible
from places import TESTS

pytestmark = pytest.mark.slow

CHANGES = ("add", "stale", "export")


def crashed(what: str, how: str, number: int) -> dict[str, Any]:
    command = [sys.executable, str(TESTS / "crashes.py"), what, how, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("how", ["kill", "fail"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_ends_at_some_operation_leaves_a_bundle_and_the_next_one_cleans_up(what: str, how: str) -> None:
    found = crashed(what, how, 7)
    assert found["operations"] > 50
    assert found["faults"] == []


@pytest.mark.full
@pytest.mark.parametrize("how", ["kill", "fail"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_ends_at_any_operation_leaves_a_bundle_and_the_next_one_cleans_up(what: str, how: str) -> None:
    assert crashed(what, how, 1)["faults"] == []


@pytest.mark.parametrize("what", CHANGES)
def test_a_power_cut_leaves_the_old_bundle_or_the_new(what: str) -> None:
    found = crashed(what, "cut", 4)
    assert (found["unsafe"], found["faults"]) == (0, [])
    assert found["states"] > 300
    assert found["again"] > 1


@pytest.mark.full
@pytest.mark.parametrize("what", CHANGES)
def test_a_power_cut_leaves_the_old_bundle_or_the_new_in_every_state(what: str) -> None:
    found = crashed(what, "cut", 4096)
    assert (found["unsafe"], found["faults"]) == (0, [])


@pytest.mark.parametrize("what", ["add", "export"])
def test_without_syncs_of_folders_the_same_check_finds_unsafe_states(what: str) -> None:
    assert crashed(what, "unsynced", 1)["unsafe"] > 10


def test_the_model_keeps_what_was_synced_and_nothing_else(tmp_path: Path) -> None:
    """A recorder fed by hand: no hook in this process."""
    (tmp_path / "old").write_bytes(b"old!")
    recorder = Recorder(tmp_path)
    (tmp_path / "new").write_bytes(b"new!")
    recorder.look()
    unsynced = {json.dumps({name: str(data) for name, data in visible(tree).items()}) for _, tree in recorder.states(most=100)}
    assert len(unsynced) == 5  # no name; or a name, with the data, none of it, half of it, zeros
    with (tmp_path / "new").open("rb") as file:
        recorder.sync(file.fileno())
    assert [tree for step, tree in recorder.states(most=100) if step == recorder.step] == [
        {"old": b"old!"},
        {"old": b"old!", "new": b"new!"},
    ]
    recorder.syncs[recorder.top].append(recorder.step)  # the folder
    assert [tree for step, tree in recorder.states(most=100) if step == recorder.step] == [{"old": b"old!", "new": b"new!"}]
    recorder.close()
