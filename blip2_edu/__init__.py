"""BLIP-2 step by step: a small package whose Q-Former is the real one.

Importing it is quick: what is heavy is imported by the module that uses it.
"""

__version__ = "0.1.0"
