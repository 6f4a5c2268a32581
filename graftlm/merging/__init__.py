"""Combining weights: mathematics on tensors. This table is the room's contents."""

from graftlm.core.registry import Registry

__all__ = ["RULES"]

RULES = Registry(
    "merging rule",
    {
        "keep_new": "graftlm.merging.rules:keep_new",
        "average": "graftlm.merging.rules:average",
    },
    "graftlm.rules",
)
