"""Repair a finished fine-tune: weigh what it changed against its base, and write it in the form that it had.

    Hugging Face folder     a Hugging Face folder; of a vision-language model every part by the same rule
    adapter of PEFT         an adapter of PEFT, with the rank that each weight needs; or the whole model
    checkpoint of graftlm   a checkpoint with one ledger entry in place of those since its base; or one with a whole LLM

What is of low rank is never formed: a rule acts on the factors. Nothing is trained and no data are needed.

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, §4.1; Appendix: the coefficient is tuned on a CPU, after training.
Differs: connectors that base and fine-tune share are consolidated like the LLM (the paper does not say); others are the
    fine-tune's. The tokenizer and its chat template are the fine-tune's too.
"""

import contextlib
import dataclasses
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.core.cache import hash_unchanged
from graftlm.core.errors import CheckpointError, ConfigError, MergeError, did_you_mean
from graftlm.core.files import atomic_folder, hash_json, link_or_copy, read_json, write_json, write_text
from graftlm.merging import RULES, checks, headers, spectral
from graftlm.merging.card import card
from graftlm.merging.checks import Grown, Model
from graftlm.merging.compose import RECIPE, Inputs, compose, ledger_updates, open_inputs, sources
from graftlm.merging.headers import Adapter, Weights
from graftlm.merging.recipe import COMPOSERS, DTYPES, EXPERTS, Recipe
from graftlm.merging.sources import Factors, FileSource, Source, Update, UpdatedSource
from graftlm.merging.spectral import Report
from graftlm.merging.stream import Progress, default_threads
from graftlm.merging.tensorwise import stacked
from graftlm.model.base import base_folder
from graftlm.model.manifest import MANIFEST, describe_files, hash_llm, is_inside
from graftlm.model.rule import Rule

__all__ = [
    "FORMS",
    "Change",
    "Form",
    "LowRankChange",
    "check",
    "check_rule",
    "consolidate",
    "decomposed",
    "exact",
    "mixed_part",
    "one_thread_each",
    "open_change",
    "read_tensor",
]

Form = Literal["adapter", "model"]
"""What is written: an update beside its base, or all weights."""

FORMS: tuple[Form, ...] = ("adapter", "model")

CHUNK = 1 << 24
"""Numbers compared at once."""

TUNED = "tuned"
"""Name of the fine-tune in records."""

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Change:
    """A fine-tune and what it was trained from, opened by their headers.

    Attributes:
        kind: "hf", "peft" or "graftlm": what the fine-tune is.
        base: the folder that stands for the weights before: of an LLM, or a checkpoint.
        weights: of the LLM's base.
        before, after: the LLM's weights; names are the base's.
        names: tensors that may differ.
        parts: what else both have and may differ in, per file of a checkpoint: tensors before and after.
        earlier: ledger files of the weights before.
        continued: whether the weights after are those before with more updates, so that these are all that changed.
    """

    kind: Literal["hf", "peft", "graftlm"]
    base: Path
    tuned: Path
    weights: Weights
    model: Model
    before: Source
    after: Source
    names: Sequence[str]
    parts: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = field(default_factory=dict)
    earlier: Sequence[Path] = ()
    continued: bool = True

    @property
    def files(self) -> list[Path]:
        """Every file of weights that was opened."""
        return list({**self.before.opened, **self.after.opened})

    def low_rank(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """The update of a changed tensor as A, B and a scale; None if it is dense."""
        updates = self.after.factors(name) if self.continued and isinstance(self.after, UpdatedSource) else None
        return stacked(name, updates) if updates else None

    def close(self) -> None:
        """Give the files back."""
        self.before.close()
        self.after.close()


def open_change(tuned: Path, base: Path | None = None) -> Change:
    """Find out what a fine-tune is and what it changed; weights are not read, but those of connectors.

    Args:
        base: what it was trained from. An adapter may name it, and a checkpoint of graftlm knows its LLM; to weigh only
            its last stages, name the checkpoint that they started from.

    Raises:
        CheckpointError: a folder is damaged, or holds no model.
        MergeError: the two do not belong together, or there is no base.
    """
    model = checks.read_model(tuned)
    if isinstance(model, Grown):
        return _open_grown(model, base)
    recipe = Recipe("keep_new", {TUNED: str(tuned)}, None if base is None else str(base))
    if base is not None and headers.kind(base) != "hf":
        raise MergeError(
            f"--base {base}: no Hugging Face folder, which a fine-tune of an LLM has as its base. Name that."
        )
    inputs = open_inputs(recipe, least=1)
    folder, weights = inputs.base.folder, inputs.base
    if isinstance(model, Adapter):
        before = FileSource(folder, weights.tensors)
        after = _adapted(weights, before, model)
        names = [name for name in inputs.names if after.changes(name)]
        return Change("peft", folder, tuned, weights, model, before, after, names)
    return _dense("hf", inputs, model)


def _dense(kind: Literal["hf", "graftlm"], inputs: Inputs, model: Model) -> Change:
    before, models = sources(inputs)
    return Change(kind, inputs.base.folder, model.folder, inputs.base, model, before, models[TUNED], inputs.names)


def _adapted(weights: Weights, before: Source, adapter: Adapter) -> UpdatedSource:
    """A base under an adapter, by the base's names."""
    stored = FileSource(adapter.folder, adapter.tensors)
    updates: dict[str, list[tuple[str, Update]]] = {}
    for name, there in headers.align(weights, adapter).names.items():
        replaced = adapter.replaced.get(there)
        # PEFT stores an embedding that it adapts, although it is the base's
        if replaced is not None and not (there in adapter.updates and _is_same(before, name, stored, replaced.name)):
            updates.setdefault(name, []).append(("put", replaced))
        if there in adapter.updates:
            a, b, scale = adapter.updates[there]
            updates.setdefault(name, []).append(("add", Factors(a, b, scale, there in adapter.transposed)))
    return UpdatedSource(before, updates, [stored])


def _is_same(source: Source, name: str, other: Source, there: str) -> bool:
    rows = source.shape(name)[0]
    step = max(1, rows * CHUNK // max(1, math.prod(source.shape(name))))
    parts = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    return all(torch.equal(read_tensor(source, name, part), read_tensor(other, there, part)) for part in parts)


def _open_grown(model: Grown, base: Path | None) -> Change:
    """A checkpoint of graftlm against its LLM, or against the checkpoint of an earlier stage."""
    if model.manifest.get("routing"):
        raise MergeError(
            f"{model.folder}: is composed of models that stay apart; an original is expected. Write one out first: "
            f"`graftlm restore {model.folder} --route NAME --out FOLDER`."
        )
    start = None if base is None else checks.read_model(base)
    if isinstance(start, Adapter):
        raise MergeError(f"--base {base}: an adapter; the LLM or a checkpoint of an earlier stage is expected.")
    needed, ledger = str(model.manifest["llm"].get("sha256")), list(model.manifest["ledger"])
    llm = model.llm or base_folder(model.manifest["llm"]["source"] if not isinstance(start, Weights) else str(base))
    if isinstance(start, Weights) and (there := hash_llm(start.folder)) != needed:
        if ledger or not is_inside(model.manifest):
            raise MergeError(
                f"--base {base}: another LLM, with hash {there[:16]}; {model.folder} was grown from {needed[:16]} "
                f"({model.manifest['llm'].get('source')}). Name that one, or leave --base out."
            )
        return _dense("graftlm", open_inputs(Recipe("keep_new", {TUNED: str(model.folder)}, str(base))), model)
    weights = headers.read_weights(llm)
    checks.require(checks.compare(weights, {TUNED: model}, least=1))
    first: list[str] = []
    if isinstance(start, Grown):
        if (there := str(start.manifest["llm"].get("sha256"))) != needed:
            raise MergeError(
                f"--base {base}: grown from another LLM, with hash {there[:16]} instead of {needed[:16]}; a checkpoint that "
                f"{model.folder} continues is expected."
            )
        first = list(start.manifest["ledger"])
    if start is None or not isinstance(start, Grown):
        start = Grown(model.folder, {**model.manifest, "ledger": []})
    origin: Source = FileSource(llm, weights.tensors)
    before = _grown_source(origin, start, first)
    continued = [_digest(start, file) for file in first] == [_digest(model, file) for file in ledger[: len(first)]]
    later = ledger[len(first) :] if continued else ledger
    after = _grown_source(before if continued else origin, model, later)
    if continued and not later:
        raise MergeError(
            f"{model.folder}: no stage since {base or 'its LLM'}, so there is nothing to consolidate. A checkpoint after a "
            f"stage is expected" + (f"; to weigh all of it, name the folder of {base}'s LLM." if first else ".")
        )
    changed = {*_changed(start, first), *_changed(model, later)} if not continued else set(_changed(model, later))
    names = [name for name in weights.tensors if name in changed]
    if len(names) < len(changed):
        lost = sorted(changed - set(names))
        raise CheckpointError(f"{model.folder}: updates of tensors that {llm} lacks ({lost[0]} ...). Use another copy.")
    return Change(
        "graftlm",
        base or llm,
        model.folder,
        weights,
        model,
        before,
        after,
        names,
        _shared_connectors(start, model) if base is not None else {},
        [start.folder / file for file in first],
        continued,
    )


def _grown_source(base: Source, model: Grown, ledger: Sequence[str]) -> Source:
    """Weights under some entries of a checkpoint's ledger."""
    part = dataclasses.replace(model, manifest={**model.manifest, "ledger": list(ledger)})
    files = [FileSource(model.folder, headers.read_header(model.folder / file)) for file in ledger]
    return UpdatedSource(base, ledger_updates(part), files)


def _changed(model: Grown, ledger: Sequence[str]) -> list[str]:
    return [key.rpartition(".")[0] for file in ledger for key in headers.read_header(model.folder / file)]


def _digest(model: Grown, file: str) -> str:
    return str(model.manifest["files"][file]["sha256"])


def _shared_connectors(start: Grown, model: Grown) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """File -> tensors before and after, of connectors that both have in one shape and that differ."""
    found = {}
    for modality in start.modalities:
        file = f"connectors.{modality}.safetensors"
        if file not in start.manifest["files"] or file not in model.manifest["files"]:
            continue
        if _digest(start, file) == _digest(model, file):
            continue
        here, there = load_file(start.folder / file), load_file(model.folder / file)
        if {key: each.shape for key, each in here.items()} == {key: each.shape for key, each in there.items()}:
            found[file] = (here, there)
    return found


# --- what a rule makes of it ------------------------------------------------------------------------------------------


def check_rule(rule: str, settings: Mapping[str, Any], folder: Path, base: Path | None = None) -> Recipe:
    """The recipe of one consolidation.

    Raises:
        MergeError: no such rule, one that keeps models apart or needs several, or wrong settings.
    """
    if rule not in RULES.table() and rule in (*COMPOSERS, EXPERTS):
        raise MergeError(
            f"{rule}: keeps several models apart; a rule for one fine-tune is expected: {', '.join(_factored())}."
        )
    recipe = Recipe(rule, {TUNED: str(folder)}, None if base is None else str(base), dict(settings))
    sample = torch.ones(2, 2)
    try:
        RULES.get(rule)(sample, [sample], **{key: value for key, value in settings.items() if key != "trim"})
    except TypeError as error:
        raise MergeError(f"settings of {rule}: {error}. See `graftlm consolidate --help`.") from None
    return recipe


def exact(rule: Rule, settings: Mapping[str, Any]) -> bool:
    """Whether SAC has a window of one term, so that no bit need change."""
    return rule.name == "sac" and settings.get("alpha") == 1 and settings.get("window", "mean") == "mean"


class LowRankChange:
    """A low-rank update of one tensor, decomposed once, for any settings of a rule that has a low-rank form.

    Args:
        a: (R, in).
        b: (out, R).
    """

    def __init__(self, rule: Rule, a: Tensor, b: Tensor, scale: float) -> None:
        self._rule, self._factors = rule, (a, b, scale)
        self._spectrum: spectral.Spectrum | None = None
        if rule.name == "sac":
            found = spectral.decompose(a, b, scale)
            self._spectrum = dataclasses.replace(found, u=found.u.float(), v=found.v.float())  # half the memory

    def at(self, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor, float]:
        """The consolidated update, as A, B and a scale."""
        if self._spectrum is None or exact(self._rule, settings):
            assert self._rule.factored is not None
            return self._rule.factored(*self._factors, **settings)
        return self._spectrum.update(**{"alpha": 0.2, **settings})

    def report(self, settings: Mapping[str, Any]) -> Report | None:
        """What SAC does to its spectrum; None for another rule."""
        return None if self._spectrum is None else self._spectrum.report(**{"alpha": 0.2, **settings})


@contextlib.contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Workers of one thread each: an operation on one low-rank update is too small to be shared between cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(default_threads()) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def decomposed(change: Change, rule: Rule, names: Sequence[str]) -> Iterator[tuple[str, LowRankChange | None]]:
    """The changed tensors' updates, in order; None for a dense one."""

    def work(name: str) -> LowRankChange | None:
        update = change.low_rank(name)
        return None if update is None else LowRankChange(rule, *update)

    with one_thread_each() as pool:
        yield from zip(names, pool.map(work, names), strict=True)


def consolidate(
    tuned: Path,
    rule: str,
    settings: Mapping[str, Any],
    out: Path,
    *,
    base: Path | None = None,
    form: Form | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Write a consolidated fine-tune; the same call goes on with whole models that a killed one began.

    Args:
        tuned: a Hugging Face folder, an adapter of PEFT or a checkpoint of graftlm.
        rule: of one model and its base, such as "sac" or "model_mix".
        out: the folder to make; it appears when it is complete.
        base: see `open_change`.
        form: "adapter" writes an update beside its base (for a checkpoint: a ledger entry), "model" all weights. By
            default what the fine-tune is.
        dtype: storage dtype; by default the base's, or for an adapter the adapter's.

    Returns:
        ``out``.

    Raises:
        CheckpointError, MergeError: see `open_change`; the rule or its settings are wrong, or do not fit the form.
        RunError: no space, or another process makes the same folder.
    """
    recipe = check_rule(rule, settings, tuned, base)
    with contextlib.closing(open_change(tuned, base)) as change:
        form = check(change, rule, out, form, dtype)
        recipe = dataclasses.replace(recipe, base=str(change.base), dtype=dtype)
        if form == "adapter":
            with atomic_folder(out) as folder:
                write = _write_adapter if change.kind == "peft" else _write_ledger
                write(change, recipe, folder, progress)
            return out
    recipe = dataclasses.replace(recipe, base=str(change.weights.folder))
    if change.kind != "graftlm":
        return _whole(change, recipe, out, threads, progress)
    if RULES.get(rule).factored is None or not isinstance(change.after, UpdatedSource):
        return compose(recipe, out, threads=threads, least=1, progress=progress)
    return _densify(tuned, recipe, out, base, threads, progress)


def check(change: Change, name: str, out: Path, form: Form | None = None, dtype: str | None = None) -> Form:
    """What is to be written, if the rule of that name can write it, and there is a place for it.

    Raises:
        ConfigError, MergeError: see `consolidate`.
    """
    rule: Rule = RULES.get(name)
    if dtype is not None and dtype not in DTYPES:
        raise MergeError(f"dtype: '{dtype}'; {did_you_mean(dtype, DTYPES)}")
    if form not in (None, *FORMS):
        raise ConfigError(f"--as {form}: one of {', '.join(FORMS)} is expected.")
    chosen: Form = form or ("model" if change.kind == "hf" else "adapter")
    if chosen == "adapter" and change.kind == "hf":
        raise MergeError(
            f"--as adapter: {change.tuned} is a whole model, and what it changed is not of low rank; --as model is expected."
        )
    if chosen == "adapter" and not isinstance(change.after, UpdatedSource):
        raise MergeError(
            f"--as adapter: {change.tuned} holds a whole LLM, which is no update of {change.base}; --as model is expected."
        )
    if chosen == "adapter" and rule.factored is None:
        raise MergeError(
            f"--as adapter: what {rule.name} makes of a low-rank update is dense; --as model is expected, or one of "
            f"{', '.join(_factored())}."
        )
    if rule.factored is None and change.earlier:
        raise MergeError(
            f"{rule.name}: has no low-rank form, and {change.base} has stages of its own; against an earlier stage one of "
            f"{', '.join(_factored())} is expected."
        )
    if chosen == "model" and isinstance(change.model, Grown) and change.model.llm and change.model.manifest["ledger"]:
        raise MergeError(
            f"--as model: {change.tuned} holds a whole LLM and stages on it, which are not written out as one; --as adapter "
            f"is expected."
        )
    owned = sum(path.stat().st_size for path in change.files if path.is_relative_to(change.tuned))
    folders = {"the base": change.base, "the fine-tune": change.tuned}
    checks.require(checks.place(out, folders, 2 * owned if chosen == "adapter" else change.weights.bytes))
    return chosen


def _factored() -> list[str]:
    return [name for name in RULES.table() if RULES.get(name).factored is not None]


def read_tensor(source: Source, name: str, rows: slice | None = None) -> Tensor:
    """A tensor, or some of its rows, in float32.

    Raises:
        MergeError: a number is not finite.
    """
    shape = source.shape(name)
    rows = slice(0, shape[0] if shape else 1) if rows is None else rows
    shape = (rows.stop - rows.start, *shape[1:]) if shape else ()
    found = torch.empty(shape, dtype=torch.float32)
    source.read(name, rows, found.numpy().reshape(-1))
    if not bool(torch.isfinite(found).all()):
        raise MergeError(f"'{name}' holds numbers that are not finite. `graftlm doctor --deep` finds them.")
    return found


# --- an adapter of PEFT -----------------------------------------------------------------------------------------------


def _write_adapter(change: Change, recipe: Recipe, folder: Path, progress: Progress) -> None:
    adapter, rule = change.model, RULES.get(recipe.rule)
    assert isinstance(adapter, Adapter)
    there = headers.align(change.weights, adapter).names
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    reports: dict[str, Report | None] = {}
    for number, (name, consolidated) in enumerate(decomposed(change, rule, change.names)):
        progress("consolidating", number, len(change.names))
        stored = there[name]
        if stored in adapter.replaced:
            info = adapter.replaced[stored]
            if consolidated is None and stored in adapter.updates:
                raise MergeError(f"'{stored}': replaced and updated, which no adapter holds as one. Use --as model.")
            before, after = read_tensor(change.before, name), read_tensor(change.after, name)
            kept = before if consolidated is not None else rule(before, [after], **recipe.settings)
            tensors[info.name] = kept.to(_dtype(recipe, info.dtype))
        if consolidated is None:
            continue
        a, b, scale = consolidated.at(recipe.settings)
        reports[name] = consolidated.report(recipe.settings)
        if stored in adapter.transposed:
            a, b = b.T, a.T
        infos = adapter.updates[stored]
        tensors[infos.a.name] = a.to(_dtype(recipe, infos.a.dtype)).contiguous()
        tensors[infos.b.name] = b.to(_dtype(recipe, infos.b.dtype)).contiguous()
        module = stored.removesuffix(".weight")
        ranks[module], alphas[module] = len(a), _whole_number(scale * len(a))
    _copy_side_files(change.tuned, folder)
    write_json(folder / headers.ADAPTER_CONFIG, _config(adapter.config, ranks, alphas))
    save_file(tensors, folder / headers.ADAPTER, metadata={"format": "pt"})
    record = _record(change, recipe, reports)
    write_json(folder / RECIPE, record)
    write_text(folder / "README.md", card(recipe, record["inputs"], change.base.name))
    progress("consolidating", len(change.names), len(change.names))


def _config(config: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The adapter's settings, with the rank and the alpha that each module has now."""
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else config["r"]
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else config["lora_alpha"]
    return {
        **config,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {module: each for module, each in alphas.items() if each != alpha},
        "use_rslora": False,  # its scale is in the alphas
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _whole_number(value: float) -> float:
    return int(value) if value == int(value) else value


def _dtype(recipe: Recipe, stored: str) -> torch.dtype:
    return TORCH[DTYPES[recipe.dtype] if recipe.dtype else stored]


def _copy_side_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template and processors: what a fine-tune has beside its weights."""
    skipped = (headers.CONFIG, headers.INDEX, headers.MANIFEST, headers.ADAPTER_CONFIG, RECIPE)
    for path in (path for pattern in headers.SIDE_FILES for path in source.glob(pattern)):
        if path.name not in skipped and path.is_file():
            shutil.copyfile(path, target / path.name)


def _record(change: Change, recipe: Recipe, reports: Mapping[str, Report | None]) -> dict[str, Any]:
    """What was done to what; with SAC also what each spectrum became."""
    owned = [path for path in change.files if path.is_relative_to(change.tuned)]
    given = {"base": (change.base, list(change.weights.files)), TUNED: (change.tuned, owned)}
    record = {
        "compose": recipe.to_dict(),
        "inputs": {
            name: {
                "path": str(folder),
                "sha256": hash_json({path.name: hash_unchanged(path) for path in sorted(files)}),
            }
            for name, (folder, files) in given.items()
        },
    }
    spectra = {name: dataclasses.asdict(report) for name, report in reports.items() if report is not None}
    return {**record, "spectra": spectra} if spectra else record


# --- a checkpoint of graftlm ------------------------------------------------------------------------------------------


def _write_ledger(change: Change, recipe: Recipe, folder: Path, progress: Progress) -> None:
    """The checkpoint again, with one entry for all that came since its base."""
    model, rule = change.model, RULES.get(recipe.rule)
    assert isinstance(model, Grown)
    manifest = model.manifest
    for file in manifest["files"]:
        if file not in manifest["ledger"] and file not in change.parts:
            link_or_copy(model.folder / file, folder / file)
    for number, path in enumerate(change.earlier):
        link_or_copy(path, folder / _ledger_file(number))
    entry: dict[str, Tensor] = {}
    reports: dict[str, Report | None] = {}
    dense: list[str] = []
    for number, (name, consolidated) in enumerate(decomposed(change, rule, change.names)):
        progress("consolidating", number, len(change.names))
        if consolidated is None:
            dense.append(name)
            continue
        a, b, scale = consolidated.at(recipe.settings)
        reports[name] = consolidated.report(recipe.settings)
        entry |= {f"{name}.A": a.contiguous(), f"{name}.B": b.contiguous()}
        entry[f"{name}.scale"] = torch.tensor(scale, dtype=torch.float64)
    for number, name in enumerate(dense, start=len(change.names) - len(dense)):
        progress("consolidating", number, len(change.names))
        before, after = read_tensor(change.before, name), read_tensor(change.after, name)
        entry[f"{name}.value"] = rule(before, [after], **recipe.settings).contiguous()
    ledger = [_ledger_file(number) for number in range(len(change.earlier) + 1)]
    (folder / ledger[-1]).parent.mkdir(parents=True, exist_ok=True)
    save_file(entry, folder / ledger[-1])
    for file, (before_part, after_part) in change.parts.items():
        save_file(mixed_part(rule, recipe.settings, before_part, after_part), folder / file)
    record = _record(change, recipe, reports)
    files = describe_files(folder)
    history = [*manifest["history"], record]
    write_json(folder / MANIFEST, {**manifest, "ledger": ledger, "history": history, "files": files})
    progress("consolidating", len(change.names), len(change.names))


def mixed_part(
    rule: Rule, settings: Mapping[str, Any], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A connector by the same rule; what is no floating-point number is the fine-tune's."""
    return {
        name: rule(before[name], [tensor], **settings).contiguous()
        if tensor.is_floating_point() and not torch.equal(before[name], tensor)
        else tensor
        for name, tensor in after.items()
    }


def _ledger_file(number: int) -> str:
    return f"ledger/{number:03}.safetensors"


# --- a whole model ----------------------------------------------------------------------------------------------------


def _whole(change: Change, recipe: Recipe, out: Path, threads: int | None, progress: Progress) -> Path:
    """All weights, by the merge engine; then the fine-tune's tokenizer beside them."""
    made = out.with_name(f".{out.name}.consolidated")
    shutil.rmtree(made, ignore_errors=True)  # complete, but perhaps of another recipe
    compose(recipe, made, threads=threads, least=1, progress=progress)
    _copy_side_files(change.tuned, made)
    if out.is_dir():
        out.rmdir()
    os.rename(made, out)
    return out


def _densify(
    tuned: Path, recipe: Recipe, out: Path, base: Path | None, threads: int | None, progress: Progress
) -> Path:
    """A checkpoint with all weights of its LLM: its update is consolidated first, and then written out."""
    small = out.with_name(f".{out.name}.small")
    shutil.rmtree(small, ignore_errors=True)
    try:
        consolidate(tuned, recipe.rule, recipe.settings, small, base=base, form="adapter", progress=progress)
        whole = Recipe("keep_new", {TUNED: str(small)}, recipe.base, dtype=recipe.dtype)
        compose(whole, out, threads=threads, least=1, progress=progress)
        story = read_json(small / MANIFEST)["history"]
        write_json(out / MANIFEST, {**read_json(out / MANIFEST), "history": story})
    finally:
        shutil.rmtree(small, ignore_errors=True)
    return out
