"""Whether ONNX Runtime's CUDA provider starts here, found by starting it.

`get_available_providers` lists what ONNX Runtime was built for, not what its libraries allow.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys

# y = Identity(x), float32 of one element, opset 17: the smallest graph that needs a provider.
IDENTITY = (
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
# In a process of its own: what is missing is said on stderr by C++, and a driver may end it.
_SCRIPT = f"""
import onnxruntime
if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    raise SystemExit(f"onnxruntime {{onnxruntime.__version__}} was built without CUDA")
if hasattr(onnxruntime, "preload_dlls"):
    onnxruntime.preload_dlls()
session = onnxruntime.InferenceSession({IDENTITY!r}, providers=["CUDAExecutionProvider"])
raise SystemExit(session.get_providers()[0] != "CUDAExecutionProvider")
"""
_LONGEST_S = 120  # a first load of CUDA's libraries from a slow disk
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@functools.cache
def obstacle() -> str:
    """Why the CUDA provider does not start here; empty where it does. Tried once in a process."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=_LONGEST_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else reason_of(done.stderr, done.returncode)


def reason_of(said: str, code: int) -> str:
    """The library that is missing, else the last line that was said, else how the process ended."""
    text = _COLOURS.sub("", said)
    missing = re.search(r"with error: (.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if missing:
        return missing.group(1).strip()
    return lines[-1][:300] if lines else f"the process that tried it ended with code {code}"
