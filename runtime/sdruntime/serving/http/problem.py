"""Errors as HTTP answers: {"error": {"message", "type", "code"}}, the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from sdruntime.errors import EnvironmentFault, QueueFull, SdruntimeError, SettingError, UnknownName, plain
from sdruntime.serving.job import CANCELLED, Failure

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY = 5  # seconds


class Problem(Exception):
    """A request that is refused. `code`: a reason for programs; `retry`: seconds after which it may be sent again."""

    def __init__(self, status: int, message: str, code: str = "", *, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry = status, code, retry

    @property
    def document(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code or None}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="sdruntime", charset="UTF-8"'
        return headers


def problem_of(error: Exception) -> Problem:
    """Return the answer to an error of the runtime."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, QueueFull):
        return Problem(429, str(error), "queue_full", retry=RETRY)
    if isinstance(error, UnknownName) and error.args and str(error).startswith("unknown model"):
        return Problem(404, str(error), "model_not_found")
    if isinstance(error, SettingError):
        return Problem(422, str(error), "invalid_setting")
    if isinstance(error, EnvironmentFault):
        return Problem(501, str(error), "not_installed")
    if isinstance(error, SdruntimeError):
        return Problem(503, str(error), "unavailable", retry=RETRY)
    return Problem(500, f"an unexpected error ({type(error).__name__}): {plain(error)}", "internal")


def problem_of_failure(failure: Failure) -> Problem:
    """Return the answer for a job that failed."""
    if failure.code == CANCELLED:
        return Problem(409, failure.message, "cancelled")
    if failure.code == 2:
        return Problem(422, failure.message, failure.reason or "invalid_setting")
    if failure.reason in ("worker_lost", "queue_timeout", "queue_full", "closed"):
        return Problem(503, failure.message, failure.reason, retry=RETRY)
    return Problem(500, failure.message, failure.reason or "failed")
