"""How much of a fine-tune to keep: one setting of a rule over a grid, measured, drawn, and picked.

Two sets are measured at every value, in percent: *new*, what the fine-tune learned, of the fine-tune's score; and *keep*,
what its base could, of the base's score; over several tasks the mean of the ratios. As the setting grows from the base's
end, new rises and keep falls:

    general-stable region    from the base's end to α1: every value keeps at least ``least_keep`` %
    task-stable region       from α2 to the fine-tune's end: every value has at least ``least_new`` % of the new
    ideal region             [α2, α1], if α2 does not lie beyond α1

The value picked is the best score inside the ideal region, or, where there is none, the best of all; of equal ones that
nearest to the base.

Values are written into one loaded model where a rule acts tensor by tensor (`InPlace`), with what is low-rank decomposed
once: a value costs one walk over the changed weights of the base, and no files. SAC of a dense fine-tune decomposes every
matrix once, too, and keeps the vectors on disk meanwhile: min(rows, columns)² float32 numbers each, about the size of the
model in float32, and then two matrix products per value and matrix. Rules that look at the whole model (TIES, DARE), and
models whose weights are called otherwise in their program, are written to a folder, loaded and deleted value by value
(`Written`).

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, §4.1, Figure 4.
Differs: the paper does not say when performance counts as stable; here a share, 95 % by default, of the end point's. Its
    figure's axes are a benchmark's scores; here they are ratios, so that several tasks count alike. Edges of regions are
    values of the grid.
"""

import contextlib
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftlm.core.cache import cache_folder
from graftlm.core.errors import ConfigError, MergeError, RunError
from graftlm.core.files import append_jsonl, hash_file, hash_json, locked, milestone, read_jsonl, write_json
from graftlm.data.types import IGNORE, Sample, Task
from graftlm.evaluation import suite
from graftlm.evaluation.gains import relative_gain
from graftlm.evaluation.suite import TaskScore
from graftlm.experiment.consolidate import (
    Change,
    check_rule,
    consolidate,
    decomposed,
    exact,
    mixed_part,
    one_thread_each,
    open_change,
    read_tensor,
)
from graftlm.experiment.progress import Progress, Silent
from graftlm.experiment.validation import LIKELIHOOD
from graftlm.merging import RULES, checks, headers, spectral
from graftlm.merging.sources import FileState
from graftlm.merging.spectral import Report
from graftlm.model import checkpoint
from graftlm.model.base import read_llm, read_pretrained, read_tokenizer
from graftlm.model.features import FeatureCache
from graftlm.model.manifest import MANIFEST
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.rule import Rule
from graftlm.model.specs import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Criteria", "Grid", "Measure", "judge", "parse_grid", "sweep"]

FALLING = frozenset({"drop", "old"})
"""Settings that lead from the fine-tune to its base as they grow."""

MOST_VALUES = 1000

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

LIKELIHOOD_BATCH = 8
"""Most samples whose scores over the whole vocabulary are in memory at once."""

JOURNAL, RESULT, SPECTRA = "journal.jsonl", "sweep.json", "spectra.json"


@dataclass(frozen=True)
class Grid:
    """The values of one setting, from the base's end to the fine-tune's."""

    setting: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Measure:
    """What is measured at every value.

    Attributes:
        new: tasks that the fine-tune learned; keep: tasks that its base could do.
    """

    new: Sequence[Task]
    keep: Sequence[Task]
    split: Literal["val", "test"] = "val"
    limit: int | None = None
    batch_size: int = 64

    @property
    def tasks(self) -> list[Task]:
        """All of them."""
        return [*self.new, *self.keep]

    def samples(self, task: Task) -> Sequence[Sample]:
        """What is asked of a task."""
        return task.measured(self.split)[: self.limit]

    def digest(self) -> str:
        """Hash of all questions and references."""
        asked = [
            [task.name, task.metric, task.max_new_tokens]
            + [[s.id, s.prompt, s.answers, [item.source.name for item in s.media]] for s in self.samples(task)]
            for task in self.tasks
        ]
        return hash_json([asked, [task.name for task in self.new], self.batch_size])


@dataclass(frozen=True)
class Criteria:
    """What counts as good.

    Attributes:
        least_new: percent of the fine-tune's score that a value of the task-stable region has at least.
        least_keep: percent of the base's score that a value of the general-stable region keeps at least.
        score: "harmonic" mean of new and keep, or their "sum".
    """

    least_new: float = 95.0
    least_keep: float = 95.0
    score: Literal["harmonic", "sum"] = "harmonic"

    def of(self, new: float, keep: float) -> float:
        """The score of a value."""
        if self.score == "sum":
            return new + keep
        return 2 * new * keep / (new + keep) if new + keep > 0 else 0.0


def parse_grid(text: str) -> Grid:
    """``alpha=0:1:0.05`` (first, last, step; the last one belongs to it) or ``alpha=0.1,0.2,0.5``.

    Raises:
        ConfigError: another form, no number, or too many values.
    """
    setting, mark, listed = text.partition("=")
    form = "a setting with its values is expected, such as alpha=0:1:0.05 or alpha=0.1,0.2,0.5."
    if not mark or not setting.isidentifier() or not listed:
        raise ConfigError(f"--sweep {text}: {form}")
    try:
        if ":" in listed:
            first, last, step = (Decimal(part.strip()) for part in listed.split(":"))
            if not step or (last - first) / step < 0:
                raise ConfigError(f"--sweep {text}: steps of {step} never lead from {first} to {last}; {form}")
            count = int((last - first) / step) + 1
            if count > MOST_VALUES:
                raise ConfigError(
                    f"--sweep {text}: {count} values; at most {MOST_VALUES} are expected. Use longer steps."
                )
            exactly = [first + step * number for number in range(count)]
        else:
            exactly = [Decimal(part.strip()) for part in listed.split(",")]
        values = {float(value) for value in exactly}
    except (InvalidOperation, ValueError, OverflowError):
        raise ConfigError(f"--sweep {text}: '{listed}' are no numbers; {form}") from None
    if not all(math.isfinite(value) for value in values):
        raise ConfigError(f"--sweep {text}: '{listed}' are not all finite; {form}")
    return Grid(setting, tuple(sorted(values, reverse=setting in FALLING)))


# --- a model at any value ---------------------------------------------------------------------------------------------


class Subject(Protocol):
    """A model that takes the weights of any value; what SAC did is said per tensor."""

    def base(self) -> MultimodalLM:
        """The weights before."""
        ...

    def tuned(self) -> MultimodalLM:
        """The fine-tune."""
        ...

    def at(self, settings: Mapping[str, Any]) -> tuple[MultimodalLM, dict[str, Report]]:
        """The consolidated weights."""
        ...


class InPlace:
    """Weights are written into one model in memory, tensor by tensor.

    Args:
        folder: for the vectors of dense updates.
    """

    def __init__(self, change: Change, rule: Rule, model: MultimodalLM, names: Sequence[str], folder: Path) -> None:
        self._change = change
        self._rule = rule
        self._model = model
        self._folder = folder
        self._weights = dict(model.llm.named_parameters(remove_duplicate=False))
        found = dict(decomposed(change, rule, names))
        self._low = {name: low for name, low in found.items() if low is not None}
        self._dense = [name for name, low in found.items() if low is None]

    def base(self) -> MultimodalLM:
        """See `Subject.base`."""
        return self._put(lambda name: read_tensor(self._change.before, name), lambda before, after: before)

    def tuned(self) -> MultimodalLM:
        """See `Subject.tuned`."""
        return self._put(lambda name: read_tensor(self._change.after, name), lambda before, after: after)

    def at(self, settings: Mapping[str, Any]) -> tuple[MultimodalLM, dict[str, Report]]:
        """See `Subject.at`."""
        reports: dict[str, Report] = {}

        def weight(name: str) -> Tensor:
            before = read_tensor(self._change.before, name)
            if (low := self._low.get(name)) is None:
                return self._mixed(name, before, settings, reports)
            a, b, scale = low.at(settings)
            return before.addmm_(b.float(), a.float(), alpha=scale)

        model = self._put(weight, lambda before, after: mixed_part(self._rule, settings, before, after))
        said = {name: low.report(settings) for name, low in self._low.items()}
        return model, reports | {name: report for name, report in said.items() if report is not None}

    def _put(
        self,
        weight: Callable[[str], Tensor],
        part: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> MultimodalLM:
        @torch.no_grad()  # in the thread that calls
        def put(name: str) -> None:
            self._weights[name].copy_(weight(name))

        with one_thread_each() as pool:
            list(pool.map(put, self._low))
        for name in self._dense:
            put(name)
        for file, (before, after) in self._change.parts.items():
            module = self._model.get_submodule(file.removesuffix(".safetensors"))
            module.load_state_dict(dict(part(before, after)))
        return self._model

    def _mixed(self, name: str, before: Tensor, settings: Mapping[str, Any], reports: dict[str, Report]) -> Tensor:
        """A dense tensor by the rule."""
        after = read_tensor(self._change.after, name)
        if self._rule.name != "sac" or before.dim() < 2 or exact(self._rule, settings):
            return self._rule(before, [after], **settings)
        update = after.sub_(before).reshape(len(before), -1)
        sigma, v, on_the_right = self._spectrum(name, update)
        how = {"alpha": 0.2, **settings}
        k, g = spectral.spectrum(sigma, **how)
        reports[name] = Report(k, len(sigma), float(g[0] / sigma[0]) if k else 0.0)
        share = (g / sigma).float()
        damped = (update @ v.T * share) @ v if on_the_right else v.T @ (share[:, None] * (v @ update))
        return before.add_(damped.reshape(before.shape))

    def _spectrum(self, name: str, update: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Singular values, falling, and the vectors (r, n) of the shorter side of a dense update; kept on disk."""
        on_the_right = update.shape[1] <= update.shape[0]
        path = self._folder / f"{self._dense.index(name):05}.safetensors"
        if path.is_file():
            found = load_file(path)
            return found["sigma"], found["v"], on_the_right
        exactly = update.double()
        squares, vectors = torch.linalg.eigh(exactly.T @ exactly if on_the_right else exactly @ exactly.T)
        sigma = squares.flip(0).clamp(min=0).sqrt()
        r = spectral.rank(sigma, *update.shape)
        sigma, v = sigma[:r].contiguous(), vectors.flip(1)[:, :r].T.float().contiguous()
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"sigma": sigma, "v": v}, partial)
        partial.rename(path)
        return sigma, v, on_the_right


class Written:
    """Weights are written to a folder and loaded from there, value by value."""

    def __init__(self, change: Change, rule: str, base: Path | None, device: str, folder: Path) -> None:
        self._change = change
        self._rule = rule
        self._base = base
        self._device = device
        self._folder = folder

    def base(self) -> MultimodalLM:
        """See `Subject.base`."""
        return self._load("model_mix", {"alpha": 0.0})

    def tuned(self) -> MultimodalLM:
        """See `Subject.tuned`."""
        return self._load("keep_new", {})

    def at(self, settings: Mapping[str, Any]) -> tuple[MultimodalLM, dict[str, Report]]:
        """See `Subject.at`; what became of spectra is not known here."""
        return self._load(self._rule, settings), {}

    def _load(self, rule: str, settings: Mapping[str, Any]) -> MultimodalLM:
        shutil.rmtree(self._folder, ignore_errors=True)
        consolidate(self._change.tuned, rule, settings, self._folder, base=self._base, form="model")
        if self._change.kind == "graftlm":
            return checkpoint.load(self._folder, device=self._device, features=_features(), verify=False)
        return _read_model(self._folder, self._folder, headers.read_weights(self._folder), self._device)


def _features() -> FeatureCache:
    return FeatureCache(cache_folder() / "features")


def _subject(change: Change, rule: str, base: Path | None, device: str, folder: Path) -> Subject:
    """The cheaper way that the rule and the model allow."""
    way = Written(change, rule, base, device, folder / "written")
    if RULES.get(rule).factored is None:
        return way
    if change.kind == "graftlm":
        model = checkpoint.load(change.tuned, device=device, features=_features())
    else:
        has_tokenizer = any((change.tuned / file).is_file() for file in checks.TOKENIZERS)
        tokenizer = change.tuned if has_tokenizer else change.weights.folder
        model = _read_model(change.weights.folder, tokenizer, change.weights, device)
    known = {name: each.shape for name, each in model.llm.named_parameters(remove_duplicate=False)}
    names = [name for name in change.names if _differs(change, name)]
    if not names and not change.parts:
        raise MergeError(f"{change.tuned}: the same weights as {change.base}; a fine-tune of it is expected.")
    if any(known.get(name) != change.before.shape(name) for name in names):
        return way
    return InPlace(change, RULES.get(rule), model, names, folder / "spectra")


def _differs(change: Change, name: str) -> bool:
    if change.low_rank(name) is not None:
        return True
    shape = change.before.shape(name)
    rows = shape[0] if shape else 1
    step = max(1, rows * (1 << 24) // max(1, math.prod(shape)))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        if not torch.equal(read_tensor(change.before, name, part), read_tensor(change.after, name, part)):
            return True
    return False


def _read_model(folder: Path, tokenizer: Path, weights: headers.Weights, device: str) -> MultimodalLM:
    """An LLM, or the language side of a vision-language model, that answers questions of text."""
    sizes: dict[str, int] = {}
    for info in weights.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    dtype = DTYPES.get(max(sizes, key=lambda name: sizes[name]), torch.float32)
    nested = weights.language is not weights.config
    llm = _read_vision_language(folder, dtype) if nested else read_llm(folder, dtype)
    spec = ModelSpec(str(folder), lora=None, dtype=str(dtype).removeprefix("torch."))
    return MultimodalLM(llm, read_tokenizer(tokenizer, llm), spec, folder=folder).to(device).eval()


def _read_vision_language(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForImageTextToText

    return read_pretrained(AutoModelForImageTextToText, "vision-language model", folder, dtype)


# --- measuring --------------------------------------------------------------------------------------------------------


def sweep(
    tuned: Path,
    rule: str,
    settings: Mapping[str, Any],
    grid: Grid,
    measure: Measure,
    folder: Path,
    *,
    base: Path | None = None,
    criteria: Criteria | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every value of a grid; what an earlier call in the same folder measured is kept.

    Args:
        settings: of the rule, but the one that is swept.
        folder: for the journal, answers and results. The same folder takes more values later.
        base: see `consolidate.open_change`.

    Returns:
        What ``sweep.json`` holds; see `judge`.

    Raises:
        CheckpointError, MergeError: see `consolidate.consolidate`.
        ConfigError: a set is empty, or the swept setting is also fixed.
        RunError: the folder is of another sweep, a score is not finite, or an end point scores 0.
    """
    if grid.setting in settings:
        raise ConfigError(
            f"{grid.setting}: both swept and set to {settings[grid.setting]}; one of the two is expected."
        )
    _check_sets(measure)
    for value in grid.values:
        check_rule(rule, {**settings, grid.setting: value}, tuned, base)
    change = open_change(tuned, base)
    with (
        contextlib.closing(change),
        locked(folder / "lock", busy=f"{folder}: another process sweeps into this folder."),
    ):
        job = _job(change, rule, settings, grid.setting, measure)
        _claim(folder, job)
        done = {entry["place"]: entry for entry in read_jsonl(folder / JOURNAL)[1:]}
        places: list[float | str] = ["base", "tuned", *grid.values]
        listener = progress or Silent()
        size = sum(len(measure.samples(task)) for task in measure.tasks)
        listener.start(float(size * sum(place not in done for place in places)))
        try:
            subject: Subject | None = None
            for place in places:
                if place in done:
                    continue
                if subject is None:
                    listener.cell(str(place), "reading the models")
                    subject = _subject(change, rule, base, device, folder)
                done[place] = _measure(subject, place, settings, grid.setting, measure, folder, listener)
                append_jsonl(folder / JOURNAL, done[place])
                milestone("sweep.measured")
                if place == "tuned":
                    _ends(measure, done["base"], done["tuned"])
        finally:
            listener.done()
        for scratch in ("spectra", "written"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
    described = {
        "rule": rule,
        "settings": dict(settings),
        "setting": grid.setting,
        "inputs": {"base": str(change.base), "tuned": str(tuned)},
        "split": measure.split,
        "limit": measure.limit,
        "sets": {
            side: {task.name: {"metric": task.metric, "items": len(measure.samples(task))} for task in tasks}
            for side, tasks in (("new", measure.new), ("keep", measure.keep))
        },
    }
    values = [done[place] for place in grid.values]
    result = {**described, **judge(measure, done["base"], done["tuned"], values, criteria or Criteria())}
    if any(entry["tensors"] for entry in values):
        write_json(folder / SPECTRA, {str(entry["place"]): entry["tensors"] for entry in values})
    write_json(folder / RESULT, result)
    return result


def _check_sets(measure: Measure) -> None:
    for side, tasks in (("new", measure.new), ("keep", measure.keep)):
        if not tasks:
            raise ConfigError(
                f"--{side}: no validation set; a sweep needs what was learned (--new) and what was there (--keep)."
            )
        for task in tasks:
            if not measure.samples(task):
                raise ConfigError(
                    f"--{side}: no samples in the {measure.split} split of {task.name}; at least 1 is expected."
                )
    if twice := {task.name for task in measure.new} & {task.name for task in measure.keep}:
        raise ConfigError(f"--keep: {', '.join(sorted(twice))} is in --new too; other sets are expected.")


def _job(change: Change, rule: str, settings: Mapping[str, Any], setting: str, measure: Measure) -> dict[str, Any]:
    """What must be the same for measurements to belong together."""
    files = [[str(path.resolve()), *vars(FileState.of(path)).values()] for path in change.files]
    if change.kind == "graftlm":
        files.append([hash_file(change.tuned / MANIFEST)])
    return {
        "models": hash_json(files),
        "rule": hash_json([rule, dict(settings)]),
        "setting": setting,
        "questions": measure.digest(),
    }


def _claim(folder: Path, job: Mapping[str, Any]) -> None:
    """Begin a journal, or go on with one of the same sweep."""
    lines = read_jsonl(folder / JOURNAL)
    if not lines:
        append_jsonl(folder / JOURNAL, {"job": job})
    elif (there := lines[0].get("job", {})) != job:
        differing = ", ".join(key for key in job if there.get(key) != job[key])
        raise RunError(f"{folder}: another sweep is in this folder ({differing} differ). Choose another --sweep-out.")


def _measure(
    subject: Subject,
    place: float | str,
    settings: Mapping[str, Any],
    setting: str,
    measure: Measure,
    folder: Path,
    listener: Progress,
) -> dict[str, Any]:
    """One line of the journal."""
    name = place if isinstance(place, str) else f"{setting}={place:g}"
    listener.cell(name, "making the weights")
    reports: dict[str, Report] = {}
    if isinstance(place, str):
        model = subject.base() if place == "base" else subject.tuned()
    else:
        model, reports = subject.at({**settings, setting: place})
    done: dict[str, int] = {}

    def tell(task: str, count: int, total: int) -> None:
        listener.cell(name, f"{task} {count}/{total}")
        listener.advance(float(count - done.get(task, 0)))
        done[task] = count

    scores = _scores(model, measure, folder / "values" / name, tell)
    for task in measure.tasks:
        listener.advance(float(len(measure.samples(task)) - done.get(task.name, 0)))  # answered by an earlier process
        if not math.isfinite(value := scores[task.name].value):
            raise RunError(
                f"{name}: the score of {task.name} is {value}; a finite number is expected. The model overflows: its weights "
                f"are broken (`graftlm doctor --deep`), or this value leads too far."
            )
    listener.cell(name, "")
    alpha = settings.get("alpha", 0.2) if setting != "alpha" or isinstance(place, str) else place
    return {
        "place": place,
        "scores": {task: asdict(score) for task, score in scores.items()},
        "spectrum": _summary(reports, float(alpha)) if reports else None,
        "tensors": {tensor: [each.window, each.rank, each.reached] for tensor, each in reports.items()},
    }


def _scores(
    model: MultimodalLM, measure: Measure, folder: Path, tell: Callable[[str, int, int], None]
) -> dict[str, TaskScore]:
    asked = [task for task in measure.tasks if task.metric != LIKELIHOOD]
    scores: dict[str, TaskScore] = {}
    if asked:
        scores = suite.evaluate(
            model, asked, folder, split=measure.split, limit=measure.limit, batch_size=measure.batch_size, progress=tell
        )
    for task in measure.tasks:
        if task.metric == LIKELIHOOD:
            samples = sorted(measure.samples(task), key=lambda sample: (len(sample.prompt), sample.id))
            items = []
            for part in _parts(samples, min(LIKELIHOOD_BATCH, measure.batch_size)):
                items += likelihood(model, part)
                tell(task.name, len(items), len(samples))
            value = statistics.fmean(items)
            error = statistics.stdev(items) / math.sqrt(len(items)) if math.isfinite(value) and len(items) > 1 else 0.0
            scores[task.name] = TaskScore(LIKELIHOOD, value, len(items), error)
    return scores


def _parts(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


@torch.no_grad()
def likelihood(model: MultimodalLM, samples: Sequence[Sample]) -> list[float]:
    """Per sample how probable a token of the reference is, as the geometric mean over its tokens."""
    output = model(model.batch(samples), logits=True)
    targets = nn.functional.pad(output.labels[:, 1:], (0, 1), value=IGNORE)
    losses = nn.functional.cross_entropy(
        output.logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    learned = targets != IGNORE
    means = (losses * learned).sum(1) / learned.sum(1)
    return [float(value) for value in (-means).exp()]


def _summary(reports: Mapping[str, Report], alpha: float) -> dict[str, Any]:
    """What SAC did over all matrices: least, median and most of k / r and of g_1 / σ_1, and how often α was out of reach."""
    shares = [report.window / report.rank for report in reports.values() if report.rank]
    reached = [report.reached for report in reports.values() if report.rank]
    out = [report for report in reports.values() if report.rank and report.window == report.rank]
    return {
        "tensors": len(reports),
        "window_share": [min(shares), statistics.median(shares), max(shares)] if shares else [],
        "reached": [min(reached), statistics.median(reached), max(reached)] if reached else [],
        "out_of_reach": sum(report.reached > alpha + 1e-6 for report in out),
    }


# --- judging ----------------------------------------------------------------------------------------------------------


def _ends(measure: Measure, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    """Refuse end points to which nothing can be compared, before any value is measured."""
    for side, tasks, end, noun in (
        ("new", measure.new, tuned, "the fine-tune"),
        ("keep", measure.keep, base, "the base"),
    ):
        if not any(end["scores"][task.name]["value"] > 0 for task in tasks):
            names = ", ".join(f"{task.name} ({task.metric})" for task in tasks)
            raise RunError(
                f"--{side}: {noun} scores 0 on {names}, so shares of it cannot be measured. Another set is expected, or "
                f"another --metric: '{LIKELIHOOD}' is above 0 for every model."
            )


def judge(
    measure: Measure,
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    values: Sequence[Mapping[str, Any]],
    criteria: Criteria,
) -> dict[str, Any]:
    """Regions and the picked value, from what was measured.

    Args:
        base, tuned, values: lines of the journal; values from the base's end to the fine-tune's.

    Returns:
        ``base``, ``tuned`` and ``values`` with ``new`` and ``keep`` in percent and ``score``; ``general_stable_to``,
        ``task_stable_from`` and ``ideal_region``, None where there is none; ``picked`` and ``criteria``.
    """

    def percent(entry: Mapping[str, Any], end: Mapping[str, Any], tasks: Sequence[Task]) -> float:
        scores = {task.name: float(entry["scores"][task.name]["value"]) for task in tasks}
        return relative_gain(scores, {task.name: float(end["scores"][task.name]["value"]) for task in tasks})

    def line(entry: Mapping[str, Any]) -> dict[str, Any]:
        new, keep = percent(entry, tuned, measure.new), percent(entry, base, measure.keep)
        return {
            "value": entry["place"],
            "new": new,
            "keep": keep,
            "score": criteria.of(new, keep),
            "scores": entry["scores"],
            "spectrum": entry["spectrum"],
        }

    lines = [line(entry) for entry in values]
    general = _stable([each["keep"] >= criteria.least_keep for each in lines])
    learned = len(lines) - _stable([each["new"] >= criteria.least_new for each in reversed(lines)])
    ideal = lines[learned:general]
    picked = max(ideal or lines, key=lambda each: each["score"])  # the first of equal ones: nearest to the base
    return {
        "base": line(base),
        "tuned": line(tuned),
        "values": lines,
        "general_stable_to": lines[general - 1]["value"] if general else None,
        "task_stable_from": lines[learned]["value"] if learned < len(lines) else None,
        "ideal_region": [ideal[0]["value"], ideal[-1]["value"]] if ideal else None,
        "picked": {key: picked[key] for key in ("value", "new", "keep", "score")},
        "criteria": asdict(criteria),
    }


def _stable(good: Sequence[bool]) -> int:
    """How many values from the end on are all good."""
    return next((number for number, each in enumerate(good) if not each), len(good))
