"""One entry to the four renderers, and what their labels mean."""

import numpy as np

from graftlm.core.errors import DataError
from graftlm.data.miniworld.canvas import Array, Labels
from graftlm.data.miniworld.render_audio import render_audio
from graftlm.data.miniworld.render_image import render_image
from graftlm.data.miniworld.render_point import render_point
from graftlm.data.miniworld.render_video import render_video
from graftlm.data.miniworld.scenes import AudioScene, ImageScene, PointScene, Scene, VideoScene, modality_of
from graftlm.data.miniworld.words import (
    BRIGHTNESS,
    COLORS,
    ENVELOPES,
    INSTRUMENTS,
    LARGER,
    MELODIES,
    MOTIONS,
    NOISES,
    PITCHES,
    PLACES,
    PROPORTIONS,
    RHYTHMS,
    SHAPES,
    SIZES,
    SOLIDS,
    SPEEDS,
    SURFACES,
    TEXTURES,
    TILTS,
)

__all__ = ["CELL_CLASSES", "LABELS", "Array", "Labels", "render"]

CELL_CLASSES = {"color": len(COLORS), "shape": len(SHAPES), "size": len(SIZES), "texture": len(TEXTURES)}
"""Classes of the first four channels of ``cell``, in order; the fifth is 1 where a shape has its centre, else -1."""

LABELS: dict[str, dict[str, int]] = {
    "image": {"background": len(BRIGHTNESS), "count": 4, "frame": len(COLORS) + 1, "place": len(PLACES)},
    "video": {"background": len(BRIGHTNESS), "motion": len(MOTIONS), "speed": len(SPEEDS), "then": len(MOTIONS)},
    "audio": {
        "instrument": len(INSTRUMENTS),
        "pitch": len(PITCHES),
        "count": 4,
        "envelope": len(ENVELOPES),
        "background": len(NOISES),
        "rhythm": len(RHYTHMS),
        "melody": len(MELODIES),
        "second": len(INSTRUMENTS),
    },
    "point": {
        "arrangement": 3,
        "color1": len(COLORS),
        "solid1": len(SOLIDS),
        "color2": len(COLORS),
        "solid2": len(SOLIDS),
        "proportion": len(PROPORTIONS),
        "surface": len(SURFACES),
        "tilt": len(TILTS),
        "larger": len(LARGER),
    },
}
"""Per modality the scalar labels and their numbers of classes; -1 means "does not apply"."""


def render(modality: str, scene: Scene, rng: np.random.Generator) -> tuple[Array, Labels]:
    """A scene as a raw array, with Int labels for training an encoder.

    Returns:
        image (48, 48, 3), video (8, 48, 48, 3), audio (8000,) or point (512, 6), float32; `LABELS` as () arrays, and
        for images and videos ``cell``, (4, 4, 5) or (8, 4, 4, 5). `write.write_media` stores just this array.

    Raises:
        DataError: the scene is of another modality.
    """
    match scene:
        case ImageScene() if modality == "image":
            return render_image(scene, rng)
        case VideoScene() if modality == "video":
            return render_video(scene, rng)
        case AudioScene() if modality == "audio":
            return render_audio(scene, rng)
        case PointScene() if modality == "point":
            return render_point(scene, rng)
    raise DataError(f"cannot render a scene of '{modality_of(scene)}' as '{modality}' - name the scene's own modality.")
