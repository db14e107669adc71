"""Which backend runs a bundle: the one that the table of targets names."""

from __future__ import annotations

from patchsieve.contract.errors import PatchsieveError, RequestError
from patchsieve.contract.targets import ONNXRUNTIME, TARGETS, USUAL
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.bundle import Bundle


def open_backend(bundle: Bundle, *, threads: int | None = None) -> Backend:
    """Make the backend of a bundle's target.

    Raises:
        BackendMissingError: The target's library is not installed.
        PatchsieveError: This version does not know the target.
        RequestError: Threads were given for a target that does not run on the CPU.
    """
    row = TARGETS.get(bundle.target)
    if row is None:
        raise PatchsieveError(
            "this version cannot run the target",
            found=bundle.target,
            expected=", ".join(TARGETS),
            do=f"run the bundle with --target {USUAL}",
        )
    if row.backend == ONNXRUNTIME:
        from patchsieve.runtime.ort.backend import OrtBackend

        return OrtBackend(bundle, threads=threads)
    if threads is not None:
        raise RequestError(
            "threads are those of the CPU",
            found=f"{threads} for the target {bundle.target}",
            do="leave --threads out",
        )
    from patchsieve.runtime.gpu.backend import TensorRTBackend

    return TensorRTBackend(bundle)
