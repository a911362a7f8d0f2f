"""Reading prompts into the cache: in chunks between the calls of decoding, and equal beginnings once.

Host code: decides, and queues commands for the device. Called by the engine.
"""

import time
from collections.abc import Collection

from realm_jax.engine.driver import Driver
from realm_jax.engine.metrics import Metrics
from realm_jax.engine.prefixes import LEAST_PREFIX, PrefixIndex, common_prefix
from realm_jax.engine.seat import Seat
from realm_jax.engine.settings import EngineSettings
from realm_jax.engine.shapes import Shapes


class PromptReader:
    """Brings seats from admission to decoding. index: of the prefix cache."""

    def __init__(self, driver: Driver, shapes: Shapes, asked: EngineSettings, metrics: Metrics):
        self._driver, self._shapes, self._asked, self._metrics = driver, shapes, asked, metrics
        self.index = PrefixIndex(asked.prefix_rows)

    def read(self, seats: Collection[Seat]) -> None:
        """Chunks of prompts: about `prefill_tokens`, or more if nobody could decode otherwise."""
        used = 0
        while used < self._asked.prefill_tokens or not any(seat.ready_at for seat in seats):
            reading = self._placed(seats)
            if not reading:
                return
            rows, chunk = self._shapes.prefill(len(reading), reading[0].left)
            self._fill(reading[:rows], rows, chunk)
            used += rows * chunk

    def _placed(self, seats: Collection[Seat]) -> list[Seat]:
        """Those whose prompts are to be read on, in the order of admission; who need not read is set aside."""
        reading = sorted((s for s in seats if s.ready_at is None), key=lambda s: s.handle.timing.admitted)
        leaders: list[Seat] = []
        for seat in reading:
            if not seat.placed and not any(self._follows(seat, leader) for leader in leaders):
                self._place(seat)
            if seat.placed:
                leaders.append(seat)
                if seat.left == 0:
                    self._finish(seat)
        return [seat for seat in leaders if seat.left]

    def _follows(self, seat: Seat, leader: Seat) -> bool:
        """Whether it pays to wait for what another one is reading: the same beginning."""
        if not self._asked.prefix_rows or seat.adapter != leader.adapter or leader.left == 0:
            return False
        return common_prefix(seat.tokens[:-1], leader.tokens[:-1]) >= LEAST_PREFIX

    def _place(self, seat: Seat) -> None:
        """Begin with what the prefix cache has of the prompt."""
        seat.placed = True
        row, tokens = self.index.find(seat.adapter, seat.tokens[:-1])
        if tokens:
            self._driver.start_from(seat.slot, row, tokens)
            seat.filled = seat.handle.timing.cached = tokens
            self._metrics.prefix(seat.handle, tokens)

    def _fill(self, seats: list[Seat], rows: int, chunk: int) -> None:
        """One chunk of these prompts; rows, chunk: one of the shapes."""
        self._driver.fill([seat.slot for seat in seats], rows, chunk)
        for seat in seats:
            seat.filled += min(seat.left, chunk)
            if seat.left == 0:
                self._finish(seat)

    def _finish(self, seat: Seat) -> None:
        """A prompt is in the cache: the seat decodes from now on, and others may begin with what it has."""
        seat.ready_at = time.perf_counter()
        if not seat.handle.done:
            seat.handle.status = "decode"
        row = self.index.keep(seat.adapter, seat.tokens[:-1])
        if row is not None:
            self._driver.keep(row, seat.slot, seat.filled)
