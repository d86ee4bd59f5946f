"""The cluster files against Ray's own schema, and what must hold of all: closed doors, a storage that every node reaches, labels."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from roma_ray.config.loading import load_config
from roma_ray.store import files, objects
from roma_ray.store.buckets import UnfinishedUploads, as_path
from tests.bucket import Proxy, Request

ROOT = Path(__file__).parents[1]
UP = ["ray-cluster.yaml", "cluster/on-premise-mi300x.yaml"]
KUBERAY = ROOT / "cluster" / "kuberay"
IMAGES = sorted((ROOT / "cluster" / "images").glob("*.Dockerfile"))
FILES = [*(ROOT / name for name in UP), *sorted(KUBERAY.glob("*.yaml")), *IMAGES]


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


def test_machines_of_ones_own_share_a_file_system() -> None:
    config = documents(ROOT / UP[1])[0]
    assert "--mount type=bind,source=/mnt/shared,target=/mnt/shared" in config["docker"]["run_options"]
    assert "ROMA_RAY_STORAGE=/mnt/shared/roma " in config["head_start_ray_commands"][1]


def in_container(config: dict[str, Any], role: str) -> tuple[dict[str, str], list[str]]:
    """The environment of a node's container, and what of the machine it sees."""
    options = [*config["docker"]["run_options"], *config["docker"][f"{role}_run_options"]]
    variables = [option.removeprefix("--env ").split("=", 1) for option in options if option.startswith("--env ")]
    mounts = [option.partition("source=")[2] for option in options if option.startswith("--mount ")]
    return dict(variables), mounts


def test_every_node_on_aws_reaches_the_bucket_by_its_role_and_has_a_scratch() -> None:
    config = documents(ROOT / UP[0])[0]
    heads = config["head_node_type"]
    for role in ("head", "worker"):
        variables, mounts = in_container(config, role)
        assert as_path(variables["ROMA_RAY_STORAGE"]).parts[0] == "s3:"
        assert variables["AWS_REGION"] == config["provider"]["region"]
        scratch = variables["ROMA_RAY_SCRATCH"]
        assert mounts == [f"{scratch},target={scratch}"]
        assert float(variables["ROMA_RAY_SCRATCH_GIB"]) > 100
        assert f"sudo chown 1000 {scratch}" in config["initialization_commands"]
        assert ("MLFLOW_TRACKING_URI" in variables) == (role == "head")
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in node_types().items()}
    assert set(profiles.values()) == {"roma-ray-head", "roma-ray-worker"}
    assert [name for name, profile in profiles.items() if profile == "roma-ray-head"] == [heads]
    # An instance without disks of its own has the bound of its root disk.
    assert {kind["node_config"]["InstanceType"] for kind in node_types().values()} <= {
        "m6id.2xlarge",
        "p4d.24xlarge",
        "p5.48xlarge",
    }


def node_types() -> dict[str, Any]:
    return documents(ROOT / UP[0])[0]["available_node_types"]


@pytest.mark.parametrize("disks", ["", "/dev/nvme1n1", "/dev/nvme1n1 /dev/nvme2n1"])
@pytest.mark.parametrize("mounted", ["", "/opt/dlami/nvme", "/mnt/scratch"])
def test_the_scratch_is_made_of_the_instances_own_disks_once(tmp_path: Path, disks: str, mounted: str) -> None:
    """The commands as bash runs them, with tools that only say that they were called."""
    tools = {
        "sudo": 'echo "$@" >> calls',
        "mountpoint": f'test "$2" = "{mounted}"',
        "lsblk": "printf '/dev/nvme0n1 Amazon Elastic Block Store\\n'; "
        + "".join(f"printf '{disk} Amazon EC2 NVMe Instance Storage\\n'; " for disk in disks.split()),
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for command in documents(ROOT / UP[0])[0]["initialization_commands"]:
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=path, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (calls.pop(0), calls.pop()) == ("mkdir -p /mnt/scratch", "chown 1000 /mnt/scratch")
    if mounted == "/mnt/scratch" or (not mounted and not disks):
        assert calls == []
    elif mounted:
        assert calls == ["mount --bind /opt/dlami/nvme /mnt/scratch"]
    else:
        made, *rest = calls
        assert made.endswith(f"--level=0 --raid-devices={len(disks.split())} {disks}")
        assert rest == ["mkfs.ext4 -q -E nodiscard /dev/md0", "mount /dev/md0 /mnt/scratch"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_credential_and_each_place_to_fill_in_is_marked(path: Path) -> None:
    """Roles stand in for keys; a bucket, an account or a host that is nobody's has CHANGE beside it."""
    text = path.read_text()
    assert not re.search(
        r"(?i)access_?key|secret_?key|session_?token|account_?key|sas_?token|application_credentials", text
    )
    assert not re.search(r"AKIA[0-9A-Z]{16}|://[^/\s]*@", text)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    strange = [line for line in lines if re.search(r"BUCKET|REGISTRY/|0{8}|mlflow\.|roma-ray-(head|worker) \}", line)]
    assert all("# CHANGE" in line for line in strange), strange
    assert bool(strange) == (path.name != "network-policy.yaml") or path.suffix == ".Dockerfile"


def uncommented(path: Path, begins: str) -> str:
    """The file with the choice that stands in its comments, whose first lines begin so."""
    lines, inside = [], None
    for line in path.read_text().splitlines():
        comment = re.fullmatch(r"( *)# (.*)", line)
        if comment and re.match(begins, comment[2]):
            inside = comment[1]
        elif not comment or comment[1] != inside or not comment[2].startswith("  "):
            inside = None
        lines.append(f"{comment[1]}{comment[2]}" if comment and inside is not None else line)
    return "\n".join(lines)


def test_a_mounted_file_system_is_a_choice_in_comments_alone() -> None:
    """As it stands no file mounts one; with the comments taken away each file is whole, and all name one place."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    for path in (ROOT / UP[0], *KUBERAY.glob("*.yaml")):
        assert not re.search(r"(?m)^[^#]*(/mnt/shared[^/]*$|PersistentVolumeClaim|efs\.)", path.read_text()), path
    up = yaml.safe_load(uncommented(ROOT / UP[0], r"- (--mount|sudo|>-)"))
    validate_config(prepare_config(copy.deepcopy(up)))
    assert in_container(up, "worker")[1][0] == "/mnt/shared,target=/mnt/shared"
    assert "efs.us-east-1.amazonaws.com:/ /mnt/shared" in up["initialization_commands"][-1]
    subprocess.run(["bash", "-n", "-c", "; ".join(up["initialization_commands"])], check=True)

    text = (KUBERAY / "storage.yaml").read_text()
    *_, claim = yaml.safe_load_all(re.sub(r"(?m)^# ?", "", text[text.index("# ---") :]))
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in ("raycluster", "rayjob"):
        document = yaml.safe_load(uncommented(KUBERAY / f"{name}.yaml", r"- (name: shared|\{ name: shared)"))
        for pod in pods(document["spec"].get("rayClusterSpec", document["spec"])):
            (volume,) = [v for v in pod["volumes"] if v["name"] == "shared"]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert {"name": "shared", "mountPath": "/mnt/shared"} in pod["containers"][0]["volumeMounts"]


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


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's, then the workers'."""
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


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
    assert head["template"]["spec"]["automountServiceAccountToken"] is True
    for pod in pods(spec):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert not [e for e in container["env"] if "TOKEN" in e["name"] or "SECRET" in e["name"]]


@pytest.mark.parametrize(("name", "spec"), clusters(), ids=[name for name, _ in clusters()])
def test_every_pod_reaches_the_bucket_by_its_account_and_has_a_scratch(name: str, spec: dict[str, Any]) -> None:
    """The account is one of the files'; copies have less room than the volume, and the pod asks for the volume's."""
    (account,) = [d for d in documents(KUBERAY / "storage.yaml") if d["kind"] == "ServiceAccount"]
    assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")
    assert account["automountServiceAccountToken"] is False
    for number, pod in enumerate(pods(spec)):
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        # By which the cloud's token, and the scratch, can be read by the container's user.
        assert pod["securityContext"]["fsGroup"] == pod["containers"][0]["securityContext"]["runAsUser"] == 1000
        variables = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
        assert as_path(variables["ROMA_RAY_STORAGE"]).parts[0] == "s3:"
        assert variables["AWS_REGION"]
        assert ("MLFLOW_TRACKING_URI" in variables) == (number == 0)
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"scratch": variables["ROMA_RAY_SCRATCH"], "shm": "/dev/shm"}
        volumes = {v["name"]: v["emptyDir"] for v in pod["volumes"]}
        assert set(volumes) == set(mounts)
        assert "medium" not in volumes["scratch"], "it would lie in memory"
        size, asked = (
            float(text.removesuffix("Gi"))
            for text in (
                volumes["scratch"]["sizeLimit"],
                pod["containers"][0]["resources"]["requests"]["ephemeral-storage"],
            )
        )
        assert float(variables["ROMA_RAY_SCRATCH_GIB"]) <= 0.8 * size
        assert size < asked


def test_the_job_runs_what_there_is() -> None:
    """The entry point and its configuration exist in the image, its overrides are settings, and the namespace is one."""
    job = documents(KUBERAY / "rayjob.yaml")[0]
    words = job["spec"]["entrypoint"].split()
    assert "--storage" not in words, "every pod knows it from its environment"
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


# -- what a role must be allowed ---------------------------------------------------------------------------------------


def action(request: Request) -> str:
    """The action of S3 that a request needs, by AWS' own list."""
    names = {part.partition("=")[0] for part in request.query.split("&")}
    if not request.key and request.method in ("GET", "HEAD"):
        return "s3:ListBucketMultipartUploads" if "uploads" in names else "s3:ListBucket"
    if request.method in ("GET", "HEAD"):
        return "s3:ListMultipartUploadParts" if "uploadId" in names else "s3:GetObject"
    if request.method == "DELETE":
        return "s3:AbortMultipartUpload" if "uploadId" in names else "s3:DeleteObject"
    return "s3:DeleteObject" if "delete" in names else "s3:PutObject"


def test_readme_lists_the_actions_that_a_bucket_is_asked_for_and_no_other(
    bucket: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verb of the store, large files in parts, and what `gc` does; that Ray asks for no other is told by its own run."""
    import boto3

    asked: set[str] = set()
    bucket.rule = lambda request: asked.add(action(request))
    monkeypatch.setattr(objects, "_WHOLE_BYTES", 1 << 20)
    address = bucket.address("actions")
    root = as_path(address)
    files.write_bytes(root / "a" / "large", bytes(11 << 20))
    files.create(root / "a" / "new", "1")
    objects.replace(root / "a" / "new", b"2", objects.facts(root / "a" / "new").tag)
    assert len(files.local(root / "a" / "large").read_bytes()) == 11 << 20
    assert [path.name for path in files.listed(root / "a")] == ["large", "new"]
    files.remove(root / "a" / "new")
    files.remove_folder(root)
    client = boto3.client("s3", endpoint_url=bucket.endpoint, region_name="us-east-1")
    client.create_multipart_upload(Bucket="bucket", Key="actions/left")
    UnfinishedUploads(root).abort()
    text = (ROOT / "cluster" / "README.md").read_text()
    (policy,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    allowed = {name for rule in json.loads(policy)["Statement"] for name in rule["Action"]}
    assert asked == allowed


def test_ray_asks_a_bucket_for_nothing_more(bucket: Proxy) -> None:
    """What Ray Train does where it keeps its runs, on a cluster of several nodes."""
    from ray.train.v2._internal.execution.storage import StorageContext

    asked: set[str] = set()
    bucket.rule = lambda request: asked.add(action(request))
    StorageContext(storage_path=bucket.address("ray"), experiment_dir_name="runs")
    assert asked == {"s3:ListBucket", "s3:GetObject", "s3:PutObject"}
