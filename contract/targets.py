"""Every target in one table: what its graphs are, what compiles and runs them, how it is installed.

A target has a row here and a lowering in export/lowering, in a file of its name. All else that
depends on a target reads the row: export, build, run, doctor, help texts and errors. Sources and
measurements are in the lowerings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import FORMATS, FP8, INT4_CPU, NVFP4

Version = tuple[int, int]
Range = tuple[Version, Version]  # from the first on, below the second

ONNXRUNTIME = "onnxruntime"
TENSORRT = "tensorrt"
BACKENDS = (ONNXRUNTIME, TENSORRT)  # what runs a target

_NVIDIA = "--extra-index-url https://pypi.nvidia.com"
_GPU_ON_JETPACK_6 = (
    "pip uninstall -y onnxruntime && pip install onnxruntime-gpu "
    "--index-url https://pypi.jetson-ai-lab.io/jp6/cu126"
)
_JETPACK = (
    "sudo apt-get install -y python3-libnvinfer && python3 -m venv --system-site-packages .venv"
)
CUDA_LIBRARIES = 'pip install "onnxruntime-gpu[cuda,cudnn]"'  # where no CUDA toolkit is
# It has int4, blocks of a matrix, and QuantizeLinear without a zero point.
QUANTISED_OPSET = 21
_ALL = ("float32", "float16", "bfloat16")


def _but(*absent: str) -> tuple[str, ...]:
    """Every format but these."""
    return tuple(name for name in FORMATS if name not in absent)


@dataclass(frozen=True)
class Compiler:
    """A library that makes engines from graphs and runs them.

    Attributes:
        label: Its name, for people.
        module: What Python imports.
        distributions: What pip may call it.
        tool: Its program for the command line.
        is_ahead_of_time: It compiles for a list of GPUs, none of which need be here; any other
            compiles for the GPU of the machine, which times the kernels.
        capabilities: Compute capabilities of the GPUs that it takes; None for any.
        portable: Those of them that run an engine which was compiled for no list.
    """

    label: str
    module: str
    distributions: tuple[str, ...]
    tool: str
    is_ahead_of_time: bool = False
    capabilities: tuple[str, ...] | None = None
    portable: tuple[str, ...] = ()

    def takes(self, capability: str | None) -> bool:
        """Whether it makes and runs engines for a GPU; yes if the GPU does not say what it is."""
        return self.capabilities is None or not capability or capability in self.capabilities


FULL = Compiler(
    "TensorRT", "tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), tool="trtexec"
)
# TensorRT-RTX 1.7 refuses 8.7 (Orin), 9.0 (Hopper) and 11.0 (Thor). A card outside of `portable`
# takes engines whose list names it.
RTX = Compiler(
    "TensorRT-RTX",
    "tensorrt_rtx",
    ("tensorrt-rtx", "tensorrt_rtx"),
    tool="tensorrt_rtx",
    is_ahead_of_time=True,
    capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    portable=("8.6", "8.9", "12.0"),
)


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: What users call it.
        library: What builds or runs its graphs, as pip calls it.
        versions: Which of the library's versions read the graphs, as pip spells a range.
        quantised_versions: The same for graphs that hold quantised matrices; "" if there is no
            difference.
        install: The line that installs the library; boards have lines of their own.
        where: The machines, for people.
        backend: What runs it, one of `BACKENDS`.
        opset: Of standard ONNX in its graphs; that of a graph that holds quantised matrices is at
            least `QUANTISED_OPSET`.
        cache: How its stages take their caches, `names.IN_PLACE` or `names.NEW_ROWS`.
        precisions: Types that its graphs may have.
        formats: Formats of `patchsieve.contract.formats` that its graphs may hold.
        compiler: What makes its engines; None if its graphs run as they are.
        serves: Versions of the compiler whose target this is; None if the compiler has one target.
        has_fixed_slots: The length of its caches is a number in its graphs.
        attention_forms: How half-precision attention may be spelt, of `names.ATTENTION_FORMS`; none
            if there is no choice.
        operators: Table of export/operators that its graphs keep to; None if it is not checked.
        device: Where ONNX Runtime runs its graphs; None if another library runs them.
        is_checkable: ONNX Runtime knows its operators, so that `verify` can run its graphs.
        is_to_compare: It serves to check other targets; `auto` takes it only if nothing else runs.
        install_on_board: The line that installs the library on a Jetson; "" if none is known.
        is_for_boards: Its library is JetPack's in the first place.
    """

    name: str
    library: str
    versions: str
    install: str
    where: str
    backend: str
    opset: int
    cache: str
    precisions: tuple[str, ...] = _ALL
    formats: tuple[str, ...] = tuple(FORMATS)
    quantised_versions: str = ""
    compiler: Compiler | None = None
    serves: Range | None = None
    has_fixed_slots: bool = False
    attention_forms: tuple[str, ...] = ()
    operators: str | None = None
    device: str | None = None
    is_checkable: bool = False
    is_to_compare: bool = False
    install_on_board: str = ""
    is_for_boards: bool = False

    @property
    def module(self) -> str:
        """What Python imports to run it."""
        return self.backend if self.compiler is None else self.compiler.module


_ROWS = (
    Target(
        name="cpu",
        library="onnxruntime",
        versions=">=1.23",
        install='pip install "onnxruntime>=1.23"',
        where="any CPU",
        backend=ONNXRUNTIME,
        opset=21,
        cache=names.IN_PLACE,
        precisions=("float32", "float16"),  # ONNX Runtime has few kernels for bfloat16
        device="cpu",
        is_checkable=True,
        formats=_but(FP8, NVFP4),
    ),
    Target(
        name="cuda",
        library="onnxruntime-gpu",
        versions=">=1.23",
        install='pip uninstall -y onnxruntime && pip install "onnxruntime-gpu>=1.23"',
        where="NVIDIA cards, by CUDAExecutionProvider",
        backend=ONNXRUNTIME,
        opset=18,
        cache=names.NEW_ROWS,
        precisions=("float32", "float16"),
        operators="onnxruntime-cuda",
        device="cuda",
        install_on_board=_GPU_ON_JETPACK_6,
        is_checkable=True,
        quantised_versions=">=1.25",  # the first with CUDA kernels for all of opset 21
        formats=_but(FP8, NVFP4),
    ),
    Target(
        name="tensorrt-rtx",
        library="tensorrt-rtx",
        versions=">=1.7,<2",
        install='pip install "tensorrt-rtx>=1.7"',
        where="RTX cards",
        backend=TENSORRT,
        opset=24,
        cache=names.IN_PLACE,
        compiler=RTX,
        has_fixed_slots=True,
        attention_forms=names.ATTENTION_FORMS,
        operators="tensorrt-rtx-1.7",
    ),
    Target(
        name="tensorrt",
        library="tensorrt",
        versions=">=11,<12",
        install=f'pip install "tensorrt>=11" {_NVIDIA}',
        where="data-centre and desktop cards, JetPack 7.2.2 with TensorRT 11",
        backend=TENSORRT,
        opset=24,
        cache=names.IN_PLACE,
        compiler=FULL,
        install_on_board=_JETPACK,
        serves=((11, 0), (12, 0)),
        has_fixed_slots=True,
        attention_forms=names.ATTENTION_FORMS,
        operators="tensorrt-11",
        # NVIDIA documents int4 in blocks of 64 and 128 alone.
        formats=_but(INT4_CPU),
    ),
    Target(
        name="tensorrt10",
        library="tensorrt",
        versions=">=10.15,<11",
        install=f'pip install "tensorrt>=10.15,<11" {_NVIDIA}',
        where="JetPack 7.2 on Orin and Thor, other cards",
        backend=TENSORRT,
        opset=24,
        cache=names.IN_PLACE,
        compiler=FULL,
        install_on_board=_JETPACK,
        serves=((10, 15), (11, 0)),
        has_fixed_slots=True,
        attention_forms=names.ATTENTION_FORMS,
        operators="tensorrt-10.15",
        formats=_but(INT4_CPU),
    ),
    Target(
        name="jetpack6",
        library="tensorrt",
        versions=">=10.3,<11",
        install=f'pip install "tensorrt>=10.3,<10.15" {_NVIDIA}',
        where="JetPack 6.1 and 6.2 with 10.3, 7.0 and 7.1 with 10.13",
        backend=TENSORRT,
        opset=18,
        cache=names.NEW_ROWS,
        compiler=FULL,
        install_on_board=_JETPACK,
        # 10.3 to 10.14 have none of the operators of opset 23; later ones have a better target.
        serves=((10, 3), (10, 15)),
        operators="tensorrt-10.3",
        is_checkable=True,
        is_for_boards=True,
        formats=_but(INT4_CPU, NVFP4),  # FP4 came with 10.8; FP8 is for Thor, not for Orin
    ),
    Target(
        name="reference",
        library="onnxruntime",
        versions=">=1.24",
        install='pip install "onnxruntime>=1.24"',
        where="any CPU, to check other targets",
        backend=ONNXRUNTIME,
        opset=24,
        cache=names.IN_PLACE,
        precisions=("float32", "float16"),  # as ONNX Runtime runs it
        device="cpu",
        is_checkable=True,
        is_to_compare=True,
        formats=_but(FP8, NVFP4),
    ),
)
TARGETS = {row.name: row for row in _ROWS}
USUAL = "cpu"  # of an export that names none, and what runs anywhere


def those(is_wanted: Callable[[Target], object]) -> tuple[str, ...]:
    """Names of the targets that have a property, in the order of the table."""
    return tuple(row.name for row in _ROWS if is_wanted(row))


WITH_ENGINES = those(lambda row: row.compiler)
CHECKABLE = those(lambda row: row.is_checkable)
WITH_ATTENTION_FORMS = those(lambda row: row.attention_forms)
AHEAD_OF_TIME = those(lambda row: row.compiler and row.compiler.is_ahead_of_time)


def known(target: str) -> Target:
    """The row of a target.

    Raises:
        PatchsieveError: There is none.
    """
    if target not in TARGETS:
        raise PatchsieveError(
            "unknown target",
            found=repr(target)[:60],
            expected=", ".join(sorted(TARGETS)),
            do="choose one of these with --targets or --target",
        )
    return TARGETS[target]


def of_compiler(compiler: Compiler) -> tuple[str, ...]:
    """The targets whose engines a library makes."""
    return those(lambda row: row.compiler is compiler)


def on_device(device: str) -> Target:
    """The target that ONNX Runtime runs on "cpu" or "cuda"."""
    return next(row for row in _ROWS if row.device == device)


def install_line(module: str) -> str | None:
    """The line that installs a module which some target needs; None for any other module."""
    return next((row.install for row in _ROWS if row.module == module), None)


def compiler_of(target: str) -> Compiler:
    """What makes a target's engines, of a target that has some."""
    compiler = TARGETS[target].compiler
    assert compiler is not None, target
    return compiler


def of_version(version: str | None) -> str | None:
    """The target that a version of TensorRT serves; None for 8.x and what is not known."""
    numbers = numbers_of(version)
    served = those(lambda row: row.serves and row.serves[0] <= numbers < row.serves[1])
    return next(iter(served), None)


def by_version() -> str:
    """Which TensorRT has which target, for people."""
    return ", ".join(
        f"{row.name} for {row.library} {row.versions}" for row in _ROWS if row.compiler
    )


def numbers_of(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version; of one that is not known, the highest."""
    numbers = re.findall(r"\d+", version or "")
    return tuple(int(number) for number in numbers[:2]) if numbers else (1 << 30,)
