"""MEFT as a method of PEFT: its configuration, its tuner, and their registration, which importing this module does.

Importing ``meft_engine`` sees to that, wherever PEFT is imported too. PEFT keeps an adapter's weights in the model's
state dict; rows are in none, and are neither flattened, cast nor moved. Saving and loading therefore go by
:mod:`meft_engine.checkpoint`, in the same two files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import peft_types
from torch import nn

from meft_engine import config as block_config
from meft_engine.adapter import named
from meft_engine.adapter.attach import DTYPES, AttachedAdapters, attach
from meft_engine.adapter.module import SparseAdapter
from meft_engine.checkpoint import export
from meft_engine.checkpoint.saved_adapter import CONFIG_FILE, PEFT_TYPE, SavedAdapter
from meft_engine.config import AdapterConfig, MeftConfigError
from meft_engine.inference import fill_from

METHOD = PEFT_TYPE
_SECTIONS = set(block_config.MeftConfig.model_fields) - {"enabled", "adapter"}

# Defined, documented and validated there; here they are only listed.
_Fields = make_dataclass(
    "_Fields",
    [
        *((name, info.annotation, field(default=info.default)) for name, info in AdapterConfig.model_fields.items()),
        ("compute_dtype", str | None, field(default=None)),
        ("sections", dict, field(default_factory=dict)),
    ],
    bases=(PeftConfig,),
)


class MeftConfig(_Fields):
    """The configuration of a MEFT adapter for PEFT, as in ``get_peft_model(model, MeftConfig(rows=4096))``.

    Args:
        settings: the fields of ``"adapter"`` in the ``"meft"`` block (:class:`meft_engine.config.AdapterConfig`), such
            as ``rows``, ``top_k`` or ``target_modules``; whole sections of the block, such as
            ``router={"balance": "bias"}``; ``compute_dtype`` (``"bf16"`` or ``"fp32"``; by default as the model); and
            those of every PEFT configuration, such as ``task_type``.

    Raises:
        MeftConfigError: with one sentence that names the field, the value and the remedy.
    """

    def __init__(self, **settings: Any) -> None:
        self.__dict__["from_file"] = "peft_type" in settings
        settings = _of_description(settings) if self.from_file else settings
        sections = {name: settings.pop(name) for name in _SECTIONS & set(settings)}
        settings.setdefault("sections", sections)
        targets = settings.get("target_modules")
        if targets is not None:
            # PEFT's own methods take sets, and a text for a single one.
            settings["target_modules"] = [targets] if isinstance(targets, str) else sorted(targets)
        unknown = {name: value for name, value in settings.items() if name not in _names()}
        if unknown:
            block_config.MeftConfig.from_block({"adapter": unknown})
        super().__init__(**settings)
        self.peft_type = peft_types.PeftType[METHOD]
        self.block()

    def block(self) -> block_config.MeftConfig:
        """The ``"meft"`` block of these settings.

        Raises:
            MeftConfigError: as above.
        """
        if self.compute_dtype not in (None, *DTYPES):
            raise MeftConfigError(f"compute_dtype = {self.compute_dtype!r} is not valid; use {' or '.join(DTYPES)}")
        adapter = {name: getattr(self, name) for name in AdapterConfig.model_fields}
        return block_config.MeftConfig.from_block({**self.sections, "adapter": adapter})


def _names() -> set[str]:
    return {found.name for found in fields(_Fields)}


def _of_description(description: dict[str, Any]) -> dict[str, Any]:
    """Settings from what ``adapter_config.json`` says; what it says of its tensors is read where these are read."""
    block = description.get("meft", {})
    known = {name: value for name, value in description.items() if name in _names()}
    return {**known, **{name: block[name] for name in _SECTIONS & set(block)}, **block.get("adapter", {})}


class MeftLayer(nn.Module, BaseTunerLayer):
    """What PEFT asks about one adapted FFN. The adapters are in the model itself; this holds no tensor."""

    adapter_layer_names = ("routers",)

    def __init__(self, ffn: str, tuner: MeftModel) -> None:
        super().__init__()
        self.ffn = ffn
        self.__dict__["_tuner"] = tuner  # no child

    @property
    def routers(self) -> nn.ParameterDict:
        """The router of each adapter that the FFN has."""
        found = self._tuner.attached.items()
        return nn.ParameterDict({name: a.adapters[self.ffn].router for name, a in found if self.ffn in a.adapters})

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are disabled."""
        return not any(switch.enabled for switch in named.switches(self._tuner.model))

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the adapter that is set."""
        return self._tuner.active_adapter

    def extra_repr(self) -> str:
        """The FFN, for ``print(model)``."""
        return self.ffn


class MeftModel(BaseTuner):
    """The tuner that PEFT puts around a base model with MEFT adapters."""

    prefix = "meft_"
    tuner_layer_cls = MeftLayer
    target_module_mapping: dict[str, list[str]] = {}
    # Saving and loading need this object, so PEFT is not to put adapters into a model without it.
    uses_shared_state = True

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.attached: dict[str, AttachedAdapters] = {}
        self.meft_layers = nn.ModuleList()
        self._unfilled: set[str] = set()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the adapter that ``peft_config[adapter_name]`` describes; trainable unless in ``inference_mode``.

        Raises:
            MeftConfigError: if that does not fit the model, which is then as it was.
        """
        config = self.peft_config[adapter_name]
        block = config.block()
        dtype = config.compute_dtype or block.offload.compute_dtype
        attached = attach(
            model,
            block,
            compute_dtype=DTYPES[dtype] if dtype else _dtype_like(model),
            trainable=not config.inference_mode,
            name=adapter_name,
        )
        adapters = attached.adapters
        if any(adapter.router.is_meta and adapter.keys.device.type != "meta" for adapter in adapters.values()):
            named.take_off(model, [switch for switch in named.switches(model) if switch.name == adapter_name])
            raise MeftConfigError(
                "low_cpu_mem_usage = True cannot be used with a MEFT adapter; leave it out, rows never cost twice"
            )
        if block.adapter.freeze_base:
            own = {
                id(p) for module in model.modules() if isinstance(module, SparseAdapter) for p in module.parameters()
            }
            for parameter in model.parameters():
                if id(parameter) not in own:
                    parameter.requires_grad_(False)
        given = {key: getattr(config, key) for key in ("base_model_name_or_path", "revision", "task_type")}
        attached.peft_keys.update({key: value for key, value in given.items() if value is not None})
        self.attached[adapter_name] = attached
        self.targeted_module_names += [name for name in adapters if name not in self.targeted_module_names]
        self.meft_layers = nn.ModuleList(MeftLayer(name, self) for name in self.targeted_module_names)
        if config.from_file:
            self._unfilled.add(adapter_name)

    def fill(self, adapter_name: str, folder: Path) -> None:
        """Put a saved adapter's rows into one that :meth:`inject_adapter` has attached.

        Raises:
            MeftConfigError: if they do not fit; an adapter that was made for them is then removed again.
        """
        try:
            with SavedAdapter(folder) as saved:
                saved.require_whole()
                fill_from(self.attached[adapter_name], saved)
        except BaseException:
            if adapter_name in self._unfilled:
                self.delete_adapter(adapter_name) if len(self.attached) > 1 else self.unload()
            raise
        self._unfilled.discard(adapter_name)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("inject_adapter attaches adapters to whole FFNs")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing is cast: rows have the precision that they were trained in, and routers are read in fp32."""

    def enable_adapter_layers(self) -> None:
        """As :func:`meft_engine.enable_adapter_layers`."""
        named.enable_adapter_layers(self.model)

    def disable_adapter_layers(self) -> None:
        """As :func:`meft_engine.disable_adapter_layers`."""
        named.disable_adapter_layers(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As :func:`meft_engine.set_adapter`; of a list there may be one name.

        Raises:
            MeftConfigError: for an unknown name, or more than one.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise MeftConfigError(f"set_adapter({names}) names {len(names)} adapters; one MEFT adapter acts at a time")
        named.set_adapter(self.model, names[0])
        self.active_adapter = names[0]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the routers of some adapters learn, or not.

        Raises:
            MeftConfigError: for an adapter that was loaded for inference, whose rows keep no gradients.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for adapter in self.attached[name].adapters.values():
                if requires_grad and not adapter.keys.trainable:
                    raise MeftConfigError(
                        f'adapter "{name}" was loaded for inference and cannot learn; load it with is_trainable = True'
                    )
                adapter.router.requires_grad_(requires_grad and self.attached[name].config.trains_routers)

    def delete_adapter(self, adapter_name: str) -> None:
        """As :func:`meft_engine.unload_adapter`."""
        named.unload_adapter(self.model, adapter_name)
        for held in (self.peft_config, self.attached):
            held.pop(adapter_name, None)
        self._unfilled.discard(adapter_name)
        self.targeted_module_names = list(dict.fromkeys(n for a in self.attached.values() for n in a.adapters))
        self.meft_layers = nn.ModuleList(MeftLayer(name, self) for name in self.targeted_module_names)
        self.active_adapter = named.active_adapter(self.model) or []

    def unload(self) -> nn.Module:
        """The base model, as it was before."""
        if named.switches(self.model):
            named.unload_adapter(self.model)
        self.attached.clear()
        self.meft_layers = nn.ModuleList()
        vars(self.model).pop("peft_config", None)
        return self.model

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Impossible.

        Raises:
            MeftConfigError: always.
        """
        _refuse_to_merge()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Impossible.

        Raises:
            MeftConfigError: always.
        """
        _refuse_to_merge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """``False``: which rows act depends on the token."""
        return False

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise MeftConfigError(
            "the rows of a MEFT adapter are in no state dict; save it with save_pretrained(folder) of its PeftModel"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise MeftConfigError(
            "the rows of a MEFT adapter are in no state dict; load it with PeftModel.from_pretrained or load_adapter"
        )


def _refuse_to_merge() -> NoReturn:
    raise MeftConfigError(
        "a MEFT adapter cannot be merged into its base, since which of its rows act, and how much, depends on the "
        "token; use it as it is, or unload() it"
    )


def _dtype_like(model: nn.Module) -> torch.dtype:
    """The rows' precision where nobody has named it: bf16 for a model in 16 bits, else fp32."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return torch.bfloat16 if half else torch.float32


# Two methods of PeftModel deal with state dicts before any tuner is asked.


def _load_adapter(
    peft_model: PeftModel, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any
) -> Any:
    """``PeftModel.load_adapter`` where the adapters are MEFT's: rows go from the file to where they stay."""
    folder = _local_folder(str(model_id), **kwargs)
    if adapter_name not in peft_model.peft_config:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not is_trainable
        peft_model.add_adapter(adapter_name, config)
    peft_model.base_model.fill(adapter_name, folder)
    if not is_trainable:
        peft_model.eval()
    return torch.nn.modules.module._IncompatibleKeys([], [])


def _save_pretrained(
    peft_model: PeftModel,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """``PeftModel.save_pretrained`` where the adapters are MEFT's: the files of ``engine.save_adapter``; those of an
    adapter of another name than "default" in a folder of that name, as PEFT has it."""
    attached = peft_model.base_model.attached
    names = list(attached) if selected_adapters is None else selected_adapters
    unknown = [name for name in names if name not in attached]
    if unknown:
        raise MeftConfigError(f"selected_adapters names {unknown}, and the adapters are {list(attached)}")
    if not safe_serialization:
        raise MeftConfigError("safe_serialization = False is not supported for a MEFT adapter, which is never pickled")
    for name in names:
        folder = Path(save_directory) / (name if name != named.DEFAULT_NAME else "")
        export.save_adapter(attached[name], folder, write=is_main_process)


def _local_folder(model_id: str, subfolder: str | None = None, **kwargs: Any) -> Path:
    """The folder that holds an adapter's files, which are downloaded where ``model_id`` is a name of the hub."""
    folder = Path(model_id) / (subfolder or "")
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        options = {key: kwargs[key] for key in ("revision", "cache_dir", "token") if key in kwargs}
        pattern = f"{subfolder}/adapter_*" if subfolder else "adapter_*"
        folder = Path(snapshot_download(model_id, allow_patterns=[pattern], **options)) / (subfolder or "")
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder / CONFIG_FILE} is missing, so nothing can be loaded from {folder}")
    return folder


def _divert(name: str, ours: Callable[..., Any]) -> None:
    """Let a method of ``PeftModel`` do what it did, except where the adapters are MEFT's."""
    original = getattr(PeftModel, name)

    @functools.wraps(original)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        is_ours = isinstance(self.base_model, MeftModel)
        return ours(self, *args, **kwargs) if is_ours else original(self, *args, **kwargs)

    setattr(PeftModel, name, method)


def _register() -> None:
    """Make PEFT know the method; its list of methods is an enumeration, to which Python has no official way to add."""
    kind = peft_types.PeftType
    if METHOD not in kind.__members__:
        member = str.__new__(kind, METHOD)
        member._name_ = member._value_ = METHOD
        type.__setattr__(kind, METHOD, member)
        kind._member_map_[METHOD] = kind._value2member_map_[METHOD] = member
        kind._member_names_.append(METHOD)
    peft_types.register_peft_method(
        name=METHOD.lower(), config_cls=MeftConfig, model_cls=MeftModel, prefix=MeftModel.prefix
    )
    _divert("load_adapter", _load_adapter)
    _divert("save_pretrained", _save_pretrained)


_register()
