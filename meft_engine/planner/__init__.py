"""What a run needs and whether it fits, worked out before anything is allocated."""

from meft_engine.planner.base import base_bytes_needed
from meft_engine.planner.limits import host_limit, require_device_memory, require_host_memory
from meft_engine.planner.model_shape import ModelShape
from meft_engine.planner.plan import Plan, Planner, plan_run
from meft_engine.planner.rows import (
    BYTES_PER_TRAINED_PARAMETER,
    device_bytes_needed,
    gradient_slots_of_layer,
    host_bytes_needed,
    hot_rows_of_layer,
    snapshot_bytes_needed,
)

__all__ = [
    "BYTES_PER_TRAINED_PARAMETER",
    "ModelShape",
    "Plan",
    "Planner",
    "base_bytes_needed",
    "device_bytes_needed",
    "gradient_slots_of_layer",
    "host_bytes_needed",
    "host_limit",
    "hot_rows_of_layer",
    "plan_run",
    "require_device_memory",
    "require_host_memory",
    "snapshot_bytes_needed",
]
