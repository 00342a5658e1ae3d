"""YAML that can be trusted: no key twice, no aliases that grow without bound."""
from __future__ import annotations

from typing import Any

import yaml

from alpha_maml.errors import first_line

NODES = 10_000  # values that a file may hold, those that aliases repeat counted each time


class Loader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error, and aliases cannot grow without bound."""

    def __init__(self, text: str):
        super().__init__(text)
        self.sizes: dict[yaml.Node, int] = {}  # with all that its aliases stand for

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node: Any = super().compose_node(parent, index)
        if alias and node not in self.sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands for what it is in", problem_mark=mark)
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        self.sizes[node] = 1 + sum(self.sizes[part] for part in parts)
        if self.sizes[node] > NODES:
            raise yaml.MarkedYAMLError(problem=f"it holds more than {NODES} values", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {name.value} stands twice", problem_mark=name.start_mark)
                seen.add(name.value)
        return node


def parsed(text: str) -> Any:
    """What a YAML text holds; raises ValueError, which says why it holds nothing."""
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # PyYAML raises a dozen kinds, such as an IndexError of an empty !!int
        mark = getattr(error, "problem_mark", None)
        place = f", at line {mark.line + 1}" if mark else ""
        raise ValueError(f"{getattr(error, 'problem', None) or first_line(error)}{place}") from None
