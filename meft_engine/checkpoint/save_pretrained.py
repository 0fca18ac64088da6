"""``model.save_pretrained`` of a model that an engine trains: it writes the adapter, not the frozen base.

This is what ``Trainer``, TRL and loops with accelerate call to save a model, so none of them has to know of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from meft_engine.adapter.module import SparseAdapter
from meft_engine.checkpoint import folders

if TYPE_CHECKING:
    from meft_engine.engine import MeftEngine


def install(engine: MeftEngine) -> None:
    """Give the engine's model the new ``save_pretrained``, if it has one at all."""
    model = engine.module
    original = getattr(model, "save_pretrained", None)
    if original is None:
        return

    def save_pretrained(
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the MEFT adapter; if more of the model trains (a LoRA, an unfrozen base), that too, as ever, and the
        adapter into the folder ``meft`` beside it."""
        if push_to_hub:
            raise ValueError(
                "save_pretrained(push_to_hub=True) is not supported for a MEFT adapter; save it to a folder and send "
                "that with huggingface_hub.upload_folder"
            )
        folder = Path(save_directory)
        if trains_more_than_the_adapter(model):
            if state_dict is None and engine.zero_optimization_partition_weights():
                # What the model holds of its own accord is nothing.
                state_dict = engine._zero3_consolidated_16bit_state_dict()
            own = without_adapters(model, state_dict if state_dict is not None else model.state_dict())
            original(save_directory, is_main_process=is_main_process, state_dict=own, **kwargs)
            folder = folder / folders.SUBFOLDER
        gathers = engine.zero_optimization_partition_weights() and state_dict is None
        if is_main_process or gathers:
            engine.save_adapter(folder, state_dict=state_dict)

    model.save_pretrained = save_pretrained


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`."""
    vars(model).pop("save_pretrained", None)


def trains_more_than_the_adapter(model: nn.Module) -> bool:
    """Whether anything besides MEFT adapters requires grad."""
    own = {id(p) for m in model.modules() if isinstance(m, SparseAdapter) for p in m.parameters()}
    return any(p.requires_grad and id(p) not in own for p in model.parameters())


def without_adapters(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the routers and anchors of MEFT adapters, which the base model's class does not know."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SparseAdapter))
    return {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}
