"""What the two distributions, the README and the changelog say of each other."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from places import ROOT

import sdexport
import sdruntime

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every line of the README's shell blocks that calls one of the two command lines."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line[0] in ("sdexport", "sdruntime")]


def test_versions_agree_and_stand_in_the_changelog() -> None:
    assert sdexport.__version__ == sdruntime.__version__
    assert f"## {sdruntime.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_both_wheels_name_the_licence_and_carry_its_text() -> None:
    import tomllib

    for folder in (ROOT, ROOT / "runtime"):
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
        assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "runtime" / "LICENSE").read_bytes()
    runtime = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [re.split(r"[<>=]", each)[0] for each in runtime["dependencies"]] == ["numpy"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_lowest_versions_that_are_promised_are_those_that_are_tested() -> None:
    """All but torch's, of which there is one version in both environments, and what only some systems need."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    promised = dict(each.split(">=") for each in wanted if ">=" in each and ";" not in each)
    pinned = dict(line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines())
    assert pinned.keys() == promised.keys()
    assert f"torch=={pinned.pop('torch')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert [name for name, pin in pinned.items() if not f"{pin}.".startswith(f"{promised[name]}.")] == []


def test_the_generated_parts_of_the_documentation_are_what_the_code_says() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_commands_of_the_readme_parse(command: list[str]) -> None:
    from sdexport.cli.main import main
    from sdruntime.cli.parser import parser

    program, *arguments = command
    if program == "sdruntime":
        assert callable(parser().parse_args(arguments).run)
    else:
        name, *rest = arguments
        assert main.commands[name].make_context(name, rest).params


def test_the_readme_shows_commands_and_pictures_that_are_there() -> None:
    assert len(commands()) >= 5
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert len(targets) >= 5
    assert [target for target in targets if not (ROOT / target).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert f"\n{target}: " in makefile


def test_contributing_names_every_folder_and_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in (ROOT / "runtime" / "sdruntime", ROOT / "sdexport"):
        rooms = {place.parent.name for place in package.glob("*/__init__.py")}
        assert {room for room in rooms if f"| `{room}/` |" not in text} == set()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    files = [f"/{path}" for path in listed] or [f"/{path.relative_to(ROOT).as_posix()}" for path in ROOT.rglob("*")]
    named = {name for name in re.findall(r"`([\w./-]+\.(?:py|md|toml|txt))`", text) if not re.search("NAME|MODULE", name)}
    assert len(named) >= 30
    assert {name for name in named if not any(path.endswith(f"/{name}") for path in files)} == set()
