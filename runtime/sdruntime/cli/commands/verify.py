"""The command `verify`: check a bundle against its reference outputs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sdruntime.cli.progress import columns_of
from sdruntime.cli.terminal import Failed, check_output, document

if TYPE_CHECKING:
    from sdruntime.bundle.bundle import Bundle
    from sdruntime.cli.progress import Reporter
    from sdruntime.verification.report import Check, ImageCheck


def verify(options: argparse.Namespace) -> None:
    """Run `sdruntime verify`."""
    from sdruntime.backends.base.engine import EngineOptions
    from sdruntime.bundle.bundle import Bundle
    from sdruntime.errors import VerificationFailed
    from sdruntime.verification.html import write_page
    from sdruntime.verification.verify import report_of
    from sdruntime.verification.verify import verify as checks

    if options.html:
        check_output(options.html, "--html")
    bundle = Bundle.open(options.bundle)
    engine_options = EngineOptions(device=options.device, threads=options.threads)
    report = report_of(bundle, with_progress(bundle, checks(bundle, options=engine_options), options.progress))
    if options.html:
        write_page(report, options.html)
    if not options.json:
        options.progress.print("\n".join(report.lines(columns_of(sys.stdout))))
    if not report.passed:
        raise Failed(VerificationFailed(bundle.folder, report.faults()), **report.document())
    if options.json:
        document(**report.document())


def with_progress(bundle: Bundle, checks: Iterable[Check | ImageCheck], reporter: Reporter) -> Iterator[Check | ImageCheck]:
    """Yield the checks as they are done, and show the engine of the last one as progress."""
    from sdruntime.verification.verify import subjects

    total, seen = subjects(bundle), set()
    reporter.show("verify", total=total)
    for check in checks:
        seen.add(check.subject)
        reporter.show("verify", check.subject, done=min(len(seen), total), total=total)
        yield check
