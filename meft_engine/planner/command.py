"""What a run needs, and whether it fits, from its DeepSpeed JSON and the model's configuration alone.

Nothing is trained, downloaded but a config.json, or allocated. Exit code 0: it fits; 1: it does not; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meft_engine.config import MeftConfigError

if TYPE_CHECKING:
    from meft_engine.planner.fit import Fitted
    from meft_engine.planner.plan import Plan
    from meft_engine.planner.settings import RunSettings

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_SPEEDS = {
    "tflops": "10¹² operations a second in the base's products of matrices",
    "host_gbps": "10⁹ bytes a second that a copy in host memory reads and writes",
    "device_gbps": "the same on the device",
    "pass_gbps": "10⁹ bytes a second that an activation function reads and writes",
    "pcie_gbps": "10⁹ bytes a second between host and device, one way",
    "network_gbps": "10⁹ bytes a second out of a node",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("config", help="DeepSpeed JSON with a meft block")
    parser.add_argument("--model", required=True, help="folder or hub name of the base; its config.json alone is read")
    parser.add_argument("--gpus", type=int, default=1, help="ranks of a node (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="how many nodes (default 1)")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens of a sequence (default 512)")
    parser.add_argument("--batch_size", type=int, help='sequences of a micro-batch, where the JSON says "auto"')
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help='of the base, where the JSON says "auto"')
    parser.add_argument("--gradient_checkpointing", action="store_true", help="layers are computed again in backward")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where it is going to compute (default: as here)")
    parser.add_argument("--device_memory", metavar="SIZE", help="of each device, such as 24GB (default: as here)")
    parser.add_argument("--host_memory", metavar="SIZE", help="of each node, such as 64GB (default: as here)")
    parser.add_argument("--save_total_limit", type=int, help="the Trainer's: how many checkpoints stay")
    parser.add_argument("--touched_share", type=float, help="of a layer's rows that a micro-batch touches, 0 to 1")
    for name, text in _SPEEDS.items():
        parser.add_argument(f"--{name}", type=float, help=f"{text} (default: measured here, or assumed)")
    parser.add_argument("--no_time", action="store_true", help="predict no time, and so measure nothing")
    parser.add_argument("--fit", metavar="SIZE", help="change as little as makes it fit into so much device memory")
    parser.add_argument("--output", metavar="FILE", help="where to write the configuration that fits")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, and write what fits where that is asked for.

    Raises:
        MeftConfigError: for bad input.
    """
    if (arguments.output is None) != (arguments.fit is None):
        raise MeftConfigError("--fit and --output belong together: a size to fit into, and a file for what fits")
    if arguments.touched_share is not None and not 0 < arguments.touched_share <= 1:
        raise MeftConfigError(f"--touched_share = {arguments.touched_share:g} is no share; use more than 0, at most 1")
    _calm()
    from meft_engine.planner.fit import fit, with_nearest, written
    from meft_engine.planner.settings import read_json

    config = read_json(arguments.config)
    _settings(config, arguments, arguments.gradient_checkpointing, batch_size=arguments.batch_size)
    plan_of = _planner(arguments)
    plan = plan_of(config, arguments.gradient_checkpointing)
    fitted = None
    if not plan.fits or arguments.fit is not None:
        fitted = fit(config, plan_of, gradient_checkpointing=arguments.gradient_checkpointing)
        plan = with_nearest(plan, fitted)
    _show(plan, as_json=arguments.json)
    if arguments.fit is None:
        return 0 if plan.fits else 1
    if fitted is None:
        return 1
    try:
        Path(arguments.output).write_text(written(fitted.config), encoding="utf-8")
    except OSError as error:
        raise MeftConfigError(f"--output = {arguments.output} cannot be written ({error.strerror})") from None
    if not arguments.json:
        _show_fitted(fitted, arguments.output)
    return 0


def size(text: str, option: str) -> int:
    """Bytes of a text such as ``24GB`` (10⁹ bytes), ``24GiB`` (2³⁰) or a bare number of bytes.

    Raises:
        MeftConfigError: for another text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    unit = f"{found[2]}{found[3]}".upper() if found else "?"
    if unit not in _UNITS:
        raise MeftConfigError(f"{option} = {text} is no size; write it as 24GB, 24GiB or a number of bytes")
    return int(float(found[1]) * _UNITS[unit])


def _planner(arguments: argparse.Namespace) -> Any:
    """Plans configurations for what the options say."""
    from meft_engine.planner.limits import Limit
    from meft_engine.planner.measure import find_speeds
    from meft_engine.planner.plan import Planner, choose_device

    asked = {name: getattr(arguments, name) for name in ("host_memory", "device_memory")}
    if arguments.fit is not None:
        asked["device_memory"] = asked["device_memory"] or arguments.fit
    memory = {name: size(text, f"--{name}") if text is not None else None for name, text in asked.items()}
    device = choose_device(arguments.device, memory["device_memory"])
    planner = Planner(arguments.model, trust_remote_code=arguments.trust_remote_code)
    speeds: dict[Any, Any] = {}

    def plan_of(config: Mapping[str, Any], gradient_checkpointing: bool) -> Plan:
        # A number that has been put in the place of "auto" stays.
        is_open = config.get("train_micro_batch_size_per_gpu", "auto") == "auto"
        batch_size = arguments.batch_size if is_open else None
        run = _settings(config, arguments, gradient_checkpointing, batch_size=batch_size)
        if not arguments.no_time and run.base_dtype not in speeds:
            trace = planner.trace(run)
            given = {name: getattr(arguments, name) for name in _SPEEDS}
            speeds[run.base_dtype] = find_speeds(
                trace.products if trace else (), run.base_dtype, device=device, **given
            )
        return planner.plan(
            run,
            device=device,
            host=Limit(memory["host_memory"], "as given") if memory["host_memory"] else None,
            on_device=Limit(memory["device_memory"], "as given") if memory["device_memory"] else None,
            touched_share=arguments.touched_share,
            speeds=speeds.get(run.base_dtype),
            save_total_limit=arguments.save_total_limit,
        )

    return plan_of


def _settings(
    config: Mapping[str, Any], arguments: argparse.Namespace, gradient_checkpointing: bool, *, batch_size: int | None
) -> RunSettings:
    from meft_engine.planner.settings import read_settings

    return read_settings(
        config,
        gpus=arguments.gpus,
        nodes=arguments.nodes,
        sequence_length=arguments.sequence_length,
        batch_size=batch_size,
        dtype=arguments.dtype,
        gradient_checkpointing=gradient_checkpointing,
    )


def _calm() -> None:
    """Without what transformers has to say of configurations."""
    import logging
    import warnings

    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|torch")


def _show(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.as_dict()))
        return
    from meft_engine.planner.tables import show

    show(plan)


def _show_fitted(fitted: Fitted, path: str) -> None:
    print(f"{path} fits" + (f", with {'; '.join(fitted.changes)}" if fitted.changes else " as it was asked for"))
    if fitted.gradient_checkpointing:
        print("the script has to switch gradient checkpointing on, which is no setting of DeepSpeed's")
