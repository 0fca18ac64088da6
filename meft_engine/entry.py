"""How training scripts get a `MeftEngine`: `initialize`, or `enable` for scripts that stay as they are."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from meft_engine.config import MeftConfigError, find_block
from meft_engine.engine import MeftEngine


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` that honours the ``"meft"`` block.

    Takes what ``deepspeed.initialize`` takes and returns what it returns: ``(engine, optimizer, dataloader,
    scheduler)``.
    Without a block, or with ``"enabled": false``, it *is* ``deepspeed.initialize``.

    Raises:
        MeftConfigError: for a bad block, or a combination that cannot work.
    """
    was_enabled = "__new__" in DeepSpeedEngine.__dict__
    enable()
    try:
        return deepspeed.initialize(*args, **kwargs)
    finally:
        if not was_enabled:
            disable()


def enable() -> None:
    """Make ``deepspeed.initialize`` honour the ``"meft"`` block from now on, whoever calls it.

    DeepSpeed names its engine class in code, so the class itself decides: constructing a ``DeepSpeedEngine`` with an
    enabled block makes a :class:`MeftEngine`. Everything else about DeepSpeed stays as it is.
    """
    DeepSpeedEngine.__new__ = staticmethod(_new_engine)


def disable() -> None:
    """Undo :func:`enable`."""
    if "__new__" in DeepSpeedEngine.__dict__:
        del DeepSpeedEngine.__new__


def _new_engine(cls: type, *args: Any, **kwargs: Any) -> DeepSpeedEngine:
    config = kwargs.get("config")
    block = find_block(config) if isinstance(config, dict) else None
    if block is None or issubclass(cls, MeftEngine):
        return object.__new__(cls)
    if cls is not DeepSpeedEngine:
        raise MeftConfigError(
            f'an enabled "meft" block cannot be used with {cls.__name__}; '
            "use a plain model (no PipelineModule, no hybrid engine), or set meft.enabled to false"
        )
    return object.__new__(MeftEngine)
