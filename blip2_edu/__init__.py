"""BLIP-2 step by step: a small package whose Q-Former is the real one.

Importing it is quick: what is heavy is imported by the module that uses it.
"""

__version__ = "0.1.0"


class UserError(Exception):
    """Something that a user can mend; the message is one sentence that says how."""


def demo(checkpoint: str = "mini"):
    """The live demo as a widget, for a notebook; checkpoint as for `Blip2.from_pretrained`.

    One at a time: a cell that is run again closes the demo it made before, model and all.
    """
    from blip2_edu import widgets

    if widgets.current is not None:
        widgets.current.close()
    widgets.current = widgets.Demo(checkpoint)
    return widgets.current
