"""Text that users read is plain English: phrases of CONTRIBUTING's glossary that must not come back."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

# what the phrase is, and what to write
PHRASES = {
    r"\bpictures?\b": "image",
    r"\bdr(?:ew|awn|awing|awings)\b|\bdraws? (?:an?|the|one|it|images?|with|from)\b": "generate",
    r"\b(?:is|was|were|are|been|be) asked\b|\basked (?:for|of)\b": "request, requested",
    r"\bthe former\b": "the existing bundle, the previous version",
    r"\bgiven back\b|\bgives? (?:it|them|memory) back\b": "released",
    r"\bleft out\b|\bleaves? (?:it|them|that|this|\w+ing) out\b|\bleaving out\b": "omit, skip, default",
    r"\b(?:is|are|was|were|be|been) told\b|\btells? (?:of|what|which|how|whether|that)\b": "report, show, list",
    r"\banew\b": "again, rebuild",
    r"\bgolden numbers?\b": "reference outputs",
    r"\bin company\b|\bmany callers\b": "concurrent requests",
    r"\bhas none\b|\bis no Python\b": "is not available, non-Python",
    r"\b(?:is|are) here\b(?! (?:refused|never|followed))|\bnothing here\b": "installed, available, on this machine",
    r"\bwhat (?:it|they|PyTorch) answered\b": "reference outputs",
    r"\bevery word that\b|\bmends? it\b|\bwhat mends\b": "how to fix it",
}
TOPS = ("docs", "deploy", "engines", "benchmarks", "reports", "runtime")
PAGES = sorted(path for pattern in ("*.md", "examples/*/*.md", *(f"{top}/*.md" for top in TOPS)) for path in ROOT.glob(pattern))
SOURCES = sorted(path for top in ("runtime/sdruntime", "sdexport") for path in (ROOT / top).rglob("*.py"))


def faults(text: str) -> list[str]:
    """Return each phrase of the text that is listed, with what to write instead."""
    flat = " ".join(text.split())
    found = (
        (match.group(), instead) for phrase, instead in PHRASES.items() for match in re.finditer(phrase, flat, re.IGNORECASE)
    )
    return [f"{phrase!r}: write {instead}" for phrase, instead in found]


def prose(page: str) -> str:
    """Return a Markdown page without its code, and CONTRIBUTING without its glossary."""
    page = page.partition("\n## Language\n")[0]
    page = re.sub(r"^```.*?^```|<!--.*?-->", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", page)


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and text of what users read: strings of several words, and the docstrings of click commands."""
    tree = ast.parse(source)
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, scopes) and node.body)
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings and " " in node.value:
            yield node.lineno, node.value
        elif isinstance(node, ast.FunctionDef) and any("click.command" in ast.unparse(each) for each in node.decorator_list):
            yield node.lineno, ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_in_plain_words(path: Path) -> None:
    assert faults(prose(path.read_text(encoding="utf-8"))) == []


def test_messages_and_help_texts_are_in_plain_words() -> None:
    found = []
    for path in SOURCES:
        for line, text in literals(path.read_text(encoding="utf-8")):
            found += [f"{path.relative_to(ROOT)}:{line}: {fault}" for fault in faults(text)]
    assert found == []


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and text of what contributors read: docstrings and comments."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""


def test_docstrings_and_comments_are_in_plain_words() -> None:
    """A field of the format, in backticks, keeps its name; noise is drawn; and "it has none" may be said of a list."""
    found = []
    for path in SOURCES:
        for line, text in comments(path.read_text(encoding="utf-8")):
            told = [
                fault for fault in faults(re.sub(r"`[^`]*`", "", text)) if not re.search(r"^'(dr[aeo]w|has none)", fault, re.I)
            ]
            found += [f"{path.relative_to(ROOT)}:{line}: {fault}" for fault in told]
    assert found == []


# participles that name a thing by what happened to it, where `tensor`, `engine` or `image` says what it is
VAGUE = {"asked", "each", "found", "given", "made", "told"}


def variables(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each variable and parameter."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def test_variables_are_named_by_what_they_are() -> None:
    vague = []
    for path in SOURCES:
        names = variables(path.read_text(encoding="utf-8"))
        vague += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in names if name in VAGUE]
    assert vague == []


ROOMS = ("runtime", "sdexport", "tests", "docs", "engines", "examples", "benchmarks", "reports")
# a file of this project: with its folders, or the bare name of a source file; and a module with its package
FILE = re.compile(r"(?<![\w/.{}<*-])(?:(?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|hpp|c|h|md)|[\w-]+\.(?:py|cpp|hpp))\b")
MODULE = re.compile(r"\b(?:sdexport|sdruntime)(?:\.(?!hp?p?\b)[a-z_]\w*)+")
WRITTEN_LATER = ("numpy.py",)  # the file of a hostile checkpoint


def project_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    return set(listed) or {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")}


def strangers(text: str, files: set[str]) -> Iterator[str]:
    """Yield each file or module in a comment that is not in the project."""
    for match in FILE.finditer(text):
        name, (top, slash, _) = match.group(), match.group().partition("/")
        in_project = not slash or top in ROOMS
        if in_project and name not in WRITTEN_LATER and not any(file == name or file.endswith(f"/{name}") for file in files):
            yield name
    for match in MODULE.finditer(text):
        parts = match.group().replace("sdruntime", "runtime.sdruntime", 1).split(".")
        homes = (
            (f"{'/'.join(parts[:count])}{end}", parts[count : count + 1])
            for count in range(len(parts), 0, -1)
            for end in (".py", "/__init__.py")
        )
        home, attribute = next(((home, rest) for home, rest in homes if home in files), ("", parts))
        if attribute and not (home and re.search(rf"\b{attribute[0]}\b", (ROOT / home).read_text(encoding="utf-8"))):
            yield match.group()


def test_comments_name_files_and_modules_of_the_project() -> None:
    files, found = project_files(), []
    for path in (*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))):
        for line, text in comments(path.read_text(encoding="utf-8")):
            found += [f"{path.relative_to(ROOT)}:{line}: {name} does not exist" for name in strangers(text, files)]
    for path in sorted((ROOT / "runtime" / "capi").rglob("*.[ch]pp")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            comment = line[line.index("//") :] if "//" in line else ""
            found += [f"{path.relative_to(ROOT)}:{number}: {name} does not exist" for name in strangers(comment, files)]
    assert found == []


def test_a_file_that_does_not_exist_is_found() -> None:
    text = "see runtime/old.py, image.py and sdruntime.nowhere.thing; not other/old.py, sdruntime.errors.plain or numpy.py"
    assert list(strangers(text, {"runtime/sdruntime/errors.py"})) == ["runtime/old.py", "image.py", "sdruntime.nowhere.thing"]


def test_a_phrase_is_found() -> None:
    assert faults("the picture\nis left out") == ["'picture': write image", "'left out': write omit, skip, default"]
    assert faults(prose("`picture` and\n```\na picture\n```\nan image")) == []
