"""Errors of requests, in OpenAI's form."""

from typing import Any

# OpenAI's error `type` for a status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
LONGEST = 300  # characters of a message


class ApiError(Exception):
    """An error that a request gets as its answer.

    Attributes:
        status: HTTP status.
        message: one line, for a person.
        code: a word for programs, such as "model_not_found".
        param: the field of the request that is wrong.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: object,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        line = " ".join(str(message).split())
        super().__init__(line)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after
        self.message = line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
