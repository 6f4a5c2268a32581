"""Scenes belong to one split for good, show what they hold, and carry labels that fit."""

import numpy as np
import pytest

from graftlm.core.errors import DataError
from graftlm.core.seeds import rng
from graftlm.data.miniworld.language import pick
from graftlm.data.miniworld.render import CELL_CLASSES, LABELS, render
from graftlm.data.miniworld.scenes import MODALITIES, SPLITS, describe, draw, modality_of, split_of, visit_of
from graftlm.data.miniworld.text import text_sample

SHAPES = {"image": (48, 48, 3), "video": (8, 48, 48, 3), "audio": (8000,), "point": (512, 6)}
EVERY = [(modality, visit) for modality in MODALITIES for visit in (1, 2)]


@pytest.mark.parametrize(("modality", "visit"), EVERY)
def test_a_scene_belongs_to_the_split_it_is_drawn_from(modality, visit):
    stream = rng(0, "test", modality, visit)
    for split in SPLITS:
        for _ in range(30):
            scene = draw(modality, stream, split, visit)
            assert split_of(scene) == split
            assert (modality_of(scene), visit_of(scene)) == (modality, visit)


@pytest.mark.parametrize("modality", MODALITIES)
def test_splits_partition_scenes_about_70_10_20(modality):
    stream = rng(0, "test", modality)
    scenes = {str(describe(scene)): split_of(scene) for scene in (draw(modality, stream) for _ in range(4000))}
    shares = [sum(split == wanted for split in scenes.values()) / len(scenes) for wanted in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.06)


@pytest.mark.parametrize(("modality", "visit"), EVERY)
def test_rendering_is_a_float_array_with_labels_in_range(modality, visit):
    stream = rng(0, "render", modality, visit)
    for _ in range(20):
        raw, labels = render(modality, draw(modality, stream, visit=visit), stream)
        assert raw.shape == SHAPES[modality]
        assert raw.dtype == np.float32
        assert np.isfinite(raw).all()
        cells = labels.pop("cell", None)
        assert labels.keys() == LABELS[modality].keys()
        for name, classes in LABELS[modality].items():
            assert labels[name].shape == ()
            assert -1 <= labels[name] < classes
        if modality in ("image", "video"):
            assert raw.min() >= 0
            assert raw.max() <= 1
            assert cells.shape == (*raw.shape[:-3], 4, 4, 5)
            for channel, classes in enumerate(CELL_CLASSES.values()):
                assert cells[..., channel].max() < classes
            assert set(np.unique(cells[..., 4])) == {-1, 1}
        else:
            assert cells is None


def test_second_visits_add_attributes_that_first_visits_lack():
    added = {"image": ("place",), "video": ("then",), "audio": ("melody", "second"), "point": ("tilt", "larger")}
    for modality, names in added.items():
        for visit in (1, 2):
            stream = rng(0, "visits", modality, visit)
            labels = [render(modality, draw(modality, stream, visit=visit), stream)[1] for _ in range(20)]
            assert any(label[name] >= 0 for label in labels for name in names) == (visit == 2)
    image = draw("image", rng(0, "frame"), visit=2)
    assert render("image", image, rng(0, "frame"))[1]["frame"] == image.frame + 1


def test_the_same_stream_gives_the_same_array():
    scene = draw("audio", rng(1, "scene"))
    first, second = (render("audio", scene, rng(1, "pixels"))[0] for _ in range(2))
    assert (first == second).all()


def test_a_moving_shape_moves_the_way_its_scene_says():
    stream = rng(0, "motion")
    for motion, axis, sign in ((0, 1, -1), (1, 1, 1), (2, 0, -1), (3, 0, 1)):
        scene = draw("video", stream, wanted=lambda scene, motion=motion: scene.motion == motion and scene.speed == 1)
        cells = render("video", scene, stream)[1]["cell"]
        places = [np.argwhere(frame[..., 4] == 1)[0][axis] for frame in cells]
        assert (places[-1] - places[0]) * sign > 0


def test_a_rhythm_needs_three_notes():
    stream = rng(0, "rhythm")
    for _ in range(100):
        scene = draw("audio", stream)
        assert (scene.rhythm >= 0) == (scene.count >= 3)


def test_unknown_modality_and_impossible_wish_are_errors(monkeypatch):
    with pytest.raises(DataError, match="has no modality 'smell' - expected one of image, video, audio, point"):
        draw("smell", rng(0))
    monkeypatch.setattr("graftlm.data.miniworld.scenes._ATTEMPTS", 10)
    with pytest.raises(
        DataError, match=r"no image scene of split 'val' \(visit 1\) meets the condition after 10 draws"
    ):
        draw("image", rng(0), "val", wanted=lambda scene: False)
    with pytest.raises(DataError, match="cannot render a scene of 'audio' as 'image'"):
        render("image", draw("audio", rng(0)), rng(0))


def test_the_text_corpus_draws_from_the_train_split_only(monkeypatch):
    asked = []

    def watch(modality, stream, split=None, *rest, **named):
        asked.append(split)
        return draw(modality, stream, split, *rest, **named)

    for module in ("text", "joint", "instructions"):
        monkeypatch.setattr(f"graftlm.data.miniworld.{module}.draw", watch)
    stream = rng(0, "corpus")
    for _ in range(300):
        text_sample(stream)
    assert set(asked) == {"train"}


def test_pick_covers_all_values():
    stream = rng(0, "pick")
    assert {pick(stream, "abc") for _ in range(50)} == set("abc")
