"""Kernels compiled ahead of time, for which Triton must not be interpreting."""

from __future__ import annotations

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
