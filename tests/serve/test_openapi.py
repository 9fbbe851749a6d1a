"""The server does what /openapi.json says, whatever it is sent."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from servers import serving

import mistral_ext


@pytest.fixture(scope="module")
def short():
    """A server whose context is so short that no request takes long."""
    with serving("--max-positions", "48", "--adapter-updates") as server:
        yield server


CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_server_does_what_it_says(short, mode):
    schema = schemathesis.openapi.from_url(f"{short.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing in it can be wrong

        @settings(max_examples=20, suppress_health_check=[*HealthCheck])
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(checks=CHECKS, timeout=100)

        check()
    assert not [line for line in short.lines if "Traceback" in line]


def test_every_route_is_described(short):
    document = short.http.get("/openapi.json").json()
    assert document["info"]["version"] == mistral_ext.__version__
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            response = httpx.request(method, short.url + path.replace("{model}", "demo"))
            assert str(response.status_code) in operation["responses"]
            assert response.status_code not in (404, 405)
