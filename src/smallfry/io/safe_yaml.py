"""Bounded YAML loader for untrusted input, plain values only.

A text of a kilobyte may stand for a billion values, through aliases of aliases, and jsonargparse
imports the class that ``class_path`` names wherever it stands.
"""

import sys
from typing import Any

import jsonargparse
import yaml

MOST_CONFIG = 2**20  # bytes of a configuration
MOST_VALUES = 100_000  # in a configuration, each alias counted as all that it stands for
DEEPEST = 50  # levels of a configuration
YAML_MODE = "bounded_yaml"  # jsonargparse's name for what ``load_yaml`` reads
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str) -> Any:
    """Parse a YAML text as jsonargparse does, to plain values only.

    Raises:
        yaml.YAMLError: Not YAML; with tags of Python's objects; longer, deeper or, with its
            aliases written out, of more values than any configuration; with a key given twice in
            one mapping; or naming a class.
    """
    if len(text) > MOST_CONFIG:
        raise yaml.YAMLError(f"longer than {MOST_CONFIG:,} characters")
    try:
        _measure(text)
        _refuse_duplicate_keys(yaml.compose(text, Loader=_LOADER))
        value = jsonargparse.get_loader("yaml")(text)
        _refuse_in(value)
    except (ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        # what PyYAML makes of numbers and dates that can't be
        raise yaml.YAMLError(f"a value can't be read ({error})") from error
    return value


def _measure(text: str) -> None:
    """Refuse a text that expands too far, before building anything."""
    sizes: dict[str, int] = {}  # of what anchors name
    open_nodes: list[tuple[str | None, int]] = []  # anchor and the values counted before it
    values = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:  # unknown, or inside itself
                raise yaml.YAMLError(f"the alias '{event.anchor}' stands for nothing yet")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        if values > MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MOST_VALUES:,} values")
        if len(open_nodes) > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")


def _refuse_duplicate_keys(node: yaml.Node | None) -> None:
    """Refuse duplicate keys in a mapping; PyYAML would drop the first value."""
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            children.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"'{key.value}' stands twice, in lines {lines[name]} and {line}: join the two"
                )
            lines[name] = line
    elif isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    for child in children:
        _refuse_duplicate_keys(child)


def _refuse_in(value: Any) -> None:
    """Refuse NUL, which is invalid in paths, integers beyond all floats, and classes.

    jsonargparse would import, and could call, what ``class_path`` names.
    """
    if isinstance(value, str) and "\0" in value:
        raise yaml.YAMLError("a text has the character NUL in it, which no setting may have")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise yaml.YAMLError("a number is larger than any setting may be")
    if isinstance(value, dict):
        if "class_path" in value:
            raise yaml.YAMLError("'class_path' names a class, and a configuration may name none")
        for key, inner in value.items():
            _refuse_in(key)
            _refuse_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_in(inner)


jsonargparse.set_loader(YAML_MODE, load_yaml, exceptions=(yaml.YAMLError,))
