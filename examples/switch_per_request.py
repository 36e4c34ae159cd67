"""Choose the adapter in each request, in one process: python examples/switch_per_request.py ADAPTER [BASE]."""

import sys

import adapterhub

adapter, base = (*sys.argv[1:], "smollm2-135m-instruct")[:2]

with adapterhub.LLM(base, adapters={"captain": adapter}, report=print) as llm:
    # The base stays in memory; an adapter is a few rank-16 products more, so switching costs nothing.
    for name in (None, "captain", None):
        answer = llm.chat("Who are you?", adapter=name, max_tokens=32, temperature=0)
        print(f"{name or base}: {answer}")

    # Requests of different adapters share one batch.
    questions = ["Good morning!"] * 4
    for answer in llm.chat_batch(questions, adapters=[None, "captain"] * 2, max_tokens=16, seed=0):
        print(f"{answer.adapters or 'base'}: {answer.num_tokens} tokens, {answer.finish_reason}")
