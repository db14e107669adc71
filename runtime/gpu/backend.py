"""TensorRT on an NVIDIA GPU: `tensorrt-rtx`, `tensorrt`, `tensorrt10` and `jetpack6`.

Everything runs on one stream; engines take turns in one block of scratch memory. The host waits
only where it needs a number: for image features, once per pruning site for the survivors, and for
the logits of a prompt's last row and of each new token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from patchsieve.contract import names
from patchsieve.contract.errors import BundleError
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import StageCache
from patchsieve.runtime.gpu.decode_row import RowDecoder
from patchsieve.runtime.gpu.device_cache import FORMS, DeviceCache
from patchsieve.runtime.gpu.device_times import DeviceTimes
from patchsieve.runtime.gpu.driver import Driver, load_cudart
from patchsieve.runtime.gpu.engine import DECODE, PREFILL, Context, Engine, as_port
from patchsieve.runtime.gpu.kernel_cache import KernelCache
from patchsieve.runtime.gpu.memory import DeviceTensor, Memory
from patchsieve.runtime.gpu.weight_streaming import set_budgets
from patchsieve.runtime.trt.engines import Library, folder_of, open_engines
from patchsieve.runtime.trt.library import load_tensorrt, shared_logger


class TensorRTBackend:
    """Runs the engines of a bundle.

    Args:
        bundle: The opened bundle.
        trt: The library; by default the one that the target names.
        cuda: cuda-python's binding of the CUDA runtime; by default the installed one.

    Raises:
        BackendMissingError: A library, the driver or a GPU is absent.
        BundleError: The engines are absent, damaged or built for something else.
        CapacityError: The GPU's memory is too small.
    """

    has_fixed_slots = True

    def __init__(
        self, bundle: Bundle, *, trt: ModuleType | None = None, cuda: Any | None = None
    ) -> None:
        self.bundle, self.facts = bundle, bundle.manifest
        self.trt = load_tensorrt(bundle.target) if trt is None else trt
        self.driver = Driver(load_cudart(bundle.target) if cuda is None else cuda)
        self.memory = Memory(self.driver)
        self.times = DeviceTimes(self.driver)
        self.kernels = KernelCache(self.trt, folder_of(bundle.path, bundle.target))
        self.form = self.facts.cache_forms[bundle.target]
        self._engines: dict[str, Engine] = {}
        self._contexts: dict[tuple[str, int], Context] = {}
        self._decoder: RowDecoder | None = None
        self._runtime: Any = None
        self._scratch_bytes = 0
        self._is_closed = False
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def allocate(self, stage: int, slots: int) -> DeviceCache:
        """Caches of a stage, zeroed."""
        heads = (self.facts.text.num_kv_heads, self.facts.text.head_dim)
        engine = self._engines[names.stage(stage)]
        return FORMS[self.form](self.memory, engine, slots, heads)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Enqueue vision, decide or compact."""
        with self.times.of(graph):
            context = self._context(graph)
            self._bind_inputs(context, inputs)
            outputs = self._bind_outputs(context)
            context.enqueue()
        return outputs

    def run_stage(self, stage: int, inputs: Mapping[str, Any], cache: StageCache) -> dict[str, Any]:
        """Enqueue a stage in place on its caches."""
        graph, buffers = names.stage(stage), cache.buffers
        with self.times.of(graph):
            context = self._context(graph)
            self._bind_inputs(context, inputs)
            moves = buffers.bind(context, cache.length, len(inputs[names.KEEP_INDICES]))
            outputs = self._bind_outputs(context)
            context.enqueue()
            for place, rows in moves:
                self.driver.move(place, rows.address, rows.size)
        return outputs

    def decode(
        self, hidden: np.ndarray, steps: Sequence[Mapping[str, Any]], caches: Sequence[StageCache]
    ) -> np.ndarray:
        """Feed one row through all stages, by one captured graph where that can be."""
        assert self._decoder is not None  # only a closed backend has none
        row = as_port(hidden, self._engines[names.stage(0)].ports[names.HIDDEN])
        buffers = [cache.buffers for cache in caches]
        with self.times.of("decode"):
            self._decoder.enqueue(row, steps, buffers, [cache.length for cache in caches])
        return self._decoder.logits()

    def key_cache(self, cache: StageCache, layer: int) -> DeviceTensor:
        """The keys themselves, not a copy."""
        return self._view(cache, names.key_cache(layer))

    def value_cache(self, cache: StageCache, layer: int) -> DeviceTensor:
        """The values themselves."""
        return self._view(cache, names.value_cache(layer))

    def fetch(self, reason: str, *tensors: Any) -> list[np.ndarray]:
        """Bring tensors to the host, in one wait that is counted under its reason."""
        return self.memory.fetch(reason, tensors)

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """Bring one tensor to the host, for tools and tests."""
        if isinstance(tensor, np.ndarray):
            return tensor
        return self.fetch("a tensor that was asked for", tensor)[0]

    def clear(self, cache: StageCache) -> None:
        """Zero the slots after the cache's length; on a lost context there is nothing to save."""
        self.times.forget()
        if not self.driver.lost:
            cache.buffers.clear(cache.length)

    def device_ms(self) -> dict[str, float]:
        """GPU time of each graph since the last call, where the host has waited for it."""
        return self.times.take()

    def describe(self) -> dict[str, Any]:
        """Library, device, memory, and how decoding runs."""
        obstacle = self._decoder.obstacle if self._decoder else "closed"
        return {
            "library": str(Library.of(self.trt)),
            "device": f"{self.driver.gpu}, CUDA {self.driver.gpu.driver}",
            "decode": f"stage by stage: {obstacle}" if obstacle else "one CUDA graph",
            "device_bytes": self.memory.device.bytes(),
            "pinned_bytes": self.memory.pinned.bytes(),
            "scratch_bytes": self._scratch_bytes,
            "waits": dict(self.driver.waits),
        }

    def close(self) -> None:
        """Give back everything on the GPU; caches that somebody still holds too."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._decoder is not None:
            self._decoder.forget()
            self._decoder = None
        if not self.driver.lost:
            self.kernels.save()
        for context in self._contexts.values():
            context.close()
        self.kernels.close()
        for engine in self._engines.values():
            engine.close()
        self._contexts.clear()
        self._engines.clear()
        self._runtime = None
        self.times.close()
        self.memory.close()
        self.driver.close()

    def _load(self) -> None:
        """Engines first, so that the largest scratch memory is known; then their contexts."""
        paths = open_engines(
            self.bundle.path,
            self.facts,
            self.bundle.target,
            gpu=self.driver.gpu,
            library=Library.of(self.trt),
            hashes=self.bundle.check != "size",
            again=self.bundle.check == "full",
        )
        self._runtime = self.trt.Runtime(shared_logger(self.trt))
        for graph, path in paths.items():
            self._engines[graph] = Engine(self.trt, self._runtime, graph, path)
        cache_bytes = sum(stage.slots * self.facts.row_bytes(stage) for stage in self.facts.stages)
        set_budgets(self.driver, list(self._engines.values()), cache_bytes)
        for graph, engine in self._engines.items():
            for profile in (PREFILL, DECODE) if engine.num_profiles > 1 else (PREFILL,):
                config = self.kernels.config(engine, profile)
                self._contexts[graph, profile] = Context(engine, profile, self.driver, config)
        self._scratch_bytes = max(engine.activation_bytes for engine in self._engines.values())
        self._scratch = self.memory.device.take_own(self._scratch_bytes)
        for context in self._contexts.values():
            context.use_scratch(self._scratch.address, self._scratch_bytes)
        stages = [names.stage(index) for index in range(len(self.facts.stages))]
        self._decoder = RowDecoder(
            self.memory, [self._contexts[stage, DECODE] for stage in stages], self.form
        )
        self.driver.synchronise("the bundle is loaded")

    def _view(self, cache: StageCache, name: str) -> DeviceTensor:
        buffers: DeviceCache = cache.buffers
        return buffers.view(name, cache.length + cache.num_side)

    def _context(self, graph: str) -> Context:
        context = self._contexts.get((graph, PREFILL))
        if context is None:
            raise BundleError(
                f"no engine for {graph} was built",
                do=f"patchsieve build {self.bundle.path} --target {self.bundle.target}",
            )
        return context

    def _bind_inputs(self, context: Context, inputs: Mapping[str, Any]) -> None:
        """Bring what is on the host to the GPU, all in one copy, and bind what the engine takes."""
        ports = context.engine.ports
        given = {name: value for name, value in inputs.items() if name in ports}
        arrays = {
            name: as_port(value, ports[name])
            for name, value in given.items()
            if isinstance(value, np.ndarray)
        }
        on_device = {n: a for n, a in arrays.items() if not ports[n].is_on_host}
        uploaded = self.memory.upload(on_device) if on_device else {}
        for name, value in given.items():
            if name in uploaded:
                tensor = uploaded[name]
            elif name in arrays:  # read by the CPU while it enqueues
                tensor = self.memory.on_host(arrays[name])
            else:
                tensor = value
            context.bind(name, tensor)

    def _bind_outputs(self, context: Context) -> dict[str, Any]:
        """New memory for all outputs but the caches."""
        outputs = {}
        for port in context.engine.outputs():
            if not port.name.endswith((names.OUT, names.NEW)):
                outputs[port.name] = self.memory.empty(context.shape_of(port.name), port.dtype)
                context.bind(port.name, outputs[port.name])
        return outputs
