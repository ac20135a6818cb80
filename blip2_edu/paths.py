"""Where the course keeps what is no code."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "images"  # the course's own photographs
CHECKPOINTS = ROOT / "data" / "checkpoints"
CACHE = ROOT / "data" / "cache"  # whatever can be made again
