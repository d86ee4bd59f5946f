"""The cluster files against Ray's own schema, and what must hold of all: closed doors, shared storage, labels, one set of versions."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from roma_ray.config.loading import load_config

ROOT = Path(__file__).parents[1]
UP = ["ray-cluster.yaml", "cluster/on-premise-mi300x.yaml"]
KUBERAY = ROOT / "cluster" / "kuberay"
IMAGES = sorted((ROOT / "cluster" / "images").glob("*.Dockerfile"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("name", UP)
def test_ray_up_accepts_the_file(name: str) -> None:
    """Ray's schema, with the provider's defaults filled in; a misspelt key is seen, so the check is one."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = documents(ROOT / name)[0]
    validate_config(prepare_config(copy.deepcopy(config)))
    wrong = {**config, "idle_timeout": 3}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("name", UP)
def test_clusters_of_machines_are_closed(name: str) -> None:
    """Tokens on every node, the dashboard on loopback, the token in no file, the head without work."""
    config = documents(ROOT / name)[0]
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "--num-cpus=0" in starts[0]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not re.search(r"RAY_AUTH_TOKEN\s*=", (ROOT / name).read_text())
    assert any("/mnt/shared" in option for option in config["docker"]["run_options"])


def test_workers_scale_and_bear_their_kind() -> None:
    """Each GPU node type has the labels and the accelerator resource that stages may ask for; the head has no GPU."""
    config = documents(ROOT / UP[0])[0]
    types = config["available_node_types"]
    assert "GPU" not in types[config["head_node_type"]]["resources"]
    gpus = {name: kind for name, kind in types.items() if "GPU" in kind["resources"]}
    assert set(gpus) == {"a100", "h100"}
    for name, kind in gpus.items():
        assert kind["resources"][f"accelerator_type:{name.upper()}"] == 1
        assert kind["labels"]["gpu-type"] == name
        assert kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"]
    for rule in config["provider"]["security_group"]["IpPermissions"]:
        assert rule["FromPort"] == rule["ToPort"] == 22
        assert all(r["CidrIp"].endswith("/32") for r in rule["IpRanges"])
    workers = " ".join(documents(ROOT / UP[1])[0]["worker_start_ray_commands"])
    assert "gpu-type=mi300x" in workers
    # Ray refuses it on AMD nodes.
    assert "ROCR_VISIBLE_DEVICES=" not in (ROOT / UP[1]).read_text()


def clusters() -> list[tuple[str, dict[str, Any]]]:
    job = documents(KUBERAY / "rayjob.yaml")[0]["spec"]["rayClusterSpec"]
    return [("raycluster", documents(KUBERAY / "raycluster.yaml")[0]["spec"]), ("rayjob", job)]


@pytest.mark.parametrize(("name", "spec"), clusters(), ids=[name for name, _ in clusters()])
def test_kuberay_clusters(name: str, spec: dict[str, Any]) -> None:
    """Structure that the operator needs, and what we promise of every pod."""
    import ray

    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["dashboard-host"] == ("127.0.0.1" if name == "raycluster" else "0.0.0.0")
    for group in groups:
        assert 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert {"pool", "gpu-vendor", "gpu-type"} <= set(group["labels"])
        pod = group["template"]["spec"]
        resource = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}[group["labels"]["gpu-vendor"]]
        assert int(pod["containers"][0]["resources"]["limits"][resource]) == 8
        assert [t["key"] for t in pod["tolerations"]] == [resource]
        assert pod["automountServiceAccountToken"] is False
        image = pod["containers"][0]["image"]
        assert image.endswith({"nvidia": ":cuda", "amd": ":rocm"}[group["labels"]["gpu-vendor"]])
    assert all(isinstance(v, str) for g in [head, *groups] for v in g["rayStartParams"].values())
    claim = next(d for d in documents(KUBERAY / "storage.yaml") if d["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in [head, *groups]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        assert mounts == {"shared": "/mnt/shared", "shm": "/dev/shm"}
        assert set(mounts) == {v["name"] for v in pod["volumes"]}
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert not [e for e in container["env"] if "TOKEN" in e["name"] or "SECRET" in e["name"]]


def test_the_job_runs_what_there_is() -> None:
    """The entry point and its configuration exist in the image, its overrides are settings, and the namespace is one."""
    job = documents(KUBERAY / "rayjob.yaml")[0]
    words = job["spec"]["entrypoint"].split()
    for word in words:
        if word.startswith("/opt/roma-ray/"):
            assert (ROOT / word.removeprefix("/opt/roma-ray/")).is_file(), word
    overrides = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    config = load_config(ROOT / "configs" / "olmoe.yaml", overrides)
    assert config.ray.wait_seconds > 0
    assert config.device == "cuda"
    assert config.ray.extract_workers
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    spaces = {
        d["metadata"].get("namespace", d["metadata"]["name"]) for p in KUBERAY.glob("*.yaml") for d in documents(p)
    }
    assert spaces == {"roma-ray"}


def test_the_network_policy_admits_the_cluster_and_the_operator_alone() -> None:
    (policy,) = documents(KUBERAY / "network-policy.yaml")
    assert policy["spec"]["podSelector"] == {}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    inside, operator = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {}}]}
    assert [p["port"] for p in operator["ports"]] == [8265]


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.stem)
def test_images_are_of_one_set_of_versions(path: Path) -> None:
    """Both images install by constraints.txt, run as a user without rights, and hold no token."""
    text = path.read_text()
    assert {p.stem for p in IMAGES} == {"cuda", "rocm"}
    assert "--constraint constraints.txt" in text
    assert "USER ray" in text
    assert "RAY_AUTH_MODE=token" in text
    assert "AUTH_TOKEN" not in text
    copied = [part for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for part in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert ("faiss" in text.split("--constraint")[1]) == (path.stem == "cuda")
    torch = re.search(r"ARG TORCH=torch==([\d.]+)", text)
    assert torch
    makefile = re.search(r"^TORCH \?= torch==([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile
    assert torch[1] == makefile[1]
