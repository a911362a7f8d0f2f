"""The engine's side of the device: holds the state there, and hands it one batch of commands a call.

Commands are queued by `admit`, `start_from`, `fill` and `keep`, and run by `decode`, in a thread of its own: the host
takes as long to dispatch a call as the device to do it, where the host turns the loop over the steps (on a GPU), and
text is handed out meanwhile. Called by the engine, which sees to it that one call is in flight at most.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from realm_jax.decode.drafts import Draft
from realm_jax.engine import device
from realm_jax.engine.admission import admission
from realm_jax.engine.seat import Seat
from realm_jax.engine.settings import EngineSettings
from realm_jax.engine.shapes import Shapes
from realm_jax.lora import Adapter
from realm_jax.model.model import Model


class Driver:
    """The device of one engine. most: tokens that a call can append to a row."""

    def __init__(
        self, model: Model, draft: Draft | None, stack: Adapter | None, slots: int, size: int, asked: EngineSettings
    ):
        self._model, self._draft, self._stack, self._slots, self._asked = model, draft, stack, slots, asked
        self._size = size
        self.most = asked.steps * (1 if draft is None else draft.tokens + 1)
        self._state = device.create(
            model.config,
            draft,
            slots=slots,
            size=size,
            dtype=asked.cache_dtype,
            eog_ids=model.tokenizer.eog_ids if model.tokenizer else (),
            bias=asked.max_logit_bias,
            logprobs=asked.max_logprobs,
        )
        self._prefixes = None
        if asked.prefix_rows:
            rows = (asked.prefix_rows, size, asked.cache_dtype)
            self._prefixes = device.create_prefixes(model.config, draft, *rows)
        self._commands: list[Callable[[], None]] = []
        self._thread = ThreadPoolExecutor(1, "realm-engine")

    def admit(self, seats: Sequence[Seat]) -> None:
        """New rows."""
        config, draft = self._model.config, self._draft
        sizes = (self._slots, self._size, config.vocab_size, config.context_length, self._asked.max_logit_bias)
        arrivals = [(seat.slot, seat.tokens, seat.handle, seat.adapter) for seat in seats]

        def command() -> None:
            self._state = device.admit(self._state, admission(arrivals, *sizes, draft.tokens if draft else 0))

        self._commands.append(command)

    def start_from(self, slot: int, row: int, tokens: int) -> None:
        """The beginning of a prompt from the prefix cache."""

        def command() -> None:
            self._state = device.start_from(self._state, self._prefixes, *map(np.int32, (slot, row, tokens)))

        self._commands.append(command)

    def keep(self, row: int, slot: int, tokens: int) -> None:
        """The beginning of a slot into the prefix cache."""

        def command() -> None:
            self._prefixes = device.keep(self._prefixes, self._state, *map(np.int32, (row, slot, tokens)))

        self._commands.append(command)

    def fill(self, slots: Sequence[int], rows: int, chunk: int) -> None:
        """The next chunk of the prompts in some slots; rows, chunk: one of the shapes."""
        slot_P = np.arange(self._slots, self._slots + rows, dtype=np.int32)  # what is left are numbers past the last
        slot_P[: len(slots)] = slots
        model, draft, stack = self._model, self._draft, self._stack

        def command() -> None:
            self._state = device.prefill(model.params, model.config, draft, self._state, stack, slot_P, chunk)

        self._commands.append(command)

    def decode(self, ending: Sequence[int], window: int) -> "Future[device.Report]":
        """Run the commands, end the rows in some slots, and decode; the report is on the host."""
        end_B = np.zeros(self._slots, bool)
        end_B[list(ending)] = True
        commands, self._commands = self._commands, []
        return self._thread.submit(self._run, commands, end_B, window)

    def compile(self, shapes: Shapes) -> None:
        """Run everything once with nobody in it; only while no slot is taken."""
        self.admit([])
        for rows, chunk in shapes.prefills:
            self.fill([], rows, chunk)
        if self._prefixes is not None:
            self.keep(0, 0, 0)
            self.start_from(0, 0, 0)
        for window in shapes.windows:
            self.decode([], window).result()

    def close(self) -> None:
        """Wait for the call in flight, and give the memory back."""
        self._thread.shutdown()
        self._state = self._prefixes = self._stack = None
        self._commands = []

    def _run(self, commands: Sequence[Callable[[], None]], end_B: np.ndarray, window: int) -> device.Report:
        for command in commands:
            command()
        model = self._model
        self._state, report = device.decode(
            model.params, model.config, self._draft, self._state, self._stack, end_B, self._asked.steps, window
        )
        return jax.device_get(report)
