"""Lets transformers' Trainer take a quantised base without a LoRA, where a MEFT adapter will be what trains."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from meft_engine.config import find_block

_CHECK = "validate_quantization_for_training"
_PLACES = ("transformers.trainer_utils", "transformers.trainer")


def allow() -> None:
    """Pass Trainer's check, which looks for an adapter before the engine exists, if the configuration will bring one.

    Does nothing where transformers has no such function (before 5.0 the check was part of a method).
    """
    import transformers.trainer_utils as utils

    original = getattr(utils, _CHECK, None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def check(model: Any) -> None:
        from transformers.integrations.deepspeed import deepspeed_config

        config = deepspeed_config()
        if config is None or find_block(config) is None:
            original(model)

    _replace(check)


def disallow() -> None:
    """Undo :func:`allow`."""
    check = getattr(sys.modules.get(_PLACES[0]), _CHECK, None)
    if hasattr(check, "__wrapped__"):
        _replace(check.__wrapped__)


def _replace(check: Callable[[Any], None]) -> None:
    # Trainer's module has imported the function by name, if it has been imported at all.
    for place in _PLACES:
        module = sys.modules.get(place)
        if module is not None and _CHECK in vars(module):
            setattr(module, _CHECK, check)
