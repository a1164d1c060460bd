"""Sanic without a database."""

from .sanic_app import sanic_app as create_app

__all__ = ["create_app"]
