"""Documents against the program: the CLI page is current, and every command that a document shows exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from adapterhub import errors
from adapterhub.cli.commands import examples
from adapterhub.cli.main import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"(?:^|[`$ ])adapterhub ((?:[a-z]+)(?:[^`\n#|&]*))", re.MULTILINE)


def test_the_cli_page_is_what_the_command_says(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    arguments = ["adapterhub.cli.main", "utils", "docs", "--name", "adapterhub", "--title", "The command adapterhub"]
    subprocess.run(
        [Path(sys.executable).with_name("typer"), *arguments, "--output", str(page)],
        check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    assert (ROOT / "docs" / "cli.md").read_text() == page.read_text(), "run `make docs`"


def _known() -> dict[str, set[str]]:
    """Command path -> its options."""
    found: dict[str, set[str]] = {}

    def walk(command: object, path: tuple[str, ...]) -> None:
        subcommands = getattr(command, "commands", None)
        if subcommands is not None:
            for name, sub in subcommands.items():
                walk(sub, (*path, name))
        else:
            options = [opt for p in command.params for opt in (*p.opts, *p.secondary_opts)]  # type: ignore[attr-defined]
            found[" ".join(path)] = {opt for opt in options if opt.startswith("-")} | {"--help"}

    walk(typer.main.get_command(app), ())
    return found


def test_every_command_has_an_example() -> None:
    assert set(_known()) == set(examples()), "give each command a line in adapterhub/cli/commands.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_shown_exists_with_its_options(document: Path) -> None:
    known = _known()
    for match in _COMMAND.finditer(document.read_text()):
        words = match[1].split()
        if words[0] in ("is", "reads", "does", "needs", "and", "for"):  # prose
            continue
        path = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert path in known or any(name.startswith(f"{path} ") for name in known), match[0]
        options = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(?:=.*)?", word)}
        assert options <= known.get(path, options), match[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_has_a_target(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_format_page_names_every_refusal_of_a_package() -> None:
    page = (ROOT / "docs" / "adapter-format.md").read_text()
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.PackageError | errors.Incompatible):
            is_leaf = not error.__subclasses__()
            assert not is_leaf or error is errors.SignatureInvalid or f"`{error.__name__}`" in page


def test_no_document_or_source_names_a_path_of_a_machine() -> None:
    for path in [*DOCUMENTS, *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]:
        is_ours = not path.relative_to(ROOT).parts[0].startswith(".")
        if is_ours and path.name != "test_docs.py":
            assert not re.search(r"/(?:work|root|tmp/fresh)/", path.read_text()), path
