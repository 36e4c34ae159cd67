"""Scale an adapter, and add two of them in one request: python examples/mix.py FIRST SECOND [BASE]."""

import sys

import adapterhub

first, second, base = (*sys.argv[1:], "smollm2-135m-instruct")[:3]

with adapterhub.LLM(base, adapters={"first": first, "second": second}) as llm:
    # 0 is the base, 1 the adapter as it was trained; between them its influence grows.
    for scale in (0.0, 0.5, 1.0):
        print(scale, llm.chat("Who are you?", adapter={"first": scale}, max_tokens=24, temperature=0))

    # Updates add up: W + 0.7 * B1 A1 + 0.3 * B2 A2, for this request only.
    mixed = llm.chat("Who are you?", adapter={"first": 0.7, "second": 0.3}, max_tokens=24, temperature=0)
    print(f"{len(mixed.adapters)} adapters: {mixed}")
