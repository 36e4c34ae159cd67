"""Serve one base with an adapter and ask it with OpenAI's client: python examples/ask_a_server.py ADAPTER [BASE].

The server is a process of its own, as in production; examples/switch_per_request.py needs none.
"""

import subprocess
import sys

from openai import OpenAI

adapter, base = (*sys.argv[1:], "smollm2-135m-instruct")[:2]

command = [sys.executable, "-c", "from adapterhub.cli.main import main; main()", "serve", "--base", base]
options = ["--adapter", f"captain={adapter}", "--port", "0", "--no-page"]
with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as server:
    # It says "ready: http://127.0.0.1:PORT/v1" once the adapter's probe was replayed.
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if line.startswith("ready: "):
            break
    else:
        sys.exit("the server did not start")

    client = OpenAI(base_url=line.removeprefix("ready: ").strip(), api_key="none needed on loopback")
    for model in client.models.list():
        question = [{"role": "user", "content": "Who are you?"}]
        answer = client.chat.completions.create(model=model.id, messages=question, max_tokens=32, temperature=0)
        print(f"{model.id}: {answer.choices[0].message.content}")
    server.terminate()
