"""Finding a Ray cluster, or starting one here, and how many workers fit on it."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from roma_ray.cluster.environment import forwarded, quiet_ray
from roma_ray.cluster.placement import Need, Node, inventory, live_nodes, main_kind, need_of, room
from roma_ray.cluster.worker_pool import WorkerPool
from roma_ray.config.schema import Config
from roma_ray.engine.devices import usable_cores
from roma_ray.errors import ConfigError, ModelError, WorkerError
from roma_ray.store.buckets import is_object
from roma_ray.store.files import roomy

_AUTH_HELP = (
    "Ray's authentication must be the same on both sides. For a cluster with tokens, set RAY_AUTH_MODE=token and "
    "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or the head's ~/.ray/auth_token) here as on every node; for one without, set "
    "RAY_AUTH_MODE=disabled here and where `ray start` runs. Ray turns tokens on by itself once ~/.ray/auth_token exists."
)
_NODES_POLL_SECONDS = 2.0
_OOM_RETRIES = "RAY_task_oom_retries"
_SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# What a cluster sets for its processes, and sets back when it is closed.
_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *_SOCKETS, _OOM_RETRIES)


class Cluster:
    """A Ray cluster: an existing one, or one of this process's own that starts when it is first needed."""

    def __init__(
        self, config: Config, address: str | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Find the cluster; connects at once to an existing one. Raises WorkerError when it cannot be reached."""
        quiet_ray()
        self.config, self.say = config, say
        self.compared = False
        self._started = False
        self._saved = {name: os.environ.get(name) for name in _VARIABLES}
        # Tasks that die for want of memory are tried as often as others; by itself Ray would never stop.
        os.environ.setdefault(_OOM_RETRIES, str(config.ray.max_failures))
        # Ray reads this when it is imported. A client that sends a token works with clusters of either kind, so one that
        # exists is sent.
        # In a task there is one already, whatever is written where it runs.
        self.address = None if self.connected else find_address(address or config.ray.address)
        if self.address is not None and "RAY_AUTH_MODE" not in os.environ and token_known():
            os.environ["RAY_AUTH_MODE"] = "token"
        if self.address is not None:
            self._attach(self.address)

    @cached_property
    def pool(self) -> WorkerPool:
        """The workers of planned batches, kept between stages."""
        return WorkerPool(0 if self.own else self.config.ray.keep_workers_seconds)

    @property
    def connected(self) -> bool:
        # Importing it takes seconds, which a run that starts no workers has no use for.
        ray = sys.modules.get("ray")
        return ray is not None and bool(ray.is_initialized())

    @property
    def own(self) -> bool:
        """Whether this process has started the cluster, or will where workers are needed."""
        return self._started or (self.address is None and not self.connected)

    def connect(self) -> None:
        """Start this process's own cluster unless there is one."""
        if not self.connected:
            self._start()

    def close(self) -> None:
        """Disconnect; a cluster that this process started ends. Kept workers end also where the connection is another's."""
        if "pool" in self.__dict__ and self.connected:
            self.pool.close()
        if self._started or self.address is not None:
            import ray

            ray.shutdown()
            self._started = False
        for name, value in self._saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    def device(self) -> str:
        """`cuda` when the workers have GPUs (CUDA or ROCm) and the configuration does not refuse them, else `cpu`.

        Raises ModelError when GPUs are asked for and there are none.
        """
        if not self.connected:
            from roma_ray.engine.setup import resolve_device

            return resolve_device(self.config)
        if self.config.device == "cpu":
            return "cpu"
        if self.resource("GPU") > 0:
            return "cuda"
        if self.config.device == "cuda" and self.config.ray.wait_seconds:
            return "cuda"
        if self.config.device == "cuda":
            raise ModelError(
                "device: cuda, but no node of the Ray cluster has a GPU resource. Start the nodes with `ray start "
                "--num-gpus=N` (and the GPU's driver and torch build installed), or use device: cpu. On a cluster that starts "
                "GPU nodes when asked, set ray.wait_seconds."
            )
        return "cpu"

    def resource(self, name: str) -> float:
        """How much of a resource (CPU, GPU) the whole cluster has."""
        import ray

        return float(ray.cluster_resources().get(name, 0.0))

    def nodes(self) -> list[Node]:
        """The live nodes."""
        return live_nodes()

    def place(
        self, stage: str, wanted: int | None, at_most: int, device: str, *, kept: bool = False
    ) -> tuple[int, Need]:
        """How many workers a stage gets, of at most `at_most` that have work, and what each asks of its node.

        Waits for nodes where the configuration says so. Workers that the pool keeps end first, for the stage gets their place,
        unless its workers are the pool's (`kept`). Raises ConfigError, with what the cluster has, when they do not fit.
        """
        if not kept:
            self.pool.release()
        need = need_of(stage, self.config.ray, device)
        self.await_room(need, min(wanted or 1, at_most))
        nodes = self.nodes()
        if stage == "finetune":
            need = self.of_one_kind(stage, need)
        fit = room(nodes, need)
        if fit < 1 or (wanted or 0) > fit:
            lower = f"Lower ray.{stage}_workers, ray.cpus_per_worker or ray.gpus_per_worker"
            raise ConfigError(
                f"ray.{stage}_workers: the cluster has room for {fit} workers of {need}, not {wanted or 1}. It has: "
                f"{inventory(nodes)}. {lower}, change ray.{stage} (accelerator, labels, memory_gib), or add nodes "
                "(ray.wait_seconds where the cluster starts them itself)."
            )
        if wanted is None:
            wanted = fit if device == "cuda" else min(fit, max(1, self.cores() // self.config.threads))
        return max(1, min(wanted, at_most)), need

    def of_one_kind(self, stage: str, need: Need) -> Need:
        """The need on the kind of GPU with the most room, where there are several and none is named: workers that must be alike."""
        if not need.gpus or need.accelerator is not None:
            return need
        kind, kinds = main_kind(self.nodes(), need)
        if kind is not None:
            self.say(f"{stage}: on {kind}, of {', '.join(kinds)} (ray.{stage}.accelerator names another)")
        return need.of_kind(kind)

    def cores(self) -> int:
        """The cores of this machine where the cluster is its own, for its logical CPUs are more; else the cluster's logical CPUs."""
        return usable_cores() if self._started else int(self.resource("CPU"))

    def await_room(self, need: Need, workers: int) -> None:
        """Ask the autoscaler for nodes and wait for them, at most `ray.wait_seconds`."""
        limit = time.monotonic() + self.config.ray.wait_seconds
        if not self.config.ray.wait_seconds or room(self.nodes(), need) >= workers:
            return
        from ray.autoscaler.sdk import request_resources

        self.say(f"waiting up to {self.config.ray.wait_seconds} s for nodes with room for {workers} workers of {need}")
        selectors = [dict(need.labels)] * workers if need.labels else None
        request_resources(bundles=[need.resources()] * workers, bundle_label_selectors=selectors)
        try:
            while room(self.nodes(), need) < workers and time.monotonic() < limit:
                time.sleep(_NODES_POLL_SECONDS)
        finally:
            # The work itself keeps its nodes; a standing request would keep them for ever.
            request_resources(bundles=[])

    def compare(self, stage: str, seconds: float, starting: float, work: float) -> None:
        """Say once that one process without Ray would have been faster, from a stage's time, its start-up and its work."""
        if self.compared or seconds < 2 * work:
            return
        self.compared = True
        self.say(
            f"note: {stage} took {seconds:.0f} s on Ray, {starting:.0f} s of them until its workers had started; its work takes one "
            f"process about {work:.0f} s. `roma-ray local` is faster for so few questions: the same bits, no Ray."
        )

    def describe(self) -> str:
        """One line about the cluster."""
        import ray

        nodes = sum(node["Alive"] for node in ray.nodes())
        where = "its own cluster on this machine" if self._started else f"{self.address or 'the running cluster'}"
        return f"ray {ray.__version__}: {where}, {nodes} node(s), {self.resource('CPU'):.0f} logical CPUs, {self.resource('GPU'):.0f} GPUs"

    def _attach(self, address: str) -> None:
        import ray

        # Ray itself would try for a quarter of an hour. A ray:// or bootstrap address has its own rules.
        if "://" not in address and not _answers(address):
            raise WorkerError(f"cannot use the Ray cluster at {address}: nothing answers there. {_REACH_HELP}")
        environment = forwarded()
        try:
            with _stderr_dropped():
                ray.init(address=address, runtime_env={"env_vars": environment} if environment else None, **_QUIET)
        except ray.exceptions.AuthenticationError as error:
            raise WorkerError(
                f"the Ray cluster at {address} refused this process ({_first_line(error)}). {_AUTH_HELP}"
            ) from None
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            # Without a token Ray's connection fails with no reason, though the port answers.
            remedy = f"Something answers there. {_AUTH_HELP} {_REACH_HELP}" if _answers(address) else _REACH_HELP
            raise WorkerError(f"cannot use the Ray cluster at {address}: {_first_line(error)}. {remedy}") from None
        self.say(self.describe())

    def _start(self) -> None:
        import ray
        import torch

        # A token of its own: nobody else can use this cluster, and no ~/.ray/auth_token is left behind, which would turn
        # authentication on for the next `ray start` on this machine.
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        # What training workers listen on.
        for name in _SOCKETS:
            os.environ.setdefault(name, "lo")
        # Logical CPUs only: more of them than cores, so that Ray's own tasks never wait for a worker to end.
        # Not many more, for Ray starts an idle process for each.
        cpus = max(4, 2 * usable_cores())
        gpus = torch.cuda.device_count() if self.device() == "cuda" else 0
        try:
            with _stderr_dropped(), _to_loopback():
                ray.init(address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, **_QUIET)
        # The bare class is what Ray itself raises when a part of it does not start.
        except Exception as error:
            raise WorkerError(
                f"Ray does not start on this machine: {_first_line(error)}. `roma-ray local` runs the same without Ray."
            ) from error
        self._started = True
        self.say(self.describe())
        if not on_loopback():
            self.say(
                f"note: ray {ray.__version__} listens on all of this machine's network addresses. A token protects it, except what "
                "its /metrics pages tell; a firewall closes those too."
            )


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
_REACH_HELP = (
    "Check that it runs (`ray status`), that ray's and Python's versions are the same there, and the address (--address, "
    "RAY_ADDRESS); `--address new` starts one here."
)


@contextlib.contextmanager
def open_cluster(
    config: Config, address: str | None = None, say: Callable[[str], None] = lambda text: None
) -> Iterator[Cluster]:
    """A cluster for as long as the block runs; `say` hears which. Raises WorkerError."""
    cluster = Cluster(config, address, say)
    try:
        yield cluster
    finally:
        cluster.close()


def on_loopback() -> bool:
    """Whether the connected cluster is one machine's, out of the network's reach."""
    import ray

    return ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback


def place_of_runs(folder: Path) -> Path:
    """Where Ray may keep what it writes of its own while a stage in this folder runs: its workers must all see it.

    Of a storage in a bucket that is this machine's scratch where the cluster is this machine, for Ray leaves marks behind.
    """
    return roomy(folder) / "ray" / folder.name if is_object(folder) and on_loopback() else folder


@contextlib.contextmanager
def _to_loopback() -> Iterator[None]:
    """A cluster that starts within listens on 127.0.0.1 alone: all of Ray's processes, and the workers, bind to their node's address.

    Ray turns a loopback address that it is given into the machine's own, except where it knows that no cluster will come of it,
    as on macOS; there this constant is false.
    """
    from ray._private import ray_constants

    saved = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = saved


@contextlib.contextmanager
def _stderr_dropped() -> Iterator[None]:
    """Drop what Ray's core writes straight to stderr while it connects; what matters comes as an exception."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def find_address(wanted: str | None) -> str | None:
    """The address of the cluster to use, or None to start one here: as given, $RAY_ADDRESS, or one running on this machine."""
    # `auto` takes $RAY_ADDRESS first, as Ray's own does: in a submitted job it names the job's cluster.
    named = os.environ.get("RAY_ADDRESS")
    address = named or wanted if wanted in (None, "auto") else wanted
    if address in ("new", "local"):
        # `local` is Ray's own word for it, in $RAY_ADDRESS; that of the commands means this process, without Ray.
        return None
    if address and address != "auto":
        if "://" in address:
            raise ConfigError(
                f"the Ray address {address} is not of the form host:6379. (http://host:8265 is the address for `ray job submit`; "
                "ray:// clients are not supported: submit a job, or run on a node of the cluster.)"
            )
        return address
    # Where `ray start` leaves the address of its latest cluster; the cluster may be gone.
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        found = file.read_text().strip()
    except OSError:
        found = ""
    if found and _answers(found):
        return found
    if address == "auto":
        raise WorkerError(f"no Ray cluster runs on this machine. {_REACH_HELP}")
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


def token_known() -> bool:
    """Whether Ray would find an authentication token in this environment."""
    return (
        bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))
        or (Path.home() / ".ray" / "auth_token").is_file()
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
