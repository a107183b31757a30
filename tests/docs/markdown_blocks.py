"""The code blocks of a Markdown page, and how each is tested.

Python is executed, YAML is read as a configuration of a training run, and the commands of a shell
block are parsed as ``smallfry`` would. A comment right before a block asks for something else:

    <!-- not run: REASON -->      leave it out
    <!-- run -->                  run the commands of a shell block
    <!-- run with OPTIONS -->     the same, with further options behind each command
    <!-- given                    Python that runs before a Python block and that no reader sees,
    CODE -->                      where the text above says in words what is there
"""

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

from smallfry import cli
from smallfry.cli._parser import read
from smallfry.training.config import read_config
from smallfry_runtime.__main__ import main as run_export

ROOT = Path(__file__).parents[2]
SHELL = ("", "sh", "console")
PROSE = ("text",)  # formulas and listings of files: nothing to run
KINDS = ("python", "yaml", *SHELL, *PROSE)
COMMENT = re.compile(r"(not run): (\S.*)|(run)(?: with (.+))?|(given)\n(.+)", re.DOTALL)
FITS = {"": KINDS, "run": SHELL, "given": ("python",)}  # "not run" fits any block


class Block(NamedTuple):
    """A code block of a page."""

    page: Path
    line: int  # of its first line of code
    language: str
    code: str
    wish: str = ""  # what the comment before it asks for: "not run", "run" or "given"
    detail: str = ""  # the reason, the options, or the code

    @property
    def name(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name
        return f"{page}:{self.line}"


class UntestedBlockError(Exception):
    """A block that is neither testable nor excluded."""


def blocks_of(page: Path) -> list[Block]:
    """All code blocks of a page, in their order.

    Raises:
        UntestedBlockError: A block that no test knows, or a comment before one that says nothing.
    """
    found, comment = [], ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            fenced = token.type == "fence"
            language = token.info.strip() if fenced else "indented"
            block = Block(page, token.map[0] + (2 if fenced else 1), language, token.content)
            found.append(_understood(block, comment))
        is_comment = token.type == "html_block" and token.content.startswith("<!--")
        comment = token.content.strip()[4:-3].strip() if is_comment else ""
    return found


def _understood(block: Block, comment: str) -> Block:
    if comment:
        match = COMMENT.fullmatch(comment)
        if match is None:
            raise UntestedBlockError(f"{block.name}: no test knows the comment '{comment}'")
        said = [part for part in match.groups() if part is not None]
        block = block._replace(wish=said[0], detail=said[1] if len(said) > 1 else "")
    if block.wish != "not run" and block.language not in FITS[block.wish]:
        raise UntestedBlockError(
            f"{block.name}: a '{block.language}' block can't be tested{' so' * bool(block.wish)}; "
            f"there are {', '.join(filter(None, KINDS))}, and <!-- not run: REASON --> before it"
        )
    return block


def work_through(block: Block, namespace: dict[str, object]) -> None:
    """Do with a block, in the working directory, what its language and its comment ask for."""
    if block.wish == "not run":
        return
    if block.language == "python":
        if block.wish == "given":
            exec(compile(block.detail, f"{block.name} (given)", "exec"), namespace)
        code = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's line
        exec(compile(code, str(block.page), "exec"), namespace)
    elif block.language == "yaml":
        file = Path("configuration.yaml")
        file.write_text(block.code)
        read_config(file)
    elif block.language in SHELL:
        for command in commands(block.code):
            if block.wish == "run":
                run(command, shlex.split(block.detail))
            else:
                check(command)


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments and prompts."""
    lines = code.replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words]


def check(command: list[str]) -> None:
    """Make sure that a command would be understood, without running it.

    Raises:
        UntestedBlockError: Not a command that can be checked.
        AssertionError: It would not be understood.
    """
    program, *arguments = command
    if program == "smallfry":
        with suppress(SystemExit):  # of --help and --print_config, once they have printed
            read(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        asked = {argument for argument in arguments if "=" not in argument}  # not ARGS=…
        assert asked <= set(targets), f"the Makefile has no {' '.join(asked)}"
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
    else:
        raise UntestedBlockError(
            f"no test can check '{shlex.join(command)}': write <!-- not run: REASON --> before it"
        )


def run(command: list[str], options: list[str]) -> None:
    """Run a command of smallfry, with further options, in this process."""
    program, *arguments = command
    main = {"smallfry": cli.main, "smallfry-runtime": run_export}.get(program)
    assert main is not None, f"only smallfry is run here, not '{shlex.join(command)}'"
    assert main([*arguments, *options]) == 0, shlex.join(command)
