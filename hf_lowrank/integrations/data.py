"""Rows and texts out of files and data set ids, for calibration and for evaluation."""

import json
import os
from pathlib import Path

from ..errors import CalibrationError, MissingPackageError


def read_rows(path, split="train", argument="calibration", error=CalibrationError):
    """The rows of a `.jsonl` file or of a data set, one dict at a time.

    Args:
        path (`str`): a `.jsonl` file, or a data set id, with `:subset` behind it where the data set has several.
        split (`str`, defaults to `"train"`): of a data set.
        argument (`str`, defaults to `"calibration"`): what the user called it, for messages.
        error (`type`, defaults to [`CalibrationError`]): raised for data that cannot be read.

    Raises:
        MissingPackageError: the datasets library is not installed.
    """
    if path.endswith(".jsonl"):
        return _json_lines(path)
    try:
        from datasets import load_dataset
    except ImportError as missing:
        raise MissingPackageError(
            f"`{argument}`={path!r} is read as a data set id, which needs the datasets library: "
            "`pip install 'hf-lowrank[data]'`. A list of texts, a .txt or a .jsonl file needs nothing more."
        ) from missing
    name, _, subset = path.partition(":")
    try:
        return load_dataset(name, subset or None, split=split, streaming=True)
    except (OSError, ValueError) as refused:
        raise error(
            f"`{argument}`={path!r} is read as a data set id, split {split!r}, and cannot be loaded: {refused}. Give "
            "a .txt or a .jsonl file where the Hub cannot be reached."
        ) from refused


def read_texts(path, split, column, argument="calibration", owner="Calibration", error=CalibrationError):
    """The texts of a `.txt` file (one), a `.jsonl` file or a data set (one a row).

    Args:
        path (`str` or `os.PathLike`): as in [`read_rows`].
        split (`str`): of a data set.
        column (`str`): that holds the text.
        argument (`str`, defaults to `"calibration"`): what the user called it, for messages.
        owner (`str`, defaults to `"Calibration"`): the class whose `text_column` cures a wrong column.
        error (`type`, defaults to [`CalibrationError`]): raised for data that cannot be read.
    """
    path = os.fspath(path)
    if path.endswith(".txt"):
        return [Path(path).read_text(encoding="utf-8")]
    return _column(read_rows(path, split, argument, error), column, path, argument, owner, error)


def _json_lines(path):
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _column(rows, column, path, argument, owner, error):
    for row in rows:
        if column not in row:
            raise error(
                f"`{argument}`={path!r} has no column {column!r}; its columns are {sorted(row)}. Name the right one "
                f"with {owner}(text_column=...)."
            )
        yield row[column]
