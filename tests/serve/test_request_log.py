"""The file of requests and replies."""

from __future__ import annotations

import json
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


def test_lines_are_json_if_a_request_has_infinity(tmp_path):
    requests = log.RequestLog(tmp_path / "requests.jsonl")
    requests.write(log.Record("id", "/v1/completions", body=json.loads('{"user": 1e999}')))
    requests.close()

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "requests.jsonl").read_text(), parse_constant=refuse)
    assert line["request"] == {"user": None}
