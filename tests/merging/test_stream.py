"""The engine gives what the rules of tensors give, bit by bit, whatever the chunks, the threads and the storage dtype."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging.conftest import SHAPES, Folders, continued, flat, read, write
from safetensors.torch import load_file
from torch import Tensor

from graftlm.core.errors import MergeError
from graftlm.merging import mmer, rules, signs, stream, vectors
from graftlm.merging.compose import compose
from graftlm.merging.recipe import Recipe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def merged(rule: str, base: Path, models: list[Path], out: Path, **options: Any) -> dict[str, Tensor]:
    threads = options.pop("threads", 2)
    recipe = Recipe(rule, {m.name: str(m) for m in models}, base=str(base), **options)
    return read(compose(recipe, out, threads=threads))


RULES = [
    ("average", {}),
    ("average", {"weight": 0.3}),
    ("arithmetic", {"scale": 0.4}),
    *(
        ("ties", {"density": density, "merge": how, "scale": 0.7})
        for density in (0.2, 0.8, 1.0)
        for how in ("mean", "sum", "max")
    ),
    ("ties", {"density": 0.4, "compat_reference": True}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "settings"), RULES)
def test_a_streamed_merge_is_the_rule_over_the_whole_model(
    rule: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, models = folders(dtype)
    monkeypatch.setattr(stream, "CHUNK", 64)
    got = flat(merged(rule, base, models, tmp_path / "out", settings=settings))
    wanted = getattr(rules, rule)(flat(read(base)), [flat(read(model)) for model in models], **settings)
    assert got.dtype == dtype
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("then", ["average", "arithmetic", "ties"])
def test_dropping_is_the_rule_tensor_by_tensor(then: str, folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16)
    settings = {"drop": 0.5, "seed": 3, "then": then}
    got = merged("dare", base, models, tmp_path / "out", settings=settings)
    before, after = read(base), [read(model) for model in models]
    for name in SHAPES:
        wanted = rules.dare(
            before[name], [a[name] for a in after], names=[m.name for m in models], tensor=name, **settings
        )
        assert torch.equal(got[name], wanted), name


def test_dropping_does_not_depend_on_order_threads_or_chunks(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = folders(torch.bfloat16)
    settings = {"drop": 0.9, "then": "ties"}
    results = []
    for i, (order, threads, chunk) in enumerate(itertools.product((models, models[::-1]), (1, 3), (64, 1 << 20))):
        monkeypatch.setattr(stream, "CHUNK", chunk)
        results.append(flat(merged("dare", base, order, tmp_path / f"out{i}", settings=settings, threads=threads)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rule", ["average", "arithmetic", "ties"])
def test_the_order_of_models_does_not_matter(rule: str, folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16, 4)
    first = flat(merged(rule, base, models, tmp_path / "a"))
    assert torch.equal(first, flat(merged(rule, base, models[::-1], tmp_path / "b")))


def test_trimming_per_tensor_is_the_rule_tensor_by_tensor(folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16)
    got = merged("ties", base, models, tmp_path / "out", settings={"density": 0.3, "trim": "tensor"})
    before, after = read(base), [read(model) for model in models]
    for name in SHAPES:
        assert torch.equal(got[name], rules.ties(before[name], [a[name] for a in after], density=0.3)), name


def test_weights_of_single_models(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    per_model = {"m1": {"weight": 0.5}, "m2": {"weight": 0.25}, "m3": {"weight": 0.25}}
    got = flat(merged("average", base, models, tmp_path / "out", per_model=per_model))
    a, b, c = (flat(read(model)).double() for model in models)
    assert torch.equal(got, (0.5 * a + 0.25 * b + 0.25 * c).float())


@pytest.mark.parametrize(
    ("rule", "settings"), [("sac", {"alpha": 0.3}), ("model_mix", {"alpha": 0.3}), ("ewf", {"new": 1.0, "old": 3.0})]
)
def test_rules_of_one_model(rule: str, settings: dict[str, Any], folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16, 1)
    got = merged(rule, base, models, tmp_path / "out", settings=settings)
    before, after = read(base), read(models[0])
    for name in SHAPES:
        assert torch.equal(got[name], getattr(rules, rule)(before[name], [after[name]], **settings)), name


def test_a_tall_matrix_is_consolidated_by_rows(folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.float32, 1)
    recipe = Recipe("sac", {"m": str(models[0])}, str(base), {"alpha": 0.3})
    whole = read(compose(recipe, tmp_path / "whole"))
    rows = read(compose(recipe, tmp_path / "rows", ram=200_000))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(rows[name], read(models[0])[name])
    torch.testing.assert_close(rows[name], whole[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_signs_and_scales(
    dtype: torch.dtype, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = folders(dtype)
    monkeypatch.setattr(stream, "CHUNK", 64)
    settings = {"density": 0.8, "significance": 0.9, "rescale": True}
    per_model = {"m2": {"significance": 0.5}}
    compose(Recipe("mmer", {m.name: str(m) for m in models}, str(base), settings, per_model), tmp_path / "mmer")
    compose(Recipe("signs", {m.name: str(m) for m in models}, str(base)), tmp_path / "signs")
    stored = load_file(tmp_path / "mmer" / "routing" / "00001.safetensors")
    bits = load_file(tmp_path / "signs" / "routing" / "00001.safetensors")
    before, after = read(base), [read(model) for model in models]
    taus = vectors.task_vectors(flat(before), [flat(a) for a in after])
    trimmed = [vectors.trim(tau, 0.8) for tau in taus]
    shared = rules.vectors.ties(taus, 0.8)
    masks = mmer.masks(shared, trimmed, [0.9, 0.5, 0.9])
    start = 0
    for name in sorted(SHAPES):
        size = before[name].numel()
        part = slice(start, start + size)
        start += size
        assert torch.equal(stored[f"{name}.shared"], shared[part].reshape(SHAPES[name]).to(dtype)), name
        for i, mask in enumerate(masks):
            assert torch.equal(stored[f"{name}.masks"][i], mmer.pack(mask[part])), name
        scales = mmer.rescale(shared[part], [m[part] for m in masks], [t[part] for t in taus])
        torch.testing.assert_close(stored[f"{name}.scales"], scales.float(), rtol=1e-6, atol=0)
        for i in range(len(models)):
            positive, scale = signs.signs(after[i][name].float() - before[name].float())
            assert torch.equal(bits[f"{name}.signs"][i], mmer.pack(positive)), name
            torch.testing.assert_close(bits[f"{name}.scales"][i], scale.float().flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("where", "rule"), list(itertools.product(["base", "m2"], ["average", "ties", "sac", "signs"]))
)
def test_a_weight_that_is_not_finite_is_named(where: str, rule: str, folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16, 1 if rule == "sac" else 3)
    broken = base if where == "base" else models[0 if rule == "sac" else 1]
    weights = read(broken)
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    (broken / "model.safetensors").unlink()
    broken.rename(tmp_path / "gone")
    write(broken, weights)
    with pytest.raises(MergeError, match=r"up_proj\.weight.*(finite)"):
        merged(rule, base, models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_are_sharded_and_indexed(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.merging import output

    base, models = folders()
    monkeypatch.setattr(output, "SHARD_BYTES", 8000)
    merged("average", base, models, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert set(index["weight_map"]) == set(SHAPES)


SCRIPT = """
import sys
from graftlm.merging import stream, output
from graftlm.merging.compose import compose
from graftlm.merging.recipe import Recipe
stream.CHUNK, stream.NOTED_BYTES = 64, 1
rule, base, out, *models = sys.argv[1:]
compose(Recipe(rule, {m.rsplit("/", 1)[1]: m for m in models}, base), __import__("pathlib").Path(out), threads=1)
"""


@pytest.mark.parametrize("rule", ["ties", "mmer", "signs", "sac"])
def test_killed_at_any_point_it_goes_on_and_ends_byte_identical(rule: str, folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16, 1 if rule == "sac" else 3)

    def run(out: Path, kill: str = "") -> int:
        environment = {
            **os.environ,
            "GRAFTLM_KILL_AT": kill,
            "OMP_NUM_THREADS": "1",
            "GRAFTLM_CACHE": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", SCRIPT, rule, str(base), str(out), *map(str, models)]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    assert run(tmp_path / "whole") == 0
    for kill in ("merge.noted:2", "merge.noted:4", "merge.written"):
        assert run(tmp_path / "out", kill) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", "merge.renamed") == -signal.SIGKILL
    assert run(tmp_path / "out") == 0
    whole, resumed = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()}
        for d in (tmp_path / "whole", tmp_path / "out")
    )
    assert whole.keys() == resumed.keys()
    assert all(whole[path] == resumed[path] for path in whole)
    assert not list(tmp_path.glob(".out*"))


def test_another_job_starts_again(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (tmp_path / ".out.journal").write_text('{"job": "another"}\n{"tensors": 5, "kept": [0, 0, 0]}\n')
    (partial / "model.safetensors").write_bytes(b"left over")
    got = flat(merged("average", base, models, tmp_path / "out"))
    assert torch.equal(got, rules.average(flat(read(base)), [flat(read(model)) for model in models]))


def test_a_model_that_changes_meanwhile_is_noticed(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    recipe = Recipe("average", {m.name: str(m) for m in models}, base=str(base))

    def touch(what: str, done: int, total: int) -> None:
        os.utime(models[1] / "model.safetensors", ns=(1, 1))

    with pytest.raises(MergeError, match=r"m2.*changed while it was merged"):
        compose(recipe, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Anonymous memory of a merge of 50 MB and of 200 MB per model differs by less than the difference of one model."""
    grown = []
    for rows in (2_000, 8_000):
        root = tmp_path / str(rows)
        base = {
            "a.weight": torch.randn(rows, 3_000, dtype=torch.bfloat16),
            "b.weight": torch.randn(64, 64, dtype=torch.bfloat16),
        }
        folders = [write(root / "base", base), *(write(root / f"m{i}", continued(base, i)) for i in (1, 2))]
        code = (
            "import sys, pathlib\n"
            "from graftlm.merging.compose import compose\n"
            "from graftlm.merging.recipe import Recipe\n"
            "seen = []\n"
            "def look(*_):\n"
            "    text = open('/proc/self/status').read()\n"
            "    seen.append(int(text.split('RssAnon:')[1].split()[0]))\n"
            "base, out, *models = sys.argv[1:]\n"
            "recipe = Recipe('ties', {m.rsplit('/', 1)[1]: m for m in models}, base)\n"
            "compose(recipe, pathlib.Path(out), threads=1, progress=look)\n"
            "print(max(seen))\n"
        )
        command = [sys.executable, "-c", code, str(folders[0]), str(root / "out"), *map(str, folders[1:])]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        grown.append(int(done.stdout.split()[-1]) * 1024)
    assert grown[1] - grown[0] < 36_000_000 * 0.5
    assert grown[1] < 600_000_000


def test_packed_bits_are_little_endian() -> None:
    mask = np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], bool)
    assert mmer.pack(torch.from_numpy(mask)).tolist() == [1, 1]


def test_files_that_went_missing_are_not_taken_for_finished(folders: Folders, tmp_path: Path) -> None:
    base, models = folders(torch.bfloat16)
    command = [sys.executable, "-c", SCRIPT, "average", str(base), str(tmp_path / "out"), *map(str, models)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRAFTLM_CACHE": str(tmp_path / "cache")}
    killed = subprocess.run(command, env={**environment, "GRAFTLM_KILL_AT": "merge.noted:3"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    shard = tmp_path / ".out.partial" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:500])
    subprocess.run(command, env=environment, check=True)
    wanted = rules.average(flat(read(base)), [flat(read(model)) for model in models])
    assert torch.equal(flat(read(tmp_path / "out")), wanted)


@pytest.mark.parametrize("where", ["base", "m2"])
@pytest.mark.parametrize("settings", [{"drop": 0.9}, {"drop": 0.9, "then": "ties", "merge": "max"}])
def test_dropping_hides_no_weight_that_is_not_finite(
    settings: dict[str, Any], where: str, folders: Folders, tmp_path: Path
) -> None:
    base, models = folders()
    broken = base if where == "base" else models[1]
    weights = read(broken)
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = float("inf")
    broken.rename(tmp_path / "gone")
    write(broken, weights)
    with pytest.raises(MergeError, match=r"up_proj\.weight.*finite"):
        merged("dare", base, models, tmp_path / "out", settings=settings)


def test_a_density_that_keeps_nothing_of_a_tensor(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    tiny = {"density": 0.004, "trim": "tensor"}
    got = merged("ties", base, models, tmp_path / "out", settings=tiny)
    before, after = read(base), [read(model) for model in models]
    for name in SHAPES:
        assert torch.equal(got[name], rules.ties(before[name], [a[name] for a in after], density=0.004)), name


def test_a_head_that_is_tied_is_not_merged_apart(folders: Folders, tmp_path: Path) -> None:
    base, models = folders()
    for folder in (base, *models):
        weights = read(folder)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        folder.rename(tmp_path / f"{folder.name}-old")
        write(folder, weights)
        (folder / "config.json").write_text('{"model_type": "test", "tie_word_embeddings": true}')
    got = merged("dare", base, models, tmp_path / "out", settings={"drop": 0.5})
    assert "lm_head.weight" not in got and "model.embed_tokens.weight" in got


def test_a_wide_matrix_is_consolidated_from_the_left(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(48, 160, generator=generator)}
    tuned = {"a.weight": base["a.weight"] + 0.1 * torch.randn(48, 160, generator=generator)}
    recipe = Recipe(
        "sac", {"m": str(write(tmp_path / "m", tuned))}, str(write(tmp_path / "base", base)), {"alpha": 0.3}
    )
    whole = read(compose(recipe, tmp_path / "whole"))["a.weight"]
    wide = read(compose(recipe, tmp_path / "wide", ram=100_000))["a.weight"]
    torch.testing.assert_close(wide, whole, rtol=1e-5, atol=1e-6)
