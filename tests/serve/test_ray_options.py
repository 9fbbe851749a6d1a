"""The server on a Ray cluster, as far as no cluster has to run: options, errors, announcements."""

from __future__ import annotations

import socket
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from mistral_ext.cli import main
from mistral_ext.serve import ray as ours
from mistral_ext.serve import replicas
from mistral_ext.serve.settings import settings_for

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@needs_ray
def test_the_application_of_a_config_file():
    given = {"replicas": [1, 3], "threads": 2, "max_queue": 5, "max_batch": 4, "drain_seconds": 7}
    application = ours.app({**given, "device": "cuda", "api_keys": "key", "model": "folder"})
    deployment = application._bound_deployment
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    assert deployment.max_ongoing_requests >= 4 + 5
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 1}
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
    settings, arguments, threads = deployment.init_args
    assert (settings.model_name, settings.max_queue, settings.api_keys) == ("folder", 5, ("key",))
    assert (arguments, threads) == ({"model": "folder", "device": "cuda", "max_batch": 4}, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modle": "x"}, "option 'modle' is unknown, expected one of .*, model, "),
        ({"port": 80}, "option 'port' is unknown"),
        ({"replicas": 0}, "replicas is 0, expected integers of 1 or more"),
        ({"replicas": [3, 2]}, "replicas is 3 to 2"),
        ({"replicas": "2"}, "replicas is '2', expected integers"),
        ({"replicas": [1, 2, 3]}, r"replicas is \[1, 2, 3\], expected integers"),
        ({"progress": True}, "option 'progress' is unknown"),
        ({"threads": 0}, "threads is 0, expected an integer of 1 or more"),
        ({"max_queue": "8"}, "max_queue is '8', expected an integer of 0 or more"),
        ({"drain_seconds": -1}, "drain_seconds is -1, expected a number above 0"),
        ({"template": "v9"}, "template is 'v9', expected one of"),
        ({"adapters": {"demo": "x"}}, "an adapter has the name 'demo'"),
        ({"adapters": "abc"}, "adapters is 'abc', expected names, and the path of each"),
        ({"adapters": {"a": None}}, "adapters is {'a': None}, expected names"),
        ({"api_keys": None}, "api_keys is of type NoneType, expected some text or a list"),
        ({"api_keys": [123]}, "an API key is empty or not printable ASCII"),
        ({"api_keys": ""}, "an API key is empty or not printable ASCII"),
        ({"cors_origins": None}, "cors_origins is of type NoneType, expected some text"),
        ({"cors_origins": [5]}, "cors_origins has 5, expected some text"),
        ({"moderate": "input,all"}, "moderate has 'all', expected input, output or input,output"),
        ({"moderate": [[1]]}, r"moderate has \[1\], expected input"),
        ({"max_batch": "8"}, "max_batch is '8', expected an integer of 1 or more"),
        ({"max_batch": None}, "max_batch is None, expected an integer of 1 or more"),
        ({"max_batch": 0}, "max_batch is 0, expected an integer of 1 or more"),
        ({"prefill_chunk": 1.5}, "prefill_chunk is 1.5, expected an integer"),
        ({"cache_tokens": "all"}, "cache_tokens is 'all', expected an integer"),
        ({"drafts": 8}, "drafts is 8, expected an integer from 0 to 7"),
        ({"dtype": "bf16"}, "dtype is 'bf16', expected one of bfloat16, float16, float32"),
        ({"quantize": "int3"}, "quantize is 'int3', expected one of int8, int4"),
        ({"device": "gpu"}, "device is 'gpu', expected cpu or cuda"),
        ({"device": "cuda:1"}, "device is 'cuda:1', expected cpu or cuda"),
        ({"device": 1}, "device is 1, expected cpu or cuda"),
        ({"model": 5}, "model is 5, expected a path or hub id"),
        ({"model_name": 5}, "model_name is 5, expected some text"),
    ],
)
def test_wrong_options_of_a_config_file(options, words):
    with pytest.raises(ValueError, match=words):
        replicas.read_options(options)


def test_options_of_a_config_file():
    given = {"api_keys": ["a,b", "c"], "moderate": "input,output", "cors_origins": "*"}
    settings, arguments, _ = replicas.read_options({**given, "dtype": "bfloat16"})
    assert (settings.api_keys, settings.moderate) == (("a,b", "c"), ("input", "output"))
    assert settings.cors_origins == ("*",)
    assert arguments == {"model": None, "dtype": "bfloat16"}
    assert "a,b" not in repr(settings)


@pytest.mark.parametrize(
    ("device", "gpus"), [(None, 0), ("cpu", 0), ("cuda", 1), ("cuda:0", 1), (0, 1)]
)
def test_gpus_of_a_replica(device, gpus):
    assert replicas.gpus_for(device) == gpus


def test_a_replica_refuses_an_empty_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("MISTRAL_EXT_API_KEY", "")
    monkeypatch.setattr(ours, "_replica_name", lambda: "one")
    with pytest.raises(ValueError, match="an API key is empty"):
        ours.Replica(settings_for(None), {"model": None}, torch.get_num_threads())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter-updates", "--ray"], "--adapter-updates does not go with --ray: a client"),
        (["--max-unread", "9", "--ray"], "--max-unread does not go with --ray: Ray's proxy"),
        (["--log-requests", "x", "--ray"], "--log-requests does not go with --ray: each"),
        (["--replicas", "2"], "--replicas is given without --ray"),
        (["--replicas", "0", "--ray"], "--replicas is 0, expected integers of 1 or more"),
        (
            ["--replicas", "3,2", "--ray"],
            "--replicas is 3 to 2, expected integers of 1 or more, in order",
        ),
        (["--device", "cuda:1", "--ray"], "--device is 'cuda:1', expected cpu or cuda, as"),
        (["--max-batch", "0", "--ray"], "--max-batch is 0, expected an integer of 1 or more"),
    ],
)
def test_wrong_options_of_the_command(monkeypatch, capsys, options, words):
    monkeypatch.setattr("mistral_ext.cli.extras.find_spec", lambda name: True)
    assert main(["serve", *options]) == 1
    assert words in capsys.readouterr().err


def test_without_ray_the_command_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("mistral_ext.cli.extras.find_spec", lambda name: name != "ray" or None)
    assert main(["serve", "--ray"]) == 1
    assert (
        capsys.readouterr().err == "mistral-ext: ray is missing: pip install 'mistral_ext[ray]'\n"
    )


@pytest.fixture
def joined(monkeypatch):
    """In place of a cluster that others have started: what is called of Ray Serve, with the
    cluster's applications and proxies."""
    from ray import serve

    cluster = SimpleNamespace(applications={}, proxies={}, calls=[], error=None)

    def run(app, name):
        cluster.calls.append(("run", name))
        if cluster.error:
            raise cluster.error

    monkeypatch.setattr(ours, "_cluster", lambda _: nullcontext(False))
    monkeypatch.setattr(ours, "_wait_for_signal", lambda _: 0)
    monkeypatch.setattr(serve, "status", lambda: cluster)
    monkeypatch.setattr(serve, "start", lambda **given: cluster.calls.append(("start", given)))
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "delete", lambda name, **_: cluster.calls.append(("delete", name)))
    return cluster


def run_on(cluster, **settings) -> list[str]:
    """The names of the calls of a run with these settings."""
    assert ours.run(settings_for(None, **settings), {}, replicas.Replicas()) == 0
    return [name for name, _ in cluster.calls]


@needs_ray
def test_an_application_of_another_process_is_left_alone(joined):
    joined.applications["mistral_ext"] = None
    with pytest.raises(RuntimeError, match="has an application 'mistral_ext' already"):
        run_on(joined)
    assert joined.calls == []


@needs_ray
def test_proxies_of_a_cluster_listen_where_the_options_say(joined, caplog):
    caplog.set_level("INFO")
    with socket.create_server(("127.0.0.1", 0)) as taken:  # on this machine, not on the cluster's
        port = taken.getsockname()[1]
        assert run_on(joined, port=port, api_keys=("k",)) == ["start", "run", "delete"]
    assert joined.calls[0][1]["http_options"] == {"host": "127.0.0.1", "port": port}
    assert f"address 127.0.0.1, port {port}, of each machine with a replica" in caplog.text
    assert "anyone" not in caplog.text
    with pytest.raises(ValueError, match="--port is 0, expected 1 to 65535"):
        run_on(joined, port=0)


@needs_ray
def test_where_ray_serve_runs_it_keeps_its_address_and_is_open_without_a_key(joined, caplog):
    caplog.set_level("INFO")
    joined.proxies["node"] = "HEALTHY"
    assert run_on(joined) == ["run", "delete"]
    assert "--host and --port have no effect" in caplog.text
    assert "anyone who can reach Ray Serve may use it" in caplog.text


@needs_ray
def test_errors_of_ray_serve_are_errors_of_the_command(joined):
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import RayServeException

    reason = RayServeException("Prefix / is being used")
    for joined.error in (reason, RayTaskError("deploy", "a traceback", reason)):
        with pytest.raises(RuntimeError, match=r"^Ray Serve: Prefix / is being used$"):
            run_on(joined)
