"""Exceptions of the package."""


class UnsupportedError(RuntimeError):
    """A backend that was forced cannot serve a call. The message names the op, the backend and the reason."""
