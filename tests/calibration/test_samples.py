"""From records to samples: what is trained with, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.samples import Samples
from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.records import Records
from tests.support.conversations import make_conversations


def test_a_missing_image_is_an_error_or_counted_as_asked(checkpoint: Path, tmp_path: Path) -> None:
    path = make_conversations(tmp_path / "data", 3)
    (tmp_path / "data" / "1.png").unlink()
    encoder = Encoder(str(checkpoint))
    with pytest.raises(PatchsieveError, match=r"record 1 names an image that is not there"):
        Samples(Records(path), encoder)
    left = Samples(Records(path), encoder, skip_missing=True)
    assert (len(left), left.missing) == (2, 1)


def test_a_system_turn_is_trained_with_and_judges_no_token(checkpoint: Path, data: Path) -> None:
    record, encoder = Records(data)[1], Encoder(str(checkpoint))
    words = "What is on the table? Is it red?"
    system = {"role": "system", "content": [{"type": "text", "text": words}]}
    plain, begun = encoder(record), encoder(replace(record, messages=[system, *record.messages]))
    extra = len(begun.input_ids) - len(plain.input_ids)
    assert extra > 5 and begun.labels[extra:].tolist() == plain.labels.tolist()
    assert (begun.text[0] - extra).tolist() == plain.text[0].tolist()
    assert begun.input_ids[begun.text[0]].tolist() == plain.input_ids[plain.text[0]].tolist()


def test_an_image_after_the_first_question_is_refused(checkpoint: Path, data: Path) -> None:
    record = Records(data)[0]
    later = [*record.messages[:2], record.messages[0], record.messages[1]]
    twice = replace(record, messages=later, images=record.images * 2)
    with pytest.raises(PatchsieveError, match="after its first question"):
        Encoder(str(checkpoint))(twice)
