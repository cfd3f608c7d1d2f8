# SPDX-License-Identifier: Apache-2.0
"""Machine code of a compiled kernel (SASS): its loops, and how many instructions one warp issues.

A backward edge of the control flow closes a loop. Its step is read from the register that its exit compares. If the
compiler has unrolled a loop, the step is a multiple of the source's. Every reachable instruction counts as one issue
slot, guarded or not. Code that only a call leads to (the slow path of a division) does not count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")
_REGISTER = re.compile(r"\b(U?R\d+|U?P\d+)\b")
_NUMBER = re.compile(r"^-?0x[0-9a-f]+$|^-?\d+$")


@dataclass(frozen=True)
class Instruction:
    """One line: the guard (``!P0``, or empty), the operation with its suffixes, and its operands."""

    guard: str
    operation: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.operation.split(".")[0]


@dataclass
class Loop:
    """A loop of the machine code, or as the outermost one the kernel itself.

    Args:
        own: instructions of one iteration outside of the loops in it.
        step: what an iteration adds to the register that the exit compares; 0 where that was not found.
        inner: loops in it, in the order of the code.
    """

    own: int
    step: int = 0
    inner: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Bound:
    """A loop of a kernel's source.

    Args:
        trips: iterations at the size in question; a mean where they differ between programs.
        step: of its variable.
        inner: loops in it, in the order of the source.
    """

    trips: float
    step: int
    inner: tuple[Bound, ...] = ()


def disassembler() -> str | None:
    """Triton's own nvdisasm, None where it has none."""
    from triton import knobs

    try:
        path: str = knobs.nvidia.nvdisasm.path
    except RuntimeError:
        return None
    return path


def disassemble(cubin: bytes) -> str:
    """Text of a compiled kernel.

    Raises:
        RuntimeError: there is no nvdisasm, or it fails.
    """
    tool = disassembler()
    if tool is None:
        raise RuntimeError("sass: nvdisasm is missing; expected it in Triton's package, got none")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # without its analysis of the data flow it takes two thirds of the time
        done = subprocess.run([tool, "-c", "-novliw", "-ndf", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sass: nvdisasm failed: {' '.join(done.stderr.split())}")
    return done.stdout


def read(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in the order of the code, and for each label the position that it marks."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            operands = tuple(part.strip().removesuffix(".reuse") for part in found[4].split(",")) if found[4] else ()
            code.append(Instruction(found[2] or "", found[3], operands))
    if not code:
        raise RuntimeError("sass: the text has no instructions; expected the output of nvdisasm -c")
    return code, labels


def registers(text: str) -> int:
    """Registers of a thread."""
    return 1 + max((int(number) for number in re.findall(r"\bR(\d+)\b", text)), default=0)


def _returns(code: Sequence[Instruction], place: int) -> bool:
    """Whether a call of this place comes back; older GPUs leave some loops by a call that does not."""
    names = [instruction.name for instruction in code[place:] if instruction.guard == ""]
    return next((name for name in names if name in ("EXIT", "RET")), "") == "RET"


def _next(code: Sequence[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Positions at which control may go on after each instruction; what only a call or divergence leads to is left
    out.
    """
    found: list[list[int]] = []
    for n, instruction in enumerate(code):
        after = [n + 1] if n + 1 < len(code) else []
        # a guard that is always true, or none
        always = instruction.guard in ("", "PT", "UPT")
        # a branch may name a second guard before its target
        conditional = not always or len(instruction.operands) > 1 and instruction.name == "BRA"
        target = [labels[name] for name in re.findall(r"\.L_x_\d+", ",".join(instruction.operands)) if name in labels]
        if instruction.operation == "BRA.DIV":
            # taken by a warp that has diverged before a collective
            found.append(after)
        elif instruction.name in ("BRA", "BRX"):
            found.append(target + (after if conditional else []))
        elif instruction.name == "CALL" and target and not _returns(code, target[0]):
            found.append(target + (after if conditional else []))
        elif instruction.name in ("EXIT", "RET"):
            found.append(after if conditional else [])
        else:
            found.append(after)
    return found


def _dominators(following: Sequence[Sequence[int]]) -> dict[int, int]:
    """For each instruction that can be reached, those that every way to it passes, as the bits of a number."""
    seen, stack = {0}, [0]
    while stack:
        for m in following[stack.pop()]:
            if m not in seen:
                seen.add(m)
                stack.append(m)
    order = sorted(seen)
    before: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for m in following[n]:
            before[m].append(n)
    found = dict.fromkeys(order, (1 << len(following)) - 1) | {0: 1}
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            new = found[before[n][0]]
            for m in before[n][1:]:
                new &= found[m]
            new |= 1 << n
            if new != found[n]:
                found[n], changed = new, True
    return found


def _step(code: Sequence[Instruction], body: Iterable[int], exits: Iterable[int]) -> int:
    """What one iteration adds to a register that a way out of the loop depends on; 0 where none is found."""
    writes: dict[str, list[tuple[int, Instruction]]] = {}
    for n in sorted(body):
        # a comparison writes two predicates, and an addition its carries
        for operand in code[n].operands[: 2 if "SETP" in code[n].name else 1]:
            for register in _REGISTER.findall(operand):
                writes.setdefault(register, []).append((n, code[n]))
    wanted = [
        (register, n)
        for n in exits
        for word in (code[n].guard, *code[n].operands)
        for register in _REGISTER.findall(word)
    ]
    compared: list[str] = []
    while wanted:
        predicate, place = wanted.pop(0)
        # a comparison of 64 bits goes on from that of the lower half
        for n, instruction in [write for write in writes.get(predicate, []) if write[0] < place][-1:]:
            for operand in instruction.operands[1:]:
                for register in _REGISTER.findall(operand):
                    if "P" in register:
                        wanted.append((register, n))
                    else:
                        compared.append(register)
    # the upper half of a 64-bit counter moves by one at most
    return max((abs(_increment(writes, register)) for register in compared), default=0)


def _increment(writes: dict[str, list[tuple[int, Instruction]]], register: str) -> int:
    """The sum of constants on the way from a register at the end of an iteration back to itself at its beginning; 0
    where something else is added on the way."""
    total, current = 0, register
    left = {name: [instruction for _, instruction in found] for name, found in writes.items()}
    while left.get(current):
        instruction = left[current].pop()
        numbers = [_number(operand) for operand in instruction.operands[1:] if _NUMBER.match(operand)]
        sources = [operand for operand in instruction.operands[1:] if re.fullmatch(r"U?R\d+", operand)]
        moves = "MOV" in instruction.operation or instruction.name == "R2UR"
        if len(sources) != 1 or not (moves or "ADD" in instruction.name and len(numbers) == 1):
            return 0
        total += 0 if moves else numbers[0]
        current = sources[0]
        if current == register and not left.get(register):
            return total
    return total if current == register else 0


def _number(text: str) -> int:
    value = int(text, 0)
    return value - (1 << 32) if value >= 1 << 31 else value


def loops(text: str) -> Loop:
    """The kernel as a tree of its loops.

    Args:
        text: what ``nvdisasm -c`` prints of one kernel.
    """
    code, labels = read(text)
    following = _next(code, labels)
    dominators = _dominators(following)
    before: dict[int, list[int]] = {n: [] for n in dominators}
    for n in dominators:
        for m in following[n]:
            before[m].append(n)
    bodies: dict[int, set[int]] = {}
    for tail in sorted(dominators):
        for head in following[tail]:
            if not dominators[tail] >> head & 1:
                continue
            body, stack = {head, tail}, [tail]
            while stack:
                n = stack.pop()
                for m in before[n] if n != head else ():
                    if m not in body:
                        body.add(m)
                        stack.append(m)
            bodies[head] = bodies.get(head, set()) | body
    whole = Loop(0)
    # the largest first, so that what a loop lies in is there before it
    placed: list[tuple[set[int], Loop]] = [(set(dominators), whole)]
    for head, body in sorted(bodies.items(), key=lambda item: (-len(item[1]), item[0])):
        loop = Loop(0, _step(code, body, [n for n in body if not body.issuperset(following[n])]))
        parent = [other for around, other in placed if head in around][-1]
        parent.inner.append(loop)
        placed.append((body, loop))
    for n in dominators:
        if code[n].name != "NOP":
            [loop for body, loop in placed if n in body][-1].own += 1
    _sort(whole, {id(loop): min(body) for body, loop in placed})
    return whole


def _sort(loop: Loop, starts: dict[int, int]) -> None:
    loop.inner.sort(key=lambda inner: starts[id(inner)])
    for inner in loop.inner:
        _sort(inner, starts)


def issued(loop: Loop, bounds: Sequence[Bound]) -> float:
    """Instructions that one warp issues.

    Args:
        loop: the kernel, as ``loops`` reads it.
        bounds: the loops of its source, with their trips.

    Raises:
        ValueError: the machine code has fewer loops than the source.
    """
    if len(loop.inner) < len(bounds):
        raise ValueError(f"sass: loops are missing; expected at least {len(bounds)}, got {len(loop.inner)}")
    total, left = float(loop.own), list(loop.inner)
    for n, bound in enumerate(bounds):
        main = left.pop(0)
        unrolled = _unrolled(main, bound)
        total += bound.trips / unrolled * issued(main, bound.inner)
        # more loops than the source has: an unrolled loop is followed by one for what is left over
        while len(left) > len(bounds) - n - 1:
            rest = left.pop(0)
            total += bound.trips % unrolled / _unrolled(rest, bound) * issued(rest, bound.inner)
    return total


def _unrolled(loop: Loop, bound: Bound) -> int:
    """Iterations of the source in one of the machine code. A step that is no multiple counts iterations."""
    if not loop.step or not bound.step:
        return 1
    return loop.step // bound.step if loop.step % bound.step == 0 else loop.step
