"""What a model does with the attention weights that its layers always ask for: keep them, or drop them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch


class _Weights:
    """Said by a layer or a model around the calls of its attentions. torch.compile cannot trace a context variable."""

    def __init__(self) -> None:
        self._said: ContextVar[str | None] = ContextVar("mmkernels_weights", default=None)
        self._said_while_compiling: str | None = None

    def are(self, what: Literal["kept", "dropped"]) -> bool:
        said = self._said_while_compiling if torch.compiler.is_compiling() else self._said.get()
        return said == what

    @contextlib.contextmanager
    def said_to_be(self, what: Literal["kept", "dropped"]) -> Iterator[None]:
        if torch.compiler.is_compiling():
            before, self._said_while_compiling = self._said_while_compiling, what
            try:
                yield
            finally:
                self._said_while_compiling = before
        else:
            token = self._said.set(what)
            try:
                yield
            finally:
                self._said.reset(token)


weights = _Weights()
