"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is answered with an error. status: HTTP; code: for programs; param: which field is at fault."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def kind(self) -> str:
        """OpenAI's `type` of an error with this status."""
        if self.status == 429:
            return "rate_limit_error"
        if self.status >= 500:
            return "timeout_error" if self.status == 504 else "server_error"
        return "not_found_error" if self.status == 404 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come back, where waiting helps."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400 of one field."""
    return ApiError(400, message, code=code, param=param)


__all__ = ["ApiError", "bad_request"]
