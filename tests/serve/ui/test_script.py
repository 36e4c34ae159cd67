"""The files that the page is made of, without a browser."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from serve.ui import script, style

ROOT = Path(__file__).parents[3]


def test_events_call_functions_that_the_script_has() -> None:
    calls = [value for value in vars(script).values() if isinstance(value, str) and value.startswith("(...inputs)")]
    called = {re.search(r"adapterhub\.(\w+)", call)[1] for call in [*calls, script.save_file("a.txt", "text/plain")]}  # type: ignore[index]
    offered = set(re.findall(r"^    (\w+): \(", script.HEAD.partition("window.adapterhub = {")[2], re.MULTILINE))
    assert called == offered


def test_script_is_one_element_whatever_it_holds() -> None:
    assert script.HEAD.startswith("<script>")
    assert script.HEAD.count("</script") == 1
    assert "</style" not in style.CSS


def test_files_of_the_page_are_part_of_the_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    packaged = {path for pattern in listed for path in (ROOT / "serve").glob(pattern)}
    files = [path for path in (ROOT / "serve" / "ui").rglob("*") if path.suffix in (".css", ".js", ".svg", ".html")]
    assert len(files) > 5
    assert set(files) <= packaged
