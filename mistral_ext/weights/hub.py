"""Finds a model by name: a local path, the demo, or a model of the Hugging Face hub. A hub model is
downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mistral_ext.weights.folder import COMPANIONS, CONFIGS, LAYOUTS, what_is_there
from mistral_ext.weights.gguf_file import is_gguf, part_names
from mistral_ext.weights.library_errors import summary
from mistral_ext.weights.packed_settings import OWN_FILES as PACKING_FILES

DEMO_NAME = "demo"
DEMO_MODEL = Path(__file__).parents[1] / DEMO_NAME

_OWNER_AND_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_GGUF_OF_HUB = rf"({_OWNER_AND_NAME}):([^:]+\.gguf)"


def resolve(path_or_hub_id: str | Path) -> Path:
    """Returns the local folder or GGUF file of a model: the path itself, the demo, or a download.

    A hub model is ``owner/name``. A GGUF file in it is ``owner/name:file.gguf`` (any part, if the
    file is split). Only the configuration, the tokenizer and one format of the weights are
    downloaded, into huggingface_hub's cache. Later calls work without a network. "demo" is the
    small model of this package, unless a local folder has this name.

    Raises:
        FileNotFoundError: there is no such folder or file, locally, on the hub or in its cache, or
            the hub model has no weights in a known format.
        ValueError: the path is empty, or a file of another kind.
    """
    if str(path_or_hub_id) == "":  # as a path it would be the current folder
        raise ValueError("model is '', expected a folder, a GGUF file or a hub id")
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir() or is_gguf(path):
        return path
    if path.exists():
        raise ValueError(
            f"{str(path)!r} is a file, expected the folder that holds the model, or a GGUF file"
        )
    if str(path_or_hub_id) == DEMO_NAME:
        return DEMO_MODEL
    if re.fullmatch(_OWNER_AND_NAME, str(path_or_hub_id)):
        return _download(str(path_or_hub_id))
    if match := re.fullmatch(_GGUF_OF_HUB, str(path_or_hub_id)):
        return _download_gguf(match[1], match[2])
    raise FileNotFoundError(
        f"{str(path_or_hub_id)!r} does not exist, expected a folder, a GGUF file, or a hub id like "
        "'owner/name' or 'owner/name:file.gguf'"
    )


def resolve_adapter(path_or_hub_id: str | Path, files: Sequence[str]) -> Path:
    """Returns the local folder or file of an adapter: the path itself, or a download from the hub.
    A path that does not exist and is no hub id is returned, too: the caller reports the error.

    Args:
        path_or_hub_id: a path; ``owner/name``; or ``owner/name:file.gguf``.
        files: the names of files that an adapter may have. Of a hub repository ``owner/name`` only
            these files are downloaded.

    Raises:
        FileNotFoundError: `path_or_hub_id` has the form of a hub id, and neither the hub nor its
            cache has the adapter.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        return path
    if match := re.fullmatch(_GGUF_OF_HUB, str(path_or_hub_id)):
        return _download_gguf(match[1], match[2])
    if re.fullmatch(_OWNER_AND_NAME, str(path_or_hub_id)):
        return _download_files(str(path_or_hub_id), files)
    return path


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi

    patterns = [*CONFIGS, *PACKING_FILES, *COMPANIONS]
    try:
        files = [entry.rfilename for entry in HfApi().model_info(hub_id).siblings or ()]
    except Exception as error:  # no network, access or model; the cache may have the model
        return _cached(hub_id, error)
    layout = next((layout for layout in LAYOUTS if layout.file in files), None)
    if layout is None:
        expected = ", ".join(layout.file for layout in LAYOUTS)
        raise FileNotFoundError(
            f"no weights in hub model {hub_id!r}: expected one of {expected}; "
            f"{what_is_there(files)}"
        )
    patterns += [name for name in (layout.file, layout.shards) if name is not None]
    return _download_files(hub_id, patterns)


def _download_files(hub_id: str, patterns: Sequence[str]) -> Path:
    """Downloads the files of a hub model that match the patterns. Returns their folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:
        raise _not_available(hub_id, error) from error


def _download_gguf(hub_id: str, name: str) -> Path:
    """Downloads all parts of a GGUF file, and returns the first part. Without a network it uses
    huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download

    folder, _, file = name.rpartition("/")
    parts = [f"{folder}/{part}".lstrip("/") for part in part_names(file)]
    try:
        paths = [Path(hf_hub_download(hub_id, part)) for part in parts]
    except Exception as error:
        raise _not_available(hub_id, error) from error
    return paths[0]


def _cached(hub_id: str, reason: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # With an empty list of patterns this only finds the folder in the cache. The readers of the
        # files check whether all files are there.
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=[]))
    except Exception:
        raise _not_available(hub_id, reason) from reason


def _not_available(hub_id: str, reason: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{hub_id!r} is not a local folder, and could not be downloaded from the Hugging Face hub "
        f"({type(reason).__name__}: {summary(reason)}). Models that ask for consent need "
        f"'hf auth login'. Without a network: run 'hf download {hub_id}' on another machine and "
        "pass the folder here, or set HF_HOME to a copy of its cache."
    )
