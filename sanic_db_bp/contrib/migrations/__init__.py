"""Migrations: Alembic's commands on the blueprint's own settings and tables.

Needs the extra: ``pip install 'sanic-db-bp[migrations]'``.
"""

from ...exceptions import ConfigurationError

try:
    import alembic  # noqa: F401
except ImportError:
    raise ConfigurationError(
        "Migrations need Alembic. Install it with: pip install 'sanic-db-bp[migrations]'",
        entry="missing-package",
    ) from None

from .blueprint import MigrationsBlueprint
from .errors import MigrationFailed

__all__ = ["MigrationFailed", "MigrationsBlueprint"]
