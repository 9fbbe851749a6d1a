"""Checks for packages that are not always installed, but only with an extra of this package."""

from __future__ import annotations

from importlib.util import find_spec


def expect_extra(extra: str, *modules: str) -> None:
    """Raises ImportError, which says what to install, unless all modules are installed."""
    for name in modules:
        if find_spec(name) is None:
            raise ImportError(f"{name} is missing: pip install 'mistral_ext[{extra}]'")
