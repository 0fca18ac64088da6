"""Runs a training script that stays as it is, with the ``"meft"`` block of its DeepSpeed JSON honoured.

    deepspeed --module meft_engine.run train.py --deepspeed ds_config.json …
    accelerate launch --use_deepspeed … --module meft_engine.run train.py …
    python -m meft_engine.run train.py …                 (-m package.module in place of train.py works too)
    srun -n 16 python -m meft_engine.run train.py …      (and mpirun; DeepSpeed alone needs mpi4py for that)

It is ``meft_engine.enable()`` before the script's first line; ranks of ``srun`` and ``mpirun`` get the variables that
DeepSpeed's own launcher would set (:func:`meft_engine.launchers.adopt_ranks`).
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import meft_engine
from meft_engine.launchers import LaunchError, adopt_ranks

_USAGE = "usage: deepspeed --module meft_engine.run train.py [its arguments]   (or -m package.module for train.py)"


def split_arguments(arguments: Sequence[str]) -> tuple[str, bool, list[str]]:
    """What is to run, whether that is a module's name, and its arguments.

    DeepSpeed's launcher puts ``--local_rank=N`` right behind what it starts, that is, before the script. The script
    gets it where it would stand without this module: first among its own arguments.

    Raises:
        SystemExit: with one sentence, if no script is named.
    """
    given = list(arguments)
    position = next((i for i, argument in enumerate(given) if argument == "-m" or not argument.startswith("-")), None)
    if position is None:
        sys.exit(f"meft_engine.run was given no script; {_USAGE}")
    launcher, target, rest = given[:position], given[position], given[position + 1 :]
    is_module = target == "-m"
    if is_module:
        if not rest:
            sys.exit(f"meft_engine.run was given no module after -m; {_USAGE}")
        target, rest = rest[0], rest[1:]
    elif not Path(target).exists():
        sys.exit(f"meft_engine.run: the script {target!r} does not exist; {_USAGE}")
    return target, is_module, [*launcher, *rest]


def main(arguments: Sequence[str] | None = None) -> None:
    """Enable MEFT, and run the script as if it had been started itself.

    Raises:
        SystemExit: with one sentence, if no script is named or ranks cannot find each other.
    """
    try:
        adopt_ranks()
    except LaunchError as error:
        sys.exit(f"meft_engine.run: {error}")
    target, is_module, rest = split_arguments(sys.argv[1:] if arguments is None else arguments)
    # A script finds its neighbours, a module those of the working directory. The first entry may be this file's own
    # folder (DeepSpeed starts it by its path under Slurm), whose modules would pass for others of the same name.
    sys.path[0] = str(Path.cwd() if is_module else Path(target).resolve().parent)
    meft_engine.enable()
    sys.argv = [target, *rest]
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main()
