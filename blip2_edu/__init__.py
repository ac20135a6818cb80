"""BLIP-2, step by step: a real Q-Former in a small package that reads in the order of the lessons."""

__version__ = "0.1.0"
