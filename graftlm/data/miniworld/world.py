"""Build a mini world on disk: media files and annotations, reproducible to the byte.

Layout (``second/`` holds the same once more for the second visits, with eight stages)::

    coco/ okvqa/ msvd/ audiocaps/ clotho_aqa/ cap3d/ cap3d_qa/     see `formats`
    mcub/MCUB-4.json MCUB-answer.json media/<modality>/            questions over four inputs
    instructions/{train,val,test}.json                             text-only conversations
    expansion/<combination>/{val,test}.json media/<modality>/      with expansion: questions over every combination of inputs
    choice/<modality>/{train,val,test}.json                        with expansion: lettered questions about every file
    world.json                                                     spec, counts, and the scene behind every file
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftlm.core.errors import ConfigError
from graftlm.core.files import atomic_folder, hash_json, is_complete
from graftlm.core.seeds import rng
from graftlm.data.miniworld.captions import captions
from graftlm.data.miniworld.combinations import COMBINATIONS, draw_choice, draw_combined
from graftlm.data.miniworld.conventions import in_force, reword
from graftlm.data.miniworld.formats import ANNOTATIONS, Item, dump, files_of
from graftlm.data.miniworld.instructions import FORMATS, draw_instruction
from graftlm.data.miniworld.joint import draw_joint
from graftlm.data.miniworld.questions import ask
from graftlm.data.miniworld.render import render
from graftlm.data.miniworld.scenes import MODALITIES, SPLITS, Scene, Split, Visit, describe, draw
from graftlm.data.miniworld.words import LETTERS
from graftlm.data.miniworld.write import SUFFIXES, write_media

__all__ = ["SIZES", "VERSION", "Sizes", "WorldSpec", "build", "folder_of"]

VERSION = 1
"""Of the generator: raised whenever the same spec would give other files."""

REFERENCES = 5
"""Captions per item of val and test; train has one."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many. ``train`` counts caption items and, again, question items; val and test items have both.

    Attributes:
        joint: questions over all four inputs.
        expansion: questions over each combination of inputs.
    """

    train: int
    val: int
    test: int
    joint: int
    instructions: Mapping[Split, int]
    expansion: Mapping[Split, int] = field(default_factory=lambda: {"val": 4, "test": 4})


SIZES = {
    "tiny": Sizes(24, 8, 8, 8, {"train": 10, "val": 5, "test": 10}),  # learns nothing: to try the machinery in seconds
    "smoke": Sizes(120, 20, 40, 24, {"train": 40, "val": 20, "test": 40}, {"val": 8, "test": 16}),
    "default": Sizes(500, 150, 300, 200, {"train": 400, "val": 100, "test": 200}, {"val": 60, "test": 160}),
}


@dataclass(frozen=True)
class WorldSpec:
    """Which world.

    Attributes:
        conflict: in [0, 1], how far modalities contradict one another in their answers, see `conventions`.
        stages: 8 adds second visits: every modality comes back with new attributes and new tasks.
        expansion: adds questions over every combination of inputs, and lettered questions over one. Whatever is there
            without it stays the same, byte by byte.

    Raises:
        ConfigError: a value is out of range.
    """

    size: Literal["tiny", "smoke", "default"] = "default"
    seed: int = 0
    conflict: float = 0.0
    stages: Literal[4, 8] = 4
    expansion: bool = False

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"world size '{self.size}' - expected one of {', '.join(SIZES)}.")
        if not 0 <= self.conflict <= 1:
            raise ConfigError(
                f"conflict is {self.conflict} - expected a number in [0, 1], 0 for none, 1 for all conventions."
            )
        if self.stages not in (4, 8):
            raise ConfigError(f"a mini world of {self.stages} stages - expected 4, or 8 for second visits.")


def folder_of(spec: WorldSpec, root: Path) -> Path:
    """Where the world of this spec and generator lies under a root."""
    return root / f"{spec.size}-{hash_json([VERSION, _values(spec) | {'conflict': float(spec.conflict)}])[:16]}"


def _values(spec: WorldSpec) -> dict[str, Any]:
    """The spec as plain values; without expansion those that it had before there was any."""
    return {key: value for key, value in asdict(spec).items() if key != "expansion" or value}


def build(spec: WorldSpec, root: Path, progress: Progress | None = None) -> Path:
    """Write the world, or find it complete, and return its folder.

    Args:
        spec: which world.
        root: where worlds are kept, each in a folder of its own.
        progress: told what is written (a modality, "mcub"), how many items of it are done, and of how many.
    """
    folder = folder_of(spec, root)
    if is_complete(folder):
        return folder
    with atomic_folder(folder) as temporary:
        _write(spec, temporary, progress or _silent)
    return folder


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def _write(spec: WorldSpec, folder: Path, progress: Progress) -> None:
    media: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    visits: tuple[Visit, ...] = (1, 2) if spec.stages == 8 else (1,)
    for visit in visits:
        base = Path("second") if visit == 2 else Path()
        for modality in MODALITIES:
            items = _items(spec, modality, visit)
            ANNOTATIONS[modality](folder / base, items)
            for done, item in enumerate(items, 1):
                paths = [base / path for path in files_of(modality, item)]
                _write_item(spec, folder, paths, modality, item.scene, (modality, visit, item.number))
                media |= {path.as_posix(): _entry(item.split, item.scene) for path in paths}
                progress(str(base / modality), done, len(items))
            counts[(base / modality).as_posix()] = _count(items)
            if spec.expansion and visit == 1:
                counts[f"choice/{modality}"] = _write_choices(spec, folder, modality, items)
    media |= _write_joint(spec, folder, progress)
    instructions = _write_instructions(spec, folder)
    sizes = SIZES[spec.size]
    counts |= {
        "mcub": {"test": sizes.joint},
        "instructions": {str(split): total for split, total in sizes.instructions.items()},
    }
    if spec.expansion:
        media |= _write_expansion(spec, folder, progress)
        counts |= {
            f"expansion/{name}": {str(split): n for split, n in sizes.expansion.items()} for name in COMBINATIONS
        }
    content = {
        "version": VERSION,
        "spec": _values(spec),
        "counts": counts,
        "media": media,
        "instructions": instructions,
    }
    dump(folder / "world.json", content)


def _entry(split: Split, scene: Scene) -> dict[str, Any]:
    return {"split": split, "scene": describe(scene)}


def _count(items: list[Item]) -> dict[str, int]:
    """Items with captions and with questions, per split."""
    counted = {}
    for split in SPLITS:
        of_split = [item for item in items if item.split == split]
        counted[f"{split} captioned"] = sum(bool(item.captions) for item in of_split)
        counted[f"{split} asked"] = sum(bool(item.question) for item in of_split)
    return counted


def _items(spec: WorldSpec, modality: str, visit: Visit) -> list[Item]:
    """All items of a modality's visit. Media do not depend on the conflict: only answers do."""
    sizes = SIZES[spec.size]
    plan: list[tuple[Split, bool, bool]] = [("train", True, False), ("train", False, True)] * sizes.train
    plan.extend([("val", True, True)] * sizes.val)
    plan.extend([("test", True, True)] * sizes.test)
    conventions = in_force(spec.conflict)
    items = []
    for number, (split, captioned, asked) in enumerate(plan, 1):
        stream = rng(spec.seed, "miniworld", modality, visit, number)
        scene = draw(modality, stream, split, visit)
        said = captions(scene, stream, 1 if split == "train" else REFERENCES) if captioned else []
        item = Item(number, split, scene, tuple(said))
        if asked:
            question = ask(scene, stream)
            answer = reword(question, modality, conventions)
            item = Item(number, split, scene, tuple(said), question.text, answer, question.kind)
        items.append(item)
    return items


def _write_item(
    spec: WorldSpec, folder: Path, paths: list[Path], modality: str, scene: Scene, name: tuple[str | int, ...]
) -> None:
    """Render a scene into its first file and copy that to the others."""
    raw, _ = render(modality, scene, rng(spec.seed, "miniworld", "render", *name))
    first, *others = [folder / path for path in paths]
    first.parent.mkdir(parents=True, exist_ok=True)
    write_media(first, modality, raw)
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(first.read_bytes())


def _write_joint(spec: WorldSpec, folder: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """The MCUB files, from test scenes; every letter is right equally often. Returns the entries of world.json."""
    total = SIZES[spec.size].joint
    order = rng(spec.seed, "miniworld", "joint").permutation(total)
    media: dict[str, dict[str, Any]] = {}
    records = []
    for number in range(1, total + 1):
        stream = rng(spec.seed, "miniworld", "joint", number)
        question = draw_joint(stream, "test", LETTERS[int(order[number - 1]) % len(LETTERS)])
        inputs = {}
        for modality in MODALITIES:
            path = Path("media", modality, f"{number:06d}{SUFFIXES[modality]}")
            inputs[modality] = [path.as_posix()]
            _write_item(spec, folder, ["mcub" / path], modality, question.scenes[modality], ("joint", modality, number))
            media[("mcub" / path).as_posix()] = _entry("test", question.scenes[modality])
        records.append(_record(f"mcub-4-{number:06d}", question.kind, inputs, question.text, question.letter))
        progress("mcub", number, total)
    for name in ("MCUB-4", "MCUB-answer"):
        dump(folder / f"mcub/{name}.json", records)
    return media


def _record(key: str, kind: str, inputs: Mapping[str, list[str]], text: str, letter: str) -> dict[str, Any]:
    slots = " ".join(f"<{modality}>" for modality in inputs)
    return {
        "id": key,
        "kind": kind,
        "modal_inputs": {"vision" if modality == "image" else modality: paths for modality, paths in inputs.items()},
        "conversations": [{"from": "human", "value": f"{slots} {text}"}, {"from": "gpt", "value": letter}],
    }


def _write_expansion(spec: WorldSpec, folder: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """Questions over every combination; every letter is right equally often. Returns the entries of world.json."""
    media: dict[str, dict[str, Any]] = {}
    for combination in COMBINATIONS:
        base = Path("expansion", combination)
        for split, total in SIZES[spec.size].expansion.items():
            order = rng(spec.seed, "miniworld", "expansion", combination, split).permutation(total)
            records = []
            for number in range(1, total + 1):
                name = ("expansion", combination, split, number)
                letter = LETTERS[int(order[number - 1]) % len(LETTERS)]
                question = draw_combined(rng(spec.seed, "miniworld", *name), split, combination, letter)
                inputs = {}
                for modality, scene in question.scenes.items():
                    path = Path("media", modality, f"{split}-{number:06d}{SUFFIXES[modality]}")
                    inputs[modality] = [path.as_posix()]
                    _write_item(spec, folder, [base / path], modality, scene, (*name, modality))
                    media[(base / path).as_posix()] = _entry(split, scene)
                key = f"{combination}-{split}-{number:06d}"
                records.append(_record(key, question.kind, inputs, question.text, letter))
                progress(f"expansion/{combination}", number, total)
            dump(folder / base / f"{split}.json", records)
    return media


def _write_choices(spec: WorldSpec, folder: Path, modality: str, items: list[Item]) -> dict[str, int]:
    """A lettered question about every item, whose file is used again. Returns how many there are."""
    counts: dict[str, int] = {}
    for split in SPLITS:
        of_split = [item for item in items if item.split == split]
        order = rng(spec.seed, "miniworld", "choice", modality, split).permutation(len(of_split))
        records = []
        for item, place in zip(of_split, order, strict=True):
            stream = rng(spec.seed, "miniworld", "choice", modality, item.number)
            drawn = draw_choice(item.scene, stream, LETTERS[int(place) % len(LETTERS)])
            inputs = {modality: [files_of(modality, item)[0].as_posix()]}
            records.append(_record(f"{modality}-{item.number:06d}", "choice", inputs, drawn.text, drawn.letter))
        dump(folder / f"choice/{modality}/{split}.json", records)
        counts[split] = len(records)
    return counts


def _write_instructions(spec: WorldSpec, folder: Path) -> dict[str, dict[str, Any]]:
    """The conversations of all splits. Returns the scenes that they are about, for world.json."""
    scenes: dict[str, dict[str, Any]] = {}
    for split, total in SIZES[spec.size].instructions.items():
        stream = rng(spec.seed, "miniworld", "instructions", split)
        records = []
        for number in range(1, total + 1):
            drawn = draw_instruction(stream, split, FORMATS[number % len(FORMATS)])
            turns = [
                {"from": "human", "value": f"{drawn.context} {drawn.text}"},
                {"from": "gpt", "value": drawn.answer},
            ]
            records.append({"id": f"{split}-{number}", "format": drawn.form, "conversations": turns})
            scenes[f"{split}-{number}"] = _entry(split, drawn.scene)
        dump(folder / f"instructions/{split}.json", records)
    return scenes
