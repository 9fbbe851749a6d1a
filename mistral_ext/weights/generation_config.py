"""Reads ``generation_config.json``, which has the sampling defaults of a model's authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mistral_ext.files import read_json_object

NAME = "generation_config.json"

# Our names of the options. The keys are their names in the file.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_config_file(model: Path, source: str | Path) -> Path:
    """Finds the file with a model's sampling defaults.

    Args:
        model: the model's folder or GGUF file.
        source: "auto" for the file that lies with the model. Otherwise another folder, or the file
            itself.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = (model if model.is_dir() else model.parent) if source == "auto" else Path(source)
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"generation_config is {str(source)!r}, but there is no file {str(file)!r}"
        )
    return file


def sampling_defaults(file: Path) -> dict[str, Any]:
    """Reads the options of `SamplingParams` that a file sets, without checking them.

    ``do_sample: false`` means greedy decoding (temperature 0), whatever temperature the file has.
    If the file has no ``do_sample``, its temperature counts, as in vLLM.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    values = read_json_object(file)
    options = {
        ours: values[theirs] for theirs, ours in _OPTIONS.items() if values.get(theirs) is not None
    }
    do_sample = values.get("do_sample")
    if do_sample is False:
        options["temperature"] = 0.0
    elif do_sample is True:
        options.setdefault("temperature", 1.0)  # transformers' default
    return options
