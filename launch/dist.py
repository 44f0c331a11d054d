"""Defines the TorchX component of ``torchx run dist.ddp -j 2x8 ssr_rec/train.py --config C``."""

# TorchX reads the annotations as text and knows only this older spelling of optional and dict.
# ruff: noqa: UP006, UP035, UP045
from typing import Dict, List, Optional

import torchx.specs as specs
from torchx.components import dist as torchx_dist

from launch.resources import environment
from ssr_rec.common.errors import UserError


def ddp(
    *script_args: str,
    script: Optional[str] = None,
    m: Optional[str] = None,
    j: str = "1x2",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 1024,
    name: str = "/",
    image: str = "ssr_rec:latest",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
    debug: bool = False,
) -> specs.AppDef:
    """TorchX's ``dist.ddp`` that takes the script as its first argument.

    Args:
        script_args: the script, then its arguments (only arguments when --script or -m is given)
        script: the script, in TorchX's own way
        m: a module to run instead of a script
        j: {nodes}x{processes on each}
        h: a named resource, such as p4d.24xlarge (launch/resources.py); sets cpu, gpu, memMB, devices and environment
        cpu: CPUs of a node
        gpu: GPUs of a node
        memMB: memory of a node in MB
        name: {experiment}/{run} name of the job
        image: container image, for schedulers that use one
        env: environment variables of the processes, as A=1,B=2
        max_retries: restarts after a failure, by torchrun on its hosts and by the scheduler; each resumes by itself
        rdzv_port: port of the first node at which the nodes find each other
        mounts: mounts of a container, as TorchX describes them
        debug: set PyTorch's debugging variables
    """
    if script is None and m is None:
        if not script_args:
            raise UserError("no script given; for example: torchx run dist.ddp -j 1x2 ssr_rec/train.py")
        script, script_args = script_args[0], script_args[1:]
    resource, processes = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h), torchx_dist.parse_nnodes(j)[2]
    if 0 < resource.gpu < processes:
        raise UserError(f"-j {j}: {processes} processes for the {resource.gpu} GPUs of a node; one for each at most")
    # TorchX hands max_retries to the scheduler only; torchrun takes its arguments' defaults from PET_<NAME>. Restarted
    # workers would find the addresses of the dead ones in a store shared with torchrun (pytorch/pytorch#135712).
    env = {
        **(environment(resource, processes) if h else {}),
        "PET_MAX_RESTARTS": str(max_retries),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **(env or {}),
    }
    return torchx_dist.ddp(
        *script_args, script=script, m=m, j=j, h=h, cpu=cpu, gpu=gpu, memMB=memMB, name=name, image=image, env=env,
        max_retries=max_retries, rdzv_port=rdzv_port, mounts=mounts, debug=debug,
    )  # fmt: skip
