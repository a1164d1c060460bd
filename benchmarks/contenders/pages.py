"""What the contenders have in common beside the tables: the page of the fortunes, random keys."""

from collections.abc import Iterable, Sequence
from random import randint, sample

from jinja2 import Environment

from benchmarks.models import ADDED_FORTUNE, TWENTY, WORLDS, Fortune

FORTUNES_PAGE = Environment(autoescape=True).from_string(
    "<!DOCTYPE html><html><head><title>Fortunes</title></head><body><table>"
    "<tr><th>id</th><th>message</th></tr>"
    "{% for id, message in fortunes %}<tr><td>{{ id }}</td><td>{{ message }}</td></tr>{% endfor %}"
    "</table></body></html>"
)


def fortunes_page(fortunes: Iterable[Fortune]) -> str:
    """Render all fortunes, and one more, in the order of their texts."""
    return fortunes_page_of_rows([(fortune.id, fortune.message) for fortune in fortunes])


def fortunes_page_of_rows(rows: Sequence[tuple[int, str]]) -> str:
    """The same of pairs of id and text."""
    fortunes = sorted([*rows, (0, ADDED_FORTUNE)], key=lambda fortune: fortune[1])
    return FORTUNES_PAGE.render(fortunes=fortunes)


def any_key() -> int:
    """Give the key of some world."""
    return randint(WORLDS.start, WORLDS.stop - 1)


def any_keys() -> list[int]:
    """Give the keys of twenty worlds, sorted, so that no transactions wait for each other."""
    return sorted(sample(WORLDS, len(TWENTY)))


def any_number() -> int:
    """Give a new number for a world."""
    return randint(1, 10_000)
