"""The pages of the commands, made of the templates of this package."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def rendered(template: str, **values: Any) -> str:
    """The text of a page. template: the name of its file, which says what values it needs."""
    templates = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    return templates.get_template(template).render(**values)
