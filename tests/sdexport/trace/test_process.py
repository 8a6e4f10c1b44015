"""A component's process: its errors come through as they were, its death is reported as what it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from generators import whole

import sdruntime.errors
from sdexport import errors
from sdexport.trace.component import ComponentJob
from sdexport.trace.process import run_job
from sdruntime.backends.base.building import Stage
from sdruntime.system.process import _from_message, _to_message, peak_memory


@pytest.fixture
def job(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path) -> ComponentJob:
    """The text encoder, whose trace is kept already."""
    out = tmp_path / "text_encoder"
    out.mkdir()
    return ComponentJob(
        checkpoint=str(sd1_checkpoint), component="text_encoder", precision="fp32", allow_pickle=False, out=str(out)
    )


def test_a_job_makes_the_component_and_tells_its_peak(job: ComponentJob, sd1_bundle: Path) -> None:
    events = whole(run_job(job))
    names = [event.name for event in events if isinstance(event, Stage)]
    assert list(dict.fromkeys(names)) == ["kept trace", "precision", "weights", "done"]
    assert isinstance(events[-1], int)
    assert 10e6 < events[-1] < 1e9
    for name in ("model.onnx", "model.onnx.data"):
        assert (Path(job.out) / name).read_bytes() == (sd1_bundle / "text_encoder" / name).read_bytes()


def test_the_errors_of_a_job_come_through(job: ComponentJob, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(job.checkpoint, tmp_path / "spoilt"))
    (spoilt / "vae" / "config.json").unlink()
    wrong = ComponentJob(checkpoint=str(spoilt), component="unet", precision="fp32", allow_pickle=False, out=job.out)
    with pytest.raises(errors.CheckpointError, match="1 fault") as caught:
        whole(run_job(wrong))
    assert caught.value.faults == ("vae/config.json is missing",)


@pytest.mark.parametrize(
    "error",
    [
        errors.ExportError("unet: no"),
        errors.PrecisionError("weights: odd", ["a: too large", "b: too large"]),
        sdruntime.errors.OutOfSpace("the disk is full"),
        errors.EnvironmentFault("no torch"),
    ],
)
def test_an_error_crosses_the_pipe_unchanged(error: Exception) -> None:
    found = _from_message(_to_message(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def replaced_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", code], **more))


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", errors.ProcessKilled, "ended by SIGKILL: the system was probably out of memory"),
        ("import os; os.kill(os.getpid(), 11)", errors.ProcessKilled, "ended by SIGSEGV"),
        ("import sys; print('odd', file=sys.stderr); sys.exit(7)", errors.ExportError, "failed with code 7: odd"),
        ("pass", errors.ExportError, "its process ended without a result"),
        ("raise KeyError('nobody expected')", errors.ExportError, "failed with code 1: KeyError: 'nobody expected'"),
        ("print('{\"sta', end='', flush=True); import os; os.kill(os.getpid(), 9)", errors.ProcessKilled, "SIGKILL"),
    ],
)
def test_a_death_is_told_as_what_it_was(
    job: ComponentJob, monkeypatch: pytest.MonkeyPatch, code: str, kind: type, said: str
) -> None:
    replaced_child(monkeypatch, code)
    with pytest.raises(kind, match=said) as caught:
        whole(run_job(job))
    assert str(caught.value).startswith("text_encoder: ")


def test_a_job_that_is_left_ends_its_process(job: ComponentJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    stage = '{"event": {"name": "trace"}}'
    replaced_child(
        monkeypatch,
        f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); print('{stage}', flush=True); time.sleep(60)",
    )
    events = run_job(job)
    next(events)
    events.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_process_ends_with_its_parent() -> None:
    """The child reads the end of its standard input, which the parent's death closes."""
    code = "import sdruntime.system.process as p, time; p.serve(lambda *_: time.sleep(60), errors=(), memory=MemoryError())"
    quiet = subprocess.DEVNULL
    child = subprocess.Popen([sys.executable, "-c", code, "{}"], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
    child.communicate(timeout=30)  # closes its input
    assert child.returncode == 1


def test_peak_memory_is_plausible() -> None:
    assert 10e6 < peak_memory() < 64e9
