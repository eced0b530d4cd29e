"""What a client is told when there is no image: an HTTP status and the API's JSON."""

from typing import Any

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""By status; others are invalid requests below 500 and errors of the server from there on."""
SERVER_ERROR = 500


class ApiError(Exception):
    """A request that is not answered with an image.

    Attributes:
        status: of HTTP.
        message: one sentence.
        param: field of the request that is wrong, if it is one.
        code: short name of what is wrong.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or None

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response, as OpenAI's API has it."""
        other = "server_error" if self.status >= SERVER_ERROR else "invalid_request_error"
        error = dict(
            message=self.message,
            type=TYPES.get(self.status, other),
            param=self.param,
            code=self.code,
        )
        return {"error": error}
