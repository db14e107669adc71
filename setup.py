"""Packaging. The metadata lives here because the setuptools 59 of JetPack 6 ignores [project]."""

from setuptools import find_packages, setup

FOLDERS = ("pruning", "export", "runtime", "calibration")  # at the top here, patchsieve.* installed

EXPORT = ["torch>=2.8", "transformers>=5.0", "onnx>=1.20", "onnxscript>=0.7", "safetensors>=0.5"]
CPU = ["onnxruntime>=1.23"]
RTX = ["tensorrt-rtx>=1.7"]

setup(
    name="patchsieve",
    version="0.1.0",
    description="Compile LLaVA-style models whose visual tokens are pruned inside the decoder",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["patchsieve"]
    + [f"patchsieve.{p}" for f in FOLDERS for p in find_packages(include=[f, f"{f}.*"])],
    package_dir={"patchsieve": "patchsieve", **{f"patchsieve.{f}": f for f in FOLDERS}},
    install_requires=["numpy>=1.24", "pillow>=10.0", "tokenizers>=0.21", "jinja2>=3.1"],
    extras_require={
        "cpu": CPU,
        "rtx": RTX,
        "export": EXPORT,
        "dev": ["pytest>=8", "ruff>=0.12", "mypy>=1.15", "pre-commit>=4", "psutil>=6"],
    },
    entry_points={"console_scripts": ["patchsieve = patchsieve.cli:main"]},
)
