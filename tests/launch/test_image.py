"""The Dockerfile, as far as it can be checked without a container engine: what it copies and runs is there."""

import re
import subprocess

from packaging.specifiers import SpecifierSet

from tests.project import PROJECT, ROOT


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


def test_its_python_is_one_that_the_project_was_run_on():
    (version,) = {found for _, rest in instructions() for found in re.findall(r"python(3\.\d+)", rest)}
    (serving,) = re.findall(r"^FROM python:(3\.\d+)", (ROOT / "launch/serving/Dockerfile").read_text(), re.MULTILINE)
    for python in (version, serving):
        assert python in SpecifierSet(PROJECT["requires-python"])
        assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_every_shell_command_parses():
    """As sh reads them; a missing quote or fi would be found by the builder only."""
    for word, rest in instructions():
        if word == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest
