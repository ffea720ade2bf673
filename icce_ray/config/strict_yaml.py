"""YAML without the surprises of YAML 1.1.

PyYAML reads ``off`` as false, ``010`` as 8, ``1:30`` as 90 and a date as an object, and of a key that is given twice it
keeps the last. Here such values are refused with the spelling that is meant, and dates stay text.
"""

import re
from typing import Any

import yaml

from icce_ray.config.section import is_utf8

MAX_NODES = 100_000
"""Limit of a document's size with all aliases expanded. A short file with nested aliases can stand for gigabytes."""
MAX_DIGITS = 300
MAX_CHARACTERS = 2**16
"""A config has a few thousand. PyYAML takes seconds for this many."""

_MISREAD = {
    r"(?i)(yes|on)": "is ambiguous; write true",
    r"(?i)(no|off)": "is ambiguous; write false, or null to leave a setting out",
    r"[-+]?0[0-9_]*[1-9][0-9_]*": "would be read as an octal number; write it without the leading 0",
    r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?": "would be read as a number in base 60; write the number itself",
}
"""Words and numbers without quotes, and what to do about them."""


class _Loader(yaml.SafeLoader):
    """Dates and times stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """The value of a YAML document. Raises ValueError: it is not valid YAML, or holds a value that YAML 1.1 would
    misread. One line, with the place."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"not usable: {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return _construct(loader, node)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("not usable: it is nested too deeply") from None


def _construct(loader: _Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (LookupError, AttributeError, TypeError) as error:  # such as `!!bool maybe`
        raise ValueError(f"not valid YAML: a tag (!!) with a value that does not fit it: {error}") from None


def _check(root: yaml.Node) -> None:
    """Refuse values that would be misread, keys that are given twice, and aliases that expand without bound."""
    sizes: dict[int, int] = {}
    """Expanded size of a node by its identity; 0 while its children are being counted."""

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if sizes[id(node)] == 0:
                raise ValueError(f"line {_line(node)}: an alias that contains itself")
            return sizes[id(node)]
        sizes[id(node)] = 0
        total = 1
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                name = str(key.value)
                if isinstance(key, yaml.ScalarNode) and name in seen:
                    raise ValueError(f"line {_line(key)}: {name!r} is given twice, first in line {seen[name]}")
                seen[name] = _line(key)
                total += size(key) + size(value)
        else:
            total += sum(size(child) for child in node.value)
        if total > MAX_NODES:
            raise ValueError(f"line {_line(node)}: more than {MAX_NODES:,} values once its aliases are expanded")
        sizes[id(node)] = total
        return total

    size(root)


def _check_scalar(node: yaml.ScalarNode) -> None:
    text = str(node.value)
    if not is_utf8(text):
        raise ValueError(f"line {_line(node)}: {text!r} holds half of a character, which is no text")
    if node.style is not None:  # quoted
        return
    for pattern, problem in _MISREAD.items():
        if re.fullmatch(pattern, text):
            raise ValueError(f'line {_line(node)}: {text} {problem}, or "{text}" in quotes if it is text')
    if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(text) > MAX_DIGITS:
        raise ValueError(f"line {_line(node)}: a number of {len(text):,} digits; at most {MAX_DIGITS} are read")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
