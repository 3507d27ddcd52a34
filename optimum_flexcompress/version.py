"""The version of the package, on its own so that packaging can read it without importing anything."""

from __future__ import annotations


__version__ = "0.1.0.dev0"
