"""Hardware files: the presets make sense, one's own are checked, wrong names get the nearest."""

from pathlib import Path

import pytest

from ssr_rec.planning.hardware import load_hardware, preset_names
from tests.planning.small import write_yaml


def test_the_presets_are_those_of_the_datasheets() -> None:
    assert {"a100_40g", "a100_80g", "h100", "h200", "cpu"} <= set(preset_names())
    for name in preset_names():
        hardware = load_hardware(name)
        assert hardware.name == name
        assert all(source for source in hardware.sources.values())
        if hardware.device == "cuda":
            assert hardware.peak_tflops.fp32 < (hardware.peak_tflops.tf32 or 0) < hardware.peak_tflops.bf16
            assert hardware.host_link_gb_s < hardware.link_gb_s < hardware.memory_gb_s
    a100, h100, h200 = (load_hardware(name) for name in ("a100_80g", "h100", "h200"))
    assert (a100.memory_gb_s, h100.memory_gb_s, h200.memory_gb_s) == (2039, 3350, 4800)
    assert h200.peak_tflops == h100.peak_tflops
    assert load_hardware("aws_p4de").memory_gib == a100.memory_gib
    assert load_hardware("aws_p4de").network_gbit_s == a100.network_gbit_s / 4


def test_a_gpu_is_a_rank_and_a_cpu_host_is_shared() -> None:
    a100, cpu = load_hardware("a100_80g"), load_hardware("cpu")
    assert a100.rank_bytes(8) == a100.rank_bytes(4) == int((79.1 * 0.95 - 2) * 2**30)
    assert cpu.rank_bytes(4) == int((512 / 4 * 0.95 - 0.5) * 2**30)
    assert a100.gemm_flops("tf32", 8) == pytest.approx(156e12 * 0.4)
    assert cpu.gemm_flops("fp32", 4) == pytest.approx(10e12 * 0.7 / 4)
    assert a100.host_bytes(8) == 2048 * 2**30 // 16
    with pytest.raises(ValueError, match="cpu has no tf32"):
        cpu.gemm_flops("tf32", 1)


def test_a_file_over_a_preset_changes_what_it_names(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "base: h100\nnetwork_gbit_s: 800\nassumptions: {link_utilisation: 0.5}\n", "mine.yaml")
    mine, h100 = load_hardware(path), load_hardware("h100")
    assert (mine.name, mine.network_gbit_s, mine.assumptions.link_utilisation) == ("mine", 800, 0.5)
    assert mine.assumptions.reserved_gib == h100.assumptions.reserved_gib
    assert mine.memory_gb_s == h100.memory_gb_s


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100_80gb", "did you mean 'a100_80g'"),
        ("H100", "did you mean 'h100'"),
        ("A100-40G", "did you mean 'a100_40g'"),
        ("zzz", "it is none.*a100_40g.*h200"),
        ("none.yaml", "No such file"),
        ("../../secrets", "it is none|did you mean"),
    ],
)
def test_a_wrong_name_gets_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_hardware(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: b200\n", "'b200' is no preset; use one of a100_40g"),
        ("base: h100\nmemory_gb: 3\n", "memory_gb: .*; keys: name, device"),
        ("base: h100\nmemory_gib: -1\n", "memory_gib: .*greater than 0"),
        ("base: h100\nassumptions: {link_utilisation: 2}\n", "assumptions.link_utilisation"),
        ("device: cuda\n", "max_ranks_per_node: Field required"),
        ("base: h100\nmemory_gib: !!python/object/apply:os.getcwd []\n", "tags as"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_hardware(write_yaml(tmp_path, text))
    assert "file.yaml" in str(error.value)
