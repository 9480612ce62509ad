"""Which channels move together, and how a block is cut down to some of them."""

from __future__ import annotations

from .groups import ChannelGroup, Member, Slices, slices_of
from .layouts import Layout, register_layout, unregister_layout
from .slicing import slice_module

__all__ = [
    "ChannelGroup",
    "Layout",
    "Member",
    "Slices",
    "register_layout",
    "slice_module",
    "slices_of",
    "unregister_layout",
]
