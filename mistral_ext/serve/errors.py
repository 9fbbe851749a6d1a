"""Makes errors in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An answer with a status other than 200.

    Args:
        status: the HTTP status.
        message: a description of the error for people.
        param: the field of the request that is wrong. None: the error is not that of one field.
        code: a name of the error for programs. None: the status says enough.
        headers: additional headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}

# This header keeps OpenAI's clients from repeating a request, which would probably fail again.
_NO_RETRY = {"x-should-retry": "false"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error for a request that cannot be answered as it is."""
    return ApiError(400, message, param, code)


def no_model(message: str) -> ApiError:
    """An error for a name that neither the model nor an adapter has."""
    return ApiError(404, message, "model", "model_not_found")


def removed_model(error: Exception) -> ApiError:
    """An error for an adapter that was removed after the request for it came."""
    return no_model(f"the model was removed: {error}")


def unsupported(name: str) -> ApiError:
    """An error for a field that asks for something that this server cannot do."""
    return ApiError(400, f"{name} is not supported", name, "unsupported_parameter")


def too_busy() -> ApiError:
    """An error for a request that finds the queue full."""
    message = "the queue is full, try again later"
    return ApiError(429, message, code="queue_full", headers={"retry-after": "1"})


def shutting_down() -> ApiError:
    """An error for requests that come while the server is ending, or that it has to cut off."""
    message = "the server is shutting down"
    headers = {"retry-after": "5", "connection": "close"}
    return ApiError(503, message, code="shutting_down", headers=headers)


def out_of_order() -> ApiError:
    """An error for requests to a server whose engine has died."""
    message = "the engine has failed and needs a restart"
    return ApiError(503, message, code="engine_dead", headers=_NO_RETRY)


def filtered(category: str, param: str) -> ApiError:
    """An error for a prompt that the model judges not acceptable."""
    message = f"{param} was refused: the model takes it for {category} content"
    return bad_request(message, param, "content_filter")


def out_of_time(seconds: float) -> ApiError:
    """An error for a request that took too long."""
    message = f"the request took longer than {seconds:g} s"
    return ApiError(504, message, code="timeout", headers=_NO_RETRY)


def failed(error: Exception) -> ApiError:
    """An error for a request whose work failed in the engine."""
    message = f"the model failed: {' '.join(str(error).split()) or type(error).__name__}"
    return ApiError(500, message, code="engine_error", headers=_NO_RETRY)
