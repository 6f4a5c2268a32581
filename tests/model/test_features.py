"""The feature cache: counted, shared by processes, bounded, and not to be harmed by damage."""

import contextlib
import logging
import multiprocessing
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import DataError
from graftlm.data.types import Media
from graftlm.model import features
from graftlm.model.encoders.base import Encoder
from graftlm.model.features import FeatureCache


class Digits(Encoder):
    """A file of numbers, one token per number; counts its work."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.width, self.tokens = 4, 3
        self.batches: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, generator=generator), requires_grad=False)

    def read(self, source: Path) -> Tensor:
        try:
            return torch.tensor([float(x) for x in source.read_text().split()])
        except ValueError as error:
            raise DataError(f"{source}: not numbers ({error}). Restore the file.") from None

    def forward(self, inputs: Tensor) -> Tensor:
        self.batches.append(len(inputs))
        return torch.matmul(inputs[..., None], self.weight[None])


@pytest.fixture
def items(tmp_path: Path) -> list[Media]:
    return [write(tmp_path / f"{i}.txt", f"{i} 2.5 {i + 1}") for i in range(5)]


def write(path: Path, text: str) -> Media:
    path.write_text(text)
    return Media("digits", path)


def expected(items: list[Media], encoder: Digits | None = None) -> Tensor:
    encoder = encoder or Digits()
    return torch.stack([encoder.read(item.source)[:, None] * encoder.weight for item in items])


def counts(cache: FeatureCache) -> tuple[int, int]:
    return cache.hits, cache.misses


def file_of(root: Path) -> Path:
    (path,) = root.glob("*.sqlite")
    return path


def execute(path: Path, command: str, *values: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute(command, values)


def settle(path: Path) -> None:
    """Everything into the main file, as when the last process has gone: the log would repair what a test damages."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)


# --- hits and misses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [True, False])
def test_counters(tmp_path: Path, items: list[Media], on_disk: bool) -> None:
    cache, encoder = FeatureCache(tmp_path / "c" if on_disk else None), Digits()
    assert torch.equal(cache.get(encoder, items[:3]), expected(items[:3]))
    assert counts(cache) == (0, 3)
    assert torch.equal(cache.get(encoder, [items[4], items[1], items[4]]), expected([items[4], items[1], items[4]]))
    assert counts(cache) == (2, 4)  # the second of two equal ones is a hit
    assert encoder.batches == [1, 1, 1, 1]


def test_another_cache_finds_them(tmp_path: Path, items: list[Media]) -> None:
    FeatureCache(tmp_path / "c").get(Digits(), items)
    cache, encoder = FeatureCache(tmp_path / "c"), Digits()
    assert torch.equal(cache.get(encoder, items), expected(items))
    assert counts(cache) == (5, 0) and not encoder.batches


def test_content_counts_and_not_the_name(tmp_path: Path, items: list[Media]) -> None:
    cache, encoder = FeatureCache(), Digits()
    cache.get(encoder, items[:1])
    cache.get(encoder, [write(tmp_path / "copy.txt", items[0].source.read_text())])
    assert counts(cache) == (1, 1)
    changed = write(items[0].source, "7 7 77")
    assert torch.equal(cache.get(encoder, [changed]), expected([changed]))
    assert counts(cache) == (1, 2)


def test_every_encoder_has_its_own(tmp_path: Path, items: list[Media]) -> None:
    cache = FeatureCache(tmp_path / "c")
    for seed in (0, 1):
        assert torch.equal(cache.get(Digits(seed), items), expected(items, Digits(seed)))
    assert counts(cache) == (0, 10) and len(list((tmp_path / "c").glob("*.sqlite"))) == 2


def test_weights_loaded_later_make_another_encoder(items: list[Media]) -> None:
    cache, encoder = FeatureCache(), Digits(0)
    cache.get(encoder, items)
    encoder.load_state_dict(Digits(1).state_dict())
    assert torch.equal(cache.get(encoder, items), expected(items, Digits(1)))


def test_another_code_makes_another_encoder(
    tmp_path: Path, items: list[Media], monkeypatch: pytest.MonkeyPatch
) -> None:
    FeatureCache(tmp_path / "c").get(Digits(), items)
    (tmp_path / "media.py").write_text("# read in another way")
    monkeypatch.setattr(features.media, "__file__", str(tmp_path / "media.py"))
    cache = FeatureCache(tmp_path / "c")
    cache.get(Digits(), items)
    assert counts(cache) == (0, 5)


# --- what a feature depends on ----------------------------------------------------------------------------------------


def test_features_are_float32_without_gradient(items: list[Media]) -> None:
    encoder = Digits()
    encoder.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = FeatureCache().get(encoder, items)
    assert out.dtype == torch.float32 and not out.requires_grad
    assert torch.equal(out, expected(items).detach())


def test_several_at_once_if_asked_for(tmp_path: Path, items: list[Media]) -> None:
    encoder = Digits()
    odd = write(tmp_path / "odd.txt", "1 2")
    cache = FeatureCache(tmp_path / "c", batch=2)
    assert torch.equal(cache.get(encoder, [*items, items[0]]), expected([*items, items[0]]))
    assert encoder.batches == [2, 2, 1] and counts(cache) == (1, 5)
    cache.get(encoder, [write(tmp_path / "9.txt", "9 9 9")])
    with pytest.raises(RuntimeError):  # tokens of different numbers make no tensor, but each was encoded alone
        cache.get(encoder, [odd, write(tmp_path / "8.txt", "8 8 8")])
    assert encoder.batches == [2, 2, 1, 1, 1, 1]


def test_memory_is_bounded(tmp_path: Path, items: list[Media]) -> None:
    size = 3 * 4 * 4
    cache, encoder = FeatureCache(tmp_path / "c", memory_bytes=2 * size), Digits()
    for _ in range(2):
        assert torch.equal(cache.get(encoder, items), expected(items))  # more than fits, in one batch
    assert counts(cache) == (5, 5) and encoder.batches == [1] * 5  # the others came from the disk
    assert len(cache._memory) == 2 and cache._size == 2 * size
    nothing = FeatureCache(None, memory_bytes=0)
    nothing.get(encoder, items)
    assert not nothing._memory and nothing._size == 0


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "data = zeroblob(48)",
        "data = substr(data, 1, 40)",
        "data = NULL",
        "data = 'text'",
        "crc = crc + 1",
        "crc = NULL",
        "shape = '3,5'",
        "shape = 'what'",
        "shape = NULL",
    ],
)
def test_a_damaged_row_is_computed_again(tmp_path: Path, items: list[Media], change: str) -> None:
    root = tmp_path / "c"
    first = FeatureCache(root)
    first.get(Digits(), items)
    execute(file_of(root), f"UPDATE features SET {change} WHERE digest = ?", first.digest(items[1]))
    for hits_and_misses in ((4, 1), (5, 0)):  # and the row is replaced
        cache = FeatureCache(root)
        assert torch.equal(cache.get(Digits(), items), expected(items))
        assert counts(cache) == hits_and_misses


def garbage(path: Path) -> None:
    path.write_bytes(b"no data base at all " * 999)


def bad_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:] = b"\xff" * (len(data) - 100)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [garbage, bad_pages])
def test_a_damaged_file_is_set_aside(
    tmp_path: Path, items: list[Media], damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "c"
    FeatureCache(root).get(Digits(), items)
    settle(file_of(root))
    damage(file_of(root))
    with caplog.at_level(logging.WARNING):
        cache = FeatureCache(root)
        assert torch.equal(cache.get(Digits(), items), expected(items))
    assert counts(cache) == (0, 5)
    assert len(list(root.glob("*.damaged"))) == 1 and caplog.text.count("its features are computed again") == 1
    again = FeatureCache(root)
    again.get(Digits(), items)
    assert counts(again) == (5, 0)


def test_a_file_damaged_while_in_use(tmp_path: Path, items: list[Media], caplog: pytest.LogCaptureFixture) -> None:
    """Two caches meet the same damage: one sets the file aside, the other goes on with the new one."""
    root = tmp_path / "c"
    one, two = FeatureCache(root, memory_bytes=0), FeatureCache(root, memory_bytes=0)
    for cache in (one, two):
        cache.get(Digits(), items)
    execute(file_of(root), "PRAGMA wal_checkpoint(TRUNCATE)")
    bad_pages(file_of(root))
    for cache in (one, two, FeatureCache(root), one, two):
        assert torch.equal(cache.get(Digits(), items), expected(items))
    assert caplog.text.count("its features are computed again") == 1
    fresh = FeatureCache(root)
    fresh.get(Digits(), items)
    assert counts(fresh) == (5, 0)


def test_a_cache_that_cannot_be_used(tmp_path: Path, items: list[Media]) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises(
        DataError, match=r"sqlite: the feature cache cannot be used .*; a file on a local disk with free"
    ):
        FeatureCache(tmp_path / "c").get(Digits(), items)


def test_a_table_of_another_program(tmp_path: Path, items: list[Media]) -> None:
    root = tmp_path / "c"
    FeatureCache(root).get(Digits(), items)
    execute(file_of(root), "ALTER TABLE features RENAME COLUMN data TO what")
    with pytest.raises(
        DataError, match=r"cannot be used \(no such column: data\).* the file may be deleted at any time"
    ):
        FeatureCache(root).get(Digits(), items)


def test_another_thread_is_refused_and_nothing_is_lost(tmp_path: Path, items: list[Media]) -> None:
    cache, encoder, seen = FeatureCache(tmp_path / "c", memory_bytes=0), Digits(), []
    cache.get(encoder, items)

    def use() -> None:
        with pytest.raises(DataError, match="same thread"):
            cache.get(encoder, items)
        seen.append(True)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen and not list((tmp_path / "c").glob("*.damaged"))


@pytest.mark.parametrize(
    ("name", "message"), [("bad.txt", "bad.txt: not numbers"), ("none.txt", "none.txt: cannot be")]
)
def test_media_that_cannot_be_read(tmp_path: Path, items: list[Media], name: str, message: str) -> None:
    (tmp_path / "bad.txt").write_text("1 2 x")
    cache = FeatureCache(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        cache.get(Digits(), [items[0], Media("digits", tmp_path / name)])
    assert torch.equal(cache.get(Digits(), items), expected(items))
    with pytest.raises(DataError, match=r"none\.txt: cannot be read \(No such file or directory\); a file is expected"):
        cache.digest(Media("digits", tmp_path / "none.txt"))


# --- processes --------------------------------------------------------------------------------------------------------


def work(root: Path, paths: list[Path], results: "multiprocessing.Queue[tuple[int, int, float]]") -> None:
    torch.set_num_threads(1)
    cache = FeatureCache(root, memory_bytes=0)
    items = [Media("digits", path) for path in paths]
    total = sum(float(cache.get(Digits(), items[i : i + 4]).sum()) for i in range(0, len(items), 4))
    results.put((cache.hits, cache.misses, total))


def test_processes_share_one_file(tmp_path: Path) -> None:
    """They begin at once, on a file that is not there yet, in different orders."""
    items = [write(tmp_path / f"{i}.txt", f"{i} {i + 0.5} 1") for i in range(40)]
    paths = [item.source for item in items]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    orders = (paths, paths[::-1], paths[20:] + paths[:20])
    processes = [context.Process(target=work, args=(tmp_path / "c", order, results)) for order in orders]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(hits + misses == 40 for hits, misses, _ in seen) and sum(misses for _, misses, _ in seen) >= 40
    assert all(total == pytest.approx(float(expected(items).sum()), rel=1e-4) for _, _, total in seen)
    last = FeatureCache(tmp_path / "c")
    assert torch.equal(last.get(Digits(), items), expected(items)) and counts(last) == (40, 0)
