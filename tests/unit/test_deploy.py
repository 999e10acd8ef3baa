"""deploy/ and docs/scaling.md: what they start exists, and the files agree. Needs no Docker and no cluster."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
LOCK = (ROOT / "tests/sglang/runtime/requirements.lock").read_text()
CUT_SHORT_S = 12  # what `ghostvis serve` needs at most after --drain-timeout
KEY = "GHOSTVIS_API_KEY"


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def objects() -> dict[tuple[str, str], dict[str, Any]]:
    """Kubernetes objects by kind and name."""
    documents = [one for path in KUBERNETES for one in yaml.safe_load_all(path.read_text())]
    named = [one for one in documents if "metadata" in one]
    return {(one["kind"], one["metadata"]["name"]): one for one in named}


def unit(name: str) -> dict[str, str]:
    """A unit's settings; of those that are given twice, the last."""
    text = (DEPLOY / "systemd" / name).read_text().replace("\\\n", " ")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def pod(kind: str, name: str) -> dict[str, Any]:
    return dict(objects()[kind, name]["spec"]["template"]["spec"])


def entrypoint(stage: int) -> list[str]:
    found: list[str] = yaml.safe_load(re.findall(r"^ENTRYPOINT (.*)$", dockerfile(), re.MULTILINE)[stage])
    return found


def replicas() -> dict[str, list[str]]:
    """The words after `ghostvis serve`, wherever a replica is started."""
    image = entrypoint(0)[2:]
    containers = {
        **{f"compose {name}": compose()["services"][name]["command"] for name in ("replica-0", "replica-1")},
        "kubernetes": pod("StatefulSet", "ghostvis")["containers"][0]["args"],
    }
    systemd = shlex.split(unit("ghostvis-serve@.service")["ExecStart"])[2:]
    return {**{place: image + args for place, args in containers.items()}, "systemd": systemd}


def gateways() -> dict[str, list[str]]:
    """The words after `smg launch`."""
    return {
        "compose": compose()["services"]["gateway"]["command"],
        "kubernetes": pod("Deployment", "ghostvis-gateway")["containers"][0]["args"],
        "systemd": shlex.split(unit("ghostvis-gateway.service")["ExecStart"])[2:],
    }


def documented() -> dict[str, list[str]]:
    """Commands `ghostvis serve` of the page on scaling."""
    text = (ROOT / "docs/scaling.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:[A-Z_]+=\S+ )*ghostvis serve .*$", text, re.MULTILINE)
    return {line: shlex.split(line.partition("ghostvis serve")[2], comments=True) for line in lines}


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def workers(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("http://")]


def policy(words: list[str]) -> dict[str, str]:
    """What decides where a request goes; not addresses, keys and times that belong to a place."""
    pairs = dict(pairwise(words))
    places = {
        "--host",
        "--port",
        "--api-key",
        "--prometheus-host",
        "--worker-urls",
        "--shutdown-grace-period-secs",
    }
    return {word: pairs.get(word, "") for word in words if word.startswith("--") and word not in places}


def seconds(span: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|m|)", str(span)).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit == "m" else 1)


@pytest.fixture(scope="module")
def serve_options() -> set[str]:
    ghostvis = str(Path(sys.executable).with_name("ghostvis"))
    environment = os.environ | {"COLUMNS": "200"}
    run = subprocess.run(
        [sys.executable, ghostvis, "serve", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", run.stdout, re.MULTILINE))


def test_every_option_of_serve_that_is_used_exists(serve_options: set[str]) -> None:
    used = {**replicas(), **documented()}
    assert len(used) > 6
    for place, words in used.items():
        ours = words[: words.index("--")] if "--" in words else words
        assert {word for word in ours if word.startswith("--")} <= serve_options, place


def test_every_gateway_routes_as_the_tested_one_does() -> None:
    source = (ROOT / "tests/sglang/gateways.py").read_text()
    tested = re.findall(r'"([^"]+)"', re.search(r"^FLAGS = \((.*?)\)", source, re.DOTALL | re.MULTILINE)[1])  # type: ignore[index]
    assert policy(tested)["--policy"] == "consistent_hashing"
    for place, words in gateways().items():
        assert policy(words) == policy(tested), place


def test_the_gateways_know_the_replicas_by_their_names_and_ports() -> None:
    port = value(entrypoint(0), "--port")
    found = {place: workers(words) for place, words in gateways().items()}
    services = [name for name in compose()["services"] if name.startswith("replica-")]
    assert found["compose"] == [f"http://{name}:{port}" for name in services]

    state = objects()["StatefulSet", "ghostvis"]["spec"]
    names = [f"ghostvis-{number}.{state['serviceName']}" for number in range(state["replicas"])]
    assert found["kubernetes"] == [f"http://{name}:{port}" for name in names]
    assert objects()["Service", state["serviceName"]]["spec"]["clusterIP"] == "None"

    instances = re.findall(r"ghostvis-serve@(\d)", unit("ghostvis-gateway.service")["Wants"])
    template = value(replicas()["systemd"], "--port")
    assert found["systemd"] == [f"http://127.0.0.1:{template.replace('%i', number)}" for number in instances]


def test_containers_ports_and_probes_are_those_the_programs_listen_on() -> None:
    for kind, name, words in (
        ("StatefulSet", "ghostvis", entrypoint(0)),
        ("Deployment", "ghostvis-gateway", gateways()["kubernetes"]),
    ):
        [container] = pod(kind, name)["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert str(ports["http"]) == value(words, "--port")
        probes = [probe for key, probe in container.items() if key.endswith("Probe")]
        assert probes and all(probe["httpGet"]["port"] == "http" for probe in probes)
        service = objects()["Service", name]["spec"]
        assert [port["targetPort"] for port in service["ports"]] == ["http"]
        assert service["selector"] == objects()[kind, name]["spec"]["selector"]["matchLabels"]
        labels = objects()[kind, name]["spec"]["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()


def test_a_stop_gives_requests_the_time_to_finish_before_anything_is_killed() -> None:
    allowed = {
        place: int(value(words, "--drain-timeout")) + CUT_SHORT_S for place, words in replicas().items()
    }
    services = compose()["services"]
    assert seconds(services["replica-0"]["stop_grace_period"]) > allowed["compose replica-0"]
    assert int(unit("ghostvis-serve@.service")["TimeoutStopSec"]) > allowed["systemd"]
    assert unit("ghostvis-serve@.service")["KillMode"] == "mixed"
    container = pod("StatefulSet", "ghostvis")
    pause_s = int(container["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert container["terminationGracePeriodSeconds"] > allowed["kubernetes"] + pause_s

    grace = {place: int(value(words, "--shutdown-grace-period-secs")) for place, words in gateways().items()}
    assert seconds(services["gateway"]["stop_grace_period"]) > grace["compose"]
    assert int(unit("ghostvis-gateway.service")["TimeoutStopSec"]) > grace["systemd"]
    assert pod("Deployment", "ghostvis-gateway")["terminationGracePeriodSeconds"] > grace["kubernetes"] + 5


def test_the_key_comes_from_one_place_and_is_written_nowhere() -> None:
    for service in compose()["services"].values():
        assert service["environment"][KEY].startswith("${")
    for kind, name in (("StatefulSet", "ghostvis"), ("Deployment", "ghostvis-gateway")):
        [variable] = pod(kind, name)["containers"][0]["env"]
        assert variable["name"] == KEY
        assert variable["valueFrom"]["secretKeyRef"] == {"name": "ghostvis", "key": "api-key"}
    assert "create secret generic ghostvis" in (DEPLOY / "README.md").read_text()
    assert "--from-file=api-key=" in (DEPLOY / "README.md").read_text()
    for path in (DEPLOY / "env.example", DEPLOY / "systemd/serve.env.example"):
        assert re.search(rf"^{KEY}=$", path.read_text(), re.MULTILINE)


def test_images_find_room_in_shared_memory() -> None:
    assert compose()["services"]["replica-0"]["shm_size"] == "8g"
    volumes = {volume["name"]: volume for volume in pod("StatefulSet", "ghostvis")["volumes"]}
    mounts = {
        mount["name"]: mount for mount in pod("StatefulSet", "ghostvis")["containers"][0]["volumeMounts"]
    }
    assert volumes.keys() == mounts.keys()
    assert mounts["shm"]["mountPath"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_kustomize_lists_every_manifest() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    names = {path.name for path in KUBERNETES} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == names
    assert ("Namespace", kustomization["namespace"]) in objects()


def test_the_images_have_the_tested_versions_and_all_that_the_package_needs() -> None:
    for name, pattern in (("sglang", r"SGLANG_VERSION=(\S+)"), ("smg", r"smg==(\S+)")):
        assert re.search(pattern, dockerfile())[1] in re.findall(rf"^{name}==(\S+)$", LOCK, re.MULTILINE)  # type: ignore[index]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["sglang"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in needed} - {"sglang"}  # type: ignore[index]
    [install] = re.findall(r"^RUN pip list.*$", dockerfile(), re.MULTILINE)
    assert names <= set(re.findall(r"[\w-]+", install))
    copied = set(re.findall(r"^COPY (.*) /src", dockerfile(), re.MULTILINE))
    assert copied == {"pyproject.toml README.md LICENSE", "ghostvis_cli", "commands", "profiles"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for path in UNITS:  # the programs are not at their places here
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", path.read_text(), flags=re.MULTILINE)
        (tmp_path / path.name).write_text(text)
    started = [str(tmp_path / path.name.replace("@.", "@0.")) for path in UNITS]
    for path in UNITS:
        if "@." in path.name:
            (tmp_path / path.name.replace("@.", "@0.")).symlink_to(tmp_path / path.name)
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *started],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
    )
    said = [line for line in run.stderr.splitlines() if str(tmp_path) in line or "ghostvis" in line]
    assert (run.returncode, said) == (0, [])
