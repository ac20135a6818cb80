"""BLIP-2 step by step: a small package whose Q-Former is the real one.

Importing it is quick: what is heavy is imported by the module that uses it.
"""

__version__ = "0.1.0"


def demo(checkpoint: str = "mini"):
    """The live demo as a widget, for a notebook; checkpoint as for `Blip2.from_pretrained`."""
    from blip2_edu.widgets import Demo

    return Demo(checkpoint)
