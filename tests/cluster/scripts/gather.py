"""Every rank tells every rank its host's name; ``<folder>/rank<N>`` holds what it was told."""

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    Path(sys.argv[-1], f"rank{os.environ['RANK']}").write_text(" ".join(names))
    dist.destroy_process_group()
