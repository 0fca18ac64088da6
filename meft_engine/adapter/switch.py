"""`Switch`: what all layers of one adapter share, its name and whether it acts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

DEFAULT_NAME = "default"

_numbers = itertools.count()


@dataclass(eq=False)
class Switch:
    """The name of one adapter of a model, and whether it acts; its layers look here in every forward."""

    name: str = DEFAULT_NAME
    selected: bool = True
    """Whether it is the one, of those on the model, that acts."""
    enabled: bool = True
    """Whether adapters act at all."""
    number: int = field(default_factory=_numbers.__next__)
    """Grows from one adapter to the next, so that they can be told in the order in which they came."""

    @property
    def on(self) -> bool:
        """Whether it adds to the output of the model."""
        return self.selected and self.enabled
