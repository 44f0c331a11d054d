"""The Dockerfile, as far as it can be checked without a container engine: what it copies and runs is there."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of every logical line."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(word, rest.strip()) for word, rest in (line.split(maxsplit=1) for line in lines)]


def test_it_starts_from_a_public_image_of_one_version():
    first, image = instructions()[0]
    assert first == "FROM" and re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu22\.04", image)
    assert all(word in {"FROM", "RUN", "ARG", "WORKDIR", "ENV", "COPY"} for word, _ in instructions())


def test_what_it_copies_and_installs_is_in_the_context():
    ignored = {line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")}
    copied = [rest.split()[0] for word, rest in instructions() if word == "COPY"]
    assert copied == ["requirements", "."], "the pinned packages in a layer of their own, before the code"
    ran = " ".join(rest for word, rest in instructions() if word == "RUN")
    files = re.findall(r"-r (\S+)", ran)
    assert files == ["requirements/cuda.txt", "requirements/no-deps.txt"]
    for name in [*files, "pyproject.toml", "ssr_rec", "launch", "ssr_rec/kernels/cpu", "configs", "tools"]:
        assert (ROOT / name).exists() and not {name, name.split("/")[0]} & ignored
    for module, name in re.findall(r"from (\S+) import (\w+);", ran):
        assert re.search(rf"^def {name}\(", (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(), re.M)


def test_the_project_allows_its_python():
    (version,) = {found for _, rest in instructions() for found in re.findall(r"python(3\.\d+)", rest)}
    assert f'requires-python = ">={version},<' in (ROOT / "pyproject.toml").read_text()


def test_every_shell_command_parses():
    """As sh reads them; a missing quote or fi would be found by the builder only."""
    for word, rest in instructions():
        if word == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest
