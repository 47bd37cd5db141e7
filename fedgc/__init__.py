"""Federated face recognition whose leakage is measured."""

__version__ = "0.1.0"
