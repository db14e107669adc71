"""From encoded conversations to batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.records import Record, Records


@dataclass(frozen=True)
class Sample:
    """One conversation as the model is fed it.

    Attributes:
        input_ids: int64 [L].
        labels: Answer tokens, -100 elsewhere, int64 [L].
        visual: Rows of each image, int64 [N] each.
        text: Rows of the instruction that judges each image, int64 [T] each.
        pixel_values: float32 [M, 3, h, w]; None without images.
        position_ids: Rotary positions, int64 [L, A]; None if they are a row's place.
    """

    input_ids: Tensor
    labels: Tensor
    visual: list[Tensor]
    text: list[Tensor]
    pixel_values: Tensor | None
    position_ids: Tensor | None = None


Encode = Callable[[Record], Sample]


class Samples(torch.utils.data.Dataset[Sample]):
    """Records, encoded when they are asked for.

    Args:
        records: The conversations.
        encode: Makes a sample of a record, as a bundle would.
        skip_missing: Leave out records whose images are not there; else they are an error.

    Attributes:
        missing: Records that were left out.

    Raises:
        PatchsieveError: An image is missing and none may be, or every record lacks one.
    """

    def __init__(self, records: Records, encode: Encode, *, skip_missing: bool = False) -> None:
        self.records, self.encode = records, encode
        self.indices, self.missing = [], 0
        for index in range(len(records)):
            record = records[index]
            lost = next((path for path in record.images if not path.is_file()), None)
            if lost is None:
                self.indices.append(index)
            elif skip_missing:
                self.missing += 1
            else:
                raise PatchsieveError(
                    f"{record.where} names an image that is not there",
                    found=lost,
                    do="correct --image-folder, or leave such records out with --skip-missing",
                )
        if not self.indices:
            raise PatchsieveError(
                "no record of the data has its images",
                found=f"{self.missing} records without",
                do="correct --image-folder",
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.encode(self.records[self.indices[index]])


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Pad samples on the right into a batch: the arguments of `PrunedLlava.forward`."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [sample.input_ids for sample in samples]
    batch = {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad([s.labels for s in samples], batch_first=True, padding_value=-100),
    }
    positions = [sample.position_ids for sample in samples if sample.position_ids is not None]
    if positions:
        batch["position_ids"] = pad(positions, batch_first=True)
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    if pixels:
        owners = [number for number, sample in enumerate(samples) for _ in sample.visual]
        texts = [rows for sample in samples for rows in sample.text]
        batch |= {
            "pixel_values": torch.cat(pixels),
            "image_sample": torch.tensor(owners),
            "visual_rows": torch.stack([rows for sample in samples for rows in sample.visual]),
            "text_rows": pad(texts, batch_first=True, padding_value=-1),
        }
    return batch
