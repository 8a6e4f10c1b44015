"""What the strict fakes raise where a real library would return garbage, crash, or quietly do something slow."""

from __future__ import annotations


class Strictness(AssertionError):
    """A use that the real library need not notice: a missing synchronisation, a freed address, a truncated pointer."""


class BadCall(Strictness, TypeError):
    """A call that no signature of the real binding admits. The real one raises TypeError, and so does this one."""


class NotModelled(Strictness):
    """A member that this version has, and the fake no behaviour for: add it to the fake."""
