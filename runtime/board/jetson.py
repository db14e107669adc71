"""What a Jetson's own files and programs say, from JetPack 5 to 7.2: pure functions of text.

tests/recorded/jetson holds what boards printed, each with its source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# L4T -> JetPack, the longest beginning counts. Later releases of a line fall back on its major.
JETPACKS = {
    "32": "4",
    "34": "5",
    "35": "5",
    "35.1": "5.0.2",
    "35.2": "5.1",
    "35.3": "5.1.1",
    "35.4": "5.1.2",
    "35.5": "5.1.3",
    "35.6": "5.1.4",
    "36": "6",
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "38": "7",
    "38.2": "7.0",
    "38.4": "7.1",
    "39": "7",
    "39.2": "7.2",
    "39.2.1": "7.2.1",
}
# SoC -> compute capability of its GPU.
CAPABILITIES = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}
_FAMILIES = {"Xavier": "7.2", "Orin": "8.7", "Thor": "11.0"}
# Rails that measure the whole module or board; where there is none, those that add up to it.
# VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0 and would count twice.
WHOLE_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
PART_RAILS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # AGX Thor where VIN is not read
)
OFFLINE_C = -256.0  # what a sensor reads whose part has no power


def parse_release(text: str) -> str | None:
    """L4T's version, such as 36.4.3, from /etc/nv_tegra_release."""
    match = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match.group(1)}.{match.group(2)}" if match else None


def jetpack_of(l4t: str | None) -> str | None:
    """JetPack that an L4T belongs to; only its major where the release is not in the table."""
    parts = (l4t or "").split(".")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((JETPACKS[name] for name in beginnings if name in JETPACKS), None)


def parse_packages(status: str, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of installed packages by name, from /var/lib/dpkg/status."""
    found = {}
    for record in status.split("\n\n"):
        name = re.match(r"Package: (\S+)", record)
        if name and name.group(1) in names and "\nStatus: install ok installed" in record:
            version = re.search(r"^Version: (\S+)", record, re.MULTILINE)
            if version:
                found[name.group(1)] = version.group(1)
    return found


def capability_of(compatible: str, model: str) -> str | None:
    """Compute capability of the board's GPU, from the device tree; nvidia-smi does not say it."""
    for soc, capability in CAPABILITIES.items():
        if soc in compatible:
            return capability
    return next((value for name, value in _FAMILIES.items() if name in model), None)


@dataclass(frozen=True)
class PowerMode:
    """What `nvpmodel -q` says: the mode's name and number."""

    name: str
    number: int | None

    @property
    def is_full(self) -> bool:
        """The mode without a cap."""
        return self.name.startswith("MAXN")


def parse_power_mode(text: str) -> PowerMode | None:
    """Read `nvpmodel -q`, of any JetPack, with or without --verbose; None if it says nothing."""
    match = re.search(r"NV Power Mode: *(\S+)(?:\s*\n(\d+)\s*$)?", text, re.MULTILINE)
    if match is None:
        return None
    return PowerMode(match.group(1), int(match.group(2)) if match.group(2) else None)


@dataclass(frozen=True)
class Clock:
    """Lowest and highest frequency that a clock may take; unit of its source."""

    lowest: int
    highest: int

    @property
    def is_locked(self) -> bool:
        """It cannot move."""
        return self.lowest == self.highest


def parse_clocks(text: str) -> dict[str, Clock]:
    """CPU and GPU clocks of `jetson_clocks --show`, in kHz and Hz.

    The memory's line is left out: its lowest frequency stays low, FreqOverride locks it.
    """
    pattern = r"^(cpu\d+|GPU|gpu-gpc-\d+)\b:?\s.*?MinFreq=(\d+) MaxFreq=(\d+)"
    found = re.findall(pattern, text, re.MULTILINE)
    return {name: Clock(int(low), int(high)) for name, low, high in found}


def are_locked(clocks: dict[str, Clock]) -> bool | None:
    """Whether every clock is locked; None if no clock is known."""
    return all(clock.is_locked for clock in clocks.values()) if clocks else None


@dataclass(frozen=True)
class Tegrastats:
    """One line of tegrastats.

    Attributes:
        ram_mb: In use and in all.
        swap_mb: The same; None if there is no swap.
        gpu_percent: Load of the GPU; None if this JetPack does not print it (Thor).
        gpu_mhz: Clock of each of its clusters, none printed or none known.
        temp_c: By sensor, offline ones left out.
        power_mw: By rail, at this moment.
    """

    ram_mb: tuple[int, int]
    swap_mb: tuple[int, int] | None = None
    gpu_percent: int | None = None
    gpu_mhz: tuple[int, ...] = ()
    temp_c: dict[str, float] = field(default_factory=dict)
    power_mw: dict[str, int] = field(default_factory=dict)


def parse_tegrastats(line: str) -> Tegrastats | None:
    """Read a line of any JetPack; None if it is not one.

    The GPU is told as `10%@1300`, `0%@[1300,1300]`, `@[314,314,314]`, `0%`, or not at all. A rail
    has two values up to JetPack 7.1 and three in 7.2: now, average, and highest.
    """
    ram = re.search(r"\bRAM (\d+)/(\d+)MB", line)
    if ram is None:
        return None
    swap = re.search(r"\bSWAP (\d+)/(\d+)MB", line)
    gpu = re.search(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?([\d,]+)\]?)?", line)
    percent, clocks = gpu.groups() if gpu else (None, None)
    temperatures = re.findall(r"\b(\w+)@(-?[\d.]+)C\b", line)
    rails = re.findall(r"\b([A-Z]\w*) (-?\d+)(?:mW)?/", line)
    return Tegrastats(
        ram_mb=(int(ram.group(1)), int(ram.group(2))),
        swap_mb=(int(swap.group(1)), int(swap.group(2))) if swap else None,
        gpu_percent=int(percent) if percent else None,
        gpu_mhz=tuple(int(part) for part in clocks.split(",")) if clocks else (),
        temp_c={n: float(v) for n, v in temperatures if float(v) != OFFLINE_C},
        power_mw={n: int(v) for n, v in rails if n not in ("RAM", "SWAP", "NC")},
    )


def whole_rails(names: set[str]) -> tuple[str, ...] | None:
    """The rails whose sum is what the module draws; None if the board is not known."""
    for name in WHOLE_RAILS:
        if name in names:
            return (name,)
    return next((parts for parts in PART_RAILS if names.issuperset(parts)), None)


def parse_cuda(smi: str) -> str | None:
    """The CUDA version that the driver serves, from the table of nvidia-smi."""
    match = re.search(r"CUDA Version: *(\d+\.\d+)", smi)
    return match.group(1) if match else None


def parse_swaps(text: str) -> dict[str, int]:
    """Bytes of swap by device or file, from /proc/swaps; zram lies in memory itself."""
    rows = re.findall(r"^(/\S+)\s+\S+\s+(\d+)\s", text, re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in rows}
