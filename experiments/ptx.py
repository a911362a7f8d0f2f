"""The text of a GPU kernel in PTX, as instructions. Called by `ptx_machine`, which runs them.

It reads what XLA's compilers write for Triton kernels, with the assembly that kernels bring along: one entry, registers
and shared memory in nested scopes. Source: NVIDIA, PTX ISA, "Syntax" and "State Spaces, Types, and Variables".
"""

from __future__ import annotations

import re
from typing import NamedTuple

from realm_jax.errors import RealmError

Operand = str | tuple[str, ...]
STATEMENT = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):|(?P<text>[^;{}][^;]*);)")
NAME = re.compile(r"(?<![\w%$.])[A-Za-z_]\w*")


class Instruction(NamedTuple):
    """One instruction: the line of the text that it is in, its opcode with all modifiers, its operands (a tuple of
    names is a vector), and the predicate under which a thread runs it ("": all do), or does not, if `negated`."""

    line: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: str = ""
    negated: bool = False

    def __str__(self) -> str:
        operands = ", ".join(x if isinstance(x, str) else f"{{{', '.join(x)}}}" for x in self.operands)
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {operands}".strip()


class Kernel(NamedTuple):
    """parameters: names of pointers, in order. threads: of a program (PTX: a CTA). body: with branches to the places of
    `labels` in it. shared: name -> where in static shared memory it starts, of `shared_bytes` in all. dynamic: name of
    the shared memory whose size the launch says, which comes after it, or "".
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    body: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]
    shared_bytes: int
    dynamic: str


class Scope(NamedTuple):
    """Between braces: a number of its own, and what the names that it declares are called in the kernel."""

    number: int
    names: dict[str, str]

    def declare(self, name: str) -> str:
        """A name that no other scope has."""
        self.names[name] = name if name.startswith("%") else f"{name}@{self.number}"
        return self.names[name]


def read_kernel(text: str) -> Kernel:
    """The kernel of a PTX text with one entry. RealmError, in one line, for what is not understood."""
    text = re.sub(r"//[^\n]*", "", text)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", text, re.S)
    if not head or text.count(".entry") != 1:
        raise RealmError(f"PTX: {text.count('.entry')} kernels in the text; want 1")
    threads = re.search(r"\.reqntid\s+(\d+)((?:\s*,\s*1\b)*)", head[3])
    if not threads or int(threads[1]) % 32:
        raise RealmError(f"PTX: kernel {head[1]}: want .reqntid, of whole warps")
    dynamic = re.search(r"\.extern\s+\.shared[^;]*?(\w+)\[\]", text[: head.start()])
    reader = _Reader(text, head.end())
    reader.read()
    return Kernel(
        head[1],
        tuple(re.findall(r"(\w+)\s*(?:,|$)", head[2].strip())),
        int(threads[1]),
        tuple(reader.body),
        reader.labels,
        reader.shared,
        reader.shared_bytes,
        dynamic[1] if dynamic else "",
    )


class _Reader:
    """Reads the statements of a kernel's body, which starts at `place` of the text."""

    def __init__(self, text: str, place: int) -> None:
        self.text, self.place, self.scopes = text, place, [Scope(0, {})]
        self.body: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0

    def read(self) -> None:
        """All statements, up to the brace that closes the body."""
        opened, branches = 0, []
        while self.scopes:
            found = STATEMENT.match(self.text, self.place)
            if not found:
                raise RealmError(f"PTX: line {self._line(self.place)}: not understood")
            self.place = found.end()
            if found["open"]:
                opened += 1
                self.scopes.append(Scope(opened, {}))
            elif found["close"]:
                self.scopes.pop()
            elif found["label"]:
                self.labels[self.scopes[-1].declare(found["label"])] = len(self.body)
            elif found["text"].startswith("."):
                self._declare(found["text"], self._line(found.start("text")))
            else:
                self.body.append(self._instruction(found["text"], self._line(found.start("text"))))
                if self.body[-1].opcode.startswith("bra"):
                    branches.append((len(self.body) - 1, list(self.scopes)))
        for place, scopes in branches:  # a label may come after what branches to it
            branch = self.body[place]
            self.body[place] = branch._replace(operands=(_declared(branch.operands[0], scopes),))

    def _line(self, place: int) -> int:
        return self.text.count("\n", 0, place) + 1

    def _declare(self, text: str, line: int) -> None:
        """`.reg .b32 a, b<2>`, or `.shared .align 16 .b8 ring[1024]`."""
        registers = re.match(r"\.reg\s+\.\w+\s+(.*)", text, re.S)
        shared = re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", text)
        if registers:
            for name, many in re.findall(r"([%$\w]+)(?:<(\d+)>)?", registers[1]):
                for own in [f"{name}{i}" for i in range(int(many))] if many else [name]:
                    self.scopes[-1].declare(own)
        elif shared:
            start = -(-self.shared_bytes // int(shared[1])) * int(shared[1])
            self.shared[self.scopes[-1].declare(shared[2])] = start
            self.shared_bytes = start + int(shared[3])
        elif not text.startswith(".pragma"):
            raise RealmError(f"PTX: line {line}: {' '.join(text.split())}: not understood")

    def _instruction(self, text: str, line: int) -> Instruction:
        found = re.match(r"(?:@(!?)([%$\w]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if not found:
            raise RealmError(f"PTX: line {line}: {' '.join(text.split())}: not understood")
        negated, guard, opcode, rest = found.groups()
        if not opcode.startswith("bra"):
            rest = NAME.sub(lambda name: _declared(name[0], self.scopes), rest)
        guard = _declared(guard, self.scopes) if guard else ""
        return Instruction(line, opcode, _operands(rest), guard, negated == "!")


def _declared(name: str, scopes: list[Scope]) -> str:
    """What a name that is used in the last of the scopes is called in the kernel."""
    return next((scope.names[name] for scope in reversed(scopes) if name in scope.names), name)


def _operands(text: str) -> tuple[Operand, ...]:
    """`{a, b}, [c + 4], 1` as (("a", "b"), "[c + 4]", "1")."""
    found: list[Operand] = []
    for vector, one in re.findall(r"\{([^}]*)\}|(\[[^\]]*\]|[^,{}\s]+)", text):
        found.append(tuple(name.strip() for name in vector.split(",")) if vector else one)
    return tuple(found)
