"""Options, settings, scripts and files that pages name within a sentence or a table are there.

Blocks that are run or parsed are tested in ``test_code_blocks``; those that are not run are here.
"""

import re
import shlex
from functools import cache

import pytest
from markdown_blocks import ROOT, SHELL, blocks_of
from markdown_it import MarkdownIt

from smallfry.cli._explain import unknown_option
from smallfry.cli._parser import expand_shorthand, form_of, subcommands_of
from smallfry.cli._verbs import verb_names

FOLDERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "benchmarks/*.md")
PAGES = sorted(page for pattern in FOLDERS for page in ROOT.glob(pattern))
SCRIPTS = ("benchmarks", "campaign", "recipes", "runtime/src")
FOREIGN = {"initial-checkpoint", "input-size", "shm-size"}  # options of timm's script and of Docker
OTHERS = {"count", "import"}  # the verb that a page adds, and the package in Python
EXAMPLES = {"src/smallfry/cli/count.py"}  # a file for the reader to write
SUFFIXES = {"onnx", "safetensors", "packed", "py"}  # model.onnx is a file and no setting
PLACES = "tests|benchmarks|recipes|results|docs|examples|campaign|notebooks|runtime|src"
PLACEHOLDER = re.compile(r"\b[A-Z]+\b|[A-Z]{4,}|…")
SCRIPT = re.compile(rf"(?:python (?:-m )?)?((?:{PLACES})/[\w/]+\.py|campaign)((?: .*)?)")


def codes(page):
    """Return the line and the text of each piece of code that no other test reads."""
    found = []
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        if token.type == "inline":
            spans = [child.content for child in token.children if child.type == "code_inline"]
            found += [(token.map[0] + 1, " ".join(span.split())) for span in spans]
    for block in blocks_of(page) if page.is_relative_to(ROOT / "docs") else ():
        if block.wish == "not run" and block.language in SHELL:
            found += [(block.line, line) for line in block.code.replace("\\\n", " ").splitlines()]
    return found


@cache
def forms():
    """Return the options of every verb, or verb and subcommand, with their types."""
    words = []
    for verb in verb_names():
        subcommands = subcommands_of(verb)
        words += [(verb, name) for name in subcommands] or [(verb,)]
    return {each: form_of(each).types for each in words}


@cache
def options_of_scripts():
    files = [file for folder in SCRIPTS for file in (ROOT / folder).rglob("*.py")]
    return {name for file in files for name in re.findall(r'"--([\w-]+)"', file.read_text())}


def fault_of_command(text):
    """Return what is wrong with the verb or an option of a command."""
    try:
        _, *words = shlex.split(text, comments=True)
    except ValueError:  # a command that the next line goes on with
        return ""
    if not words or words[0].startswith("-") or {words[0].rstrip(",")} & OTHERS:
        return ""
    if words[0].rstrip(",") not in verb_names():
        return f"no verb {words[0]}"
    verb = words[0].rstrip(",")
    subs = subcommands_of(verb)
    chosen = [word for word in words[1:2] if word in subs]
    if subs and not chosen:
        return "" if not words[1:] or PLACEHOLDER.search(words[1]) else f"no {verb} {words[1]}"
    types = forms()[verb, *chosen]
    unknown = unknown_option(expand_shorthand(words[1 + len(chosen) :], types), types)
    return f"no option {unknown}" if unknown else ""


def fault_of_options(text):
    """Return an option, named by itself, that nothing has."""
    for name in re.findall(r"(?<!\S)--([\w.-]+)", text):
        plain = name.rstrip(".")
        taken = any(
            unknown_option(expand_shorthand([f"--{plain}"], types), types) is None
            for types in forms().values()
        )
        if not taken and plain not in options_of_scripts() | FOREIGN:
            return f"no option {name}"
    return ""


def fault_of_script(path, arguments):
    """Return what a call of a script names that is not there."""
    file = ROOT / path / "__main__.py" if path == "campaign" else ROOT / path
    if not file.is_file():
        return "" if path in EXAMPLES else f"no file {path}"
    source = file.read_text()
    wrong = [o for o in re.findall(r"(?<!\S)--([\w-]+)", arguments) if f'"--{o}"' not in source]
    return f"{path} has no option {wrong[0]}" if wrong else ""


def fault_of_setting(text):
    """Return a setting of training runs that is not there."""
    types = forms()[("train",)]
    groups = {name.partition(".")[0] for name in types if "." in name}
    for name in re.findall(r"(?<![\w./-])([a-z_]+\.[a-z_.]+[a-z_])(?![\w/(-])", text):
        group, _, rest = name.partition(".")
        if group not in groups or rest.rpartition(".")[2] in SUFFIXES:
            continue
        if (ROOT / "src/smallfry" / group / f"{rest.partition('.')[0]}.py").is_file():
            continue  # a module
        if name not in types and not any(name.startswith(f"{each}.") for each in types):
            return f"no setting {name}"
    return ""


def fault_of_file(text):
    """Return a file of the project that is not there."""
    for path in re.findall(rf"(?<![\w./-])((?:{PLACES})/[\w./*-]+)", text):
        if not PLACEHOLDER.search(path) and not any(ROOT.glob(path.rstrip("./"))):
            return f"no file {path}"
    return ""


def fault_of(text):
    if text.startswith("smallfry "):
        return fault_of_command(text)
    if text.startswith("--"):
        return fault_of_options(text)
    if script := SCRIPT.fullmatch(text):
        return fault_of_script(*script.groups())
    return fault_of_setting(text) or fault_of_file(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    faults = [f"{line}: {text}: {fault}" for line, text in codes(page) if (fault := fault_of(text))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("smallfry train --epoch 3", "no option epoch"),
        ("smallfry train --data cifar10 --freeze --model.options.pool z", ""),
        ("smallfry trian", "no verb trian"),
        ("smallfry study autoencoders --short", "no study autoencoders"),
        ("smallfry study S --short", ""),
        ("--max_kb", ""),
        ("--max_kbs 3", "no option max_kbs"),
        ("--data.…", ""),
        ("data.limits", "no setting data.limits"),
        ("optimizer.lr 0.1", ""),
        ("model.onnx", ""),
        ("python benchmarks/gpu.py --root DIR --budget 540", ""),
        ("python benchmarks/gpu.py --roots DIR", "benchmarks/gpu.py has no option roots"),
        ("python benchmarks/nothing.py", "no file benchmarks/nothing.py"),
        ("results/nothing.json", "no file results/nothing.json"),
        ("results/digits_vitrm_micro_seed*.json", ""),
        ("tests/test_no*.py", "no file tests/test_no*.py"),
    ],
)
def test_a_name_of_nothing_is_found(text, fault):
    assert fault_of(text) == fault
