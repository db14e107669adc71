"""Power, heat and throttling from a tree of sysfs files as boards have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import patchsieve
from patchsieve.runtime.board import power
from patchsieve.runtime.board.power import PowerReader
from patchsieve.runtime.profile import Conditions, profile
from tests.support.bundles import PHOTO, PROMPT

pytest_plugins = ["tests.support.bundles"]

# Millivolts and milliamperes by rail, from published readings.
AGX_ORIN = {"VDD_GPU_SOC": (12008, 280), "VDD_CPU_CV": (12008, 40), "VIN_SYS_5V0": (4968, 980)}
ORIN_NANO = {"VDD_IN": (4984, 960), "VDD_CPU_GPU_CV": (4976, 120), "VDD_SOC": (4976, 304)}
AGX_ORIN_W = 12.008 * (0.280 + 0.040) + 4.968 * 0.980


def write(root: Path, name: str, value: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def chip(root: Path, number: int, rails: dict[str, tuple[int, int]], name: str = "ina3221") -> Path:
    folder = f"sys/class/hwmon/hwmon{number}"
    write(root, f"{folder}/name", name)
    for index, (rail, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        write(root, f"{folder}/in{index}_label", rail)
        write(root, f"{folder}/in{index}_input", millivolts)
        write(root, f"{folder}/curr{index}_input", milliamperes)
        write(root, f"{folder}/in{index + 3}_input", 40)  # shunt voltage
    write(root, f"{folder}/in7_label", "sum of shunt voltages")
    write(root, f"{folder}/in7_input", 120)
    return root / folder


def zone(root: Path, number: int, name: str, millidegrees: object) -> None:
    write(root, f"sys/class/thermal/thermal_zone{number}/type", name)
    write(root, f"sys/class/thermal/thermal_zone{number}/temp", millidegrees)


def alert(root: Path, state: int) -> None:
    write(root, "sys/class/thermal/cooling_device0/type", "pwm-fan")
    write(root, "sys/class/thermal/cooling_device0/cur_state", 3)
    write(root, "sys/class/thermal/cooling_device1/type", "gpu-throttle-alert")
    write(root, "sys/class/thermal/cooling_device1/cur_state", state)


def test_an_agx_orin_s_power_is_the_sum_of_three_rails(tmp_path: Path) -> None:
    chip(tmp_path, 3, AGX_ORIN)
    chip(tmp_path, 4, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (4968, 80)})
    chip(tmp_path, 0, {"VDD_5V": (5000, 1000)}, name="pwmfan")
    assert set(power.find_rails(tmp_path)) == {*AGX_ORIN, "VDDQ_VDD2_1V8AO"}
    reader = PowerReader.find(tmp_path)
    assert reader is not None
    reader.sample()
    assert reader.samples[0][1] == pytest.approx(AGX_ORIN_W)
    assert reader.describe()["rails"] == list(AGX_ORIN)


def test_an_input_rail_is_the_whole_and_parts_are_not_added(tmp_path: Path) -> None:
    chip(tmp_path, 1, ORIN_NANO)
    reader = PowerReader.find(tmp_path)
    assert reader is not None
    assert [rail.name for rail in reader.rails] == ["VDD_IN"]


def test_a_thor_s_input_comes_from_a_chip_that_multiplies_itself(tmp_path: Path) -> None:
    chip(tmp_path, 1, {"VDD_GPU": (12040, 640), "VDD_CPU_SOC_MSS": (12040, 960)})
    write(tmp_path, "sys/class/hwmon/hwmon5/name", "ina238")
    write(tmp_path, "sys/class/hwmon/hwmon5/label", "VIN")
    write(tmp_path, "sys/class/hwmon/hwmon5/power1_input", 28_796_000)
    reader = PowerReader.find(tmp_path)
    assert reader is not None
    reader.sample()
    assert reader.samples[0][1] == pytest.approx(28.796)


@pytest.mark.parametrize("spoil", ["nothing there", "unknown rails", "not readable"])
def test_where_nothing_can_be_measured_there_is_no_reader(tmp_path: Path, spoil: str) -> None:
    if spoil == "unknown rails":
        chip(tmp_path, 1, {"VDD_SOC": (5000, 100)})
    elif spoil == "not readable":
        write(chip(tmp_path, 1, ORIN_NANO), "curr1_input", "")
    assert PowerReader.find(tmp_path) is None


def test_a_sample_in_which_a_rail_is_silent_is_left_out(tmp_path: Path) -> None:
    folder = chip(tmp_path, 3, AGX_ORIN)
    reader = PowerReader.find(tmp_path)
    assert reader is not None
    (folder / "curr2_input").unlink()
    reader.sample()
    assert reader.samples == []


def test_joules_are_the_area_under_the_samples(tmp_path: Path) -> None:
    chip(tmp_path, 1, ORIN_NANO)
    reader = PowerReader.find(tmp_path)
    assert reader is not None
    reader.samples = [(0.0, 99.0), (1.0, 4.0), (2.0, 8.0), (3.0, 2.0), (9.0, 99.0)]
    used = reader.between(0.5, 3.5)
    # 0.5 s at 4 W, trapezoids of 6 W and 5 W for a second each, 0.5 s at 2 W
    assert used == {"mean_w": round(14 / 3, 4), "peak_w": 8.0, "joules": 14.0}
    assert reader.between(4.0, 5.0) is None


def test_the_thread_samples_until_it_is_stopped(tmp_path: Path) -> None:
    chip(tmp_path, 1, ORIN_NANO)
    reader = PowerReader.find(tmp_path)
    assert reader is not None
    reader.interval_s = 0.001
    reader.start()
    while len(reader.samples) < 3:
        pass
    reader.stop()
    count = len(reader.samples)
    assert [watts for _, watts in reader.samples] == pytest.approx([4.984 * 0.960] * count)
    assert reader._thread is None and len(reader.samples) == count


def test_zones_without_power_are_left_out(tmp_path: Path) -> None:
    zone(tmp_path, 0, "cpu-thermal", 51187)
    zone(tmp_path, 1, "cv0-thermal", -256000)
    zone(tmp_path, 2, "gpu-thermal", "")
    assert power.temperatures(tmp_path) == {"cpu": 51.187}


def test_an_alert_or_a_rising_count_is_throttling(tmp_path: Path) -> None:
    assert power.throttling(tmp_path) == {}
    assert power.has_throttled({}, {}) is None
    alert(tmp_path, 0)
    write(tmp_path, "sys/class/hwmon/hwmon2/oc3_event_cnt", 10)
    before = power.throttling(tmp_path)
    assert before == {"gpu-throttle-alert": 0, "oc3_event": 10}
    assert power.has_throttled(before, before) is False
    write(tmp_path, "sys/class/hwmon/hwmon2/oc3_event_cnt", 12)
    assert power.has_throttled(before, power.throttling(tmp_path)) is True
    alert(tmp_path, 1)
    assert power.has_throttled(power.throttling(tmp_path), power.throttling(tmp_path)) is True


def test_conditions_are_looked_at_before_and_after(tmp_path: Path) -> None:
    zone(tmp_path, 0, "tj-thermal", 40000)
    alert(tmp_path, 0)
    with Conditions(tmp_path) as conditions:
        zone(tmp_path, 0, "tj-thermal", 61500)
    assert conditions.to_dict() == {
        "power": None,
        "temp_c": {"before": {"tj": 40.0}, "after": {"tj": 61.5}},
        "has_throttled": False,
    }


@pytest.fixture
def answers(tiny_bundle: Path) -> Callable[[Path], dict[str, Any]]:
    def measure(root: Path) -> dict[str, Any]:
        model = patchsieve.load(tiny_bundle, threads=1)
        counts: dict[str, Any] = {"warmup": 1, "runs": 2, "max_new_tokens": 2}
        report = profile(model, PHOTO, PROMPT, against="none", root=root, **counts)
        model.close()
        return report

    return measure


def test_a_profile_tells_watts_and_joules_of_an_answer(
    tmp_path: Path, answers: Callable[[Path], dict[str, Any]]
) -> None:
    chip(tmp_path, 3, AGX_ORIN)
    report = answers(tmp_path)
    assert report["conditions"]["power"]["rails"] == list(AGX_ORIN)
    for plan in report["plans"].values():
        assert plan["power"]["mean_w"] == pytest.approx(AGX_ORIN_W, rel=1e-4)
        assert plan["power"]["peak_w"] == pytest.approx(AGX_ORIN_W, rel=1e-4)
        assert len(plan["raw"]["energy"]) == 2
        joules = [run["joules"] for run in plan["raw"]["energy"]]
        assert all(a > 0 for a in joules)
        assert plan["power"]["joules_per_answer"]["mean"] == pytest.approx(
            sum(joules) / 2, abs=1e-3
        )


def test_a_desktop_s_profile_has_no_power_and_names_no_jetson(
    tmp_path: Path, answers: Callable[[Path], dict[str, Any]]
) -> None:
    report = answers(tmp_path)
    assert report["conditions"] == {
        "power": None,
        "temp_c": {"before": {}, "after": {}},
        "has_throttled": None,
    }
    assert {plan["power"] for plan in report["plans"].values()} == {None}
    assert report["machine"]["jetson"] is None
    assert "Jetson" not in report["machine"]["label"]
