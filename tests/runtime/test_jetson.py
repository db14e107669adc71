"""What boards of JetPack 5 to 7.2 printed is read right; recorded/jetson names the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchsieve.runtime.board import jetson

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "jetson"


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


def test_every_recording_has_a_source() -> None:
    sources = (RECORDED / "README.md").read_text()
    assert [path.name for path in RECORDED.glob("*.txt") if path.name not in sources] == []


@pytest.mark.parametrize(
    ("name", "l4t", "jetpack"),
    [
        ("jetpack5", "35.4.1", "5.1.2"),
        ("jetpack6", "36.4.3", "6.2"),
        ("jetpack7.0", "38.2.0", "7.0"),
        ("jetpack7.2", "39.2.0", "7.2"),
    ],
)
def test_the_release_file_tells_l4t_and_jetpack(name: str, l4t: str, jetpack: str) -> None:
    assert jetson.parse_release(recorded(f"{name}.release")) == l4t
    assert jetson.jetpack_of(l4t) == jetpack


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [("36.9.9", "6"), ("39.2.1", "7.2.1"), ("39.2.5", "7.2"), ("99.1", None), (None, None)],
)
def test_a_release_that_is_not_listed_falls_back_on_its_line(
    l4t: str | None, jetpack: str | None
) -> None:
    assert jetson.jetpack_of(l4t) == jetpack


def test_a_file_that_is_no_release_tells_nothing() -> None:
    assert jetson.parse_release("# R36\n") is None


@pytest.mark.parametrize(
    ("name", "mode", "number", "is_full"),
    [
        ("jetpack5.nvpmodel", "MAXN", 0, True),
        ("jetpack5.nvpmodel_user", "MODE_15W_DESKTOP", 7, False),
        ("jetpack6.nvpmodel", "25W", 1, False),
        ("jetpack6.nvpmodel_verbose", "25W", 1, False),
        ("jetpack7.0.nvpmodel", "120W", 1, False),
        ("jetpack7.2.nvpmodel", "25W", 1, False),
    ],
)
def test_the_power_mode_is_read(name: str, mode: str, number: int, is_full: bool) -> None:
    found = jetson.parse_power_mode(recorded(name))
    assert found == jetson.PowerMode(mode, number)
    assert found.is_full is is_full


def test_the_super_mode_is_full_and_silence_is_no_mode() -> None:
    found = jetson.parse_power_mode("NV Power Mode: MAXN_SUPER\n")
    assert found == jetson.PowerMode("MAXN_SUPER", None) and found.is_full
    assert jetson.parse_power_mode("") is None


@pytest.mark.parametrize(
    ("name", "cores", "gpu", "locked"),
    [
        ("jetpack5", 12, ("GPU", 306000000, 1300500000), False),
        ("jetpack6", 6, ("GPU", 306000000, 918000000), False),
        ("jetpack7.0", 14, ("gpu-gpc-0", 1575000000, 1575000000), True),
    ],
)
def test_clocks_are_locked_where_none_can_move(
    name: str, cores: int, gpu: tuple[str, int, int], locked: bool
) -> None:
    clocks = jetson.parse_clocks(recorded(f"{name}.clocks"))
    assert sum(clock.startswith("cpu") for clock in clocks) == cores
    assert clocks[gpu[0]] == jetson.Clock(*gpu[1:])
    assert len(clocks) == cores + 1
    assert jetson.are_locked(clocks) is locked


def test_without_clocks_nobody_knows_whether_they_are_locked() -> None:
    assert jetson.are_locked(jetson.parse_clocks("Error: Run this script as a root user")) is None


LINES = {
    "jetpack5.tegrastats": ((1282, 62795), 0, (0,), {"CPU": 42.593, "tj": 42.593}, 6831),
    "jetpack5.tegrastats_nx": ((3168, 6851), 0, (114,), {"GPU": 45.5, "PMIC": 50.0}, 2763),
    "jetpack6.tegrastats": ((18207, 62841), 0, (0, 0), {"cpu": 52.562, "soc1": 49.656}, 8726),
    "jetpack6.tegrastats_nano": ((1343, 7620), 0, (305,), {"gpu": 49.625}, 5251),
    "jetpack7.0.tegrastats": ((17842, 125772), None, (), {"soc345": 31.218}, 16802),
    "jetpack7.1.tegrastats": ((4208, 125773), None, (0, 0, 0), {"tj": 34.5}, 8291),
    "jetpack7.2.tegrastats": ((20642, 62817), 12, (1300, 1300), {}, 13907),
    "jetpack7.2.tegrastats_thor": ((36529, 125749), None, (), {"gpu": 62.906}, 87426),
}


@pytest.mark.parametrize("name", LINES)
def test_each_form_of_tegrastats_is_read(name: str) -> None:
    ram, percent, clocks, temperatures, milliwatts = LINES[name]
    found = jetson.parse_tegrastats(recorded(name))
    assert found is not None
    assert (found.ram_mb, found.gpu_percent, found.gpu_mhz) == (ram, percent, clocks)
    assert temperatures.items() <= found.temp_c.items()
    rails = jetson.whole_rails(set(found.power_mw))
    assert rails is not None
    assert sum(found.power_mw[rail] for rail in rails) == milliwatts


def test_offline_sensors_and_unconnected_rails_are_left_out() -> None:
    found = jetson.parse_tegrastats(recorded("jetpack5.tegrastats"))
    assert found is not None
    assert "GPU" not in found.temp_c and "CV0" not in found.temp_c
    assert set(found.power_mw) == {
        "VDD_GPU_SOC",
        "VDD_CPU_CV",
        "VIN_SYS_5V0",
        "VDDQ_VDD2_1V8AO",
    }
    assert found.swap_mb == (0, 31398)


def test_both_temperatures_of_jetpack_7_2_are_told_apart() -> None:
    found = jetson.parse_tegrastats(recorded("jetpack7.2.tegrastats"))
    assert found is not None
    assert found.temp_c == {"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625}


def test_another_line_is_not_one_of_tegrastats() -> None:
    assert jetson.parse_tegrastats("tegrastats: command not found") is None


def test_a_board_with_unknown_rails_has_no_total() -> None:
    assert jetson.whole_rails({"VDD_SOC", "VDD_GPU"}) is None


def test_the_driver_s_cuda_is_in_the_table_of_nvidia_smi() -> None:
    assert jetson.parse_cuda(recorded("jetpack7.0.smi")) == "13.0"
    assert jetson.parse_cuda("NVIDIA-SMI has failed") is None


def test_the_device_tree_tells_the_gpu_better_than_the_name() -> None:
    assert jetson.capability_of("nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0", "") == "11.0"
    assert jetson.capability_of("", "NVIDIA Jetson AGX Orin Developer Kit") == "8.7"
    assert jetson.capability_of("raspberrypi,5-model-b", "Raspberry Pi 5") is None
