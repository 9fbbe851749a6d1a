"""mistral_ext.weights.folder: which files count, and what is wrong with those that do not."""

from __future__ import annotations

import pytest
from test_config import HF_V1, PARAMS_V1, without, write

from mistral_ext.weights.folder import read_folder


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '{"a": 1,}'])
def test_damaged_json_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_folder(tmp_path)


def test_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json.*params.json") as error:
        read_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


# Early v0.2 folders disagree: a window in config.json, none in params.json.
PARAMS_V2 = without(PARAMS_V1, "sliding_window") | {"rope_theta": 1e6}


@pytest.mark.parametrize(
    ("weights", "window"),
    [
        ([], 4096),
        (["model.safetensors"], 4096),
        (["model.safetensors", "consolidated.safetensors"], 4096),
        (["consolidated.safetensors"], None),
        (["consolidated.00.pth"], None),
    ],
)
def test_of_two_files_the_one_that_goes_with_the_weights(tmp_path, weights, window):
    write(tmp_path, config=HF_V1, params=PARAMS_V2)
    for name in weights:
        (tmp_path / name).touch()
    assert read_folder(tmp_path).config.sliding_window == window


def test_params_alone_go_with_any_weights(tmp_path):
    write(tmp_path, params=PARAMS_V2)
    (tmp_path / "model.safetensors").touch()
    assert read_folder(tmp_path).config.rope_theta == 1e6
