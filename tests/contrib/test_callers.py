"""The line of the app that is responsible is found, or said not to be known."""

import asyncio

from sanic_db_bp.contrib._callers import calling_line


async def test_a_line_of_the_app_is_named_by_file_number_and_function() -> None:
    """Also if it is called in a thread."""

    def here() -> str:
        return calling_line()

    for line in (here(), await asyncio.to_thread(here)):
        assert line == f"{__file__}:{here.__code__.co_firstlineno + 1} in here"


async def test_where_libraries_alone_run_no_line_is_named() -> None:
    """Nobody has written the lines that a thread begins with."""
    assert await asyncio.to_thread(calling_line) == "a line that is not known"
