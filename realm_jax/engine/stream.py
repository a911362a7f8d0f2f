"""One request's text as it comes, for a plain loop or an asynchronous one. Made by `Engine.stream`."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from realm_jax.engine.request import Handle, Server


class Stream(Iterator[str], AsyncIterator[str]):
    """Pieces of text, each made of whole characters; whoever waits for one runs the engine, and so serves all requests.

    handle: of the request. Works with `for` and with `async for` (the engine then runs in a thread). A stream that is
    closed, left by its `with` block, or no longer held by anyone cancels its request. Raises the request's error if it
    failed.
    """

    def __init__(self, engine: Server, handle: Handle):
        self.handle = handle
        self._engine = engine
        self._taken = 0

    def __next__(self) -> str:
        self._engine.advance(self._is_ready)
        piece = self._take()
        if piece is None:
            raise StopIteration
        return piece

    async def __anext__(self) -> str:
        try:
            if not self._is_ready():
                await asyncio.to_thread(self._engine.advance, self._is_ready)
        except asyncio.CancelledError:
            self.close()
            raise
        piece = self._take()
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        self.handle.cancel()
        self._engine.forget(self.handle)

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._engine.abandon(self.handle)

    def _is_ready(self) -> bool:
        return self._taken < len(self.handle.pieces) or self.handle.done

    def _take(self) -> str | None:
        """All the text that has come since the last time; None at the end."""
        pieces = self.handle.pieces[self._taken :]
        self._taken += len(pieces)
        if pieces:
            return "".join(pieces)
        self._engine.forget(self.handle)
        if self.handle.error is not None:
            raise self.handle.error
        return None
