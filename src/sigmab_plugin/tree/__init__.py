"""SigmaB itself: cut, cluster, allocate, build, save."""

from __future__ import annotations

from .io import load, read_plan, save
from .net import SigmaBNet
from .twin import StaticTwin, static_twin

__all__ = ["SigmaBNet", "StaticTwin", "load", "read_plan", "save", "static_twin"]
