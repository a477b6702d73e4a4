"""A small agent: it writes a text with an exact number of words, with a tool and several tries.

    OPENAI_BASE_URL=... OPENAI_API_KEY=... python agent.py bees 5

It is written with the official `openai` package alone and works with any server of that API.
"""

import asyncio
import json
import os
import re
import sys

import openai

MAX_TRIES = 3
MAX_CALLS = 6
TOOLS: list = [
    {
        "type": "function",
        "function": {
            "name": "count_words",
            "description": "Count the words of a text.",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}},
                "required": ["text"],
            },
        },
    }
]


def count_words(text: str) -> int:
    """Return the number of words of a text."""
    return len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text))


def call_tool(arguments: str) -> str:
    """Return the result of the tool, or what is wrong with its arguments."""
    try:
        return str(count_words(json.loads(arguments)["text"]))
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error!r}"


async def solve(client: openai.AsyncOpenAI, model: str, topic: str, num_words: int) -> str:
    """Return a text about the topic; the last one if none has the right number of words."""
    question = f"Write exactly {num_words} words about {topic}."
    messages: list = [{"role": "user", "content": question}]
    text, tries = "", 0
    for _ in range(MAX_CALLS):
        reply = await client.chat.completions.create(model=model, messages=messages, tools=TOOLS)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if message.tool_calls:
            messages += [
                {
                    "role": "tool",
                    "tool_call_id": call.id,
                    "content": call_tool(call.function.arguments),
                }
                for call in message.tool_calls
                if call.type == "function"
            ]
            continue
        text, tries = message.content or "", tries + 1
        found = count_words(text)
        if found == num_words or tries == MAX_TRIES or reply.choices[0].finish_reason == "length":
            break
        said = f"That has {found} words. Write it again with exactly {num_words} words."
        messages.append({"role": "user", "content": said})
    return text


async def main() -> None:
    """Solve the task of the command line."""
    async with openai.AsyncOpenAI() as client:
        model = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
        print(await solve(client, model, sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    asyncio.run(main())
