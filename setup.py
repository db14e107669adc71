"""Packaging. The metadata lives here because the setuptools 59 of JetPack 6 ignores [project]."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = (
    "contract",
    "pruning",
    "export",
    "runtime",
    "calibration",
)  # installed as patchsieve.*
# A folder that several distributions share (PEP 420); optimum-cli loads what lies in it.
OPTIMUM_DOOR = {"optimum.commands.register": "patchsieve/doors/optimum"}

CPU = ["onnxruntime>=1.23"]  # 1.23 is the newest for Python 3.10
RTX = ["tensorrt-rtx>=1.7; sys_platform != 'darwin'"]  # compiles ahead of time, without a GPU
CUDA = ["cuda-python>=12.6; sys_platform != 'darwin'"]  # memory and streams beside TensorRT
TRANSFORMERS = "transformers>=5.0,<6"  # tested up to 5.24
EXPORT = [
    "torch>=2.8",
    TRANSFORMERS,
    "onnx>=1.20",
    "onnxscript>=0.7",
    "safetensors>=0.5",
    "sentencepiece>=0.2",  # reads tokenizer.model; the protobuf that it needs comes with onnx
]

CALIBRATION = ["accelerate>=1.1", "torch>=2.8", TRANSFORMERS, "safetensors>=0.5"]
OPTIMUM = ["optimum>=2.0"]  # 1.6 MB beside what export needs

EXTRAS = {
    # What runs a bundle. Never cpu and gpu together: the two packages overwrite each other.
    "cpu": CPU,
    "gpu": ["onnxruntime-gpu>=1.23"],
    "tensorrt": ["tensorrt>=10.3", *CUDA],
    "rtx": [*RTX, *CUDA],
    # On boards, where TensorRT itself comes with JetPack.
    "jetson": CUDA,  # JetPack 7, whose driver serves CUDA 13
    "jetson6": ["cuda-python==12.6.*"],  # JetPack 6, whose driver serves CUDA 12.6
    # What makes one.
    "export": EXPORT,
    "clip": ["open_clip_torch>=3.0"],
    "calibration": CALIBRATION,
    "eval": ["lmms-eval>=0.7.1"],
    "optimum": [*EXPORT, *OPTIMUM],
    # All that `make lint`, `make test` and `make bench` need, on any machine.
    "dev": [
        *CPU,
        *RTX,
        *CUDA,
        *EXPORT,
        *CALIBRATION,
        *OPTIMUM,
        "coverage>=7",
        "mypy>=1.15",
        "pre-commit>=4",
        "psutil>=6",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "ruff>=0.12",
        "setuptools>=70.1",  # builds the wheel that tests/test_packaging.py unpacks
    ],
}

setup(
    name="patchsieve",
    version="0.1.0",
    description="Compile LLaVA-style models whose visual tokens are pruned inside the decoder",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["patchsieve", "patchsieve.*"])
    + [f"patchsieve.{p}" for f in FOLDERS for p in find_packages(include=[f, f"{f}.*"])]
    + list(OPTIMUM_DOOR),
    package_dir={
        "patchsieve": "patchsieve",
        **{f"patchsieve.{f}": f for f in FOLDERS},
        **OPTIMUM_DOOR,
    },
    package_data={
        "patchsieve": ["py.typed", "show/page.*"],
        "patchsieve.export.operators": ["*.json"],
    },
    install_requires=["numpy>=1.24", "pillow>=10.1", "tokenizers>=0.21", "jinja2>=3.1.6"],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["patchsieve = patchsieve.cli:main"],
        "lmms_eval.models": ["patchsieve = patchsieve.doors.lmms_eval_entry:manifest"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
