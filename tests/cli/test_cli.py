"""The command line on the demo model: in a process of its own, as a user meets it, where the start
and the end of a process or its streams matter. A process takes seconds to import torch."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from chat_templates import MISTRAL_V1
from checkpoints import TOKENIZERS, write_checkpoint
from children import child

import mistral_ext
from mistral_ext import Mistral
from mistral_ext.cli import main
from mistral_ext.cli.parser import as_typed
from mistral_ext.evaluate.perplexity import perplexity
from mistral_ext.weights import quantize_checkpoint
from mistral_ext.weights.calibrate import CalibratedLayers

ONCE = "Once upon a time"
SLOW_MODULES = {"torch", "numpy", "mistral_common", "transformers", "sentencepiece", "tokenizers"}


def run(*args: str, stdin: str | bytes = b"") -> subprocess.CompletedProcess:
    """Runs the command line in this process."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(as_bytes(stdin)), "utf-8")
    with redirect_stdout(out), redirect_stderr(errors), mock.patch.object(sys, "stdin", given):
        status = main(list(args))
    written = (stream.buffer.getvalue() for stream in (out, errors))
    return subprocess.CompletedProcess(args, status, *written)


def as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def run_process(
    *args: str, stdin: str | bytes = b"", **env: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "mistral_ext.cli", *args],
        input=as_bytes(stdin),
        capture_output=True,
        env={**os.environ, **env},
        timeout=120,
    )


def one_line_error(process: subprocess.CompletedProcess) -> str:
    assert process.returncode == 1
    error = process.stderr.decode()
    assert error.startswith("mistral-ext: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-instruct"
    write_checkpoint(folder, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": MISTRAL_V1}))
    return str(folder)


def test_generate_streams_text_and_reports_timings():
    process = run_process("generate", "--max-tokens", "20", ONCE)
    assert process.returncode == 0
    assert process.stdout.decode() == mistral_ext.generate(ONCE, max_tokens=20) + "\n"
    assert re.fullmatch(
        r"\[prompt \d+ tokens, [\d.]+ tokens/s; completion 20 tokens, [\d.]+ tokens/s; length\]\n",
        process.stderr.decode(),
    )


def test_prompt_from_stdin_and_file(tmp_path):
    expected = run("generate", "--max-tokens", "5", "--echo", ONCE).stdout
    assert expected.decode().startswith(ONCE)
    file = tmp_path / "prompt.txt"
    file.write_text(ONCE + "\n")  # the last newline is not part of the prompt
    for args, stdin in (([], ONCE), (["-"], ONCE + "\n"), (["--file", str(file)], "")):
        process = run("generate", "--max-tokens", "5", "--echo", *args, stdin=stdin)
        assert process.stdout == expected
    process = run_process("generate", "--max-tokens", "5", "--echo", stdin=ONCE)
    assert process.stdout == expected


def test_sampling_options_arrive():
    options = {
        "max_tokens": 12,
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "seed": 7,
        "n": 2,
        "ignore_eos": True,
        "stop": ["zzz"],
        "logit_bias": {300: 2.5, 301: -3.0},
        "logprobs": 2,
        "drafts": 3,
    }
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "logit_bias":
            flags += [f"{flag}={token_id}={bias}" for token_id, bias in value.items()]
        elif value is True:
            flags.append(flag)
        else:
            flags += [flag, str(value[0] if isinstance(value, list) else value)]
    process = run("generate", "--json", *flags, ONCE)
    assert process.returncode == 0, process.stderr
    printed = [json.loads(line) for line in process.stdout.decode().splitlines()]
    llm = mistral_ext.Mistral.from_pretrained(mistral_ext.llm.DEMO_MODEL)
    expected = llm.generate(ONCE, **options)
    assert [p["text"] for p in printed] == [c.text for c in expected]
    assert [p["token_ids"] for p in printed] == [c.token_ids for c in expected]
    assert printed[0]["logprobs"][0]["token_id"] == expected[0].token_ids[0]
    assert printed[0]["finish_reason"] == "length"


def test_a_draft_model(tmp_path, capsys):
    generate = ["generate", "--max-tokens", "20", ONCE]
    assert main([*generate, "--draft-model", str(mistral_ext.llm.DEMO_MODEL)]) == 0
    assert capsys.readouterr().out == mistral_ext.generate(ONCE, max_tokens=20) + "\n"
    write_checkpoint(tmp_path, vocab_size=100)
    assert main([*generate, "--draft-model", str(tmp_path)]) == 1
    assert f"--draft-model is {tmp_path}, whose vocabulary has 100" in capsys.readouterr().err


def test_what_a_completion_has_to_match(tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "a.lark"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}')
    grammar.write_text('start: "a" ("b" | "c")')
    by_schema = run("generate", ONCE, "--schema", str(schema), "--max-tokens", "60")
    assert [value in (1, 2) for value in json.loads(by_schema.stdout)] == [True, True]
    assert run("generate", ONCE, "--grammar", str(grammar)).stdout in (b"ab\n", b"ac\n")
    assert re.fullmatch(rb"[0-9]{4}\n", run("generate", ONCE, "--regex", "[0-9]{4}").stdout)
    assert "unclosed" in one_line_error(run("generate", ONCE, "--regex", "("))
    both = run("generate", ONCE, "--regex", "a", "--schema", str(schema))
    assert "--schema and --regex are given" in one_line_error(both)
    missing = run_process("generate", ONCE, "--schema", str(tmp_path / "b.json"))
    assert missing.returncode == 2
    assert b"b.json" in missing.stderr


def test_logprobs_are_shown():
    process = run("generate", "--max-tokens", "3", "--logprobs", "2", ONCE)
    lines = process.stderr.decode().splitlines()[1:]
    assert len(lines) == 3
    assert all(re.fullmatch(r"('.*?' -?[\d.]+\s*){3}", line) for line in lines)
    process = run("generate", "--max-tokens", "3", "--logprobs", "2", "--n", "2", ONCE)
    two = process.stderr.decode().splitlines()
    assert two[1:4] == two[5:] == lines


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate"], "prompt is empty"),
        (["generate", "--temperature", "-1", ONCE], ": --temperature is -1.0, expected"),
        (["generate", "--file", "no-such-file"], "no-such-file: No such file or directory"),
        (["generate", "--file", "x", ONCE], "a prompt and --file were given"),
        (["generate", "--model", "no/such/folder", ONCE], "no/such/folder"),
        (["generate", "--model", ".", ONCE], "config.json"),
        (["generate", "--threads", "0", ONCE], "--threads is 0, expected 1 to "),
        (["generate", "--threads", "100000", ONCE], "--threads is 100000, expected 1 to "),
        (
            ["generate", "--device", "potato", ONCE],
            ": --device is 'potato', expected 'cpu'",
        ),
        (
            ["generate", "--cache-tokens", "20", ONCE],
            "or make --cache-tokens larger",
        ),
        (["generate", "--logit-bias", "99999=1", ONCE], ": --logit-bias has token id 99999"),
        (["chat"], "base model"),
        (["perplexity", "--file", "no-such-file"], "no-such-file: No such file or directory"),
        (["perplexity", "--file", "-"], "texts[0] is empty"),
        (["quantize", "no/such/folder", "out", "--bits", "4"], "no/such/folder"),
        (["quantize", "no/such/folder", ".", "--bits", "4"], "'.' exists, expected a new"),
        (
            ["quantize", "a", "b", "--size", "4.2"],
            ": --size is '4.2', expected a number",
        ),
    ],
)
def test_errors_are_one_line(args, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in one_line_error(run(*args))


def test_names_of_options_in_errors():
    flags = {"max_tokens": "--max-tokens", "size": "--size", "group": "--group"}
    for message, shown in (
        ("max_tokens is 0, expected 1", "--max-tokens is 0, expected 1"),
        (
            "group is 8 and size is '1', expected one",
            "--group is 8 and --size is '1', expected one",
        ),
        ("group and size are given", "--group and --size are given"),
        (
            "top_k is 2, expected none with max_tokens",
            "top_k is 2, expected none with --max-tokens",
        ),
        ("x has 2 values, expected a size", "x has 2 values, expected a size"),
        ("a.json: max_tokens is 0", "a.json: max_tokens is 0"),
        ("/a/max_tokens/b and max_tokens.txt", "/a/max_tokens/b and max_tokens.txt"),
        ("the group is empty", "the group is empty"),
        ("--size is 2", "--size is 2"),
    ):
        assert as_typed(message, flags) == shown


def test_bytes_that_are_not_text():
    assert "stdin is not UTF-8" in one_line_error(run_process("generate", stdin=b"\xff\xfe"))


def test_wrong_usage_is_status_2():
    for args, message in (
        ([], "mistral-ext: the following arguments are required: COMMAND"),
        (["generate", "--no-such-option", "x"], "unrecognized arguments: --no-such-option"),
        (["generate", "--temp", "1", "x"], "unrecognized arguments: --temp"),
        (["generate", "--logit-bias", "x", "y"], "argument --logit-bias: 'x' is not ID=X"),
        (["generate", "--quantize", "int5", "x"], "argument --quantize: invalid choice: 'int5'"),
        (["quantize", "a", "b"], "one of the arguments --bits --size is required"),
        (
            ["quantize", "a", "b", "--bits", "4", "--size", "4GB"],
            "--size: not allowed with",
        ),
        (["quantize", "a", "b", "--bits", "3"], "argument --bits: invalid choice: 3"),
    ):
        process = run_process(*args)
        assert process.returncode == 2
        assert message in process.stderr.decode()
        assert process.stderr.count(b"\n") == 1


def test_traceback_on_request():
    process = run_process("generate", "--traceback", "--temperature", "-1", ONCE)
    assert process.returncode == 1
    assert b"Traceback" in process.stderr


def test_quantised_model(tmp_path):
    """Written once, or rounded while it is read: the same text and perplexity."""
    folder, text = str(tmp_path / "quantised"), tmp_path / "text.txt"
    process = run("quantize", str(mistral_ext.llm.DEMO_MODEL), folder, "--bits", "4")
    assert process.returncode == 0, process.stderr
    assert process.stderr.decode().startswith(f"{folder}/model.safetensors: 0.00 GB")
    text.write_text("The king's daughter went into the wood. " * 20)
    for args in (
        ["generate", "--max-tokens", "30", ONCE],
        ["perplexity", "--file", str(text), "--max-tokens", "100"],
    ):
        stored = run(args[0], "--model", folder, *args[1:])
        assert stored.returncode == 0, stored.stderr
        rounded = run(args[0], "--quantize", "int4", *args[1:])
        assert rounded.stdout == stored.stdout
    error = one_line_error(run("quantize", folder, str(tmp_path / "again"), "--bits", "8"))
    assert "quantised already" in error


def test_quantize_takes_a_group_and_a_dtype(tmp_path):
    folder = tmp_path / "quantised"
    options = ["--bits", "4", "--group", "32", "--dtype", "float32"]
    assert main(["quantize", str(mistral_ext.llm.DEMO_MODEL), str(folder), *options]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 32
    assert config["torch_dtype"] == "float32"


def test_quantize_to_a_size(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The king's daughter went into the wood. " * 20)
    for name, more in (("plain", []), ("calibrated", ["--calibrate", str(text)])):
        folder = tmp_path / name
        given = ["quantize", str(mistral_ext.llm.DEMO_MODEL), str(folder), "--size", "3.6MB", *more]
        assert main(given) == 0
        file = folder / "model.safetensors"
        assert 3_500_000 < file.stat().st_size <= 3_600_000
        formats = json.loads((folder / "config.json").read_text())["quantization_config"]["formats"]
        shown = f"{file}: 0.00 GB, iq4_xs in groups of 256, {len(formats)} matrices q8_0"
        assert shown in capsys.readouterr().err


def test_quantize_says_what_is_wrong_with_a_calibration(tmp_path, capsys):
    model, text, out = str(mistral_ext.llm.DEMO_MODEL), tmp_path / "text.txt", tmp_path / "out"
    given = ["quantize", model, str(out), "--calibrate", str(text)]
    text.write_text(" \n")
    for more, problem in (
        (["--bits", "8"], "--calibrate is given, expected none with --bits 8 or --group"),
        (["--bits", "4", "--group", "64"], "--calibrate is given, expected none with --bits 8"),
        (["--bits", "4"], f"{str(text)!r} is empty, expected a text for --calibrate"),
    ):
        assert main([*given, *more]) == 1
        assert capsys.readouterr().err.startswith(f"mistral-ext: {problem}")
    text.write_text("Once upon a time. ")
    assert main([*given, "--bits", "4"]) == 0
    assert re.match(
        r"mistral-ext: \S+text\.txt has \d tokens: with fewer than 1024 calibration gains little, "
        r"and up to 16384 are used\n",
        capsys.readouterr().err,
    )
    text.unlink()  # what is wrong with OUT is said before the text is read
    assert main([*given, "--bits", "4"]) == 1
    assert capsys.readouterr().err.endswith("out' exists, expected a new or an empty folder\n")


@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_calibration_says_how_to_go_on(tmp_path, capsys, monkeypatch, done):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The king's daughter went into the wood. " * 200)
    given = ["quantize", str(mistral_ext.llm.DEMO_MODEL), str(out), "--bits", "4"]
    rounded = CalibratedLayers.rounded

    def interrupted(self, index, layer):
        if index == done:
            raise KeyboardInterrupt
        return rounded(self, index, layer)

    monkeypatch.setattr(CalibratedLayers, "rounded", interrupted)
    assert main([*given, "--calibrate", str(text)]) == 130
    said = f"mistral-ext: the same command goes on from {out}.calibration\n"
    assert capsys.readouterr().err == (said if done else "\n")
    monkeypatch.undo()
    assert main([*given, "--calibrate", str(text)]) == 0
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["out", "text.txt"]


def test_an_interruption_promises_no_more_than_is_kept(tmp_path, capsys, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The king's daughter went into the wood. " * 200)
    given = ["quantize", str(mistral_ext.llm.DEMO_MODEL), str(out), "--bits", "4"]
    rounded, kept = CalibratedLayers.rounded, tmp_path / "out.calibration"

    def interrupted(self, index, layer):
        if index == 1:
            raise KeyboardInterrupt
        return rounded(self, index, layer)

    monkeypatch.setattr(CalibratedLayers, "rounded", interrupted)
    assert main([*given, "--calibrate", str(text)]) == 130
    capsys.readouterr()
    monkeypatch.undo()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_checkpoint, "write_model", stop)
    assert main(given) == 130  # this run calibrates nothing, and will not go on
    assert capsys.readouterr().err == "\n"
    monkeypatch.undo()
    monkeypatch.setattr(quantize_checkpoint, "remove_kept", stop)
    assert main([*given, "--calibrate", str(text)]) == 130  # the model is complete
    assert "goes on from" not in capsys.readouterr().err
    assert (out / "config.json").exists()
    assert kept.exists()


def test_perplexity(tmp_path):
    texts = ["Once upon a time there was a king. " * 9, "He had a daughter.\n"]
    files = []
    for i, text in enumerate(texts):
        files += ["--file", str(tmp_path / f"{i}.txt")]
        (tmp_path / f"{i}.txt").write_text(text)
    llm = mistral_ext.Mistral.from_pretrained(mistral_ext.llm.DEMO_MODEL)
    expected = perplexity(llm, texts)
    process = run("perplexity", *files)
    assert process.stdout.decode() == f"perplexity {expected.value:.4f}\n"
    assert re.fullmatch(
        rf"\[{expected.nll:.5f} nats a token, {expected.tokens} tokens in 2 segments, "
        r"[\d.]+ tokens/s\]\n",
        process.stderr.decode(),
    )
    shown = json.loads(run("perplexity", *files, "--json", "--prefill-chunk", "50").stdout)
    assert shown["perplexity"] == pytest.approx(expected.value, rel=0.01)
    assert (shown["tokens"], shown["segments"]) == (expected.tokens, 2)
    from_stdin = run("perplexity", "--file", "-", stdin=texts[0])
    assert from_stdin.stdout == run("perplexity", *files[:2]).stdout


def test_info():
    process = run_process("info", "--threads", "1", MISTRAL_EXT_ISA="scalar")
    shown = process.stdout.decode()
    assert f"mistral_ext      {mistral_ext.__version__}" in shown
    assert re.search(r"instruction set +scalar \(of scalar", shown)
    assert re.search(r"threads +1\n", shown)
    assert re.search(r"CUDA +(built for|not in this build)", shown)


def test_info_says_how_large_the_cache_is(instruct, capsys):
    """The demo model has a window of 64, so a ring has 128 slots; a token of it takes 2 KiB."""

    def shown(*args: str) -> str:
        assert main(["info", *args]) == 0
        return re.search(r"\ncache +(.*)\n", capsys.readouterr().out)[1]

    how = "on cpu (--cache-tokens changes it)"
    assert shown() == f"1024 tokens, 2 MiB, for the demo model {how}"
    assert shown("--cache-tokens", "512") == f"512 tokens, 1 MiB, for the demo model {how}"
    overrides = ("--sliding-window", "0", "--max-positions", "30000", "--dtype", "bfloat16")
    llm = Mistral.from_pretrained(
        instruct, sliding_window=None, max_positions=30000, dtype=torch.bfloat16
    )
    pool = llm.engine.pool
    expected = f"{pool.slots} tokens, {pool.nbytes / 2**20:.0f} MiB, for {instruct} {how}"
    assert shown("--model", instruct, *overrides) == expected


def test_errors_of_overrides_name_the_option(instruct, capsys):
    for option, value in (("--sliding-window", "-2"), ("--max-positions", "0")):
        assert main(["info", "--model", instruct, option, value]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"mistral-ext: {option} is {value}, expected a positive integer")


def test_wrong_isa_is_one_line():
    error = one_line_error(run_process("generate", ONCE, MISTRAL_EXT_ISA="mmx"))
    assert "MISTRAL_EXT_ISA: instruction set is 'mmx', expected one that this processor" in error


def test_closed_pipe_is_quiet():
    command = f"{sys.executable} -m mistral_ext.cli generate --ignore-eos --max-tokens 300 x | true"
    process = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert b"Traceback" not in process.stderr
    assert b"BrokenPipe" not in process.stderr


def test_ctrl_c_ends_a_long_generation():
    command = [sys.executable, "-m", "mistral_ext.cli", "generate", "--ignore-eos"]
    command += ["--max-tokens", "100000", ONCE]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_ctrl_c_while_torch_is_imported(tmp_path):
    """A KeyboardInterrupt may be swallowed or printed on the way: the end must not be one."""
    (tmp_path / "torch.py").write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "while True:\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n"
        "        pass\n"
    )
    command = [sys.executable, "-m", "mistral_ext.cli", "generate", ONCE]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(mistral_ext.__file__).parent.parent}"}
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"\n")
    assert process.returncode == 130


@pytest.mark.parametrize("args", [["generate"], ["chat"], ["perplexity", "--file", "-"]])
def test_closed_stdin_is_one_line(args):
    command = [sys.executable, "-m", "mistral_ext.cli", *args]
    process = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, timeout=120
    )
    assert "stdin is closed, expected" in one_line_error(process)


def test_closed_or_full_output():
    command = [sys.executable, "-m", "mistral_ext.cli", "generate", "--max-tokens", "3", ONCE]

    def run_into(redirection: str) -> subprocess.CompletedProcess:
        shell = ["sh", "-c", f'"$@" {redirection}', "sh", *command]
        env = {**os.environ, "PYTHONUNBUFFERED": ""}  # as it is for most: written at the end
        return subprocess.run(shell, capture_output=True, env=env, timeout=120)

    assert "stdout is closed" in one_line_error(run_into(">&-"))
    expected = run("generate", "--max-tokens", "3", ONCE).stdout
    assert run_into("2>&-").stdout == expected  # and no timing among the text
    command[3:] = ["info"]  # which writes at its end only
    if os.path.exists("/dev/full"):
        assert "No space left" in one_line_error(run_into(">/dev/full"))


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        (["chat", "--no-such-option"], 2),
        (["generate", "--threads", "0", ONCE], 1),
        (["generate", "--temperature", "-1", ONCE], 1),
    ],
)
def test_help_and_wrong_arguments_need_no_torch(args, status):
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mistral_ext.cli", *args],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "mistral_ext.cli.parser" in imported
    assert not imported & SLOW_MODULES


def test_chat_over_several_turns(instruct):
    options = ["--max-tokens", "6", "--seed", "1", "--temperature", "1", "--safe-prompt"]
    process = run("chat", "--model", instruct, *options, stdin="Hello\n\nAnd then?\n")
    assert process.returncode == 0, process.stderr
    llm = mistral_ext.Mistral.from_pretrained(instruct)
    chat = llm.start_chat(safe_prompt=True)
    replies = [
        "".join(chat.send(turn, max_tokens=6, seed=1, temperature=1.0))
        for turn in ("Hello", "And then?")
    ]
    assert process.stdout.decode() == "".join(reply + "\n" for reply in replies)


def test_chat_at_a_terminal(instruct):
    """Ctrl-C breaks off a reply, a message that is no text is refused, and neither ends the
    conversation; Ctrl-D ends it."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "mistral_ext.cli", "chat", "--model", instruct]
    command += ["--ignore-eos", "--max-tokens", "100000"]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    shown = b""

    def read_until(pattern: bytes) -> None:
        nonlocal shown
        while not re.search(pattern, shown, re.DOTALL):
            shown += os.read(controller, 4096)

    with child(command, start_new_session=True, **streams) as process:
        os.close(terminal)
        read_until(b"> ")
        os.write(controller, b"Hello\n")
        read_until(b"> Hello\r\n.{20}")
        process.send_signal(signal.SIGINT)
        read_until(b"> Hello\r\n.*\r\n.*> ")
        os.write(controller, b"a\xffb\n")
        read_until(b"mistral-ext: .* has a lone surrogate.*> ")
        os.write(controller, b"\x04")
        assert process.wait() == 0
    os.close(controller)


def test_chat_at_a_terminal_imports_before_the_first_message(instruct):
    """Ctrl-C in an import may become another error, which would end the conversation."""
    script = """
import builtins, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever pytest was started with
import mistral_ext.cli.chat as chat
from mistral_ext.cli import main, start

class Terminal:
    isatty = lambda self: True

def interrupts():
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler

def ask(prompt):
    print("mistral_common.protocol.instruct.request" in sys.modules, interrupts())
    raise EOFError

with start.importing():  # before `main`, so this process is another program's
    print(interrupts())
chat.stdin, builtins.input = Terminal, ask
sys.argv = ["mistral-ext", "chat", "--model", sys.argv[1], "--template", "v1"]
main()
with start.importing():
    print(interrupts())
"""
    process = subprocess.run(
        [sys.executable, "-c", script, instruct], capture_output=True, text=True, timeout=120
    )
    assert process.stdout == "True\nTrue True\nFalse\n", process.stderr
