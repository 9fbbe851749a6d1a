"""Text files as editors and shells of several systems write them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from mistral_ext import cli
from mistral_ext.files import (
    decode_text,
    json_text,
    read_json_object,
    read_text_file,
    write_png,
    write_text_file,
)
from mistral_ext.weights.hub import DEMO_MODEL

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"Once upon\na time\n", "Once upon\na time\n"),
        (BOM + b"Once upon\na time\n", "Once upon\na time\n"),
        (b"Once upon\r\na time\r\n", "Once upon\na time\n"),
        (BOM + b"Once upon\r\na time\r\n", "Once upon\na time\n"),
        (BOM, ""),
        (b"", ""),
        (b"a\rb\n\r", "a\rb\n\r"),  # only together do they end a line
        ("a\ufeffb".encode(), "a\ufeffb"),  # only at the beginning is it a mark
        ("Grüße 👋".encode(), "Grüße 👋"),
    ],
)
def test_marks_of_other_systems_are_no_text(data, text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    assert decode_text(data, "stdin") == text
    assert read_text_file(path) == read_text_file(str(path)) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"\x80", "can't decode byte"), ("a".encode("utf-16"), "it begins as UTF-16 does")],
)
def test_bytes_that_are_not_text(data, reason, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"text\.txt is not UTF-8 text: .*{reason}"):
        read_text_file(path)
    with pytest.raises(ValueError, match=f"stdin is not UTF-8 text: .*{reason}"):
        decode_text(data, "stdin")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_text_file(tmp_path / "nowhere")


def test_commands_read_the_same_text(tmp_path, capsys):
    """generate and perplexity, with what Notepad and PowerShell make of a text."""
    outputs = []
    for i, data in enumerate((b"Once upon\na time\n", BOM + b"Once upon\r\na time\r\n")):
        path = tmp_path / f"{i}.txt"
        path.write_bytes(data)
        for command in (["generate", "--max-tokens", "5", "--echo"], ["perplexity"]):
            assert cli.main([*command, "--file", str(path)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("Once upon\na time")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_not_a_json_object(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json .*, expected a JSON object"):
        read_json_object(path)
    for mark in (b"", BOM):
        path.write_bytes(mark + json.dumps({"a": 1}).encode())
        assert read_json_object(path) == {"a": 1}


def test_numbers_that_json_does_not_have_are_null():
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [inf, (-inf, 1.5)], 3: {"c": "NaN", "d": None, "e": True}}
    expected = {"a": None, "b": [None, [None, 1.5]], "3": {"c": "NaN", "d": None, "e": True}}
    assert json.loads(json_text(value, indent=2)) == expected


def test_commands_print_json_without_nan(tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(DEMO_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    of_text = ["--json", "--file", str(text)]
    for command in (["perplexity", "--model", str(folder)], ["compare", str(folder)]):
        assert cli.main([*command, *of_text]) == 0
        printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert None in printed.values()


def test_a_plot_goes_through_a_link(tmp_path):
    (tmp_path / "link.png").symlink_to("plot.png")
    write_png(tmp_path / "link.png", pytest.importorskip("matplotlib.figure").Figure())
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_link_and_a_pipe_are_written_and_stay(tmp_path):
    link, target, pipe = (tmp_path / name for name in ("link", "target", "pipe"))
    link.symlink_to(target.name)
    for text in ("new", "old"):
        write_text_file(link, text)
        assert (link.is_symlink(), target.read_text()) == (True, text)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text_file(pipe, "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "target", "pipe"}


@pytest.mark.parametrize("mode", ["w", "a"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_stdout_is_written_where_it_leads(name, mode, tmp_path):
    """It must not replace the file that the shell has opened, nor what is in it."""
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("descriptors have no paths here")
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old\n")
    link.symlink_to("/dev/stdout")
    program = (
        "import sys; from pathlib import Path; from mistral_ext.files import write_text_file;"
        "print('before'); write_text_file(Path(sys.argv[1]), 'data\\n'); print('after')"
    )
    with target.open(mode) as stdout:
        before = target.stat().st_ino
        path = link if name == "link" else name
        subprocess.run([sys.executable, "-c", program, path], stdout=stdout, check=True)
    assert target.stat().st_ino == before
    assert target.read_text() == ("old\n" if mode == "a" else "") + "before\ndata\nafter\n"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "target"}


def test_a_file_is_written_although_nobody_reads_stdout(tmp_path):
    """As in `mistral-ext eval --output FILE | head -1`."""
    program = (
        "import os, sys; from pathlib import Path; from mistral_ext.files import write_text_file;"
        "print('table'); write_text_file(Path(sys.argv[1]), 'data'); os._exit(0)"
    )
    command = [sys.executable, "-c", program, tmp_path / "a"]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run(command, stdout=writer, env=buffered, check=True)
    os.close(writer)
    assert (tmp_path / "a").read_text() == "data"
