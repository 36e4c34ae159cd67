"""An example for each command, shown at the end of its help: the one place where a reader looks for how to begin."""

from __future__ import annotations

import typer

EXAMPLES = {
    "train": "adapterhub train demo-captain --output ./captain",
    "recipes": "adapterhub recipes --json",
    "memory": "adapterhub memory smollm2-135m-instruct --rank 16",
    "pack": "adapterhub pack ./captain --licence apache-2.0",
    "verify": "adapterhub verify captain --probe",
    "inspect": "adapterhub inspect ./captain --json",
    "add": "adapterhub add ./captain --name captain",
    "list": "adapterhub list --json",
    "resolve": "adapterhub resolve me/captain@main",
    "promote": "adapterhub promote captain@main stable",
    "rollback": "adapterhub rollback captain stable",
    "history": "adapterhub history captain --json",
    "diff": "adapterhub diff captain@stable captain@main",
    "remove": "adapterhub remove captain@old",
    "gc": "adapterhub gc --dry-run",
    "search": "adapterhub search captain --base smollm2-135m-instruct",
    "watch": "adapterhub watch captain",
    "lock": "adapterhub lock captain=captain@stable --output adapters.lock",
    "keygen": "adapterhub keygen ./captain.pem",
    "sign": "adapterhub sign ./captain --key ./captain.pem",
    "mirror": "adapterhub mirror me/captain --from http://a:80 --to http://b:80",
    "export": "adapterhub export captain@stable captain.zip",
    "import": "adapterhub import captain.zip",
    "push": "adapterhub push ./captain me/captain",
    "pull": "adapterhub pull me/captain@main",
    "serve": "adapterhub serve --base smollm2-135m-instruct -a captain=captain",
    "demo": "adapterhub demo --exit",
    "chat": "adapterhub chat captain -p 'What is a bowline?' --json",
    "page": "adapterhub page --url http://127.0.0.1:8000/v1",
    "improve": "adapterhub improve captain --method dpo --promote",
    "ratings": "adapterhub ratings votes.jsonl --method bt --json",
    "doctor": "adapterhub doctor --json",
    "base pull": "adapterhub base pull smollm2-135m-instruct",
    "base list": "adapterhub base list",
    "hub serve": "adapterhub hub serve --root ./hub --port 8100",
    "hub gc": "adapterhub hub gc --root ./hub",
    "feedback export": "adapterhub feedback export --format dpo -o pairs.jsonl",
    "feedback stats": "adapterhub feedback stats --json",
}


def show_examples(app: typer.Typer, before: tuple[str, ...] = ()) -> None:
    """Put its example below each command's help."""
    for command in app.registered_commands:
        called = command.name or (command.callback.__name__.replace("_", "-") if command.callback else "")
        example = EXAMPLES.get(" ".join((*before, called)))
        if example is not None and not command.epilog:
            command.epilog = f"Example: {example}"
    for group in app.registered_groups:
        if group.typer_instance is not None and isinstance(group.name, str):
            show_examples(group.typer_instance, (*before, group.name))
