"""What the pytest plugin is made of: tests that commit, and leave nothing behind.

The fixtures are in the module ``pytest_sanic_db_bp``, which imports this when one is first used.
"""

from .counting import QueryLog, max_queries
from .leaks import no_leaked_connections
from .lender import Lender
from .link import TestTransactionError
from .scratch import Provision, scratch_database

__all__ = [
    "Lender",
    "Provision",
    "QueryLog",
    "TestTransactionError",
    "max_queries",
    "no_leaked_connections",
    "scratch_database",
]
