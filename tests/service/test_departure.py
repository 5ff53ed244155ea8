"""Clients that leave, over real connections."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from wire import listening, post

from service.api.departure import while_connected

WHOLE = (post(body=b"x"),)
CHUNKED = (post("Transfer-Encoding: chunked\r\n", body=b"1\r\nx\r\n0\r\n\r\n", length=False),)
LARGE = tuple(post(body=bytes(200_000)).partition(b"\r\n\r\n")[part] for part in (0, 1, 2))
"""Of which the server stops reading when it has more than it was asked for."""


async def ask(address, pieces):
    _, writer = await asyncio.open_connection(*address)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.02 if len(pieces) > 1 else 0)
    return writer


@pytest.mark.parametrize("pieces", [WHOLE, CHUNKED, LARGE], ids=["plain", "by h11", "large"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_what_is_done_for_a_client_that_leaves_is_cancelled(pieces, when):
    begun, left, ended, worked = asyncio.Event(), asyncio.Event(), asyncio.Event(), []

    async def work():
        worked.append(True)
        begun.set()
        await asyncio.Event().wait()

    async def app(scope, receive, send):
        request = Request(scope, receive)
        await request.body()
        if when == "before":
            begun.set()
            await left.wait()
        with pytest.raises(ClientDisconnect):
            await while_connected(request, work())
        ended.set()

    async with listening(app) as address:
        writer = await ask(address, pieces)
        await asyncio.wait_for(begun.wait(), 5)
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.02)
        left.set()
        await asyncio.wait_for(ended.wait(), 5)
    if pieces is not CHUNKED and when == "before":
        assert not worked


async def test_who_leaves_when_the_work_is_done_cancels_nothing():
    left, outcome = asyncio.Event(), []

    async def app(scope, receive, send):
        request = Request(scope, receive)
        await request.body()
        assert await while_connected(request, asyncio.sleep(0.001, "done")) == "done"
        try:
            await left.wait()
        except asyncio.CancelledError:
            outcome.append("cancelled")
            raise
        outcome.append("went on")

    async with listening(app) as address:
        writer = await ask(address, WHOLE)
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.05)
        left.set()
        await asyncio.sleep(0.05)
    assert outcome == ["went on"]


async def test_one_connection_is_answered_again_and_again():
    async def app(scope, receive, send):
        request = Request(scope, receive)
        await request.body()
        await Response(await while_connected(request, asyncio.sleep(0.001, b"done")))(scope, receive, send)

    async with listening(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(2):
            writer.write(WHOLE[0])
            assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
