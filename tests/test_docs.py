"""The manual runs: every fenced block of README.md and docs/ is executed, page by page, in an empty directory.

    ```python                  runs; the blocks of a page share their names
    ```python title=x.py       is written to x.py
    ```text                    right after a python block: what that block printed
    ```console                 `$ ` starts a command, the lines after it are what it prints; one that fails is followed
                               by `$ echo $?` and its exit code

`...` stands for any text, as in doctest.  Blocks that are indented instead of fenced are pictures and do not run.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "text", "console", "yaml"}
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def fences(text: str) -> list[Token]:
    """The fenced blocks of a page."""
    return [token for token in MarkdownIt().parse(text) if token.type == "fence"]


@dataclass
class Page:
    """One page being run: its names, and what its last python block printed."""

    path: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""
    code: int = 0

    def run(self, block: Token) -> None:
        """Run one block; anything else than what the page says is an AssertionError."""
        language, _, rest = block.info.partition(" ")
        line = block.map[0] + 1 if block.map else 0
        where = f"{self.path.relative_to(ROOT)}:{line}"
        assert language in LANGUAGES, f"{where}: a fence of kind {block.info!r}, which nobody would run"
        if rest.startswith("title="):
            Path(rest.removeprefix("title=")).write_text(block.content)
        elif language == "python":
            self.printed = self._python(block.content, line)
        elif language == "text":
            expect(block.content, self.printed, where)
        elif language == "console":
            self._console(block.content, where)

    def _python(self, source: str, line: int) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + source, str(self.path), "exec"), self.names)
        return out.getvalue()

    def _console(self, content: str, where: str) -> None:
        assert content.startswith("$ "), f"{where}: a console block starts with a command"
        for part in content.removeprefix("$ ").split("\n$ "):
            command, _, expected = part.partition("\n")
            assert self.code == 0 or command == "echo $?", f"{where}: exit code {self.code} before {command}"
            expect(expected, self._command(command), f"{where}: {command}")
        assert self.code == 0, f"{where}: exit code {self.code}"

    def _command(self, command: str) -> str:
        if command == "echo $?":
            code, self.code = self.code, 0
            return f"{code}\n"
        if "--plugin" in command:  # the page has imported the plug-in itself, and a name is registered once
            command = f"{sys.executable} -m tamis{command.removeprefix('optimize-model')}"
        if not command.startswith("optimize-model "):
            done = subprocess.run(
                command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
            )
            return done.stdout
        from tamis.runtime.cli import main

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            self.code = main(shlex.split(command)[1:])
        return out.getvalue()


def expect(expected: str, got: str, where: str) -> None:
    """What is printed is what the page says, `...` standing for anything."""
    if not doctest.OutputChecker().check_output(expected, got, LOOSE):
        raise AssertionError(f"{where}: the page says\n{expected}\nbut it prints\n{got}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    page = Page(path)
    for block in fences(path.read_text()):
        page.run(block)


def test_pages_are_reachable() -> None:
    """A page that no other page names is not part of the manual."""
    texts = {path: path.read_text() for path in PAGES}
    for page in PAGES[1:]:
        others = [text for path, text in texts.items() if path != page]
        assert any(page.name in text for text in others), f"{page.relative_to(ROOT)} is linked from nowhere"


def broken(kind: str, content: str) -> Token:
    """A fence as the parser would give it."""
    return fences(f"```{kind}\n{content}\n```\n")[0]


@pytest.mark.parametrize(
    ("kind", "content", "complaint"),
    [
        ("python", "raise AssertionError('was run')", "was run"),
        ("text", "something that was not printed", "the page says"),
        ("console", "$ optimize-model --version\nsomething else", "the page says"),
        ("console", "optimize-model --version", "starts with a command"),
        ("console", "$ optimize-model nowhere.pt2 --check\n...", "exit code 2"),
        ("ruby", "puts 1", "nobody would run"),
    ],
)
def test_the_runner_notices(kind: str, content: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        Page(ROOT / "README.md").run(broken(kind, content))
