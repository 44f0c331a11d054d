"""The literal TorchX command lines, by dry run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.dist import ddp

ROOT = Path(__file__).parents[2]


def dryrun(*arguments: str) -> str:
    torchx = Path(sys.executable).parent / "torchx"
    done = subprocess.run([torchx, "run", "--dryrun", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    # The dry run breaks long strings into quoted pieces.
    return re.sub(r"['\"]\s+['\"]", "", done.stdout)


def test_the_first_argument_is_the_script_and_the_rest_reaches_it():
    printed = dryrun("dist.ddp", "-j", "2x8", "ssr_rec/train.py", "--config", "configs/smoke.yaml", "--train.epochs=2")
    assert "--nnodes 2 --nproc_per_node 8" in printed
    assert "ssr_rec/train.py --config configs/smoke.yaml --train.epochs=2" in printed
    assert "'num_replicas': 2" in printed


def test_without_arguments_the_default_job_starts():
    assert re.search(r"ssr_rec/train\.py['\"\s]", dryrun("dist.ddp", "-j", "1x2", "ssr_rec/train.py"))


def test_torchx_own_ways_still_work():
    assert "-m ssr_rec.train --seed=3" in dryrun("dist.ddp", "-j", "1x2", "-m", "ssr_rec.train", "--", "--seed=3")
    assert "hello" in dryrun("utils.echo", "--msg", "hello")


def test_component_in_python():
    role = ddp("ssr_rec/train.py", "--seed=1", j="4x8", max_retries=3, memMB=1000, gpu=8).roles[0]
    assert (role.num_replicas, role.max_retries, role.resource.gpu, role.resource.memMB) == (4, 3, 8, 1000)
    assert role.args[1].endswith("ssr_rec/train.py --seed=1")
    assert role.env["PET_MAX_RESTARTS"] == "3"
    assert ddp("ssr_rec/train.py", env={"PET_MAX_RESTARTS": "1", "A": "b"}).roles[0].env["PET_MAX_RESTARTS"] == "1"


def test_no_script_is_refused():
    with pytest.raises(ValueError, match=r"no script given; for example: torchx run dist\.ddp"):
        ddp()
