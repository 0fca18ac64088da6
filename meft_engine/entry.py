"""How training scripts get a `MeftEngine`: `initialize`, or `enable` for scripts that stay as they are."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from meft_engine import quantized_base
from meft_engine.config import MeftConfigError, find_block
from meft_engine.engine import MeftEngine

_plain_init = DeepSpeedEngine.__init__


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` that honours the ``"meft"`` block.

    Takes what ``deepspeed.initialize`` takes and returns what it returns: ``(engine, optimizer, dataloader,
    scheduler)``.
    Without a block, or with ``"enabled": false``, it *is* ``deepspeed.initialize``.

    Raises:
        MeftConfigError: for a bad block, or a combination that cannot work.
    """
    was_enabled = DeepSpeedEngine.__init__ is _init_engine
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
    DeepSpeedEngine.__init__ = _init_engine
    quantized_base.allow()


def disable() -> None:
    """Undo :func:`enable`."""
    if DeepSpeedEngine.__init__ is _init_engine:
        DeepSpeedEngine.__init__ = _plain_init
        quantized_base.disallow()


@functools.wraps(_plain_init)
def _init_engine(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
    # Not by __new__: CPython leaves a class whose __new__ was replaced and deleted unable to take arguments.
    config = kwargs.get("config")
    block = find_block(config) if isinstance(config, dict) else None
    if block is None or isinstance(self, MeftEngine):
        _plain_init(self, *args, **kwargs)
        return
    if type(self) is not DeepSpeedEngine:
        raise MeftConfigError(
            f'an enabled "meft" block cannot be used with {type(self).__name__}; '
            "use a plain model (no PipelineModule, no hybrid engine), or set meft.enabled to false"
        )
    self.__class__ = MeftEngine
    self.__init__(*args, **kwargs)
