"""A part whose package is missing says what to install."""

import subprocess
import sys

import pytest

from sanic_db_bp import ConfigurationError

WITHOUT_EXTRAS = (
    "errors",
    "health",
    "held_connections",
    "n_plus_one",
    "pagination",
    "server_timing",
    "sql_comments",
)

WITHOUT = """
import sys
sys.modules["{package}"] = None
import sanic_db_bp.contrib.{part}
"""


@pytest.mark.parametrize(
    ("part", "package"),
    [
        ("migrations", "alembic"),
        ("prometheus", "prometheus_client"),
        ("opentelemetry", "opentelemetry"),
        ("opentelemetry", "opentelemetry.instrumentation"),
    ],
)
def test_a_missing_package_is_a_configuration_error_that_names_the_extra(
    part: str, package: str
) -> None:
    """It is told where the part is imported, before anything starts."""
    program = WITHOUT.format(part=part, package=package)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode != 0
    told, _where = ended.stderr.splitlines()[-2:]
    assert told.startswith(f"sanic_db_bp.exceptions.{ConfigurationError.__name__}: ")
    assert told.endswith(f"pip install 'sanic-db-bp[{part}]'")


def test_the_other_parts_need_no_extra() -> None:
    """They run with what the package itself depends on."""
    program = f"""
import sys
sys.modules["prometheus_client"] = sys.modules["opentelemetry"] = sys.modules["alembic"] = None
from sanic_db_bp.contrib import {", ".join(WITHOUT_EXTRAS)}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
