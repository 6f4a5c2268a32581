"""Streams: which stages, in which order, with which probes; what happens to bad media on the way."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graftlm.core.errors import ConfigError, DataError
from graftlm.data import streams
from graftlm.data.miniworld.combinations import COMBINATIONS
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import FOLDERS, MERA, STREAMS, experts, mera, miniworld
from graftlm.data.tasks import reading
from graftlm.data.types import Stream

ORDER = ["image", "video", "audio", "point"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(WorldSpec("tiny", stages=8, expansion=True), tmp_path_factory.mktemp("worlds"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A world whose files a test may damage."""
    return build(WorldSpec("tiny", seed=1), tmp_path)


def names(stream: Stream) -> list[str]:
    return [stage.name for stage in stream.stages]


def test_one_modality_after_the_other(world: Path) -> None:
    stream = miniworld(world)
    assert stream.name == "miniworld-sequential" and names(stream) == ORDER
    for stage in stream.stages:
        assert tuple(task.name for task in stage.tasks) == MERA[stage.name]
        assert stage.modalities == (stage.name,)
        assert [task.kind for task in stage.tasks] == ["caption", "qa"]
        assert len(stage.samples()) == sum(len(task.train) for task in stage.tasks) > 0
        assert stage.samples(frozenset({"caption"})) == list(stage.tasks[0].train)


def test_the_reverse_has_the_same_stages(world: Path) -> None:
    forward, backward = miniworld(world), miniworld(world, "reverse")
    assert backward.name == "miniworld-reverse" and backward.stages == forward.stages[::-1]
    assert backward.probes == forward.probes


@pytest.mark.parametrize(("order", "first"), [("sequential", ORDER), ("reverse", ORDER[::-1])])
def test_eight_stages_visit_every_modality_twice(order: streams.Order, first: list[str], world: Path) -> None:
    stream = miniworld(world, order, long=True)
    assert stream.name == f"miniworld-long-{order}"
    assert names(stream) == [*first, *(f"{name}2" for name in first)]
    assert stream.stages[:4] == miniworld(world, order).stages
    for once, again in zip(stream.stages[:4], stream.stages[4:], strict=True):
        assert again.modalities == once.modalities
        assert [task.name for task in again.tasks] == [f"{task.name}_2" for task in once.tasks]
        files = [{m.source for s in stage.samples() for m in s.media} for stage in (once, again)]
        assert files[0].isdisjoint(files[1]) and all(world / "second" in file.parents for file in files[1])


def test_probes_are_measured_and_never_learned(world: Path) -> None:
    joint, plain = miniworld(world).probes
    assert (joint.name, joint.metric, set(joint.modalities)) == ("mcub", "letter", set(ORDER))
    assert not joint.train and joint.test
    assert (plain.name, plain.kind, plain.modalities) == ("instructions", "instruction", ())


def test_samples_are_told_apart_by_task_and_id(world: Path) -> None:
    tasks = [task for stage in miniworld(world, long=True).stages for task in stage.tasks]
    keys = [(s.task, s.id) for task in tasks for s in task.train]
    assert len(set(keys)) == len(keys) and len({task.name for task in tasks}) == 16


@pytest.mark.parametrize("name", [name for name in STREAMS.table() if name.startswith(("miniworld", "mera"))])
def test_every_named_stream_opens(name: str, world: Path) -> None:
    stream = STREAMS.get(name)(world)
    assert stream.name == {"miniworld-long": "miniworld-long-sequential"}.get(name, name)
    assert names(stream)[:4] == (ORDER[::-1] if name.endswith("reverse") else ORDER)


def test_experts_learn_letters_and_are_asked_over_combinations(world: Path) -> None:
    stream = experts(world)
    assert names(stream) == ORDER
    for stage in stream.stages:
        letters = stage.tasks[2]
        assert (letters.name, letters.kind, letters.metric) == (f"choice_{stage.name}", "choice", "letter")
        assert letters.modalities == stage.modalities and len(letters.train) == len(stage.samples()) / 2
    assert [probe.name for probe in stream.probes[:-1]] == [f"expansion_{name}" for name in COMBINATIONS]
    for probe, inputs in zip(stream.probes[:-1], COMBINATIONS.values(), strict=True):
        assert probe.modalities == inputs and not probe.train and probe.val and probe.test
        assert all(tuple(m.modality for m in sample.media) == inputs for sample in probe.test)
    assert [stage.name for stage in stream.later] == [f"{task}_2" for pair in MERA.values() for task in pair]
    assert all(stage.samples() for stage in stream.later)


def test_the_order_of_public_data(world: Path, tmp_path: Path) -> None:
    assert names(mera(world)) == ORDER and [probe.name for probe in mera(world).probes] == ["mcub"]
    for task in {FOLDERS.get(task, task) for pair in MERA.values() for task in pair}:
        (tmp_path / task).symlink_to(world / task)
    assert mera(tmp_path, "reverse").probes == ()


def test_an_unknown_order_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"order 'revers'; did you mean 'reverse'\?"):
        miniworld(world, "revers")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="order 'up'; known: reverse, sequential"):
        mera(world, "up")  # type: ignore[arg-type]


def test_a_stage_without_training_samples_is_named(own: Path) -> None:
    path = own / "audiocaps/dataset/train.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="audiocaps: no training sample in"):
        miniworld(own)


def test_a_missing_folder_is_named(own: Path) -> None:
    shutil.rmtree(own / "cap3d")
    with pytest.raises(DataError, match=r"cap3d/.*: this annotation file is missing"):
        miniworld(own)


def test_bad_media_are_counted_and_left_out(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = miniworld(own)
    lost, broken = (whole.stages[i].tasks[0].train[3].media[0].source for i in (0, 1))
    broken.write_bytes(broken.read_bytes()[:50])
    assert miniworld(own) == whole  # opening a stream decodes nothing: that would take hours
    lost.unlink()
    with pytest.raises(DataError, match=rf"coco: 1 media files of 1 samples .* are missing, first {lost}"):
        miniworld(own)
    caplog.clear()
    skipped = miniworld(own, skip_bad=True)
    used = {m.source for s in skipped.stages for x in s.samples() for m in x.media}
    assert not used & {lost, broken}
    assert ", 1 skipped" in skipped.stages[0].tasks[0].source
    assert ", 1 corrupt skipped" in skipped.stages[1].tasks[0].source
    assert "msvd: 1 samples skipped because their media are corrupt" in caplog.text
    assert skipped.stages[3] == whole.stages[3]


def test_only_skipping_decodes_and_each_file_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    for modality, reader in reading.READERS.items():

        def counted(path: Path, reader: object = reader) -> object:
            read.append(path)
            return reader(path)  # type: ignore[operator]

        monkeypatch.setitem(reading.READERS, modality, counted)
    miniworld(own)
    assert not read
    miniworld(own, skip_bad=True)
    assert read and len(read) == len(set(read))


def test_the_table_is_read_without_torch() -> None:
    code = (
        "import sys; from graftlm.experiment.tables import registry; table = registry('streams').table();"
        "assert len(table) == 15 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
