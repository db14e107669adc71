"""The same checkpoint in transformers: scaled-dot-product attention, and compiled decoding."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchsieve.cli.picture import picture
from patchsieve.contract.errors import BackendMissingError


def device_of(target: str) -> str:
    """Where torch runs: on the GPU beside a GPU target, on the CPU in a CPU run.

    Raises:
        BackendMissingError: torch is absent, or sees no GPU.
    """
    if importlib.util.find_spec("torch") is None:
        raise BackendMissingError("torch is not installed", do="pip install torch transformers")
    import torch

    if target in ("cpu", "reference"):
        return "cpu"
    if not torch.cuda.is_available():
        raise BackendMissingError(
            "torch sees no GPU", found=torch.__version__, do="install torch for this CUDA"
        )
    return "cuda"


def measure(
    checkpoint: Path, prompt: str, *, device: str, precision: str, new_tokens: int, runs: int
) -> dict[str, Any]:
    """Time to first token and time per token of `generate`, with its own preprocessing left out.

    Args:
        checkpoint: The Hugging Face directory.
        prompt: The user's words.
        device: "cuda" or "cpu".
        precision: Of the weights.
        new_tokens: Tokens of every answer, at least 2.
        runs: Runs that count; the median is reported.

    Returns:
        By form ("sdpa", on a GPU also "sdpa, static cache, compiled"): ttft_ms, per_token_ms,
        total_ms, or the error; and rows of the prompt.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = getattr(torch, precision)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    words = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": words}], add_generation_prompt=True
    )
    inputs = processor(images=picture(), text=text, return_tensors="pt").to(device, dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    # With a static cache on a GPU `generate` compiles the decode step by itself.
    forms: dict[str, dict[str, Any]] = {"sdpa": {}}
    if device == "cuda":
        forms["sdpa, static cache, compiled"] = {"cache_implementation": "static"}
    told: dict[str, Any] = {"prompt_rows": int(inputs["input_ids"].shape[1])}
    for name, options in forms.items():
        generate = partial(model.generate, **inputs, **options, do_sample=False)
        try:
            told[name] = _times(generate, wait, new_tokens, runs)
        except RuntimeError as error:  # of torch: no memory, or what cannot be compiled here
            told[name] = {"error": " ".join(str(error).split())[:300]}
    if device == "cuda":
        told["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return told


def _times(
    generate: Callable[..., Any], wait: Callable[[], None], new_tokens: int, runs: int
) -> dict[str, float]:
    """Medians; the first two calls of each length compile and are not counted."""
    medians = {}
    for count in (1, new_tokens):
        taken = []
        for number in range(runs + 2):
            start = time.perf_counter()
            generate(max_new_tokens=count, min_new_tokens=count)
            wait()
            if number > 1:
                taken.append((time.perf_counter() - start) * 1e3)
        medians[count] = float(np.median(taken))
    return {
        "ttft_ms": round(medians[1], 4),
        "per_token_ms": round((medians[new_tokens] - medians[1]) / (new_tokens - 1), 4),
        "total_ms": round(medians[new_tokens], 4),
    }
