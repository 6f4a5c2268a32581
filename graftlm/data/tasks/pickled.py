"""Annotations as pickled NumPy files: not opened, since a pickle may run any code; named instead."""

from pathlib import Path

from graftlm.core.errors import DataError

__all__ = ["refuse_pickled"]


def refuse_pickled(path: Path) -> None:
    """Say so if an annotation file is missing and a ``.npy`` file lies in its place.

    Raises:
        DataError: it is; how to convert it is part of the message.
    """
    if path.is_file():
        return
    found = [path.with_suffix(".npy")] if path.with_suffix(".npy").is_file() else sorted(path.parent.glob("*.npy"))
    if found:
        raise DataError(
            f"{found[0]}: a pickled annotation, which can run any code when it is opened, so it is not; {path.name} is "
            f'expected. If you trust the file, convert it once: python -c "import json, numpy; json.dump(numpy.load('
            f"'{found[0].name}', allow_pickle=True).item(), open('{found[0].stem}.json', 'w'))\". Captions and questions "
            f"are read from the published files of the data set."
        )
