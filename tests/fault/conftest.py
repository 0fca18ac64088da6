"""One process of the tests joins its own process group, as in tests/integration."""

from tests.integration.conftest import _deepspeed  # noqa: F401
