"""Properties that hold in every format: replies of any tokens are parsed, typed markers stay text.

Each check returns what is wrong, or None.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.types import (
    Message,
    MessageDelta,
    ParseTermination,
    StreamingTextDelta,
    StreamingThinkingDelta,
    ToolCall,
)

__all__ = [
    "control_names",
    "injection_problem",
    "marker_texts",
    "parse_problem",
    "random_reply",
    "stop_problem",
    "stream_problem",
    "truncation_problem",
    "typed_conversations",
]

# Markers of other formats: ordinary text unless the tokenizer knows them.
FOREIGN_MARKERS = (
    *("<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|start_header_id|>", "</s>", "<s>", "[INST]"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|end|>", "<|channel|>", "<|call|>"),
    *(
        "<｜User｜>",
        "<｜end▁of▁sentence｜>",
        "<|im_middle|>",
        "<end_of_turn>",
        "[/INST]",
        "[gMASK]",
    ),
)
_TEXTS = ("yes", "Hi 日本 👩‍👧", "\n", "\n\n", " ", '{"name": "f", "arguments": {}}', '{"n', "é")
_CHARACTERS = "ab 1.\n\t\"'{}[]<>|/\\_:é日🙂\u0301\u200b"


def control_names(renderer: Renderer) -> list[str]:
    """Return every added token of the renderer's tokenizer."""
    added = getattr(renderer.tokenizer, "get_added_vocab", dict)()
    return sorted(added)


# ---- replies ----


def random_reply(renderer: Renderer, choose: random.Random, replies: Sequence[list[int]]) -> Any:
    """Return tokens that a broken model might sample.

    Args:
        renderer: the renderer whose tokens are used.
        choose: random number generator.
        replies: valid replies of the format, which are cut, joined and mixed with random tokens.
    """
    encoder, size = renderer.encoder, len(renderer.tokenizer)
    control = _control_ids(renderer)
    tokens: list[int] = []
    for _ in range(choose.randint(0, 6)):
        kind = choose.randrange(5)
        if kind == 0:
            tokens += choose.choices(control, k=choose.randint(1, 3))
        elif kind == 1:
            tokens += [choose.randrange(size + 5) for _ in range(choose.randint(1, 6))]
        elif kind == 2:
            tokens += encoder.encode_batch([choose.choice(_TEXTS)])[0]
        elif kind == 3:
            text = "".join(choose.choices(_CHARACTERS, k=choose.randint(1, 12)))
            tokens += encoder.encode_batch([text])[0]
        else:
            reply = choose.choice(replies)
            start = choose.randrange(len(reply))
            tokens += reply[start : choose.randint(start, len(reply))]
    return tokens


def _control_ids(renderer: Renderer) -> list[int]:
    """Return the ids of control tokens; those that structure replies are repeated."""
    added = getattr(renderer.tokenizer, "get_added_vocab", dict)()
    everything = sorted(added.values()) or [0]
    stops = [stop for stop in renderer.get_stop_sequences() if isinstance(stop, int)]
    grammar = renderer.grammar()
    marks = [*(grammar.think or ()), *(grammar.call or ()), *grammar.call_marks]
    return [*everything[:300], *(stops * 8), *(m for m in marks * 8 if m is not None)]


def stream_problem(
    renderer: Renderer, tokens: Sequence[int], bites: Sequence[Sequence[int]]
) -> str | None:
    """Check that a reply fed in chunks gives the same message as the whole, and deltas that add
    up."""
    whole = renderer.parse_response(tokens)
    parser = renderer.response_parser()
    deltas = [delta for bite in bites for delta in parser.feed(bite)]
    deltas += parser.finish()
    if parser.result() != whole:
        return f"in bites {parser.result()}, whole {whole}"
    if _added_up(deltas) != _parts(whole[0]):
        return f"deltas add up to {_added_up(deltas)}, the message has {_parts(whole[0])}"
    return None


def _added_up(deltas: Sequence[MessageDelta]) -> list[tuple[str, str]]:
    parts: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        if isinstance(delta, StreamingTextDelta):
            kind, text = "text", delta.text
        elif isinstance(delta, StreamingThinkingDelta):
            kind, text = "thinking", delta.thinking
        else:
            continue
        parts[delta.content_index] = (kind, parts.get(delta.content_index, ("", ""))[1] + text)
    return [parts[index] for index in sorted(parts)]


def _parts(message: Message) -> list[tuple[str, str]]:
    content: Any = message["content"]
    if isinstance(content, str):
        return [("text", content)] if content else []
    return [(part["type"], part[part["type"]]) for part in content]


def parse_problem(renderer: Renderer, tokens: Sequence[int], choose: random.Random) -> str | None:
    """Check one reply of any tokens: it parses without an error, equally in chunks of any size."""
    cuts = sorted(choose.randint(0, len(tokens)) for _ in range(choose.randint(0, 4)))
    bites = [tokens[a:b] for a, b in itertools.pairwise([0, *cuts, len(tokens)])]
    problem = stream_problem(renderer, tokens, bites)
    problem = problem or stream_problem(renderer, tokens, [[token] for token in tokens])
    return problem or _lost_text_problem(renderer, tokens)


def _lost_text_problem(renderer: Renderer, tokens: Sequence[int]) -> str | None:
    """Check that text before the first control token is in the message, except newlines."""
    encoder = renderer.encoder
    plain = list(itertools.takewhile(lambda token: not encoder.is_control(token), tokens))
    message, end = renderer.parse_response(plain)
    if message.get("tool_calls"):
        return None  # a valid call keeps only its name and arguments
    kept = "".join(text for _, text in _parts(message)) + message.get("trailing_text", "")
    kept += "".join(call.raw_text for call in message.get("unparsed_tool_calls", []))
    if _squeezed(encoder.decode(plain)) != _squeezed(kept):
        return f"text {encoder.decode(plain)!r} became {kept!r}"
    if end.is_stop_sequence and all(isinstance(s, int) for s in renderer.get_stop_sequences()):
        return "a reply without a control token counts as ended"
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def truncation_problem(renderer: Renderer, reply: Sequence[int]) -> str | None:
    """Check a valid reply cut at every place: it parses, streams equally and counts as cut off."""
    for length in range(len(reply) + 1):
        tokens = reply[:length]
        problem = stream_problem(renderer, tokens, [[token] for token in tokens])
        if problem:
            return f"cut after {length} tokens: {problem}"
        if renderer.parse_response(tokens)[1].is_clean != (length == len(reply)):
            return f"cut after {length} of {len(reply)} tokens: {renderer.parse_response(tokens)}"
    return None


def stop_problem(renderer: Renderer, reply: Sequence[int]) -> str | None:
    """Check a valid reply with the stop token missing or doubled, or with text after it."""
    message, end = renderer.parse_response(reply)
    if end is not ParseTermination.STOP_SEQUENCE:
        return f"ended with {end}"
    if renderer.parse_response([*reply, reply[-1]]) != (message, end):
        return f"a doubled stop token gives {renderer.parse_response([*reply, reply[-1]])}"
    if renderer.parse_response(reply[:-1])[1] is not ParseTermination.MALFORMED:
        return "without its stop token it counts as ended"
    more = renderer.encoder.encode_batch(["more"])[0]
    later, later_end = renderer.parse_response([*reply, *more])
    if later_end is not ParseTermination.MALFORMED or later.get("trailing_text") != "more":
        return f"text after the stop token gives {later}, {later_end}"
    return None


# ---- typed markers ----


def marker_texts(markers: Sequence[str]) -> Iterator[str]:
    """Yield each marker alone, within text, within itself, cut, and among white space."""
    for marker in markers:
        middle = len(marker) // 2
        yield marker
        yield f"a{marker}b"
        yield marker[:middle] + marker + marker[middle:]
        yield marker[1:]
        yield marker[:-1]
        yield f"\n{marker}\n"


Talk = Callable[[str], list[Message]]


def typed_conversations(renderer: Renderer) -> dict[str, Talk]:
    """Return conversations with a given text in each place where the format takes text."""
    places: dict[str, Talk] = {
        role: lambda text, role=role: _among(role, text)
        for role in ("system", "user", "assistant")
        if role in renderer.roles
    }
    places["name field"] = lambda text: [
        {"role": "user", "content": "q", "name": text},
        {"role": "assistant", "content": "a", "name": text},
    ]
    places["split over parts"] = lambda text: [
        Message(role="user", content=[{"type": "text", "text": t} for t in _halves(text)]),
        Message(role="assistant", content="a"),
    ]
    places["reasoning"] = lambda text: [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": text},
    ]
    places["tool call"] = lambda text: _tool_talk(renderer, "f", text, "r", "f")
    places["tool name"] = lambda text: _tool_talk(renderer, text, "x", "r", "f")
    places["tool result"] = lambda text: _tool_talk(renderer, "f", "x", text, "f")
    places["tool declaration"] = lambda text: _tool_talk(renderer, "f", "x", "r", text)
    return places


def _among(role: str, text: str) -> list[Message]:
    texts = {"system": "s", "user": "q", "assistant": "a", role: text}
    order = ("system", "user", "assistant") if role == "system" else ("user", "assistant")
    return [Message(role=role, content=texts[role]) for role in order]


def _halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def _tool_talk(
    renderer: Renderer, name: str, argument: str, result: str, declared: str
) -> list[Message]:
    import json

    arguments = json.dumps({"k": argument, argument: [argument]}, ensure_ascii=False)
    body = ToolCall.FunctionBody(name=name, arguments=arguments)
    properties = {declared: {"type": "string", "description": declared}}
    tool: Any = {
        "name": "f",
        "description": declared,
        "parameters": {"type": "object", "properties": properties},
    }
    call = Message(
        role="assistant", content="", tool_calls=[ToolCall(id="a00000000", function=body)]
    )
    answer = Message(role="tool", content=result, tool_call_id="a00000000", name="f")
    talk = [Message(role="user", content="q"), call, answer]
    return [*renderer.create_conversation_prefix_with_tools([tool]), *talk]


def injection_problem(
    renderer: Renderer, talk: Talk, texts: Sequence[str]
) -> tuple[int, str | None]:
    """Check that a conversation has the same control tokens for every text typed into it.

    Returns:
        The number of texts that were rendered (a format may refuse some), and what is wrong.

    Raises:
        RendererError: if the format does not have this place for text.
    """
    from tinker_cookbook.exceptions import RendererError

    is_control = renderer.encoder.is_control
    harmless = [t for t in renderer.render(talk("harmless")).tokens() if is_control(t)]
    count = 0
    for text in texts:
        try:
            tokens = renderer.render(talk(text)).tokens()
        except RendererError:
            continue
        count += 1
        found = [token for token in tokens if is_control(token)]
        if found != harmless:
            names = renderer.encoder.decode(found)
            return count, f"{text!r} gives the control tokens {names!r}"
    return count, None
