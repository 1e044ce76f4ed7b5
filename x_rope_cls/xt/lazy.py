"""What an attention layer returns beside its output when the operator has stored no attention map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from x_transformers.attend import Intermediates

MAPS = ("qk_similarities", "pre_softmax_attn", "post_softmax_attn")


class LazyIntermediates(Intermediates):
    """Attention maps are made when somebody looks at them.

    Args:
        make: returns intermediates with the maps.
    """

    def __init__(self, make: Callable[[], Intermediates]) -> None:
        self._maps: dict[str, Any] = {}
        self._make = make
        super().__init__()
        self._maps.clear()

    def _map(self, name: str) -> Any:
        if name not in self._maps:
            made = self._make()
            for each in MAPS:
                self._maps.setdefault(each, getattr(made, each))
        return self._maps[name]


def _lazy(name: str) -> property:
    def get(self: LazyIntermediates) -> Any:
        return self._map(name)

    def put(self: LazyIntermediates, value: Any) -> None:
        self._maps[name] = value

    return property(get, put)


for _name in MAPS:
    setattr(LazyIntermediates, _name, _lazy(_name))
