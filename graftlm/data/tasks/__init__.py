"""Data sets: one file each, read as they are distributed. This table is the room's contents."""

from graftlm.core.registry import Registry

__all__ = ["TASKS"]

TASKS = Registry(
    "data set",
    {
        "coco": "graftlm.data.tasks.coco:load",
        "okvqa": "graftlm.data.tasks.okvqa:load",
        "msvd": "graftlm.data.tasks.msvd:load",
        "msvd_qa": "graftlm.data.tasks.msvd_qa:load",
        "audiocaps": "graftlm.data.tasks.audiocaps:load",
        "clotho_aqa": "graftlm.data.tasks.clotho_aqa:load",
        "cap3d": "graftlm.data.tasks.cap3d:load",
        "cap3d_qa": "graftlm.data.tasks.cap3d_qa:load",
        "mcub": "graftlm.data.tasks.mcub:load",
        "flickr30k": "graftlm.data.tasks.flickr30k:load",
        "msrvtt": "graftlm.data.tasks.msrvtt:load",
        "msrvtt_qa": "graftlm.data.tasks.msrvtt_qa:load",
        "llava_json": "graftlm.data.tasks.llava_json:load",
        "iconqa": "graftlm.data.tasks.iconqa:load",
        "super_clevr": "graftlm.data.tasks.super_clevr:load",
        "clevr_math": "graftlm.data.tasks.clevr_math:load",
        "figureqa": "graftlm.data.tasks.figureqa:load",
        "arxivqa": "graftlm.data.tasks.arxivqa:load",
        "pope": "graftlm.data.tasks.pope:load",
        "letters": "graftlm.data.tasks.letters:load",
        "instructions": "graftlm.data.tasks.instructions:load",
    },
    "graftlm.tasks",
)
