import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from patchsieve.contract.errors import BundleError, RequestError
from patchsieve.runtime.inputs.builder import PromptBuilder
from patchsieve.runtime.inputs.chat_template import ChatTemplate
from patchsieve.runtime.inputs.prompt import Prompt, expand
from tests.support.tiny_tokenizers import IMAGE, KINDS, special_tokens, tokenizer, tokenizer_json

# LLaVA-1.5's own: images of a message first, then its texts
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# ChatML that takes strings and lists, keeps the order of parts and uses loop controls
CHATML = """
{%- if messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['content'] is string %}{{- message['content'] }}
    {%- else %}{%- for part in message['content'] %}
        {%- if part['type'] == 'image' %}{{- '<image>' }}{% else %}{{- part['text'] }}{% endif %}
    {%- endfor %}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
# Mistral's, which reads strings only, writes BOS itself, trims, and insists on turns
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"llava": LLAVA, "chatml": CHATML, "mistral": MISTRAL}
PAIRS = [
    (kind, name)
    for kind in KINDS
    for name in TEMPLATES
    if not (name == "mistral" and kind.startswith("qwen"))  # it needs a BOS token
]
TEXTS = (
    "What colour is the cup?",
    "  padded, with 中文 and 😀  ",
    "A",  # also a letter of the role markers
    "two\nlines\n\nof text",
    "Describe <image> please",
)


@pytest.fixture
def builder(tmp_path: Path):
    def make(kind: str, template: str | None, token: str = IMAGE) -> PromptBuilder:
        path = tmp_path / "tokenizer.json"
        path.write_text(tokenizer_json(kind), encoding="utf-8")
        return PromptBuilder(
            path,
            template,
            image_token=token,
            image_token_id=tokenizer(kind).token_to_id(token),
            special_tokens=special_tokens(kind),
        )

    return make


def llava_processor(kind: str, template: str | None) -> LlavaProcessor:
    """A real processor whose images have (8 / 2) ** 2 = 16 visual tokens."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind), **special_tokens(kind))
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        fast,
        patch_size=2,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def as_processor_reads(
    made: PromptBuilder, messages: list[dict], images: list[Image.Image]
) -> list[dict]:
    """The same chat with the pictures in it, in the form of content that the template reads."""
    if made._template.reads_text and not made._template.reads_parts:
        return [made._template._adapt(message) for message in messages]
    left = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(left)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def words(made: PromptBuilder, prompt: Prompt) -> str:
    return made.tokenizer.decode(prompt.token_ids[prompt.instruction].tolist())


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("text", TEXTS)
def test_expanded_ids_are_those_of_the_llava_processor(
    builder, kind: str, name: str, text: str
) -> None:
    made = builder(kind, TEMPLATES[name])
    processor = llava_processor(kind, TEMPLATES[name])
    images = [Image.new("RGB", (8, 8))]
    messages = [made.user_message(text, 1)]
    prompt = made.build(messages, 1)
    theirs = as_processor_reads(made, messages, images)
    assert prompt.text == processor.apply_chat_template(theirs, add_generation_prompt=True)
    has_bos = name == "mistral"  # apply_chat_template decides so, too
    ids = processor(text=prompt.text, images=images, add_special_tokens=not has_bos)["input_ids"][0]
    expanded = expand(prompt, 16)
    assert expanded.token_ids.tolist() == ids
    assert expanded.token_ids.dtype == expanded.image_index.dtype == np.int64
    assert (expanded.image_index >= 0).sum() == 16


@pytest.mark.parametrize("kind", KINDS)
def test_the_processors_own_chat_call_gives_the_same_ids(builder, kind: str) -> None:
    made = builder(kind, LLAVA)
    images = [Image.new("RGB", (8, 8))] * 2
    messages = [made.user_message("What is in this picture?", 2)]
    ids = llava_processor(kind, LLAVA).apply_chat_template(
        as_processor_reads(made, messages, images),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    expanded = expand(made.build(messages, 2), 16)
    assert expanded.token_ids.tolist() == ids
    for number, (start, stop) in enumerate(expanded.image_spans):
        assert stop - start == 16
        assert np.flatnonzero(expanded.image_index == number).tolist() == list(range(start, stop))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "<image>\n<image>\nWhat?",
        "a<image>b <image> c",
        "<image><image> both",
        "one word then\n\n<image>\n\n two",
    ],
)
def test_raw_prompts_expand_as_the_llava_processor_does(builder, kind: str, text: str) -> None:
    made = builder(kind, None)
    count = text.count(IMAGE)
    ids = llava_processor(kind, None)(text=text, images=[Image.new("RGB", (8, 8))] * count)
    expanded = expand(made.build_raw(text, count), 16)
    assert expanded.token_ids.tolist() == ids["input_ids"][0]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_instruction_is_the_users_text_without_role_markers(
    builder, kind: str, name: str, text: str
) -> None:
    made = builder(kind, TEMPLATES[name])
    prompt = made.build([made.user_message(text, 1)], 1)
    found = words(made, prompt)
    # A byte-level token may hold the space that ends a role marker or a placeholder's neighbour
    assert "".join(found.split()) == "".join(text.replace(IMAGE, "").split())
    assert not np.isin(prompt.instruction, prompt.image_positions).any()
    rows = expand(prompt, 7).instruction_rows
    assert expand(prompt, 7).token_ids[rows].tolist() == (
        prompt.token_ids[prompt.instruction].tolist()
    )


def test_the_instruction_is_that_of_the_last_user_message(builder) -> None:
    made = builder("llama", LLAVA)
    question = {"role": "user", "content": [{"type": "text", "text": "What is it?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "What is it? A cup."}]}
    prompt = made.build([question, answer, question], 0)
    assert words(made, prompt) == "What is it?"
    assert prompt.instruction.min() > len(prompt.token_ids) // 2


def test_a_template_that_rewrites_the_question_leaves_the_tokens_after_the_image(builder) -> None:
    shouting = "{% for m in messages %}<image>Q: {% for c in m['content'] %}" + (
        "{% if c['type'] == 'text' %}{{ c['text'] | upper | reverse }}{% endif %}"
        "{% endfor %}{% endfor %} A:"
    )
    made = builder("qwen", shouting)
    prompt = made.build([made.user_message("What?", 1)], 1)
    assert words(made, prompt) == "Q: ?TAHW A:"


def test_a_template_that_looks_into_the_text_is_searched_from_the_right(builder) -> None:
    looking = (
        "{% for m in messages %}{% if m['content'].startswith('What') %}What {% endif %}"
        "{{ m['content'] }}{% endfor %} A:"
    )
    made = builder("qwen", looking)
    prompt = made.build([{"role": "user", "content": "What"}], 0)
    assert prompt.text == "What What A:"
    assert prompt.instruction.min() > 0 and words(made, prompt).strip() == "What"


def test_placeholders_in_the_text_stay_where_the_user_wrote_them(builder) -> None:
    for kind, name in PAIRS:
        made = builder(kind, TEMPLATES[name])
        text = made.build([made.user_message("Is <image> like <image> here?", 2)], 2).text
        assert text.index("Is") < text.index(IMAGE) < text.index("like") < text.rindex(IMAGE)


def test_images_come_first_where_the_text_has_no_placeholder(builder) -> None:
    for kind, name in PAIRS:
        made = builder(kind, TEMPLATES[name])
        text = made.build([made.user_message("Describe", 2)], 2).text
        assert text.rindex(IMAGE) < text.index("Describe") and text.count(IMAGE) == 2


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_an_image_without_a_question_is_allowed(builder, kind: str, name: str) -> None:
    made = builder(kind, TEMPLATES[name])
    prompt = made.build([made.user_message("", 1)], 1)
    assert (prompt.instruction > prompt.image_positions[-1]).all() and prompt.instruction.size


def test_bos_is_never_doubled_and_never_lost(builder) -> None:
    bos = tokenizer("llama").token_to_id("<s>")
    for template in (LLAVA, MISTRAL):
        made = builder("llama", template)
        ids = made.build([made.user_message("What?", 1)], 1).token_ids
        assert ids[0] == bos and (ids == bos).sum() == 1
    ids = builder("llama", None).build_raw("<s>What?", 0).token_ids
    assert ids[0] == bos and (ids == bos).sum() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.build([{"role": "user", "content": "see <image>"}], 0), "no image was given"),
        (lambda b: b.user_message("see <image> and <image>", 1), "more placeholders than images"),
        (lambda b: b.user_message("see <image>", 2), "fewer placeholders than images"),
        (lambda b: b.build_raw("What?", 1), "fewer placeholders than images"),
        (lambda b: b.build_raw("<image> What?", 0), "no image was given"),
        (lambda b: b.user_message("  ", 0), "the prompt is empty"),
        (lambda b: b.build_raw("", 0), "the prompt is empty"),
        (lambda b: b.build_raw("<image>", 1), "no token after its last image"),
        (lambda b: b.build([{"role": "user", "content": ""}], 0), "the prompt is empty"),
        (lambda b: b.build([], 0), "the conversation is empty"),
        (lambda b: b.build(["What?"], 0), "bad message"),
        (lambda b: b.build([{"role": "user", "content": None}], 0), "bad message content"),
        (lambda b: b.build([{"role": "user", "content": [{"type": "video"}]}], 0), "bad message"),
        (lambda b: expand(b.build_raw("<image> What?", 1), 0), "bad visual_tokens_per_image"),
        (lambda b: b.tokenize_suffix(""), "the prompt is empty"),
    ],
)
def test_a_bad_request_is_one_clear_line(builder, call, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        call(builder("qwen", CHATML))
    assert "\n" not in str(caught.value)


def test_a_bundle_without_a_template_takes_raw_prompts_only(builder) -> None:
    made = builder("llama", None)
    with pytest.raises(RequestError, match="no chat template .* raw"):
        made.build([made.user_message("What?", 0)], 0)
    assert made.build_raw("USER: <image>\nWhat? ASSISTANT:", 1).text.startswith("USER:")


def test_what_a_template_raises_is_one_line(builder) -> None:
    made = builder("llama", MISTRAL)
    with pytest.raises(RequestError, match="refuses .*roles must alternate") as caught:
        made.build([{"role": "assistant", "content": "hello"}], 0)
    assert "\n" not in str(caught.value)


def test_broken_bundles_are_refused(builder, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not compile"):
        builder("llama", "{% for %}")
    with pytest.raises(BundleError, match="does not know the image token"):
        builder("llama", None, token="cup and picture")
    with pytest.raises(BundleError, match="no tokenizer"):
        PromptBuilder(tmp_path / "none.json", None, image_token=IMAGE, image_token_id=1)


def test_a_plain_string_is_not_lost_in_a_template_for_lists(builder) -> None:
    made = builder("llama", LLAVA)
    assert "What?" in made.build([{"role": "user", "content": "What?"}], 0).text


CONVERSATIONS = [("llama", "llava"), ("llama-first", "llava"), ("qwen", "chatml")] + [
    ("llama", "mistral"),
    ("llama-first", "mistral"),
    ("qwen", "llava"),
]


@pytest.mark.parametrize(("kind", "name"), CONVERSATIONS)
def test_the_next_turn_continues_the_cache_with_the_tokens_of_the_whole_text(
    builder, kind: str, name: str
) -> None:
    made = builder(kind, TEMPLATES[name])
    messages = [made.user_message("What colour is the cup?", 1)]
    prompt = made.build(messages, 1)
    before = list(messages)
    messages += [
        {"role": "assistant", "content": [{"type": "text", "text": "The cup is white."}]},
        made.user_message("What is <image> then?", 1),
    ]
    suffix = made.continuation(before, messages, is_answer_cached=True)
    told = made.continuation(before, messages, is_answer_cached=False)
    text = made.build(messages, 2).text
    assert suffix is not None and text.endswith("The cup is white." + suffix)
    assert told is not None and prompt.text + told == text
    whole = made.build(messages, 2).token_ids.tolist()
    tail = made.tokenize_suffix(suffix, messages)
    assert tail.token_ids.tolist() == whole[-len(tail.token_ids) :]
    assert made.tokenizer.token_to_id("<s>") not in tail.token_ids.tolist()
    assert tail.text == suffix and len(tail.image_positions) == 1
    assert "".join(words(made, tail).split()) == "Whatisthen?"
    assert expand(tail, 5).image_spans == [
        (int(tail.image_positions[0]), int(tail.image_positions[0]) + 5)
    ]


def test_images_may_have_a_count_of_rows_each(builder) -> None:
    prompt = builder("qwen", CHATML).build_raw("<image> and <image>: which?", 2)
    first, second = (int(place) for place in prompt.image_positions)
    each = expand(prompt, [3, 1])
    assert each.image_spans == [(first, first + 3), (second + 2, second + 3)]
    assert each.image_index.tolist().count(0) == 3 and each.image_index.tolist().count(1) == 1
    assert each.token_ids[each.instruction_rows].tolist() == (
        prompt.token_ids[prompt.instruction].tolist()
    )
    alike, one = expand(prompt, [4, 4]), expand(prompt, 4)
    assert (alike.token_ids == one.token_ids).all() and alike.image_spans == one.image_spans


def test_a_conversation_that_does_not_begin_with_the_cache_is_prefilled_again(builder) -> None:
    made = builder("qwen", CHATML)
    first = made.user_message("What?", 0)
    other = made.user_message("Which?", 0)
    answer = {"role": "assistant", "content": "It was"}
    for is_cached in (True, False):
        assert (
            made.continuation([first], [other, answer, first], is_answer_cached=is_cached) is None
        )


def test_templates_render_as_transformers_renders_them() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n"
        "  {%- if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "    {% set text = m['content'] %}\n"
        "{{ m | tojson }} {{ [1, {'a': '<&é>'}] | tojson(indent=2) }}\n"
        "{% generation %}{{ text }}{% set text = 'inner' %}{% endgeneration %}{{ text }}\n"
        "{% endfor %}{% if tools is not none %}tools{% endif %}{{ strftime_now('%Y') }}"
        "{% set ns = namespace(n=1, self=2) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ ns.self }}"
        "{% if not add_generation_prompt is defined %}?{% endif %}{{ undefined_name }}"
    )
    messages = [{"role": "user", "content": f"<b>'{n}' & é</b>"} for n in range(8)]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer("llama"), **special_tokens("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = fast.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True
        )
    ours = ChatTemplate(source, image_token=IMAGE, special_tokens=fast.special_tokens_map)
    assert ours.render(messages) == theirs


def test_a_template_cannot_reach_python_or_change_the_messages() -> None:
    for source in (
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
    ):
        with pytest.raises(RequestError, match="refuses"):
            ChatTemplate(source, image_token=IMAGE).render([{"role": "user", "content": "a"}])


# System prompts

# Llama 2's way: the system prompt is written inside the first question
INSIDE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.index0 == 0 and system is defined %}"
    "<<SYS>>\n{{ system | trim }}\n<</SYS>>\n\n{% endif %}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {% endif %}{% endfor %}"
)
# Questions are lists of parts and the system prompt is a string: a list would print itself
MIXED = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant: "
)
DROPS = MIXED.replace("{{ m['content'] }}", "")
SYSTEM = "Be brief, and name the cup."


@pytest.mark.parametrize("template", [LLAVA, CHATML, INSIDE, MIXED])
def test_a_system_prompt_is_written_where_the_template_has_it_and_judges_nothing(
    builder, template: str
) -> None:
    made = builder("qwen", template)
    question = "Where is the cup?"
    messages = [made.system_message(SYSTEM), made.user_message(question, 1)]
    prompt = made.build(messages, 1)
    assert prompt.text.count(SYSTEM) == 1 and "'type'" not in prompt.text
    assert prompt.text.index(SYSTEM) < prompt.text.index(question)
    assert "".join(words(made, prompt).split()) == "Whereisthecup?"
    same = made.build([made.system_message("Where is the cup?"), messages[1]], 1)
    assert "".join(words(made, same).split()) == "Whereisthecup?"
    assert same.instruction.min() > len(same.token_ids) // 3  # the user's, not the system's
    answer = {"role": "assistant", "content": [{"type": "text", "text": "There."}]}
    then = [*messages, answer, made.user_message("And now?", 0)]
    suffix = made.continuation(messages, then, is_answer_cached=True)
    assert suffix is not None and SYSTEM not in suffix
    assert made.build(then, 1).text.endswith("There." + suffix)


@pytest.mark.parametrize("template", [LLAVA, CHATML])
@pytest.mark.parametrize("system", [SYSTEM, "", "  padded\n"])
def test_a_system_prompt_is_rendered_as_the_llava_processor_renders_it(
    builder, template: str, system: str
) -> None:
    made = builder("qwen", template)
    messages = [made.system_message(system), made.user_message("What?", 1)]
    theirs = as_processor_reads(made, messages, [Image.new("RGB", (8, 8))])
    rendered = llava_processor("qwen", template).apply_chat_template(
        theirs, add_generation_prompt=True
    )
    assert made.build(messages, 1).text == rendered
    assert (
        made.build([{"role": "system", "content": system}, messages[1]], 1).text.strip()
        == rendered.strip()
    )


@pytest.mark.parametrize(
    ("template", "why"), [(DROPS, "leaves the text out"), (MISTRAL, "roles must alternate")]
)
def test_a_template_without_a_place_for_a_system_prompt_refuses_it(
    builder, template: str, why: str
) -> None:
    made = builder("llama", template)
    match = f"has no place for a system prompt.*{why}.*first prompt"
    turn = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    for call in (
        lambda: made.system_message(SYSTEM),
        lambda: made.system_message(""),
        lambda: made.build([turn, made.user_message("What?", 0)], 0),
    ):
        with pytest.raises(RequestError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    question = made.user_message("What?", 0)
    with pytest.raises(RequestError, match="refuses these messages") as caught:
        builder("llama", MISTRAL).build([question, question], 0)


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("see <image>", "the system prompt cannot hold an image"),
        ([{"type": "image"}], "the system prompt cannot hold an image"),
        (7, "the system prompt is not text"),
        ("\ud800", "the system prompt is not valid Unicode"),
    ],
)
def test_a_bad_system_prompt_is_one_clear_line(builder, system, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        builder("qwen", CHATML).system_message(system)
    assert "\n" not in str(caught.value)


def test_a_question_may_be_given_as_the_parts_of_a_message(builder) -> None:
    made = builder("qwen", CHATML)
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " red?"}]
    prompt = made.build([made.user_message(parts, 1)], 1)
    assert prompt.text == made.build([made.user_message("Is <image> red?", 1)], 1).text
    with pytest.raises(RequestError, match="more placeholders than images"):
        made.user_message([*parts, {"type": "image"}], 1)
    with pytest.raises(RequestError, match="not text"):
        made.user_message([], 0)
