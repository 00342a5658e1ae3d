"""A distribution from its name."""
from __future__ import annotations

from typing import Any, Protocol, cast

from alpha_maml.data import DATASETS, Context, Description, Settings
from alpha_maml.data.function import FunctionTasks
from alpha_maml.data.own import Own
from alpha_maml.data.tasks import TaskSizes, TaskSource


class Kind(Protocol):
    """The class of a distribution."""

    @classmethod
    def build(cls, settings: Settings, sizes: TaskSizes, context: Context) -> TaskSource: ...
    @classmethod
    def describe(cls, settings: Settings, ways: int) -> Description: ...


def build(settings: Settings, sizes: TaskSizes, context: Context) -> TaskSource:
    """The distribution that `settings` name. Raises InputError where its files or the task's sizes are wrong."""
    return _kind(settings.name).build(settings, sizes, context)


def describe(settings: Settings, ways: int) -> Description:
    """What a model of it needs to know. Raises InputError where there is no such distribution."""
    return _kind(settings.name).describe(settings, ways)


def _kind(name: str) -> type[Kind]:
    found: Any = DATASETS.find(name)
    if hasattr(found, "build") and hasattr(found, "describe"):
        return found
    makes_tasks = hasattr(found, "task") or not isinstance(found, type)
    return cast("type[Kind]", FunctionTasks if makes_tasks else Own)
