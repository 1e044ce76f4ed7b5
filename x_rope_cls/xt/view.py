"""A module under other attributes, for the time of one call."""

from __future__ import annotations

from typing import Any


class View:
    """Stands in the place of ``self`` in a method of x-transformers.

    Attributes given here hide those of the module; all others are the module's own. Nothing is set on the module, so
    that threads, recursion, checkpointing and torch.compile see no state that changes.

    Args:
        of: the module.
        **own: attributes of the view.
    """

    def __init__(self, of: Any, **own: Any) -> None:
        self.view_of = of
        for name, value in own.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "view_of":
            raise AttributeError(name)
        return getattr(self.view_of, name)
