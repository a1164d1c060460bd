"""A part whose package is missing says what to install."""

import importlib
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


@pytest.mark.parametrize(
    ("part", "package"),
    [
        ("migrations", "alembic"),
        ("prometheus", "prometheus_client"),
        ("opentelemetry", "opentelemetry"),
        ("opentelemetry", "opentelemetry.instrumentation.sqlalchemy.engine"),
    ],
)
def test_a_missing_package_is_a_configuration_error_that_names_the_extra(
    part: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told where the part is imported, before anything starts."""
    module = f"sanic_db_bp.contrib.{part}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError) as caught:
        importlib.import_module(module)
    told, _where = str(caught.value).splitlines()
    assert told.endswith(f"pip install 'sanic-db-bp[{part}]'")


def test_the_other_parts_need_no_extra() -> None:
    """They run with what the package itself depends on."""
    program = f"""
import sys
sys.modules["prometheus_client"] = sys.modules["opentelemetry"] = sys.modules["alembic"] = None
from sanic_db_bp.contrib import {", ".join(WITHOUT_EXTRAS)}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
