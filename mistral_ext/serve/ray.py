"""Runs replicas of the server on a Ray cluster, behind Ray Serve. It needs the extra [ray].

`app` is for a config file of Ray Serve, and `run` is `mistral-ext serve --ray`. Each replica is a
process with its own model. Ray Serve distributes requests among replicas, and replaces a replica
when it dies or its engine fails.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mistral_ext.llm import DEFAULT_MAX_BATCH, Mistral
from mistral_ext.serve import asgi, errors
from mistral_ext.serve.app import build_app
from mistral_ext.serve.log import RequestLog
from mistral_ext.serve.replicas import Replicas, expect_arguments, gpus_for, read_options
from mistral_ext.serve.server import announce, bind
from mistral_ext.serve.service import Service
from mistral_ext.serve.settings import Settings, keys_of_environment
from mistral_ext.weights.hub import DEMO_MODEL

if TYPE_CHECKING:
    from ray.serve import Application

_log = logging.getLogger("mistral_ext.serve")

_NAME = "mistral_ext"  # the name of the application

# Ray may send a replica this many requests more than the replica has places for completions. So a
# full replica still gets requests. It refuses them with our own error, and still answers
# GET /health.
_SPARE_REQUESTS = 16

# When the server ends, requests have `Settings.drain_seconds` to finish. Then replicas have so many
# seconds to end.
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.2

# This environment variable says whether a cluster requires the token that Ray keeps in the user's
# home. Without the variable a new cluster requires the token. A program that joins such a cluster
# must set the variable to "token".
_AUTH = "RAY_AUTH_MODE"

# Ray Serve's own log is quiet, because our log has a line for each request.
_QUIET = {"log_level": "WARNING", "enable_access_log": False}

# The number of tries to start a replica before Ray Serve gives up.
_STARTS = 3


def app(options: Mapping[str, Any]) -> Application:
    """Makes the application for a Ray Serve config file: `import_path: mistral_ext.serve.ray:app`.

    Args:
        options: the `args` of the config file. `model` is a path or hub id (default: the demo
            model), `replicas` is a number or [least, most], and `threads` is the number of cores of
            a replica. The other options are fields of `Settings` that fit a replica, and arguments
            of `Mistral.from_pretrained`. If the replicas have the environment variable
            MISTRAL_EXT_API_KEY, its value is an API key, too.

    Raises:
        ValueError, TypeError: an option is unknown or wrong. The message names the option.
    """
    return application(*read_options(options))


def application(
    settings: Settings, arguments: Mapping[str, Any], replicas: Replicas
) -> Application:
    """Makes the Ray Serve application.

    Args:
        settings: the options of each replica's server. `host` and `port` are not used, because Ray
            Serve listens.
        arguments: arguments of `Mistral.from_pretrained` that `replicas.expect_arguments` accepts.
        replicas: the number of replicas, and their resources.
    """
    from ray import serve

    max_batch = arguments.get("max_batch", DEFAULT_MAX_BATCH)
    scale: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.least < replicas.most:
        limits = {"min_replicas": replicas.least, "max_replicas": replicas.most}
        scale = {"autoscaling_config": {**limits, "target_ongoing_requests": max_batch}}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="replica",
        max_ongoing_requests=max_batch + settings.max_queue + _SPARE_REQUESTS,
        max_queued_requests=settings.max_queue + _SPARE_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        max_constructor_retry_count=_STARTS,
        logging_config=_QUIET,
        ray_actor_options={
            "num_cpus": replicas.threads,
            "num_gpus": gpus_for(arguments.get("device")),
        },
        **scale,
    )
    return deployment.bind(settings, dict(arguments), replicas.threads)


class Replica:
    """A model and its server, in a process that Ray starts. `settings` and `arguments` are as in
    `application`, and `threads` is the number of threads that the model uses."""

    def __init__(self, settings: Settings, arguments: Mapping[str, Any], threads: int) -> None:
        keys = (*settings.api_keys, *keys_of_environment())
        settings = dataclasses.replace(settings, api_keys=keys)
        torch.set_num_threads(threads)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"{_replica_name()} %(message)s"))
        log = logging.getLogger("mistral_ext")
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        self._service = Service(_load(arguments), settings, RequestLog(None))

    async def __serve_build_asgi_app__(self) -> asgi.App:
        return _named(build_app(self._service, self._lifespan))

    def check_health(self) -> None:
        """Raises an error if Ray Serve should replace the replica."""
        if self._service.engine.is_dead:
            raise RuntimeError("the engine has failed")

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        self._service.start()
        try:
            yield
        finally:
            self._service.end_all(errors.shutting_down())
            self._service.stop()


def _load(arguments: Mapping[str, Any]) -> Mistral:
    given = dict(arguments)
    model, dtype = given.pop("model"), given.pop("dtype", None)
    model = DEMO_MODEL if model is None else model
    chosen = getattr(torch, dtype) if dtype else None
    return Mistral.from_pretrained(model, dtype=chosen, progress=False, **given)


def _named(app: asgi.App) -> asgi.App:
    """Wraps an application so that its answers name the replica that made them.

    Our own x-request-id is removed from the answers, because Ray's proxy adds its own id.
    """
    name = _replica_name().encode()

    async def answer(scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        async def send_named(message: asgi.Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                message["headers"] = [*kept, (b"x-replica", name)]
            await send(message)

        await app(scope, receive, send_named)

    return answer


def _replica_name() -> str:
    """The name that Ray Serve has given to this replica."""
    from ray import serve

    name: str = serve.get_replica_context().replica_id.unique_id
    return name


def run(settings: Settings, arguments: Mapping[str, Any], replicas: Replicas) -> int:
    """Serves until SIGTERM or SIGINT, and then lets replicas finish their requests. A second signal
    ends this process at once, and with it a cluster that it has started.

    Joins the cluster that the environment variable RAY_ADDRESS names, or starts a cluster on this
    machine if the variable is not set. The arguments are those of `application`, but
    `settings.host` and `settings.port` are used, too: Ray Serve's proxies listen there, unless the
    cluster already has proxies.

    Returns:
        The status to exit with.

    Raises:
        ValueError, TypeError: an argument is wrong.
        OSError: the address cannot be bound.
        RuntimeError: no replica could be started, or the cluster already has the application, or
            Ray has failed. The message has Ray's reason.
    """
    expect_arguments(arguments)
    with _cluster(replicas) as is_own:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            status = serve.status()
            if _NAME in status.applications:  # Ray Serve would replace that application
                text = f"the cluster has an application {_NAME!r} already, expected none"
                raise RuntimeError(text)
            announcement = _open(settings, is_own, has_proxies=bool(status.proxies))
            try:
                _deploy(application(settings, arguments, replicas))
                announcement()
                return _wait_for_signal(settings.drain_seconds)
            finally:
                _end(settings.drain_seconds)
        except (RayError, RayServeException) as error:
            # The text of an error in a Ray task is a traceback. The error's cause is more useful.
            raise RuntimeError(f"Ray Serve: {getattr(error, 'cause', error)}") from error


def _open(settings: Settings, is_own: bool, has_proxies: bool) -> Callable[[], None]:
    """Makes Ray Serve's proxies listen.

    Args:
        settings: the options. The proxies listen at `host` and `port`, unless the cluster already
            has proxies.
        is_own: whether the cluster was started for this server alone.
        has_proxies: whether Ray Serve already runs on the cluster.

    Returns:
        A function that logs the address of the server, and warns if anyone may use it.
    """
    from ray import serve

    host, port = settings.host, settings.port
    if is_own:
        with bind(host, port) as listener:  # a trial: an OSError says why it fails
            host, port = listener.getsockname()[:2]
    elif not has_proxies and port == 0:
        raise ValueError("--port is 0, expected 1 to 65535 on a cluster of several machines")
    if not has_proxies:
        serve.start(http_options={"host": host, "port": port}, logging_config=_QUIET)
    if is_own:
        return partial(announce, settings, host, port)
    where = f"address {host}, port {port}, of each machine with a replica"
    if has_proxies:
        where = "the address of Ray Serve, which ran already: --host and --port have no effect"
    return partial(_announce_on_cluster, settings, where)


def _announce_on_cluster(settings: Settings, where: str) -> None:
    _log.info("serving %s at %s", settings.model_name, where)
    if not settings.api_keys:
        _log.warning("anyone who can reach Ray Serve may use it: give --api-key")


def _deploy(app: Application) -> None:
    """Starts the application's replicas.

    Raises:
        RuntimeError: no replica could be started.
    """
    from ray import serve

    try:
        serve.run(app, name=_NAME)
    except RuntimeError as error:
        raise RuntimeError(f"no replica could be started: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    """The reason why the last replica could not be started, or the text of the error if Ray Serve
    does not know the reason."""
    from ray import serve

    status = serve.status().applications.get(_NAME)
    reports = [found.message for found in status.deployments.values()] if status else []
    lines = [line.strip() for line in "\n".join(reports).splitlines() if "Error: " in line]
    return lines[-1] if lines else str(error)


@contextmanager
def _cluster(replicas: Replicas) -> Iterator[bool]:
    """Connects to a Ray cluster. Yields whether this call has started the cluster.

    A new cluster is told that it has at least as many cores as all replicas reserve, because Ray
    starts a replica only if its cores are free.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports usage to its makers
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else Ray drops log lines of requests
    import ray
    import ray.serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the import has set another level
    given: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        cores = max(os.cpu_count() or 1, replicas.most * replicas.threads)
        given = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    ray.init(logging_level=logging.WARNING, **given)
    try:
        if given:
            address, mode = ray.get_runtime_context().gcs_address, os.environ.get(_AUTH, "token")
            _log.info("others join the Ray cluster with RAY_ADDRESS=%s %s=%s", address, _AUTH, mode)
        yield bool(given)
    finally:
        ray.shutdown()


def _wait_for_signal(drain_seconds: float) -> int:
    """Waits for SIGTERM or SIGINT, and returns the exit status. A second signal ends the process at
    once, and with it a cluster that it has started."""
    status: list[int] = []
    wake = threading.Event()

    def on_signal(number: int, _: object) -> None:
        if status:
            os._exit(status[0])
        status.append(130 if number == signal.SIGINT else 0)
        wake.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    wake.wait()
    _log.info("ending: requests have %g s to finish", drain_seconds)
    return status[0]


def _end(drain_seconds: float) -> None:
    """Ends the application, and waits until Ray Serve has removed it, but not longer than
    `drain_seconds` and `_STOP_SECONDS` together."""
    from ray import serve

    deadline = time.monotonic() + drain_seconds + _STOP_SECONDS
    serve.delete(_NAME, _blocking=False)
    while _NAME in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
