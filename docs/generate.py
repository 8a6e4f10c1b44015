"""The parts of the documentation that follow from the code, between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

python docs/generate.py           rewrite them
python docs/generate.py --check   exit with 1 if one is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from sdruntime.verification.report import limit_name
from sdruntime.verification.tolerance import TOLERANCES

ROOT = Path(__file__).resolve().parent.parent


def limits() -> str:
    """Return the limits of every precision as a table."""
    lines = [
        "| precision | component: PSNR | cosine | largest error, relative | image: PSNR | SSIM |",
        "|---|---|---|---|---|---|",
    ]
    for name, held in TOLERANCES.items():
        relative = f"{held.relative:.0e}".replace("e-0", "e-") if held.relative < 1 else "–"
        lines.append(
            f"| {limit_name(name)} | {held.psnr:g} dB | {held.cosine:g} | {relative} | {held.picture_psnr:g} dB | {held.ssim:g} |"
        )
    return "\n".join(lines)


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "docs/verification.md": {"limits": limits},
}


def generated(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """Return the page with its generated parts replaced. Raises ValueError if the page lacks the markers of a part."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page or end not in page:
            raise ValueError(f"{begin} or {end} is missing")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{part()}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> int:
    check, stale = "--check" in sys.argv[1:], False
    for path, parts in PARTS.items():
        page = (ROOT / path).read_text(encoding="utf-8")
        new = generated(page, parts)
        if new != page and check:
            stale = True
            print(f"{path} is out of date: run python docs/generate.py", file=sys.stderr)
        elif new != page:
            (ROOT / path).write_text(new, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
