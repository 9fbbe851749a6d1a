"""The file of requests and replies."""

from __future__ import annotations

import json
import resource
import stat

from mistral_ext.serve import log


def test_files_are_moved_aside_and_stay_private(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_FILE_BYTES", 2000)
    monkeypatch.setattr(log, "_FILES", 3)
    path = tmp_path / "requests.jsonl"
    requests = log.RequestLog(path)
    for number in range(60):
        requests.write(log.Record(f"id-{number}", "/v1/completions", body={"prompt": "a secret"}))
    requests.close()
    files = [path, *(path.with_name(f"{path.name}.{number}") for number in (1, 2))]
    assert sorted(tmp_path.iterdir()) == files
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert all(file.stat().st_size <= 2000 for file in files)
    lines = [line for file in reversed(files) for line in file.read_text().splitlines()]
    assert 3 < len(lines) < 60  # the oldest are gone
    kept = [json.loads(line)["id"] for line in lines]
    assert kept == [f"id-{number}" for number in range(60 - len(lines), 60)]


def test_full_disk_costs_whole_lines_and_prompts_stay_secret(tmp_path, caplog, capfd):
    """A limit of this process on the size of files stands for the disk."""
    path = tmp_path / "requests.jsonl"
    requests = log.RequestLog(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(number):
        body = {"prompt": "a secret" * 1000}
        requests.write(log.Record(f"id-{number}", "/v1/completions", body=body))

    write(0)
    room = path.stat().st_size * 3 // 2
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        write(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(2)
    requests.close()
    kept = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert kept == ["id-0", "id-2"]
    (error,) = (record.message for record in caplog.records if record.levelname == "ERROR")
    assert error.startswith("id-1 is not in the file of requests: ")
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_lines_are_json_if_a_request_has_infinity(tmp_path):
    requests = log.RequestLog(tmp_path / "requests.jsonl")
    requests.write(log.Record("id", "/v1/completions", body=json.loads('{"user": 1e999}')))
    requests.close()

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "requests.jsonl").read_text(), parse_constant=refuse)
    assert line["request"] == {"user": None}
