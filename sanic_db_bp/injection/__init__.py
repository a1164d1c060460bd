"""What is injected by annotation, and where; the only package that knows sanic-ext."""

from .inject_session import inject_session
from .installation import bridge_dependencies, install

__all__ = ["bridge_dependencies", "inject_session", "install"]
