"""Frozen encoders: one file each. This table is the room's contents."""

from graftlm.core.registry import Registry

__all__ = ["ENCODERS"]

ENCODERS = Registry(
    "encoder",
    {
        "mini-image": "graftlm.model.encoders.mini:ImageEncoder",
        "mini-video": "graftlm.model.encoders.mini:VideoEncoder",
        "mini-audio": "graftlm.model.encoders.mini:AudioEncoder",
        "mini-point": "graftlm.model.encoders.mini:PointEncoder",
        "patches": "graftlm.model.encoders.patches:Patches",
    },
    "graftlm.encoders",
)
