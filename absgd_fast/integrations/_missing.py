"""The error of a module of this package whose framework is not installed."""

from __future__ import annotations


def without(module: str, needed: str) -> ImportError:
    """The ImportError of a module whose framework cannot be imported.

    Args:
        module: the name of the module, as in ``absgd_fast.integrations.<module>``.
        needed: the package and the version that the tests run with, such as "lightning 2.6".

    >>> without("lightning", "lightning 2.6").msg.split(";")[0]
    'absgd_fast.integrations.lightning: lightning cannot be imported, and this module needs it (tested with lightning 2.6)'
    """
    package = needed.split()[0]
    return ImportError(
        f"absgd_fast.integrations.{module}: {package} cannot be imported, and this module needs it (tested with {needed});"
        f" install it with `pip install {package}`, or all frameworks with `pip install absgd_fast[integrations]`"
    )
