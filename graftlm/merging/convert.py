"""Pickled weights (``.bin``, ``.pt``, ``.pth``) to safetensors.

A pickle is a program. It is read by PyTorch's unpickler for weights alone, which runs nothing, and in a process of its own:
without the environment's secrets, and one that can die without harm. One file at a time is open, and of its tensors one at
a time is in memory.

The process is this module: ``python -m graftlm.merging.convert``. It reads its work from standard input and writes a line
of JSON per file.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from graftlm.core.errors import CheckpointError, GraftError
from graftlm.core.files import atomic_folder, milestone, write_json
from graftlm.merging import headers
from graftlm.merging.checks import place, require

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert"]

INDEX = "pytorch_model.bin.index.json"
SHARD = re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin")
PICKLES = {".bin", ".pt", ".pth"}
STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
"""What a trainer keeps beside the weights."""

COPIED = {".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".safetensors"}

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which programs keep the weights among other things."""

SAFE_TORCH = (2, 10)
"""First version without a known way around the unpickler for weights (CVE-2025-32434, CVE-2026-24747)."""

DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""PyTorch's names of dtypes and those of safetensors."""

ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
"""What the other process gets of the environment: no tokens, no keys."""


def convert(folder: Path, out: Path, *, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Write a copy of a folder with safetensors in the place of its pickles; the folder appears when it is complete.

    Weights that share memory are stored apart, but a head that is the embedding and is said to be (tie_word_embeddings)
    is left out, as Hugging Face does. Code (``.py``) and a trainer's state are not copied.

    Args:
        progress: is told each file when it is finished.

    Raises:
        CheckpointError: no pickles, a damaged one, or one that asks for more than tensors.
        MergeError: the output is no new folder, or there is no space.
    """
    files = _plan(folder)
    needed = sum(path.stat().st_size for path in folder.iterdir() if path.name in files or _is_copied(path))
    require(place(out, {"the folder": folder}, needed))
    config = headers.read_object(folder / headers.CONFIG) if (folder / headers.CONFIG).is_file() else {}
    tied = config.get("tie_word_embeddings") is True
    with atomic_folder(out) as temporary:
        _copy(folder, temporary, set(files))
        _run(folder, temporary, files, tied, progress)
        shards = sorted(
            target for file, target in files.items() if file == "pytorch_model.bin" or SHARD.fullmatch(file)
        )
        if len(shards) > 1:
            write_json(temporary / headers.INDEX, _index(temporary, shards))
        for target in files.values():
            headers.read_header(temporary / target)
    return out


def _plan(folder: Path) -> dict[str, str]:
    """Pickle -> safetensors file."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; one with pickled weights is expected. Check the path.")
    there = {path.name for path in folder.iterdir()}
    pickles = sorted(name for name in there if Path(name).suffix in PICKLES and not STATE.fullmatch(name))
    for name in pickles:
        headers.inside(folder, name)
    safe = {headers.SINGLE, headers.INDEX, headers.ADAPTER} & there
    if headers.SINGLE in safe or headers.INDEX in safe:
        pickles = [name for name in pickles if name != "pytorch_model.bin" and not SHARD.fullmatch(name)]
    if headers.ADAPTER in safe:
        pickles = [name for name in pickles if name != "adapter_model.bin"]
    if not pickles:
        what = f"already safetensors ({', '.join(sorted(safe))})" if safe else "no pickled weights (.bin, .pt, .pth)"
        raise CheckpointError(
            f"{folder}: {what}; there is nothing to convert. Use the folder as it is, or check the path."
        )
    _check_shards(folder, pickles)
    targets = {name: _target(name) for name in pickles}
    if not safe and len(pickles) == 1 and "config.json" in there and "adapter_config.json" not in there:
        targets = {pickles[0]: headers.SINGLE}
    for name, target in targets.items():
        if target in there or list(targets.values()).count(target) > 1:
            raise CheckpointError(f"{folder}: {name} would become {target}, which is there too. Move one of them away.")
    return targets


def _target(name: str) -> str:
    stem = Path(name).stem
    return ("model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem) + ".safetensors"


def _check_shards(folder: Path, pickles: Iterable[str]) -> None:
    """All shards are there: by the index, else by their numbers."""
    found = {name: int(match[2]) for name in pickles if (match := SHARD.fullmatch(name))}
    if (folder / INDEX).is_file() and found:
        needed = set(headers.weight_map(folder / INDEX).values())
        for name in needed:
            headers.inside(folder, name)
        if needed != found.keys():
            extra = ", ".join(sorted(found.keys() ^ needed))
            raise CheckpointError(f"{folder}: {INDEX} and the files disagree on {extra}. Use another copy.")
    elif found and set(found.values()) != {len(found)}:
        total = max(found.values())
        raise CheckpointError(
            f"{folder}: {len(found)} of {total} shards ({', '.join(sorted(found)[:3])} ...); all are expected. "
            f"Complete the download."
        )


def _copy(folder: Path, target: Path, pickles: set[str]) -> None:
    """Everything that is neither a pickle nor code."""
    for path in sorted(folder.iterdir()):
        if _is_copied(path) and path.name not in pickles:
            shutil.copyfile(headers.inside(folder, path.name), target / path.name)


def _is_copied(path: Path) -> bool:
    wanted = path.suffix in COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
    return wanted and path.name != INDEX and path.is_file()


def _index(folder: Path, shards: Iterable[str]) -> dict[str, Any]:
    weight_map: dict[str, str] = {}
    size = 0
    for shard in shards:
        for name, info in headers.read_header(folder / shard).items():
            if name in weight_map:
                raise CheckpointError(f"{shard}: tensor '{name}' is also in {weight_map[name]}. Use another copy.")
            weight_map[name] = shard
            size += info.bytes
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


# --- the two processes ------------------------------------------------------------------------------------------------


def _run(folder: Path, target: Path, files: Mapping[str, str], tied: bool, progress: Callable[[str], None]) -> None:
    """Let the other process convert the files, and repeat its complaint if it has one."""
    job = {
        "files": [[str((folder / file).resolve()), str((target / name).resolve())] for file, name in files.items()],
        "tied": tied,
    }
    environment = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", "graftlm.merging.convert"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=target,
        env=environment,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        last: list[str] = []
        reader = threading.Thread(target=lambda pipe: last.append(pipe.read()[-2000:]), args=(process.stderr,))
        reader.start()
        try:
            _follow(process.stdin, process.stdout, job, list(files.items()), progress)
        except BaseException:
            process.kill()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            reader.join()
        if process.wait() != 0:
            raise CheckpointError(f"{folder}: the process that read its pickles {_end(process.returncode, last)}")


def _follow(
    stdin: IO[str],
    stdout: IO[str],
    job: Mapping[str, Any],
    files: list[tuple[str, str]],
    progress: Callable[[str], None],
) -> None:
    with contextlib.suppress(BrokenPipeError):  # it died at once: its end says why
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
    for count, line in enumerate(stdout):
        answer = json.loads(line)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        milestone("convert.file")
        file, name = files[count]
        tensors = f"{answer['tensors']} tensor{'' if answer['tensors'] == 1 else 's'}"
        progress(f"{file} -> {name}: {tensors} ({count + 1}/{len(files)})")


def _end(code: int, last: list[str]) -> str:
    """How a process ended without saying why."""
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out. Nothing was written. Free memory and try again."
    said = (last or [""])[0].strip().splitlines()[-1:] or ["nothing"]
    how = f"died of signal {-code}" if code < 0 else f"ended with {code}"
    return f"{how} and said: {said[0]}. Nothing was written. The file may be damaged or hostile: use another copy."


def main() -> int:
    """The other process."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    for source, target in job["files"]:
        try:
            count = _convert_file(Path(source), Path(target), tied=job["tied"])
        except GraftError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            return 0
        print(json.dumps({"tensors": count}), flush=True)
    return 0


def _leave_with_parent() -> None:
    """Standard input ends when the parent does, however it dies."""
    sys.stdin.read()
    os._exit(1)


# --- one file, in the other process -----------------------------------------------------------------------------------


def _convert_file(source: Path, target: Path, *, tied: bool) -> int:
    """Number of tensors written."""
    tensors = _select(source, _load(source), tied)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # as safetensors has it: aligned
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with target.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            _write(tensors[name], file)
    return len(order)


def _write(tensor: "Tensor", file: IO[bytes]) -> None:
    import torch

    if tensor.numel():
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _load(path: Path) -> Any:
    """What a pickle holds.

    Raises:
        CheckpointError: it asks for more than tensors, or is damaged.
    """
    import pickle

    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise CheckpointError(
            f"{path}: torch {torch.__version__} can be made to run programs by a pickle even when only weights are read; "
            f"{SAFE_TORCH[0]}.{SAFE_TORCH[1]} or later is expected. Update torch."
        )
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = re.sub(r".*WeightsUnpickler error: ", "", str(error), flags=re.DOTALL).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: a pickle that {f'asks for {asked[1]}' if asked else f'holds more than tensors ({why:.200})'}; only "
            f"tensors are read, and nothing was run. It may be hostile: do not load it with another program; ask its "
            f"authors for safetensors."
        ) from None
    except Exception as error:  # PyTorch raises many kinds on a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: cannot be read ({first:.200}). The file is damaged; use another copy."
        ) from None


def _check_archive(path: Path) -> None:
    """What PyTorch does not: checksums, and that nothing is compressed, which could unpack to any size."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: truncated, the archive's end is missing. Complete the download, or use another copy."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            broken = None if packed else archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). The file is damaged; use another copy.") from None
    if packed:
        raise CheckpointError(f"{path}: '{packed[0]}' is compressed, which PyTorch never does. Do not trust this file.")
    if broken:
        raise CheckpointError(f"{path}: the checksum of '{broken}' is wrong. The file is damaged; use another copy.")


def _select(path: Path, content: Any, tied: bool) -> dict[str, "Tensor"]:
    """The tensors to write. Where one storage is seen again, a tied head is left out."""
    import torch

    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: a {type(content).__name__}; tensors by name are expected. It holds no weights.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r:.80} is a {type(value).__name__}; tensors by name are expected. Save only the "
                f"model's state_dict."
            )
        _check_tensor(path, name, value)
    tensors = {name: value.detach() for name, value in content.items()}
    seen = {_view(value): name for name, value in tensors.items() if not name.endswith(headers.HEAD)}
    return {
        name: value
        for name, value in tensors.items()
        if not (tied and name.endswith(headers.HEAD) and _view(value) in seen)
    }


def _view(tensor: "Tensor") -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _check_tensor(path: Path, name: str, tensor: "Tensor") -> None:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantised" if tensor.is_quantized else "without data" if tensor.is_meta else str(tensor.layout)
        raise CheckpointError(f"{path}: '{name}' is {kind}; plain tensors are expected. Save the model unquantised.")
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(
            f"{path}: '{name}' is {tensor.dtype}, which safetensors does not know. Save it as another."
        )
    size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if size > stored:  # a few bytes that claim to be terabytes
        raise CheckpointError(
            f"{path}: '{name}' has {size} bytes, of which {stored} are stored; all are expected. The file is hostile, or "
            f"the tensor was expanded: save it contiguous."
        )


if __name__ == "__main__":
    sys.exit(main())
