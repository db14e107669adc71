"""Train the thresholds on the Hugging Face Trainer, alone or together with the language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.options import TrainingOptions
from patchsieve.calibration.samples import Samples, collate
from patchsieve.pruning.heads import TENSORS

LANGUAGE_MODEL = "language_model.safetensors"  # of a checkpoint from which training resumes


def arguments(options: TrainingOptions, folder: Path) -> TrainingArguments:
    """The Trainer's own arguments; checkpoints go to `folder`."""
    more: dict[str, Any] = {}
    if options.gradient_checkpointing:  # transformers 5.23 warns of the name, so only where wanted
        more["gradient_checkpointing"] = True
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=-1 if options.steps is None else options.steps,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=options.bf16,
        dataloader_num_workers=options.workers,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=10,
        seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        **more,
    )


class _Reporting(TrainerCallback):
    """Says in a line where a training is."""

    def __init__(self, progress: Callable[[str, float], None]) -> None:
        self.progress = progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Report the loss and, of a batch with images, the tokens that are left."""
        if logs is None or "loss" not in logs:  # the Trainer's summary at the end
            return
        line = f"training, step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}"
        if "average_tokens" in logs:
            line += f", {logs['average_tokens']:.1f} tokens on average"
        self.progress(line, state.global_step / state.max_steps)


class HeadsTrainer(Trainer):
    """A Trainer that steps, saves and loads what is trained: heads, and the language model.

    Args:
        model: The model.
        samples: What it learns from.
        options: How it learns.
        folder: Where checkpoints go.
        progress: Takes a line about the training and how much of it is done, every ten steps.
    """

    def __init__(
        self,
        model: PrunedLlava,
        samples: Samples,
        options: TrainingOptions,
        folder: Path,
        progress: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        super().__init__(
            model=model,
            args=arguments(options, folder),
            train_dataset=samples,
            data_collator=collate,
        )
        self.pruned, self.options = model, options
        self.remove_callback(PrinterCallback)  # it prints Python's dictionaries to stdout
        self.add_callback(_Reporting(progress))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One rate for the heads, another for the language model."""
        if self.optimizer is None:
            kind, given = self.get_optimizer_cls_and_kwargs(self.args)
            rates = {True: self.options.learning_rate, False: self.options.lm_learning_rate}
            heads = {id(p) for p in self.pruned.thresholds.parameters()}
            groups = [
                {
                    "params": [
                        p
                        for p in self.pruned.parameters()
                        if p.requires_grad and (id(p) in heads) == is_heads
                    ],
                    "lr": rate,
                    "weight_decay": self.args.weight_decay,
                }
                for is_heads, rate in rates.items()
            ]
            self.optimizer = kind([group for group in groups if group["params"]], **given)
        return self.optimizer

    def release(self) -> PrunedLlava:
        """The model, computing in its weights' own type again."""
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        return self.pruned

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add tokens and thresholds of the last batch to a training line."""
        if "loss" in logs:
            logs = logs | {name: round(value, 4) for name, value in self.pruned.facts().items()}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(head_tensors(self.pruned), folder / TENSORS)
        if self.pruned.trains_lm:
            save_file(_trained(self.pruned), folder / LANGUAGE_MODEL)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_heads_into(self.pruned, load_file(Path(resume_from_checkpoint) / TENSORS))
        if self.pruned.trains_lm:
            stored = load_file(Path(resume_from_checkpoint) / LANGUAGE_MODEL)
            with torch.no_grad():
                for name, tensor in _trained(self.pruned).items():
                    tensor.copy_(stored[name])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole: the Trainer's state is its last file."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            found[int(step["global_step"])] = path
        except (OSError, ValueError, KeyError, TypeError):  # cut off, or never written
            continue
    return found[max(found)] if found else None


def _trained(model: PrunedLlava) -> dict[str, Tensor]:
    """Parameters of the language model that are trained; tied ones once."""
    return {n: p.detach() for n, p in model.llava.named_parameters() if p.requires_grad}


def head_tensors(model: PrunedLlava) -> dict[str, Tensor]:
    """The heads by the names of `patchsieve.pruning.heads`: layer.{site}.trunk.weight, ..."""
    return {
        f"layer.{name}": tensor.detach().float().cpu().contiguous()
        for name, tensor in model.thresholds.state_dict().items()
    }


def load_heads_into(model: PrunedLlava, tensors: dict[str, Tensor]) -> None:
    """Put stored heads into a model."""
    state = {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}
    model.thresholds.load_state_dict(state)
