"""The short list of shapes that the engine's compiled functions come in. Pure arithmetic on the host."""

from dataclasses import dataclass

from realm_jax.decode.buckets import power_of_two

SMALLEST_WINDOW = 128
SMALLEST_CHUNK = 16
PREFILL_ROWS = (1, 4, 16)


@dataclass(frozen=True)
class Shapes:
    """windows: how far attention may have to read while decoding, ascending. prefills: (rows P, tokens T) of chunks."""

    windows: tuple[int, ...]
    prefills: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, slots: int, size: int, prefill_tokens: int) -> "Shapes":
        """For slots of `size` tokens, and about so many prompt tokens between two calls of decoding."""
        windows = []
        window = SMALLEST_WINDOW
        while window < size:
            windows.append(window)
            window *= 2
        longest = max(SMALLEST_CHUNK, min(power_of_two(size), power_of_two(prefill_tokens + 1) // 2))
        prefills, chunk = [], SMALLEST_CHUNK
        while chunk <= longest:
            # More rows than slots only where that saves a shape of its own.
            prefills += [
                (rows, chunk)
                for rows in PREFILL_ROWS
                if rows == 1 or (rows * chunk <= prefill_tokens and rows < 4 * slots)
            ]
            chunk = chunk * 4 if chunk == longest or 4 * chunk <= longest else longest
        return cls((*windows, size), tuple(prefills))

    def window(self, longest: int) -> int:
        """The smallest window for rows of at most so many tokens."""
        return next(w for w in self.windows if w >= min(longest, self.windows[-1]))

    def prefill(self, rows: int, tokens: int) -> tuple[int, int]:
        """The chunk for a prompt with so many tokens left, and up to so many rows in all."""
        chunk = next((t for _, t in self.prefills if t >= tokens), self.prefills[-1][1])
        fitting = [p for p, t in self.prefills if t == chunk]
        return next((p for p in fitting if p >= rows), fitting[-1]), chunk
