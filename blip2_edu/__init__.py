"""BLIP-2 step by step: a small package whose Q-Former is the real one.

`from blip2_edu import Blip2, QFormer, QFormerConfig, demo` works; importing the package alone is
quick, for what is heavy is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blip2_edu.app.widgets import demo
    from blip2_edu.blip2 import Blip2
    from blip2_edu.qformer import QFormer, QFormerConfig

__version__ = "0.1.0"
__all__ = ["Blip2", "QFormer", "QFormerConfig", "demo"]

_HOME = {
    "Blip2": "blip2_edu.blip2",
    "QFormer": "blip2_edu.qformer",
    "QFormerConfig": "blip2_edu.qformer",
    "demo": "blip2_edu.app.widgets",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
