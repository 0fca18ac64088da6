"""The command ``meft-engine``: what it can do, each in a module of its own."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from meft_engine.config import MeftConfigError

COMMANDS = {
    "plan": ("meft_engine.planner.command", "what a run needs and whether it fits, before anything is allocated"),
    "doctor": ("meft_engine.doctor", "what this machine has and lacks"),
    "report": ("meft_engine.run_report.command", "one page about one run or several"),
}
"""By name: the module, which has ``add_arguments(parser)`` and ``run(arguments) -> exit code``, and a line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 2 with one sentence on stderr for what cannot work.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="meft-engine", description="Before, during and after a run of MEFT.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in given[:1]:  # the others may be slow to import
            modules[name] = importlib.import_module(module)
            command.description = modules[name].__doc__.splitlines()[0]
            modules[name].add_arguments(command)
    arguments = parser.parse_args(given)
    try:
        return modules[arguments.command].run(arguments)
    except MeftConfigError as error:
        print(f"meft-engine {arguments.command}: {error}", file=sys.stderr)
        return 2
