"""A plan for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from meft_engine.planner.limits import GIB
from meft_engine.planner.plan import Plan


def show(plan: Plan, console: Console | None = None) -> None:
    """Print what it says, what does not fit last."""
    console = console or Console(width=120, highlight=False)
    facts = plan.as_dict()
    model, run = facts["model"], facts["run"]
    console.print(
        f"{model['parameters'] / 1e6:,.0f} M parameters in {model['layers']} layers; adapter: "
        f"{facts['adapter_parameters'] / 1e6:,.0f} M in {model['adapted_ffns']} FFNs; {run['nodes']} × "
        f"{run['ranks_of_node']} ranks, {run['tokens_of_micro_batch']} tokens × "
        f"{run['gradient_accumulation_steps']} micro-batches each, base in {run['base_dtype']}, "
        f"rows in {run['compute_dtype']}"
    )
    _bytes(console, "host memory of a node", plan.host, f"{plan.host_limit}")
    _bytes(console, "host memory of a node while the base is read", plan.host_loading, "")
    if plan.device:
        _bytes(console, "memory of each device", plan.device, f"{plan.device_limit}" if plan.device_limit else "")
    kept = "all are kept" if plan.checkpoints is None else f"{plan.checkpoints} are kept: {_in(plan.disk_in_all)}"
    _bytes(console, "a checkpoint on disk", plan.disk, kept, left_out="adapter")
    if plan.pcie:
        _bytes(console, "across the bus of each device in a step", plan.pcie, "")
    if plan.network:
        _bytes(console, "sent by each rank in a step", plan.network, "", left_out="out_of_a_node")
    if plan.step is not None:
        table = Table("seconds of a step", "", title_justify="left")
        for name, seconds in plan.step.parts.items():
            if seconds:
                table.add_row(name.replace("_", " "), f"{seconds:.3g}")
        if plan.step.hidden:
            table.add_row("beside something longer", f"-{plan.step.hidden:.3g}")
        table.add_row("[bold]in all", f"[bold]{plan.step.seconds:.3g}")
        console.print(table)
        rates = plan.speeds.tflops_by_dtype
        if rates.get("fp32") and rates.get("bf16"):
            rest = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
            console.print(f"TFLOP/s measured here: {rest}")
    console.print("assumed: " + "; ".join(plan.assumptions), style="dim")
    for problem in plan.problems:
        console.print(f"[bold red]does not fit[/]: {problem}")
    if plan.fits:
        console.print("[bold green]fits")
    elif plan.nearest:
        console.print("it would fit with " + "; ".join(plan.nearest))
    else:
        console.print("nothing that can be changed in the configuration makes it fit")


def _bytes(console: Console, title: str, kinds: Mapping[str, int], note: str, *, left_out: str = "") -> None:
    small = max(kinds.values(), default=0) < GIB // 10
    table, unit = Table(title, "MiB" if small else "GiB"), 1 << 20 if small else GIB
    for kind, count in kinds.items():
        if count:
            besides = " (besides)" if kind == left_out else ""
            table.add_row(kind.replace("_", " ") + besides, f"{count / unit:,.2f}")
    whole = sum(count for kind, count in kinds.items() if kind != left_out)
    table.add_row("[bold]in all", f"[bold]{whole / unit:,.2f}")
    console.print(table)
    if note:
        console.print(note)


def _in(count: int | None) -> str:
    return "" if count is None else f"{count / GIB:.1f} GiB with the one that is being written"
