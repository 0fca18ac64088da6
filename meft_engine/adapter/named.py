"""Several adapters on one model, told apart by name: which there are, which one acts, and how they come off again.

The conventions are PEFT's: one adapter acts at a time, the first until another is set; a disabled model is the base.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from meft_engine.adapter.module import SparseAdapter
from meft_engine.adapter.switch import DEFAULT_NAME, Switch
from meft_engine.config import MeftConfigError

_ATTRIBUTE = "meft_adapter"


def attribute_of(name: str) -> str:
    """What the adapter of this name is called in the modules that hold it, and so in a state dict."""
    return _ATTRIBUTE if name == DEFAULT_NAME else f"{_ATTRIBUTE}_{name}"


def switches(model: nn.Module) -> list[Switch]:
    """Those of the model's adapters, in the order in which these came."""
    found = {module.switch for module in model.modules() if isinstance(module, SparseAdapter)}
    return sorted(found, key=lambda switch: switch.number)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the MEFT adapters on a model, in the order in which they were loaded; ``[]`` where there is none."""
    return [switch.name for switch in switches(model)]


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that is set, also while adapters are disabled; ``None`` where there is none."""
    return next((switch.name for switch in switches(model) if switch.selected), None)


def set_adapter(model: nn.Module, name: str) -> None:
    """Let the adapter of this name act, and no other. Disabled adapters stay disabled.

    Raises:
        MeftConfigError: if the model has none of this name.
    """
    _require(model, name)
    for switch in switches(model):
        switch.selected = switch.name == name


def disable_adapter_layers(model: nn.Module) -> None:
    """Make the model the base, bit for bit, until :func:`enable_adapter_layers`; its adapters stay loaded.

    Raises:
        MeftConfigError: if the model has no MEFT adapter.
    """
    for switch in _require(model):
        switch.enabled = False


def enable_adapter_layers(model: nn.Module) -> None:
    """Undo :func:`disable_adapter_layers`.

    Raises:
        MeftConfigError: if the model has no MEFT adapter.
    """
    for switch in _require(model):
        switch.enabled = True


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` the model is the base, bit for bit; after it, also after an exception, what it was before.

    Raises:
        MeftConfigError: if the model has no MEFT adapter.
    """
    were_enabled = any(switch.enabled for switch in _require(model))
    disable_adapter_layers(model)
    try:
        yield
    finally:
        # Adapters may have come or gone in between.
        for switch in switches(model):
            switch.enabled = were_enabled


def unload_adapter(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take MEFT adapters off a model again and give their memory back; not while an engine trains them.

    Args:
        name: of the adapter; ``None``: all of them. If it is the one that acts, the first of the others takes its
            place, and a warning says so, as in PEFT.

    Returns:
        The same model; without any adapter it is what it was before they were attached.

    Raises:
        MeftConfigError: if it has none, or none of this name.
    """
    if name is None and not switches(model):
        raise MeftConfigError(f"this {type(model).__name__} has no MEFT adapters to unload")
    leaving = [switch for switch in _require(model, name) if name in (None, switch.name)]
    take_off(model, leaving)
    rest = switches(model)
    if rest and not any(switch.selected for switch in rest):
        warnings.warn(f'adapter "{name}" was active and is unloaded; "{rest[0].name}" is active now', stacklevel=2)
        rest[0].selected = True
    return model


def take_off(model: nn.Module, leaving: list[Switch]) -> None:
    """Remove the layers of some adapters from the modules that hold them, with their hooks, and close their tables."""
    for holder in list(model.modules()):
        for attribute, adapter in list(holder.named_children()):
            if isinstance(adapter, SparseAdapter) and adapter.switch in leaving:
                delattr(holder, attribute)
                for hook in adapter.hooks:
                    hook.remove()
                adapter.keys.close()
                adapter.values.close()


def require_free(model: nn.Module, name: str) -> None:
    """Check that an adapter of this name can join those of a model.

    Raises:
        MeftConfigError: if the name is taken or is no name, or if an adapter of the model is being trained.
    """
    # A module's children are told apart by what stands between dots.
    if not isinstance(name, str) or not name or "." in name:
        raise MeftConfigError(f"name = {name!r} cannot name an adapter; use a text without dots")
    if any(isinstance(module, SparseAdapter) and module.keys.trainable for module in model.modules()):
        raise MeftConfigError(
            f"the adapter of this {type(model).__name__} is being trained; load others into a fresh model"
        )
    if name in adapter_names(model):
        raise MeftConfigError(
            f'this {type(model).__name__} already has an adapter named "{name}" ({_listed(model)}); unload it first, '
            "or give the new one another name"
        )


def _require(model: nn.Module, name: str | None = None) -> list[Switch]:
    """The model's switches, of which there is at least one, and one of this name unless it is ``None``."""
    found = switches(model)
    if not found:
        raise MeftConfigError(f"this {type(model).__name__} has no MEFT adapters; load one with load_adapter")
    if name is not None and name not in [switch.name for switch in found]:
        raise MeftConfigError(f"this {type(model).__name__} has no adapter named {name!r} ({_listed(model)})")
    return found


def _listed(model: nn.Module) -> str:
    return "its adapters: " + ", ".join(f'"{name}"' for name in adapter_names(model))
