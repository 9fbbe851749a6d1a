"""Checks for packages that come only with an extra of this package, such as "plot"."""

from __future__ import annotations

from importlib.util import find_spec


def expect_extra(extra: str, *modules: str) -> None:
    """Raises ImportError if a module is missing. The message says what to install."""
    for name in modules:
        if find_spec(name) is None:
            raise ImportError(f"{name} is missing: pip install 'mistral_ext[{extra}]'")
