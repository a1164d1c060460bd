"""Handlers of every kind get the same transaction."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sanic import HTTPResponse, Request, text
from sanic.views import HTTPMethodView
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.databases import on_postgresql
from tests.handlers.helpers import OutOfStock
from tests.serving import serving
from tests.shop import Item, Observer, Shop, settled


def _plain(request: Request, status: int, session: Session) -> HTTPResponse:
    session.add(Item(name="apple"))
    session.flush()
    if status == 500:
        raise OutOfStock
    return text("answered", status)


async def _coroutine(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
    session.add(Item(name="apple"))
    await session.flush()
    if status == 500:
        raise OutOfStock
    return text("answered", status)


async def _coroutine_with_plain(request: Request, status: int, session: Session) -> HTTPResponse:
    return _plain(request, status, session)


async def _on_request(request: Request, status: int) -> HTTPResponse:
    return await _coroutine(request, status, request.ctx.session)


def _plain_on_current(request: Request, status: int) -> Awaitable[HTTPResponse]:
    return _on_request(request, status)


class _View(HTTPMethodView):
    def post(self, request: Request, status: int, session: Session) -> HTTPResponse:
        return _plain(request, status, session)

    async def put(self, request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        return await _coroutine(request, status, session)


class _Shelf:
    async def method(self, request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        return await _coroutine(request, status, session)

    def plain_method(self, request: Request, status: int, session: Session) -> HTTPResponse:
        return _plain(request, status, session)


class _Callable:
    __name__ = "callable_object"

    async def __call__(self, request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        return await _coroutine(request, status, session)


def _with_extra(request: Request, status: int, session: Session, extra: str) -> HTTPResponse:
    assert extra == "extra"
    return _plain(request, status, session)


def _decorated(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    async def around(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs)

    return around


KINDS: dict[str, Any] = {
    "plain": _plain,
    "coroutine": _coroutine,
    "coroutine_with_plain": _coroutine_with_plain,
    "on_request": _on_request,
    "plain_on_request": _plain_on_current,
    "view": _View.as_view(),
    "partial": functools.partial(_with_extra, extra="extra"),
    "bound_method": _Shelf().method,
    "plain_bound_method": _Shelf().plain_method,
    "callable": _Callable(),
    "decorated": _decorated(_coroutine),
}


@pytest.mark.parametrize("kind", KINDS)
@on_postgresql
async def test_handlers_of_every_kind(app: Shop, observer: Observer, kind: str) -> None:
    """Whatever a handler is, it commits on success and rolls back on an error."""
    app.add_route(KINDS[kind], "/<status:int>", methods=["POST", "PUT"], name=kind)
    async with serving(app) as client:
        assert (await client.post("/500")).status_code == 500
        assert (await client.post("/400")).status_code == 400
        assert observer.names() == []
        assert (await client.put("/201")).status_code == 201
        assert observer.names() == ["apple"]
        await settled(app, observer)
