#!/usr/bin/env python3
"""Check that the official `openai` package talks to `sacpo serve`: chats, streams, several answers, errors as their classes.

    python scripts/check_openai_client.py MODEL

Starts the server itself, on loopback with a free port, and stops it. MODEL must have a chat template; SmolLM2-135M-Instruct
takes two minutes on two cores. Needs `cargo build --release`.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai

SACPO = Path(__file__).resolve().parent.parent / "target/release/sacpo"
KEY = "a-key"
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


def check(what, holds):
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        sys.exit(1)


def raises(what, kind, call, code=None, status=None):
    try:
        call()
    except openai.APIError as error:
        same = type(error) is kind and code == error.code and status in (None, error.status_code)
        check(f"{what}: {type(error).__name__}, code {error.code}: {error}", same)
    else:
        check(f"{what}: no error", False)


def chat(client):
    create = client.chat.completions.create

    def ask(**options):
        return create(**{"model": "local", "messages": MESSAGES, "max_tokens": 40} | options)

    check("models.list", [model.id for model in client.models.list()] == ["local"])
    check("models.retrieve", client.models.retrieve("local").owned_by == "sacpo")

    greedy = ask(temperature=0)
    text = greedy.choices[0].message.content
    check(f"chat: {text!r}, {greedy.choices[0].finish_reason}, {greedy.usage.total_tokens} tokens", bool(text))
    check("greedy is the same again", ask(temperature=0).choices[0].message.content == text)
    short = ask(temperature=0, max_tokens=3)
    check("max_tokens", (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3))

    three = ask(n=3, seed=1)
    texts = [choice.message.content for choice in three.choices]
    check("n=3 gives three different answers", len(set(texts)) == 3 and [c.index for c in three.choices] == [0, 1, 2])
    check("the same seed gives the same answers", [c.message.content for c in ask(n=3, seed=1).choices] == texts)

    # a high temperature writes characters of several bytes, which come token by token
    for seed in range(8):
        hot = {"seed": seed, "temperature": 1.8, "stop": [" the", "\n"]}
        whole = ask(**hot)
        parts, finish, usage = [], None, None
        for chunk in ask(**hot, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                finish = choice.finish_reason or finish
        text_of_parts, choice = "".join(parts), whole.choices[0]
        same = (text_of_parts, finish, usage) == (choice.message.content, choice.finish_reason, whole.usage)
        check(f"stream, seed {seed}: {len(parts)} parts, {finish}, {len(text_of_parts.encode())} bytes", same)
    with client.chat.completions.stream(model="local", messages=MESSAGES, temperature=0, max_tokens=40) as stream:
        check("the stream helper", stream.get_final_completion().choices[0].message.content == text)

    refused = openai.BadRequestError
    raises("a wrong type", refused, lambda: ask(temperature="hot"))
    raises("tools", refused, lambda: ask(tools=[{"type": "function"}]), "unsupported_parameter")
    raises("logprobs", refused, lambda: ask(logprobs=True), "unsupported_parameter")
    raises("JSON mode", refused, lambda: ask(response_format={"type": "json_object"}), "unsupported_parameter")
    endless = [{"role": "user", "content": "word " * 20_000}]
    raises("a long prompt", refused, lambda: ask(messages=endless), "context_length_exceeded")
    raises("another model", openai.NotFoundError, lambda: ask(model="gpt-4o"), "model_not_found")
    raises("another route", openai.NotFoundError, lambda: client.embeddings.create(model="local", input="a"))
    huge = [{"role": "user", "content": "x" * (5 << 20)}]
    raises("a huge body", openai.APIStatusError, lambda: ask(messages=huge), status=413)
    other = client.with_options(api_key="another")
    raises("a wrong key", openai.AuthenticationError, lambda: other.models.list(), "invalid_api_key")


async def at_once(url, messages):
    """Eight requests, of which four are left after some tokens; then more than the queue holds."""
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

        async def ask(seed):
            options = {"model": "local", "messages": messages, "seed": seed, "max_tokens": 24}
            return (await client.chat.completions.create(**options)).choices[0].message.content

        async def leave():
            options = {"model": "local", "messages": messages, "max_tokens": 1500}
            stream = await client.chat.completions.create(**options, stream=True)
            async for _ in stream:
                break
            await stream.close()

        alone = [await ask(seed) for seed in range(4)]
        together = await asyncio.gather(*(ask(seed) for seed in range(4)), *(leave() for _ in range(4)))
        check("requests at once are answered as alone, beside clients that leave", together[:4] == alone)
        crowd = await asyncio.gather(*(ask(seed) for seed in range(40)), return_exceptions=True)
        full = [error for error in crowd if isinstance(error, openai.InternalServerError)]
        answered = [text for text in crowd if isinstance(text, str)]
        check(
            f"a full queue: {len(answered)} answered, {len(full)} refused",
            bool(answered and full) and len(full) + len(answered) == 40 and {e.status_code for e in full} == {503},
        )


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    command = [SACPO, "serve", sys.argv[1], "--name", "local", "--port", "0", "--json", "--api-key-env", "CHECK_KEY"]
    command += ["--batch-size", "8", "--queue", "8"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"CHECK_KEY": KEY}, text=True)
    try:
        url = json.loads(server.stdout.readline())["base_url"]
        print(f"openai {openai.__version__}, {url}")
        chat(openai.OpenAI(base_url=url, api_key=KEY, max_retries=0))
        asyncio.run(at_once(url, MESSAGES))
        start = time.monotonic()
        server.send_signal(signal.SIGINT)
        check("Ctrl-C ends the server", server.wait(timeout=30) == 0)
        print(f"     after {time.monotonic() - start:.2f} s")
    finally:
        server.kill()


if __name__ == "__main__":
    main()
