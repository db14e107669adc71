"""Conversations on disk: both formats, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.records import Records

TRICKY = 'say "}" or \\ or {[ twice'


def llava(value: str = "<image>\nWhat?", **more: object) -> dict[str, object]:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": TRICKY}]
    return {"id": "1", "conversations": turns} | more


def write(folder: Path, records: list[object], form: str = "json") -> Path:
    path = folder / f"data.{form}"
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if form == "jsonl" else f"[{', '.join(lines)}]\n")
    return path


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_an_array_and_lines_hold_the_same_records(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, [llava(image="a.jpg"), llava("No image: ünïcode }"), llava()], form)
    records = Records(path)
    assert len(records) == 3
    first = records[0]
    assert first.images == [tmp_path / "a.jpg"]
    assert first.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": TRICKY}]},
    ]
    assert records[1].images == []
    assert records[1].messages[0]["content"] == [{"type": "text", "text": "No image: ünïcode }"}]


def test_chat_messages_name_their_images_in_the_parts_or_beside_them(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "A cup."}
    question = {"type": "text", "text": "What?"}
    parts = [{"type": "image", "path": "b.png"}, question]
    apart = [{"type": "image"}, question]
    path = write(
        tmp_path,
        [
            {"messages": [{"role": "user", "content": parts}, answer]},
            {"messages": [{"role": "user", "content": apart}, answer], "images": ["b.png"]},
            {"messages": [{"role": "user", "content": "What?"}, answer], "image": "b.png"},
        ],
        "jsonl",
    )
    records = Records(path, Path("elsewhere"))
    for record in (records[0], records[1], records[2]):
        assert record.images == [Path("elsewhere/b.png")]
        assert record.messages[0]["content"] == [{"type": "image"}, question]


def test_a_system_prompt_beside_the_turns_is_a_turn(tmp_path: Path) -> None:
    """As ShareGPT writes it; an empty one is none."""
    turn = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    message = {"role": "user", "content": "What?"}
    chat = [message, {"role": "assistant", "content": "A cup."}]
    path = write(
        tmp_path,
        [
            llava("What?", system="Be brief."),
            {"messages": chat, "system": "Be brief.", "image": "a.jpg"},
            llava("What?", system=""),
            llava("What?", system=None),
            {"messages": [{"role": "system", "content": "Be long."}, *chat], "system": "Be brief."},
        ],
    )
    records = Records(path)
    assert records[0].messages[0] == records[1].messages[0] == turn
    assert records[1].messages[1]["content"][0] == {"type": "image"}
    assert [m["role"] for m in records[2].messages] == ["user", "assistant"]
    assert records[2].messages == records[3].messages == records[0].messages[1:]
    with pytest.raises(PatchsieveError, match="record 4 has two system prompts"):
        records[4]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (llava(), "0 images, 1 placeholders"),
        (llava(image=["a", "b"]), "2 images, 1 placeholders"),
        (llava(image=[3]), "other images than placeholders"),
        ({"id": 1}, "no conversation"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "nobody"),
        ({"messages": [{"role": "user", "content": "x"}]}, "does not end in an answer"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither text nor an"),
        ({"messages": [{"role": "user", "content": 7}]}, "without content"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "nobody"),
        (llava("What?", system=["Be brief."]), "no text"),
        (llava("What?", system="Look: <image>"), "an image in its system turn"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_by_its_number(
    tmp_path: Path, record: dict[str, object], says: str
) -> None:
    records = Records(write(tmp_path, [llava(image="a.jpg"), record]))
    with pytest.raises(PatchsieveError, match=rf"data\.json record 1 .*{says}"):
        records[1]


@pytest.mark.parametrize("content", ["", "[]", "12"])
def test_a_file_without_records_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(PatchsieveError, match=r"data\.json"):
        Records(tmp_path / "data.json")


def test_a_truncated_record_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    """It would hide all that follow."""
    path = write(tmp_path, [llava(image="a.jpg"), llava(image="b.jpg")])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PatchsieveError, match="breaks off inside a record"):
        Records(path)
    lines = [json.dumps(llava(image="a.jpg")) for _ in range(3)]
    path.write_text("\n".join([lines[0], lines[1][:-1], lines[2]]))
    with pytest.raises(PatchsieveError, match=f"byte {len(lines[0]) + 1} on"):
        Records(path)
    path.write_text("\n".join([lines[0], lines[1] + "}", lines[2]]))
    with pytest.raises(PatchsieveError, match="did not open"):
        Records(path)
