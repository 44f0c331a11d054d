"""The image and the Kubernetes objects for serving, as far as they can be checked without an engine or a cluster."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from ssr_rec.commands.serve import _parser
from ssr_rec.serving.server_settings import ServerSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "serving"


def instructions() -> list[tuple[str, str]]:
    text = "\n".join(line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(word, rest.strip()) for word, rest in (line.split(maxsplit=1) for line in lines)]


def test_the_pod_serves_as_the_server_and_its_probes_expect() -> None:
    deployment, service, budget = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod: dict[str, Any] = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    of_image = json.loads(dict(instructions())["ENTRYPOINT"])
    settings = ServerSettings.model_validate(vars(_parser().parse_args([*of_image[2:], *container["args"]])))
    (port,) = container["ports"]
    assert settings.host == "0.0.0.0" and settings.port == port["containerPort"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause + settings.drain_s
    labels = pod["metadata"]["labels"].items()
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    (mount,) = container["volumeMounts"]
    assert settings.artifact.startswith(mount["mountPath"] + "/") and mount["readOnly"]
    users = re.findall(r"--uid (\d+)", (FOLDER / "Dockerfile").read_text())
    assert users == [str(pod["spec"]["securityContext"]["runAsUser"])]


def test_the_image_copies_and_runs_what_is_there() -> None:
    first, image = instructions()[0]
    assert first == "FROM" and re.fullmatch(r"python:3\.11-slim-\w+", image)
    for word, rest in instructions():
        if word == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest
            assert all((ROOT / name).is_file() for name in re.findall(r"-r (\S+)", rest))
        if word == "ENTRYPOINT":
            assert (ROOT / json.loads(rest)[1]).is_file()
    pinned = (ROOT / "requirements" / "cpu.txt").read_text()
    assert all(f"{name}==" in pinned for name in ("fastapi", "uvicorn", "prometheus_client", "httptools"))
