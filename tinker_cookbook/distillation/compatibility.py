"""Checks before a run: teacher and student must have the same tokenizer and chat format.

Token ids are copied from the student to the teacher, so a token id must mean the same to both. And
the teacher reads what the student's chat format has written: if the teacher was trained with
another format, its probabilities are those of a model that is confused by its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tinker_cookbook import model_info, tokenizer_utils
from tinker_cookbook.exceptions import ConfigurationError, RendererError

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Message, Renderer, ToolSpec

__all__ = [
    "check_data_format",
    "check_same_format",
    "check_same_tokenizer",
    "data_format_of",
    "describe_differences",
    "find_unsuitable_format",
]

EXCERPT = 60
"""Characters of each side that a message shows."""


def check_same_tokenizer(student_model: str, teacher_model: str) -> None:
    """Refuse a teacher whose token ids mean other tokens than the student's.

    Raises:
        ConfigurationError: naming both models and the first id that differs.
    """
    if student_model == teacher_model:
        return
    student = tokenizer_utils.get_tokenizer(student_model).get_vocab()
    teacher = tokenizer_utils.get_tokenizer(teacher_model).get_vocab()
    if student == teacher:
        return
    of_student = {number: token for token, number in student.items()}
    of_teacher = {number: token for token, number in teacher.items()}
    different = sorted(
        number
        for number in of_student.keys() | of_teacher.keys()
        if of_student.get(number) != of_teacher.get(number)
    )
    first = different[0]
    raise ConfigurationError(
        f"teacher {teacher_model} and student {student_model} have different tokenizers: "
        f"{len(different)} token ids differ, first id {first} ({of_teacher.get(first)!r} and "
        f"{of_student.get(first)!r}). Use a teacher with the student's tokenizer, or train on "
        "texts that the teacher has written (supervised training)."
    )


def check_data_format(student: str | None, data: str | None, where: str) -> None:
    """Refuse data that are written in another chat format than the run's.

    Args:
        student: `renderer_name` of the run; None: unknown.
        data: `renderer_name` of the data set builder; None: unknown.
        where: Names the data set in the error.

    Raises:
        ConfigurationError: naming both.
    """
    if student is not None and data is not None and student != data:
        raise ConfigurationError(
            f"renderer_name={student} is not the chat format of {where}, which is {data}; use the "
            "same name in both places."
        )


def data_format_of(builder: object) -> str | None:
    """Return the chat format of a data set builder; None if it does not say."""
    common = getattr(builder, "common_config", builder)
    return getattr(common, "renderer_name", None)


def find_unsuitable_format(renderer_name: str, teacher_model: str) -> str | None:
    """Return the format that a chat model needs if it does not know this one; None if it does.

    Models without an entry in `model_info`, and base models, are not judged.
    """
    try:
        attributes = model_info.get_model_attributes(teacher_model)
    except ConfigurationError:
        return None
    names = attributes.recommended_renderers
    return names[0] if attributes.is_chat and renderer_name not in names else None


def check_same_format(model_name: str, student: str, teacher: str, who: str) -> None:
    """Refuse a teacher whose chat format writes other tokens than the student's.

    Args:
        model_name: Model whose tokenizer is used.
        student: Chat format of the student.
        teacher: Chat format of the teacher.
        who: Names the teacher in the error.

    Raises:
        ConfigurationError: naming what differs: plain questions, system prompts, reasoning, tools.
    """
    from tinker_cookbook.renderers import load_renderer

    if student == teacher:
        return
    renderers = load_renderer(student, model_name), load_renderer(teacher, model_name)
    differences = describe_differences(*renderers)
    if differences:
        raise ConfigurationError(
            f"teacher {who} has the chat format {teacher}, but the student has {student}; they "
            f"differ in {'; '.join(differences)}. Use renderer_name={teacher}, or set "
            f"teacher_config.renderer_name={student} to ask the teacher in the student's format."
        )


def describe_differences(student: Renderer, teacher: Renderer) -> list[str]:
    """Return what two chat formats write differently; an empty list if they agree."""
    found: list[str] = []
    for name, messages, tools in _conversations():
        one, other = _prompt(student, messages, tools), _prompt(teacher, messages, tools)
        if one == other:
            continue
        if not found:
            name += f" ({_excerpt(other, one)!r} of the teacher, {_excerpt(one, other)!r})"
        found.append(name)
    return found


def _conversations() -> Iterator[tuple[str, list[Message], list[ToolSpec]]]:
    question: Message = {"role": "user", "content": "Question"}
    system: Message = {"role": "system", "content": "System"}
    reasoned: Message = {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Reasons"},
            {"type": "text", "text": "Answer"},
        ],
    }
    tool: ToolSpec = {
        "name": "search",
        "description": "Search.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    }
    yield "prompts of plain questions", [question], []
    yield "system prompts", [system, question], []
    yield "earlier replies with reasoning", [question, reasoned, question], []
    yield "declared tools", [question], [tool]


def _prompt(renderer: Renderer, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
    """Return the text of a prompt; the reason if the format cannot write it."""
    try:
        tokens = renderer.build_generation_prompt(renderer.declare_tools(messages, tools)).to_ints()
    except (RendererError, NotImplementedError):
        return "(not supported)"
    return str(renderer.tokenizer.decode(tokens))


def _excerpt(text: str, other: str) -> str:
    """Return the first characters of a text from where it differs from another one."""
    start = next(
        (i for i, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]),
        min(len(text), len(other)),
    )
    return text[start : start + EXCERPT]
