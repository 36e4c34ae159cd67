"""The table of commands: heading, implementing function, summary and example of each. Imports no command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command as `--help` lists it."""

    function: str
    """Implementing function, as `module:function` below `adapterhub.cli`."""
    summary: str
    """First line of the function's docstring, so that `--help` need not import it."""
    example: str
    """A complete command line, shown at the end of the command's help."""


@dataclass(frozen=True)
class Group:
    """A command that only holds other commands."""

    summary: str
    """What the subcommands have in common."""
    commands: Mapping[str, Command]
    """Subcommands by name."""


_BASE = Group(
    "Manage the base models on this machine.",
    {
        "pull": Command(
            "registry.base:base_pull",
            "Download a base model, check it and store its fingerprint.",
            "adapterhub base pull smollm2-135m-instruct",
        ),
        "list": Command("registry.base:base_list", "List the base models on this machine.", "adapterhub base list"),
    },
)
_HUB = Group(
    "Run a Hub of your own.",
    {
        "serve": Command(
            "hub.hubserver:hub_serve", "Run a Hub-compatible server.", "adapterhub hub serve --root ./hub --port 8100"
        ),
        "gc": Command(
            "hub.hubserver:hub_gc",
            "Delete unreferenced objects and abandoned uploads.",
            "adapterhub hub gc --root ./hub",
        ),
    },
)
_FEEDBACK = Group(
    "Export or count collected feedback.",
    {
        "export": Command(
            "serving.feedback:export",
            "Write feedback as training data.",
            "adapterhub feedback export --format dpo -o pairs.jsonl",
        ),
        "stats": Command(
            "serving.feedback:stats", "Count the feedback entries of each kind.", "adapterhub feedback stats --json"
        ),
    },
)

SECTIONS: Mapping[str, Mapping[str, Command | Group]] = {
    "Train": {
        "train": Command(
            "training.train:train",
            "Train an adapter from a recipe.",
            "adapterhub train demo-captain --output ./captain",
        ),
        "recipes": Command(
            "training.recipes:recipes", "List the recipes that come with adapterhub.", "adapterhub recipes --json"
        ),
        "memory": Command(
            "training.memory:memory",
            "Estimate the memory that training and serving a model need.",
            "adapterhub memory smollm2-135m-instruct --rank 16",
        ),
    },
    "Packages": {
        "pack": Command(
            "registry.package:pack",
            "Turn an adapter folder into a package.",
            "adapterhub pack ./captain --license apache-2.0",
        ),
        "verify": Command(
            "registry.package:verify",
            "Verify a package's files, digests and tensors.",
            "adapterhub verify captain --probe",
        ),
        "inspect": Command(
            "registry.package:inspect",
            "Show an adapter's base, method, losses and digest.",
            "adapterhub inspect ./captain --json",
        ),
        "diff": Command(
            "registry.registry:diff",
            "Compare two adapters.",
            "adapterhub diff captain@stable captain@main",
        ),
        "keygen": Command(
            "registry.package:keygen", "Create a key pair to sign adapters with.", "adapterhub keygen ./captain.pem"
        ),
        "sign": Command("registry.package:sign", "Sign an adapter.", "adapterhub sign ./captain --key ./captain.pem"),
    },
    "Registry": {
        "add": Command(
            "registry.registry:add", "Add a package to the local registry.", "adapterhub add ./captain --name captain"
        ),
        "list": Command(
            "registry.registry:list_adapters",
            "List the adapters on this machine or on a Hub.",
            "adapterhub list --json",
        ),
        "search": Command(
            "registry.registry:search",
            "Search for adapters by name and base.",
            "adapterhub search captain --base HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        "resolve": Command(
            "registry.registry:resolve",
            "Print the digest and folder of an adapter.",
            "adapterhub resolve me/captain@main",
        ),
        "promote": Command(
            "registry.registry:promote", "Move an alias to an adapter.", "adapterhub promote captain@main stable"
        ),
        "rollback": Command(
            "registry.registry:rollback",
            "Move an alias back to its previous adapter.",
            "adapterhub rollback captain stable",
        ),
        "history": Command(
            "registry.registry:history",
            "List every move of a name's revisions and aliases.",
            "adapterhub history captain --json",
        ),
        "watch": Command(
            "registry.registry:watch", "Print each move of a name as it happens.", "adapterhub watch captain"
        ),
        "remove": Command(
            "registry.registry:remove", "Remove a revision or alias of a name.", "adapterhub remove captain@old"
        ),
        "gc": Command("registry.registry:gc", "Delete unreferenced packages.", "adapterhub gc --dry-run"),
    },
    "Sharing": {
        "push": Command(
            "hub.hub:push", "Publish an adapter to a Hub as one commit.", "adapterhub push ./captain me/captain"
        ),
        "pull": Command(
            "hub.hub:pull", "Download an adapter from a Hub and verify it.", "adapterhub pull me/captain@main"
        ),
        "mirror": Command(
            "hub.hub:mirror",
            "Copy an adapter and its history to another Hub.",
            "adapterhub mirror me/captain --from http://a:80 --to http://b:80",
        ),
        "lock": Command(
            "hub.hub:write_lock_file",
            "Write a lock file of the adapters that a deployment serves.",
            "adapterhub lock captain=captain@stable --output adapters.lock",
        ),
        "export": Command(
            "hub.hub:export_bundle",
            "Write an adapter to a single .zip file.",
            "adapterhub export captain@stable captain.zip",
        ),
        "import": Command(
            "hub.hub:import_bundle",
            "Verify an exported .zip file and add it to the registry.",
            "adapterhub import captain.zip",
        ),
    },
    "Serving": {
        "serve": Command(
            "serving.serve:serve",
            "Serve one base and many adapters over an OpenAI-compatible API.",
            "adapterhub serve --base smollm2-135m-instruct -a captain=captain",
        ),
        "chat": Command(
            "serving.chat:chat",
            "Chat with a served model in the terminal.",
            "adapterhub chat captain -p 'What is a bowline?' --json",
        ),
        "page": Command(
            "serving.chat:page",
            "Open the browser page for an OpenAI-compatible server.",
            "adapterhub page --url http://127.0.0.1:8000/v1",
        ),
        "demo": Command(
            "serving.serve:demo", "Train, publish, serve and query two small adapters.", "adapterhub demo --exit"
        ),
    },
    "Feedback": {
        "feedback": _FEEDBACK,
        "improve": Command(
            "training.improve:improve",
            "Train a candidate from feedback and offer to promote it.",
            "adapterhub improve captain --method dpo --promote",
        ),
        "ratings": Command(
            "serving.ratings:ratings",
            "Rate models from pairwise votes, with 95 % intervals.",
            "adapterhub ratings votes.jsonl --method bt --json",
        ),
    },
    "This machine": {
        "base": _BASE,
        "hub": _HUB,
        "doctor": Command("tools.doctor:doctor", "Check this machine and suggest fixes.", "adapterhub doctor --json"),
    },
}
"""Heading in `--help` -> commands by name, in the order in which they are listed."""


def examples() -> dict[str, str]:
    """Return every command, with its group's name before it, and its example."""
    found: dict[str, str] = {}
    for entries in SECTIONS.values():
        for name, entry in entries.items():
            nested = entry.commands.items() if isinstance(entry, Group) else ()
            found |= {f"{name} {inner}": command.example for inner, command in nested}
            if isinstance(entry, Command):
                found[name] = entry.example
    return found
