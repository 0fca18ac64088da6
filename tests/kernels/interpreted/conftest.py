"""Kernels in Triton's interpreter, which is chosen when they are imported: in a process that was started for it."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
