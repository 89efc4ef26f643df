"""``F.scaled_dot_product_attention`` on this library's CPU kernels, for every model of the process, untouched."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from torch.nn import attention

from mmkernels import _native

__all__ = ["Activation", "activate", "deactivate"]

_NAME = "mmkernels"
_LOCK = threading.Lock()


class _Handle:
    """What torch's registry keeps while its attention is ours."""

    def remove(self) -> None:
        _door("serve_torch_attention")(False)


def _register() -> _Handle:
    _door("serve_torch_attention")(True)
    return _Handle()


def _door(name: str) -> Any:
    if not _HAS_REGISTRY:
        raise RuntimeError("activate: expected a torch with a registry of attention implementations; got an older one")
    door = _native.door(name)
    if door is None:
        raise RuntimeError(f"activate: expected the compiled library of mmkernels; got none: {_native.reason()}")
    return door


_HAS_REGISTRY = hasattr(attention, "register_flash_attention_impl")
if _HAS_REGISTRY:
    attention.register_flash_attention_impl(_NAME, register_fn=_register)


class Activation:
    """Counts the calls of torch's attention since `activate`; as a context manager it ends what that began."""

    def __init__(self, before: str | None) -> None:
        self._before = before  # the implementation that this one took the place of
        self._start = _counts()

    @property
    def served(self) -> dict[str, int]:
        """Calls that this library's kernels ran, "forward" and "backward"."""
        return {direction: calls for (direction, reason), calls in self._calls().items() if reason is None}

    @property
    def left(self) -> dict[tuple[str, str], int]:
        """Calls that torch's own kernels ran, by direction and reason."""
        return {(d, reason): calls for (d, reason), calls in self._calls().items() if reason is not None and calls}

    def _calls(self) -> dict[tuple[str, str | None], int]:
        return {key: calls - self._start[key] for key, calls in _counts().items()}

    def __str__(self) -> str:
        lines = [f"served  {direction}: {calls} calls" for direction, calls in self.served.items()]
        lines += [f"left    {direction}: {calls} calls: {why}" for (direction, why), calls in self.left.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._before == _NAME:  # another activation's
            return
        deactivate()
        if self._before is not None:
            attention.activate_flash_attention_impl(self._before)


def activate() -> Activation:
    """Serve ``F.scaled_dot_product_attention`` on the CPU with this library's kernels, forward and backward.

    Through torch's registry (``torch.nn.attention.activate_flash_attention_impl("mmkernels")`` does the same), so that
    every model of the process that calls it is served, in eager mode, under autocast and compiled. Results are
    torch's within rounding: output, log-sum-exp and gradients have its layouts, and its errors are raised. Calls that
    these kernels do not take, or that are slower here, run torch's own kernel; `Activation.left` says how many, and
    why. Calls that torch serves by other means, as with dropout or a mask that requires a gradient, stay as they are.

    Applying it twice changes nothing. It is for all threads; torch's registry has one implementation at a time, and one
    of CUDA that was active (FA3, FA4) is not, until the block ends.

    Returns:
        An `Activation` that counts. As a context manager, ``with activate() as calls: ...``, it deactivates at the end
        of the block what was not active before.

    Raises:
        RuntimeError: the compiled library is not available, or torch has no such registry.

    Example:
        >>> x = torch.randn(1, 8, 64, 32)
        >>> with activate() as calls:
        ...     y = F.scaled_dot_product_attention(x, x, x)
        >>> calls.served
        {'forward': 1, 'backward': 0}
    """
    with _LOCK:
        _door("serve_torch_attention")
        before = attention.current_flash_attention_impl()
        if before != _NAME:
            attention.activate_flash_attention_impl(_NAME)
        return Activation(before)


def deactivate() -> None:
    """Give torch's attention back to its own kernels, bit for bit; changes nothing where they have it."""
    with _LOCK:
        if _HAS_REGISTRY and attention.current_flash_attention_impl() == _NAME:
            attention.restore_flash_attention_impl()


def _counts() -> dict[tuple[str, str | None], int]:
    return {(direction, reason): calls for direction, reason, calls in _door("count_torch_attention")()}
