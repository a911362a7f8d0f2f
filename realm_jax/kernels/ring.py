"""What threads of a kernel read ahead of time, by asynchronous copies to shared memory. Called by `lanes`
and `ahead`.

A warp copies what it alone will read, so nothing waits but for its own copies. A *stage* is what a step reads; the
ring holds the stages of the next few steps. What is put in it, and in which order, the caller says the same way each
step. Source: PTX ISA, "cp.async".
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.kernels import pallas
from realm_jax.kernels.assembly import assembly

COPIES = " ".join(f"mov.b32 ${i}, a;" for i in range(4))  # of one item
PAIRS = "mov.b32 $1, $0; mov.b32 $3, $2;"
Token = jax.Array  # (P,): the address of a thread's first bytes; whoever has it comes after what made it


class Slots(NamedTuple):
    """Which threads of a warp copy an item, and where they all read it.

    count: of places in a warp. own: which one a thread copies to and reads from (P,). copies: whether it copies, bool
    (P,), or None: all do, the same where they share a place. name: of `copies`; places of a ring that have the same
    name have the same.
    """

    count: int
    own: jax.Array
    copies: jax.Array | None = None
    name: str = ""


class Copies(NamedTuple):
    """What threads copy for several places that follow each other in a ring: indices (P,) of the first item, where to
    (P,), counted from the first place of the first of them, and which threads, bool (P,). name: as in `Slots`."""

    at: tuple[jax.Array, ...]
    to: jax.Array
    threads: jax.Array
    name: str


class Place(NamedTuple):
    """Where four items of a thread stand in a ref: `at`, indices (P,) of the first, and `span`, how many there are:
    4 neighbours, 2 neighbours of which each counts for two, or 1 that counts for all. beyond: so many items after that,
    on the last axes. copies: where that is not what the slots say; (): those of a place before bring it."""

    ref: jax.Array
    at: tuple[jax.Array, ...]
    span: int
    slots: Slots
    beyond: int = 0
    copies: Copies | tuple[()] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a thread copies."""
        return max(4, self.span * self.ref.dtype.itemsize)

    def after_rows(self, count: int) -> "Place":
        """The same so many rows later, on the first axis of the ref; an even number."""
        return self._replace(beyond=self.beyond + count * math.prod(self.ref.shape[1:]))

    @property
    def index(self) -> jax.Array:
        """The place of the first item in the flat ref (P,)."""
        return flat_index(self.at, self.ref.shape)


def flat_index(at: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """The place in a flat array of what stands at these indices."""
    index = jnp.zeros_like(at[0])
    for i, size in zip(at, shape, strict=True):
        index = index * size + i
    return index


def can_copy(dtype: jnp.dtype, span: int) -> bool:
    """Whether such items can be copied: 4 to 16 bytes, or an item of two."""
    return span * dtype.itemsize >= 4 or dtype.itemsize == 2


class Ring:
    """Stages of `places` for the warps of a program; one at least, then as many as fit in `most_bytes`."""

    def __init__(self, places: list[Place], warps: int, stages: int, most_bytes: int) -> None:
        self.warps = warps
        order = sorted(range(len(places)), key=lambda i: -places[i].nbytes)  # so that each is aligned to its size
        sizes = [warps * places[i].slots.count * places[i].nbytes for i in order]
        starts = np.cumsum([0, *sizes]).tolist()
        self.stage_bytes = -(-starts.pop() // 16) * 16
        self.starts = [starts[order.index(i)] for i in range(len(places))]
        self.stages = max(1, min(stages, most_bytes // self.stage_bytes))

    @property
    def nbytes(self) -> int:
        return self.stage_bytes * self.stages

    def begin(self) -> Token:
        return shared_array("ring", self.nbytes, 32 * self.warps)

    def put(self, token: Token, step: jax.Array, places: list[Place], live: jax.Array) -> Token:
        """Begin to copy what step `step` will read, if `live` (a scalar); one stage with what is put before `commit`,
        wanted or not."""
        stage = self._stage(step)
        live = jnp.broadcast_to(live, token.shape)
        for group in self._groups(places):
            copies = _copies(group[0][0]).threads
            token = _copy(token, group, stage, (live if copies is None else live & copies).astype(jnp.int32))
        return token

    def _groups(self, places: list[Place]) -> list[list[tuple[Place, int]]]:
        """Places that the same threads copy, and where they start in a stage: under one condition each."""
        groups: dict[str, list[tuple[Place, int]]] = {}
        for place, start in zip(places, self.starts, strict=True):
            if place.copies != ():
                groups.setdefault(_copies(place).name, []).append((place, start))
        return list(groups.values())

    def wait(self, token: Token) -> Token:
        """Until the oldest stage is there, after the newest was put."""
        text = f"cp.async.wait_group {self.stages - 1}; bar.warp.sync 0xffffffff;"
        return asm(text, ["=r", "0"], token, pure=False)

    def take(self, token: Token, step: jax.Array, places: list[Place]) -> list[jax.Array]:
        """What was put for that step: arrays (P, 4) in the types of the refs."""
        stage = self._stage(step)
        return [
            _read(token + (place.slots.own * place.nbytes + stage), start, place)
            for place, start in zip(places, self.starts, strict=True)
        ]

    def take_own(self, token: Token, step: jax.Array, places: list[Place], item: jax.Array) -> list[jax.Array]:
        """Of what was put for that step, item `item` (P,) alone: arrays (P,)."""
        stage = self._stage(step)
        return [
            _read_one(token + (place.slots.own * place.nbytes + stage), start, place, item)
            for place, start in zip(places, self.starts, strict=True)
        ]

    def take_words(
        self, token: Token, step: jax.Array, places: list[Place], number: int, word: jax.Array, count: int
    ) -> jax.Array:
        """Of what was put for that step in place `number`, 1, 2 or 4 words of the warp's, from `word` (P,) on: int32
        (P, 4), zeros after them."""
        slots, size = places[number].slots, places[number].nbytes
        warp = lax.iota(jnp.int32, token.size) // 32
        address = token + (self._stage(step) + warp * (slots.count * size) + 4 * word)
        names = [f"${i}" for i in range(count)]
        wide = f"v{count}." if count > 1 else ""
        text = (
            f"ld.shared.{wide}b32 {'{' + ', '.join(names) + '}' if wide else names[0]}, [$4 + {self.starts[number]}];"
        )
        text += " ".join(f"mov.b32 ${i}, 0;" for i in range(count, 4))
        return asm(text, ["=&r"] * 4 + ["r"], address, results=4, pure=False)

    def _stage(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.stages)) * self.stage_bytes


def shared_array(name: str, nbytes: int, threads: int) -> Token:
    """The address of so many bytes of shared memory."""
    text = f"{{ .shared .align 16 .b8 {name}[{nbytes}]; .reg .b32 o; mov.u32 o, {name}; add.u32 $0, o, $1; }}"
    return asm(text, ["=r", "r"], jnp.zeros((threads,), jnp.int32))


def address_after(token: Token, nbytes: jax.Array) -> jax.Array:
    """The address so many bytes (P,) after, four times (P, 4): for an assembly that stands beside items of four."""
    return asm(f"{{ .reg .b32 a; add.u32 a, $4, $5; {COPIES} }}", ["=&r"] * 4 + ["r"] * 2, token, nbytes, results=4)


def commit(token: Token | None) -> Token | None:
    """All copies begun since the last time are one stage."""
    return None if token is None else asm("cp.async.commit_group;", ["=r", "0"], token, pure=False)


def together(token: Token | None) -> Token | None:
    """What the lanes of a warp have read before it, no copy begun after it overwrites."""
    return None if token is None else asm("bar.warp.sync 0xffffffff;", ["=r", "0"], token, pure=False)


def read_now(place: Place) -> jax.Array:
    """The items (P, 4) of a place, read where they are wanted."""
    shape = place.at[0].shape[0], 4
    at = [jnp.broadcast_to(i[:, None], shape) for i in place.at]
    at[-1] = at[-1] + lax.broadcasted_iota(jnp.int32, shape, 1) * place.span // 4
    for axis in range(len(at) - 1):
        stride = math.prod(place.ref.shape[axis + 1 :])
        at[axis] = at[axis] + place.beyond // stride % place.ref.shape[axis]
    return pallas.load(place.ref.at[tuple(at)])


def read_few(place: Place) -> jax.Array:
    """`read_now` of a place of one or two items of 32 bits, int32, as the others stand (P, 4)."""
    if pallas.interpreting():
        return read_now(place)
    text = few("global", place.span, f"[$4 + {4 * place.beyond}]")
    address, index = [(place.ref, place.index)], place.index
    return asm(text, ["=&r"] * 4 + ["l", "r"], index, addresses=address, results=4)


def few(space: str, span: int, address: str) -> str:
    """Assembly that reads one item or two for four results."""
    if span == 1:
        return f"{{ .reg .b32 a; ld.{space}.b32 a, {address}; {COPIES} }}"
    return f"ld.{space}.v2.b32 {{$0, $2}}, {address}; {PAIRS}"


def _copy(token: Token, group: list[tuple[Place, int]], stage: jax.Array, live: jax.Array) -> Token:
    """Copies under one condition: so their code needs no more than one branch."""
    addresses, targets = {}, {}
    for place, _ in group:
        own = _copies(place)
        addresses.setdefault((id(place.ref), *map(id, own.at)), (place.ref, _index_to_copy(place, own)))
        targets.setdefault((id(own.to), place.nbytes), own.to * place.nbytes + stage)
    first = 1 + len(addresses)  # operands: the result, addresses, token, condition, targets
    lines = [f".reg .b32 to; .reg .pred p; setp.ne.b32 p, ${first + 1}, 0;"]
    for place, start in group:
        own = _copies(place)
        source = 1 + list(addresses).index((id(place.ref), *map(id, own.at)))
        target = first + 2 + list(targets).index((id(own.to), place.nbytes))
        way, beyond = "cg" if place.nbytes == 16 else "ca", place.beyond * place.ref.dtype.itemsize
        lines.append(f"""add.u32 to, $0, ${target};
            @p cp.async.{way}.shared.global [to + {start}], [${source} + {beyond}], {place.nbytes};""")
    constraints = ["=&r", *["l"] * len(addresses), "0", *["r"] * (1 + len(targets))]
    operands = token, live, *targets.values()
    text = f"{{ {' '.join(lines)} }}"
    return asm(text, constraints, *operands, addresses=list(addresses.values()), pure=False)


def _copies(place: Place) -> Copies:
    """What threads copy for a place."""
    return place.copies or Copies(place.at, place.slots.own, place.slots.copies, place.slots.name)


def _index_to_copy(place: Place, own: Copies) -> jax.Array:
    """Of items of two bytes, the pair that it is in."""
    index = flat_index(own.at, place.ref.shape)
    return index & -2 if place.span * place.ref.dtype.itemsize < 4 else index


def _read(address: jax.Array, start: int, place: Place) -> jax.Array:
    size, span = place.ref.dtype.itemsize, place.span
    halves = "and.b32 {0}, {2}, 0xffff; shr.u32 {1}, {2}, 16;"
    operands = [address]
    match span, size:
        case 4, 4:
            text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
        case 4, 2:
            text = "ld.shared.v2.b32 {a, b}, [$4];" + halves.format("$0", "$1", "a") + halves.format("$2", "$3", "b")
        case 4, 1:
            text = "ld.shared.b32 a, [$4];" + " ".join(f"bfe.u32 ${i}, a, {8 * i}, 8;" for i in range(4))
        case ((1 | 2), 4):
            text = few("shared", span, "[$4]")
        case 2, 2:
            text = "ld.shared.b32 a, [$4];" + halves.format("$0", "$2", "a") + PAIRS
        case 1, 2:
            text = "ld.shared.b32 a, [$4]; shr.u32 a, a, $5; and.b32 a, a, 0xffff;" + COPIES
            operands.append((place.index & 1) << 4)
    text = f"{{ .reg .b32 a, b; {text.replace('[$4]', f'[$4 + {start}]')} }}"
    constraints = ["=&r"] * 4 + ["r"] * len(operands)
    bits = asm(text, constraints, *operands, results=4, pure=False, dtype=jnp.uint32)
    if size < 4:
        bits = bits.astype(jnp.dtype(f"uint{8 * size}"))
    return bits if bits.dtype == place.ref.dtype else lax.bitcast_convert_type(bits, place.ref.dtype)


def _read_one(address: jax.Array, start: int, place: Place, item: jax.Array) -> jax.Array:
    """`_read` of one of the four items."""
    size, span = place.ref.dtype.itemsize, place.span
    address = address + (place.index & 1) * 2 if size * span < 4 else address + item * span // 4 * size
    bits = asm(f"ld.shared.u{8 * size} $0, [$1 + {start}];", ["=r", "r"], address, pure=False, dtype=jnp.uint32)
    if size < 4:
        bits = bits.astype(jnp.dtype(f"uint{8 * size}"))
    return bits if bits.dtype == place.ref.dtype else lax.bitcast_convert_type(bits, place.ref.dtype)


def asm(text: str, constraints: list[str], *operands: jax.Array, dtype: jnp.dtype = jnp.int32, **options) -> jax.Array:
    result = pallas.Shape(operands[0].shape, dtype)
    return assembly(text, constraints, result, *operands, **options)
