"""Names whole hosts for ``torchx run dist.ddp -h NAME``: common A100 and H100 machines of three clouds, one of CPUs.

Registered by the entry points ``torchx.named_resources`` of pyproject.toml. TorchX brings ``aws_p4d.24xlarge`` and the
like, with the whole host's vCPUs and 96 % of its memory; a kubelet and its daemons keep 0.3 vCPU of 96 and more, and
ParallelCluster's Slurm offers 95 % of the memory, so that such a job waits for ever. These leave some of both.
"""

import torchx.specs as specs
from torchx.specs.named_resources_aws import EFA_DEVICE, K8S_ITYPE

# Kubernetes on 208 vCPUs and 1,900 GiB keeps 0.6 vCPU and 3 % of memory (GKE's formula, the highest of the three):
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes
# Slurm of ParallelCluster: SchedulableMemory, 95 %.
# https://docs.aws.amazon.com/parallelcluster/latest/ug/slurm-mem-based-scheduling-v3.html
VCPUS_LEFT = 4
MEMORY_SHARE = 0.9


def host(instance_type: str, vcpus: int, memory_gib: int, gpus: int = 0, efa: int = 0) -> specs.Resource:
    """Return a whole host of one type; Kubernetes places it by the label ``node.kubernetes.io/instance-type``.

    Args:
        memory_gib: as the vendor states it; GCP's GB are GiB.
        efa: Elastic Fabric Adapters, AWS's network for NCCL.
    """
    return specs.Resource(
        cpu=vcpus - VCPUS_LEFT,
        gpu=gpus,
        memMB=int(memory_gib * 1024 * MEMORY_SHARE),
        capabilities={K8S_ITYPE: instance_type},
        devices={EFA_DEVICE: efa} if efa else {},
    )


# AWS: https://aws.amazon.com/ec2/instance-types/p4/ and p5/; adapters:
# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-acc-inst-types.html
def p4d_24xlarge() -> specs.Resource:
    """8 A100 40 GB, 4 adapters of 100 Gbit/s."""
    return host("p4d.24xlarge", 96, 1152, gpus=8, efa=4)


def p4de_24xlarge() -> specs.Resource:
    """8 A100 80 GB, 4 adapters of 100 Gbit/s."""
    return host("p4de.24xlarge", 96, 1152, gpus=8, efa=4)


def p5_48xlarge() -> specs.Resource:
    """8 H100 80 GB, 32 adapters of 100 Gbit/s."""
    return host("p5.48xlarge", 192, 2048, gpus=8, efa=32)


# GCP: https://cloud.google.com/compute/docs/accelerator-optimized-machines
def a2_highgpu_8g() -> specs.Resource:
    """8 A100 40 GB, 100 Gbit/s."""
    return host("a2-highgpu-8g", 96, 680, gpus=8)


def a2_ultragpu_8g() -> specs.Resource:
    """8 A100 80 GB, 100 Gbit/s."""
    return host("a2-ultragpu-8g", 96, 1360, gpus=8)


def a3_highgpu_8g() -> specs.Resource:
    """8 H100 80 GB, 1,000 Gbit/s by GPUDirect-TCPX, whose plugin the cluster has to bring."""
    return host("a3-highgpu-8g", 208, 1872, gpus=8)


# Azure: https://learn.microsoft.com/azure/virtual-machines/sizes/gpu-accelerated/ndasra100v4-series,
# ndma100v4-series and ndh100v5-series. The name of their InfiniBand device is the cluster's own choice: not asked for.
def nd96asr_v4() -> specs.Resource:
    """8 A100 40 GB, 8 x 200 Gbit/s InfiniBand."""
    return host("Standard_ND96asr_v4", 96, 900, gpus=8)


def nd96amsr_a100_v4() -> specs.Resource:
    """8 A100 80 GB, 8 x 200 Gbit/s InfiniBand."""
    return host("Standard_ND96amsr_A100_v4", 96, 1900, gpus=8)


def nd96isr_h100_v5() -> specs.Resource:
    """8 H100 80 GB, 8 x 400 Gbit/s InfiniBand."""
    return host("Standard_ND96isr_H100_v5", 96, 1900, gpus=8)


def c7i_48xlarge() -> specs.Resource:
    """No GPU; AVX-512, for gloo jobs: https://aws.amazon.com/ec2/instance-types/c7i/."""
    return host("c7i.48xlarge", 192, 384)


def environment(resource: specs.Resource, processes: int) -> dict[str, str]:
    """Return variables that a host's processes need, besides what the image sets.

    Left at its default on purpose: TORCH_NCCL_ASYNC_ERROR_HANDLING ends a job whose peer is lost, since torch 2.2
    (https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html).

    Args:
        processes: on one host.
    """
    # torchrun sets 1 where there are several processes, which leaves most of a host's cores to nobody:
    # https://docs.pytorch.org/docs/stable/elastic/run.html
    env = {"OMP_NUM_THREADS": str(max(1, resource.cpu // processes))}
    if resource.gpu > 0:
        # Says why a communicator failed, and nothing else:
        # https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-debug
        env["NCCL_DEBUG"] = "WARN"
    if resource.devices.get(EFA_DEVICE):
        # libfabric must not fall back to TCP in silence: https://docs.aws.amazon.com/eks/latest/userguide/node-efa.html
        env["FI_PROVIDER"] = "efa"
    return env
