"""Combining weights: mathematics on tensors. This table is the room's contents."""

from graftlm.core.registry import Registry

__all__ = ["RULES"]

RULES = Registry(
    "merging rule",
    {
        "keep_new": "graftlm.merging.rules:keep_new",
        "average": "graftlm.merging.rules:average",
        "arithmetic": "graftlm.merging.rules:arithmetic",
        "ties": "graftlm.merging.rules:ties",
        "dare": "graftlm.merging.rules:dare",
        "consensus": "graftlm.merging.rules:consensus",
        "model_mix": "graftlm.merging.rules:model_mix",
        "sac": "graftlm.merging.rules:sac",
        "ewf": "graftlm.merging.rules:ewf",
    },
    "graftlm.rules",
)
