"""What is said about a name that is not one of those allowed."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, allowed: Iterable[str], where: str = "") -> str:
    """The message about a name that is not allowed, with the nearest one that is.

    Args:
        kind: what it should have named.
        name: as it was given.
        allowed: all names.
        where: what is said behind the name.

    Example:
        >>> from absgd_fast.experiments.choices import unknown
        >>> unknown("noise", "sym", ["symmetric", "asymmetric"])
        "unknown noise 'sym'; did you mean symmetric? use one of symmetric, asymmetric"
    """
    allowed, text = list(allowed), str(name)
    longer = [one for one in allowed if text and one.startswith(text)]
    near = longer if len(longer) == 1 else difflib.get_close_matches(text, allowed, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name!r}{where}; {hint}use one of {', '.join(allowed)}"


def check_choice(kind: str, name: object, allowed: Iterable[str], where: str = "") -> None:
    """Raises ValueError with the message of unknown() unless `name` is allowed."""
    allowed = list(allowed)
    if name not in allowed:
        raise ValueError(unknown(kind, name, allowed, where))
