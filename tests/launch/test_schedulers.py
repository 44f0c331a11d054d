"""What Slurm, Kubernetes and this machine are asked for, by TorchX's dry runs; none of the three is needed."""

import re
import shlex
from importlib.metadata import EntryPoint

import pytest
import torchx.specs
from torchx.runner import get_runner
from torchx.specs.named_resources_aws import NAMED_RESOURCES as OF_TORCHX

from launch.dist import ddp
from tests.project import PROJECT

GROUP = "torchx.named_resources"
HOSTS = {name: EntryPoint(name, value, GROUP).load() for name, value in PROJECT["entry-points"][GROUP].items()}
A100_40, A100_80, H100 = "A100 40 GB", "A100 80 GB", "H100 80 GB"
# Written down apart from launch/resources.py: vCPUs and GiB of the vendors' pages, GPUs, EFA.
STATED = {
    "p4d.24xlarge": (96, 1152, 8, 4, A100_40),
    "p4de.24xlarge": (96, 1152, 8, 4, A100_80),
    "p5.48xlarge": (192, 2048, 8, 32, H100),
    "a2-highgpu-8g": (96, 680, 8, 0, A100_40),
    "a2-ultragpu-8g": (96, 1360, 8, 0, A100_80),
    "a3-highgpu-8g": (208, 1872, 8, 0, H100),
    "nd96asr_v4": (96, 900, 8, 0, A100_40),
    "nd96amsr_a100_v4": (96, 1900, 8, 0, A100_80),
    "nd96isr_h100_v5": (96, 1900, 8, 0, H100),
    "c7i.48xlarge": (192, 384, 0, 0, "No GPU"),
}
JOB = ["ssr_rec/train.py", "--config", "configs/smoke.yaml", "--runs=/shared/runs", "--name=first"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The entry points of this checkout, whatever is installed, as TorchX loads them."""
    known = {name: make for name, make in torchx.specs._named_resource_factories.items() if name not in STATED}
    monkeypatch.setattr(torchx.specs, "_named_resource_factories", {**known, **HOSTS})


@pytest.mark.parametrize("name", list(STATED))
def test_hosts_are_as_their_vendors_state_less_what_their_systems_keep(name):
    vcpus, gib, gpus, efa, label = STATED[name]
    made, resource = HOSTS[name], torchx.specs.named_resources[name]
    assert vcpus - 8 <= resource.cpu <= vcpus - 1, "a kubelet and its daemons keep part of a vCPU"
    assert 0.85 * gib * 1024 <= resource.memMB <= 0.95 * gib * 1024, "ParallelCluster offers 95 %"
    assert resource.gpu == gpus and resource.devices.get("vpc.amazonaws.com/efa", 0) == efa
    assert name.replace("-", "_") in resource.capabilities["node.kubernetes.io/instance-type"].lower().replace("-", "_")
    assert label in made.__doc__


def test_every_host_is_registered_once_and_none_takes_a_name_of_torchx():
    assert set(HOSTS) == set(STATED)
    assert not set(HOSTS) & set(OF_TORCHX)
    for name in ("p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge"):
        theirs, ours = torchx.specs.named_resources[f"aws_{name}"], torchx.specs.named_resources[name]
        assert (ours.gpu, ours.devices, ours.capabilities) == (theirs.gpu, theirs.devices, theirs.capabilities)
        assert ours.cpu < theirs.cpu and ours.memMB < theirs.memMB


def requested(scheduler: str, cfg: dict[str, str], **options) -> object:
    runner = get_runner("tests")
    return runner.dryrun(ddp(*JOB, **options), scheduler, cfg).request


def environment_of(words: list[str]) -> dict[str, str]:
    (exported,) = [word for word in words if word.startswith("--export=ALL,")]
    return dict(pair.split("=", 1) for pair in exported.split(",")[1:])


def test_slurm_gets_two_whole_hosts_that_find_each_other():
    script = requested("slurm", {"partition": "gpu"}, j="2x8", h="p4d.24xlarge", max_retries=3).materialize()
    nodes = [line for line in script.splitlines() if line.startswith("#SBATCH --job-name")]
    assert len(nodes) == 2 and script.count("#SBATCH hetjob") == 1
    for rank, line in enumerate(nodes):
        options = shlex.split(line.removeprefix("#SBATCH "))
        assert {f"--job-name=train-{rank}", "--partition=gpu", "--requeue", "--ntasks-per-node=1"} <= set(options)
        assert {"--gpus-per-task=8", "--cpus-per-task=92", f"--mem={int(1152 * 1024 * 0.9)}"} <= set(options)
    assert "TORCHX_MAX_RETRIES=3" in script and "scontrol requeue" in script
    for task in script.split("\nsrun ")[1].split("\nexitcode")[0].split(":\\\n"):
        words = shlex.split(task)
        env = environment_of(words)
        assert (env["PET_MAX_RESTARTS"], env["OMP_NUM_THREADS"], env["NCCL_DEBUG"]) == ("3", "11", "WARN")
        assert env["FI_PROVIDER"] == "efa" and env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        command = shlex.split(words[-1])
        assert command[0] == "torchrun" and command[-5:] == JOB
        assert command[command.index("--rdzv_endpoint") + 1] == "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500"
        assert command[command.index("--rdzv_id") + 1] == "$SLURM_JOB_ID", "the same after a requeue"
        assert command[command.index("--nnodes") + 1] == "2" and command[command.index("--nproc_per_node") + 1] == "8"


def test_kubernetes_gets_two_pods_that_restart_together():
    pytest.importorskip("kubernetes")
    options = {"j": "2x8", "h": "p5.48xlarge", "max_retries": 4, "image": "registry.example.com/ssr_rec:1"}
    mounts = ["type=volume", "src=shared", "dst=/shared"]
    with pytest.warns(UserWarning, match="Volcano"):
        job = requested("kubernetes", {"queue": "default"}, mounts=mounts, **options).resource
    spec = job["spec"]
    assert (job["kind"], spec["schedulerName"], spec["maxRetry"]) == ("Job", "volcano", 4)
    assert [task["name"] for task in spec["tasks"]] == ["train-0", "train-1"]
    for rank, task in enumerate(spec["tasks"]):
        assert task["replicas"] == task["minAvailable"] == 1 and task["maxRetry"] == 4
        restarts = {"event": "PodEvicted", "action": "RestartJob"}, {"event": "PodFailed", "action": "RestartJob"}
        assert all(policy in task["policies"] for policy in restarts)
        pod = task["template"].spec
        assert pod.node_selector == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
        assert pod.restart_policy == "Never", "Volcano restarts the whole job"
        (container,) = pod.containers
        assert container.image == "registry.example.com/ssr_rec:1"
        limits, requests = container.resources.limits, container.resources.requests
        assert (limits["nvidia.com/gpu"], limits["vpc.amazonaws.com/efa"]) == ("8", "32")
        assert requests["nvidia.com/gpu"] == "8" and requests["cpu"] == "187900m" and limits["cpu"] == "188000m"
        env = {variable.name: variable.value for variable in container.env}
        assert (env["PET_MAX_RESTARTS"], env["OMP_NUM_THREADS"]) == ("4", "23")
        assert (env["NCCL_DEBUG"], env["FI_PROVIDER"]) == ("WARN", "efa")
        mounted = {mount.mount_path: mount.name for mount in container.volume_mounts}
        claims = {v.name: v.persistent_volume_claim.claim_name for v in pod.volumes if v.persistent_volume_claim}
        assert claims[mounted["/shared"]] == "shared" and "/dev/shm" in mounted
        assert container.command[:2] == ["bash", "-c"]
        command = shlex.split(container.command[2])
        first = "${TORCHX_RANK0_HOST:=localhost}:29500" if rank == 0 else "${VC_TRAIN_0_HOSTS:=localhost}:29500"
        assert command[command.index("--rdzv_endpoint") + 1] == first
        assert command[command.index("--rdzv_id") + 1] == job["metadata"]["name"], "the same after a restart"
        assert command[0] == "torchrun" and command[-5:] == JOB


def test_this_machine_gets_two_agents_and_no_demands():
    """The literal command of the README: nothing is asked for and nothing is set that a laptop lacks."""
    app = ddp(*JOB, j="2x8")
    resource = app.roles[0].resource
    assert (resource.gpu, resource.devices, resource.capabilities) == (0, {}, {})
    assert not {"OMP_NUM_THREADS", "NCCL_DEBUG", "FI_PROVIDER"} & set(app.roles[0].env)
    replicas = requested("local_cwd", {}, j="2x8").role_params["train"]
    assert len(replicas) == 2
    for replica in replicas:
        (command,) = [part for part in replica.args if "torchrun" in part]
        words = shlex.split(command)
        assert words[words.index("--nnodes") + 1] == "2" and words[words.index("--nproc_per_node") + 1] == "8"
        assert words[-5:] == JOB and re.search(r"localhost:29500|\{TORCHX_RANK0_HOST:=localhost\}:29500", command)


def test_hosts_without_efa_or_gpus_get_no_settings_for_them():
    env = ddp(*JOB, j="2x8", h="nd96isr_h100_v5").roles[0].env
    assert "FI_PROVIDER" not in env and env["NCCL_DEBUG"] == "WARN"
    env = ddp(*JOB, j="2x4", h="c7i.48xlarge").roles[0].env
    assert "NCCL_DEBUG" not in env and env["OMP_NUM_THREADS"] == "47"


def test_own_variables_are_stronger():
    env = ddp(*JOB, j="2x8", h="p4d.24xlarge", env={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}).roles[0].env
    assert (env["NCCL_DEBUG"], env["OMP_NUM_THREADS"], env["FI_PROVIDER"]) == ("INFO", "4", "efa")


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match="-j 2x16: 16 processes for the 8 GPUs of a node; one for each at most"):
        ddp(*JOB, j="2x16", h="p4d.24xlarge")


def test_an_unknown_host_is_refused_with_the_nearest():
    with pytest.raises(KeyError, match=r"p4d\.24xlarg.*Did you mean"):
        ddp(*JOB, h="p4d.24xlarg")
