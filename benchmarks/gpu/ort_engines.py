"""TensorRT's place taken by ONNX Runtime, on the memory and the stream that runtime/gpu hands out.

On a GPU the CUDA provider reads and writes the very addresses that an engine would, on the very
stream. So all of runtime/gpu but TensorRT does on hardware what it is made for: memory, copies,
events, waits, caches in place, capture and replay. On a CPU the addresses are those of a `FakeGpu`
with host addresses, and the same binding runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import onnxruntime as ort

from benchmarks.gpu.fake_cuda import FakeGpu
from benchmarks.gpu.fake_tensorrt import FakeTensorRT, ICudaEngine, IExecutionContext, Port
from patchsieve.contract.errors import BackendMissingError
from patchsieve.contract.targets import CUDA_LIBRARIES
from patchsieve.runtime.ort.backend import graph_errors, preload

_QUIET = 3  # errors only
CUDA = "CUDAExecutionProvider"


class RealGpu:
    """What the stand-in asks of a `FakeGpu`, where a real one does the work.

    Attributes:
        live: Things that were made and not given back, by kind.
        wrong: What a program must never do, found on the way.
        captured: A real stream itself knows whether it is captured.
    """

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.captured = None

    def enqueue(self, work: Callable[[], None]) -> None:
        """ONNX Runtime puts its kernels on the stream by itself."""
        work()

    def holds(self, address: int) -> bool:
        """CUDA does not say."""
        return True


class OrtTensorRT(FakeTensorRT):
    """The module `tensorrt`, whose engines are sessions bound to addresses.

    Not `tensorrt_rtx`, which lists the GPUs that its engines run on, and Hopper is not among them.

    Args:
        gpu: A `FakeGpu` that has host addresses, or a `RealGpu`.
    """

    def __init__(self, gpu: FakeGpu | RealGpu) -> None:
        super().__init__(gpu, is_rtx=False)
        self.__version__ = f"played by onnxruntime {ort.__version__}"
        self._place = "cuda" if isinstance(gpu, RealGpu) else "cpu"
        # They go with their engine, before the stream that they were made with.
        self._sessions: WeakKeyDictionary[ICudaEngine, dict[int, Any]] = WeakKeyDictionary()

    def execute(self, context: IExecutionContext, stream: int) -> None:
        """Bind all tensors where they lie, and run on the stream."""
        engine = context._engine
        graph, sessions = engine._facts["graph"], self._sessions.setdefault(engine, {})
        if stream not in sessions:
            sessions[stream] = self._session(engine._facts["onnx"], stream)
        session = sessions[stream]
        inputs, outputs = context._ports(engine._inputs), context._ports(engine._outputs)

        def work() -> None:
            with graph_errors(f"the graph {graph}"):
                self._run(session, inputs, outputs)

        self.gpu.enqueue(work)

    def _run(self, session: Any, inputs: dict[str, Port], outputs: dict[str, Port]) -> None:
        binding = session.io_binding()
        for name, port in inputs.items():
            binding.bind_input(name, self._place, 0, *port)
        for name, port in outputs.items():
            binding.bind_output(name, self._place, 0, *port)
        options = ort.RunOptions()
        if self._place == "cuda":  # the host waits in Driver.synchronise alone
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        session.run_with_iobinding(binding, options)

    def _session(self, path: str, stream: int) -> Any:
        """A session that runs on this stream only.

        Raises:
            BackendMissingError: ONNX Runtime moved it to the CPU.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = _QUIET
        options.enable_mem_pattern = False  # else the second run allocates, perhaps in a capture
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._place == "cuda":
            preload()
            on_stream = {"device_id": "0", "user_compute_stream": str(stream), "use_tf32": "0"}
            on_stream["cudnn_conv_algo_search"] = "HEURISTIC"  # a search would wait and allocate
            providers.insert(0, (CUDA, on_stream))
        with graph_errors(path):
            session = ort.InferenceSession(path, options, providers)
        if self._place == "cuda" and session.get_providers()[0] != CUDA:
            found = preload() or ", ".join(session.get_providers())
            raise BackendMissingError(
                "ONNX Runtime could not start on the GPU", found=found, do=CUDA_LIBRARIES
            )
        return session
