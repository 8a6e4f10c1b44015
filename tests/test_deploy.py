"""deploy/: its files agree with each other and with `sdruntime serve`, and pass the checkers of their formats."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from sdruntime.cli.parser import parser

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
UNIT = DEPLOY / "sdruntime@.service"
PORT, TOKEN, BUNDLE, DRAIN = 7860, "/run/secrets/token", "/bundle", 30
USER = 10001
GRACE = 45  # seconds from SIGTERM to SIGKILL


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def instruction(dockerfile: Path, name: str) -> str:
    """Return what stands after the last instruction of this name, with its continuation lines."""
    text = dockerfile.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", text, flags=re.MULTILINE)[-1].strip()


def unit(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    base = read(DEPLOY / "kubernetes" / "base" / "deployment.yaml")
    yield "deployment", base["spec"]["template"]["spec"]
    yield "kserve", read(DEPLOY / "kubernetes" / "kserve.yaml")["spec"]["predictor"]


PODS = [pytest.param(pod, id=name) for name, pod in pods()]


def commands() -> Iterator[tuple[str, list[str]]]:
    for path in DOCKERFILES:
        yield path.name, json.loads(instruction(path, "CMD"))
    for name, pod in pods():
        yield name, pod["containers"][0]["args"]


def tool(name: str) -> str:
    """Return a program: that of this environment or of the PATH. Skips the test if it is not installed."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def serve_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse a command of the server with the command line's own parser."""
    (subparsers,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    if "serve" not in subparsers.choices:
        pytest.skip("this version has no command `serve`")
    return parser().parse_args(arguments)


@pytest.mark.parametrize("command", [pytest.param(command, id=name) for name, command in commands()])
def test_every_container_runs_the_same_command(command: list[str]) -> None:
    expected = [
        "serve",
        BUNDLE,
        "--host",
        "0.0.0.0",
        "--port",
        str(PORT),
        "--token",
        TOKEN,
        "--drain",
        str(DRAIN),
        "--log",
        "json",
    ]
    assert command == expected


def test_the_command_of_the_containers_parses() -> None:
    options = serve_arguments(next(commands())[1])
    assert (options.port, options.token, options.drain) == (PORT, Path(TOKEN), DRAIN)


def test_the_command_of_the_unit_parses() -> None:
    (line,) = unit("ExecStart")
    environment = dict(setting.split("=", 1) for setting in unit("Environment")[0].split())
    program, *arguments = line.split()
    arguments = [re.sub(r"\$\{(HOST|PORT)\}", lambda match: environment[match[1]], argument) for argument in arguments]
    assert program == "/opt/sdruntime/bin/sdruntime"
    options = serve_arguments(arguments)
    assert (options.host, options.port, options.drain) == ("127.0.0.1", PORT, DRAIN)
    assert options.token == Path("${CREDENTIALS_DIRECTORY}/token")
    assert unit("LoadCredential") == ["token:/etc/sdruntime/token"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_a_user_without_rights(path: Path) -> None:
    assert instruction(path, "USER") == f"{USER}:{USER}"
    assert instruction(path, "EXPOSE") == str(PORT)
    assert json.loads(instruction(path, "ENTRYPOINT")) == ["sdruntime"]
    assert f"http://127.0.0.1:{PORT}/readyz" in instruction(path, "HEALTHCHECK")
    assert "HOME=/tmp SDRUNTIME_CACHE=/tmp/sdruntime" in instruction(path, "ENV")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_images_install_extras_of_the_runtime() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"onnxruntime"}  # cpu.Dockerfile's EXTRAS
    for path in DOCKERFILES:
        (listed,) = re.findall(r'"/src/runtime\[([^]]+)\]"', path.read_text(encoding="utf-8"))
        extras |= set(listed.split(",")) - {"${EXTRAS}"}
    assert extras == {"server", "images", "onnxruntime"}
    missing = extras - project["optional-dependencies"].keys()
    if missing == {"server"}:
        pytest.skip("this version has no extra `server`")
    assert missing == set()


def test_the_build_context_has_what_the_images_copy() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = {
        source for path in DOCKERFILES for source in re.findall(r"^COPY (?!--)(\S+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert sources == {line[1:] for line in ignored if line.startswith("!")}
    assert {source for source in sources if not (ROOT / source).exists()} == set()


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_writes_nowhere_but_in_tmp(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == USER
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {BUNDLE, TOKEN, "/tmp"}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {"/tmp"}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_is_probed_at_the_port_where_it_listens_and_has_time_to_drain(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == PORT
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        request = container[probe]["httpGet"]
        assert request["path"] == path
        assert request["port"] in (port["name"], PORT)
    _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] == GRACE >= int(pause) + DRAIN + 5


def test_the_service_and_the_autoscaler_select_the_deployment() -> None:
    base = DEPLOY / "kubernetes" / "base"
    deployment, service, autoscaler = (read(base / f"{name}.yaml") for name in ("deployment", "service", "autoscaler"))
    (port,) = service["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (PORT, "http")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # else every `kubectl apply` undoes the autoscaler's decision
    monitor = read(DEPLOY / "kubernetes" / "podmonitor.yaml")["spec"]
    (labels,) = read(base / "kustomization.yaml")["labels"]
    assert labels["includeSelectors"]
    assert monitor["selector"]["matchLabels"] == labels["pairs"]
    secret = next(volume["secret"]["secretName"] for volume in next(pods())[1]["volumes"] if "secret" in volume)
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    assert endpoint["authorization"]["credentials"] == {"name": secret, "key": "token"}


def test_the_server_has_the_routes_and_the_metric() -> None:
    serving = ROOT / "runtime" / "sdruntime" / "serving"
    if not (serving / "http").is_dir():
        pytest.skip("this version has no HTTP server")
    source = "".join(path.read_text(encoding="utf-8") for path in serving.rglob("*.py"))
    (metric,) = read(DEPLOY / "kubernetes" / "base" / "autoscaler.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "sdruntime_images_waiting"
    for name in ("sdruntime_images_waiting", "/healthz", "/readyz", "/metrics", "NOTIFY_SOCKET"):
        assert f'"{name}"' in source


def test_compose_services_are_the_images() -> None:
    document = read(DEPLOY / "compose.yaml")
    services = document["services"]
    assert {service["build"]["dockerfile"] for service in services.values()} == {f"deploy/{path.name}" for path in DOCKERFILES}
    for name, service in services.items():
        assert (service["profiles"], service["image"]) == ([name], f"sdruntime:{name}")
        assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
        assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, ["/tmp"], ["ALL"])
        assert [(volume["target"], volume["read_only"]) for volume in service["volumes"]] == [(BUNDLE, True)]
        assert (service["secrets"], service["stop_grace_period"]) == (["token"], f"{GRACE}s")
    assert document["secrets"].keys() == {"token"}


def test_the_unit_waits_for_the_drain() -> None:
    assert unit("Type") == ["notify"]
    assert unit("KillMode") == ["mixed"]
    assert [int(seconds) for seconds in unit("TimeoutStopSec")] == [GRACE]


def test_the_readme_names_every_file() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in (*DOCKERFILES, UNIT, *DEPLOY.glob("*.yaml"), *(DEPLOY / "kubernetes").iterdir())}
    assert {name for name in names if name not in text} == set()
    assert {name for name in re.findall(r"\]\(([^)#:]+)\)", text) if not (DEPLOY / name).exists()} == set()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_accepts(path: Path) -> None:
    assert run(tool("hadolint"), "--no-color", path) == ""


@pytest.mark.parametrize("overlay", ["base", "cuda"])
def test_kustomize_builds_what_the_schemas_of_kubernetes_accept(overlay: str, tmp_path: Path) -> None:
    kubectl = tool("kubectl")
    built = subprocess.run(
        [kubectl, "kustomize", DEPLOY / "kubernetes" / overlay], capture_output=True, text=True, check=True
    ).stdout
    documents = {document["kind"]: document for document in yaml.safe_load_all(built)}
    assert documents.keys() == {"Deployment", "Service", "HorizontalPodAutoscaler"}
    pod = documents["Deployment"]["spec"]["template"]
    assert documents["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == {"base": "sdruntime:cpu", "cuda": "sdruntime:cuda"}[overlay]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay == "cuda")
    whole = tmp_path / "built.yaml"
    whole.write_text(built, encoding="utf-8")
    run(tool("kubernetes-validate"), "--strict", whole)


def test_triton_serves_the_bundle_that_is_mounted() -> None:
    pod = read(DEPLOY / "kubernetes" / "kserve-triton.yaml")["spec"]["predictor"]
    (container,) = pod["containers"]
    written, _, started = container["args"][0].partition(" && exec ")
    options = parser().parse_args(written.split()[1:])
    assert (written.split()[0], options.bundle) == ("sdruntime", Path(BUNDLE))
    assert f"tritonserver --model-repository={options.output}" in started
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {"/tmp", "/dev/shm"}
    assert options.output.is_relative_to("/tmp")
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    (port,) = container["ports"]
    assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {port["containerPort"]}
    assert pod["terminationGracePeriodSeconds"] == GRACE


@pytest.mark.parametrize("name", ["kserve", "kserve-triton"])
def test_the_schemas_of_kubernetes_accept_the_predictor_as_a_pod(name: str, tmp_path: Path) -> None:
    """KServe's own schema is not at hand; its predictor is a PodSpec with the bounds of the replicas added."""
    pod = read(DEPLOY / "kubernetes" / f"{name}.yaml")["spec"]["predictor"]
    spec = {key: value for key, value in pod.items() if key not in ("minReplicas", "maxReplicas")}
    path = tmp_path / "pod.yaml"
    path.write_text(
        yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "kserve"}, "spec": spec}), encoding="utf-8"
    )
    run(tool("kubernetes-validate"), "--strict", path)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = tool("systemd-analyze")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/sdruntime/bin/sdruntime", sys.executable), encoding="utf-8")
    lines = run(program, "verify", copy).splitlines()
    assert [line for line in lines if "sdruntime" in line] == []  # other units of the machine may have faults
