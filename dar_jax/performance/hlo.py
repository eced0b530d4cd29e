"""Costs of a compiled program without running it: bytes and collectives, from its HLO.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs. Here every figure
is multiplied by the trip counts of the loops around it, which XLA either announces
(`known_trip_count`) or leaves in the loop's condition, `counter < constant`.

Bytes received of a collective over n devices, each with an operand of V bytes:

    all-gather           V (n - 1)
    reduce-scatter       V (n - 1) / n
    all-reduce           2 V (n - 1) / n
    all-to-all           V (n - 1) / n
    collective-permute   V
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = {
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
"""Bytes that a device receives, from the bytes of its operand and the size of its group."""
SCATTER_FUSION = "all-reduce-scatter"
"""What TPU's compiler calls a reduce-scatter: a fusion of an all-reduce and a slice."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLEE = re.compile(
    r"\b(calls|to_apply|body|condition|\w+_computations?)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "opt-barrier", "partition-id", "replica-id"),
}
"""Instructions that move nothing themselves."""
FUSIONS = ("fusion", "fusion-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str
    """Text between the parentheses."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and group size.

    Attributes:
        kind: a key of `COLLECTIVES`.
        group_size: devices that take part together.
        count: times that one is run.
        bytes: received by each device, altogether.
        on_a_host: devices of a group that share a host; `group_size` where all do.
    """

    kind: str
    group_size: int
    count: int
    bytes: float
    on_a_host: int


class Kernel(NamedTuple):
    """A kernel: its instruction, times that it runs, bytes of one run, and what is fused in it."""

    instruction: Instruction
    runs: int
    bytes: float
    inside: dict[str, Instruction]


class HloProgram:
    """A compiled program, read from its HLO text."""

    def __init__(self, text: str, num_devices: int, per_host: int | None = None):
        """Parse `compiled.as_text()` of a program over `num_devices` devices, `per_host` on each.

        None is all on one host.
        """
        self.num_devices = num_devices
        self._per_host = per_host or num_devices
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.unknown_loops: set[str] = set()
        """Loops whose trip count could not be found; they count as one trip."""
        self._entry = ""
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self._entry = header[2] if header[1] else self._entry
            elif name := _INSTRUCTION.match(line):
                instruction = _parse(line, name)
                current[instruction.name] = instruction
        self._runs = collections.Counter()
        self._fused: set[str] = set()
        self._visit(self._entry, 1)

    def collectives(self) -> list[Collective]:
        """Return the collectives of one run, by kind and group size, those of most bytes first."""
        count, size = collections.Counter(), collections.Counter()
        for computation, instruction, runs in self._communication():
            kind = _kind(instruction)
            scatter = kind == "all-reduce" and SCATTER_FUSION in computation
            kind = "reduce-scatter" if scatter else kind
            members = self._group(instruction)
            group = len(members)
            near = sum(each // self._per_host == members[0] // self._per_host for each in members)
            operands = self._operand_types(computation, instruction)
            operand_bytes = sum(type_bytes(type_) for type_ in operands)
            count[kind, group, near] += runs
            size[kind, group, near] += runs * COLLECTIVES[kind](operand_bytes, group)
        found = [
            Collective(kind, group, times, size[kind, group, near], near)
            for (kind, group, near), times in count.items()
        ]
        return sorted(found, key=lambda each: -each.bytes)

    def memory_traffic(self) -> float:
        """Return the bytes that one run moves between main memory and the cores.

        Every instruction reads its operands and writes its result, a fusion as one instruction;
        slices and updates in place count what they touch. Buffers that TPU's compiler keeps on
        chip (memory space `S(1)`) count nothing, padding neither.
        """
        moved = 0.0
        for computation, instruction, runs in self._instructions():
            if computation not in self._fused and _kind(instruction) not in COLLECTIVES:
                moved += runs * self._traffic(computation, instruction)
        for computation, instruction, runs in self._communication():
            operands = self._operand_types(computation, instruction)
            started = instruction.opcode.endswith("-start")  # whose type repeats the operands
            arrays = [instruction.type] if started else [*operands, instruction.type]
            moved += runs * sum(type_bytes(type_, off_chip=True) for type_ in arrays)
        return moved

    def kernels(self) -> Iterator[Kernel]:
        """Yield what one run starts on a device, without collectives."""
        for computation, instruction, runs in self._instructions():
            opcode = instruction.opcode
            if computation in self._fused or opcode in _FREE or _kind(instruction) in COLLECTIVES:
                continue
            if not opcode.endswith("-done"):
                inside = self._fused_by(instruction) if opcode in FUSIONS else {}
                yield Kernel(instruction, runs, self._traffic(computation, instruction), inside)

    def _instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        for computation, runs in self._runs.items():
            for instruction in self.computations[computation].values():
                yield computation, instruction, runs

    def _communication(self) -> Iterator[tuple[str, Instruction, int]]:
        """Each collective once, with the times that it starts.

        TPU's compiler spreads one over several fusions, whose computation it hides behind, and
        names the chain; its links in between may lie in a loop.
        """
        chains: dict[Any, tuple[str, Instruction, int]] = {}
        for computation, instruction, runs in self._instructions():
            if _kind(instruction) not in COLLECTIVES:
                continue
            links = re.findall(r"(?:chain_id=\"|channel_id=)(\d+)", instruction.attributes)
            key = tuple(links) if "chain_id" in instruction.attributes else instruction.name
            if key not in chains or runs < chains[key][2]:
                chains[key] = (computation, instruction, runs)
        yield from chains.values()

    def _operand_types(self, computation: str, instruction: Instruction) -> list[str]:
        return [self.computations[computation][name].type for name in instruction.operands]

    def _visit(self, name: str, runs: int) -> None:
        self._runs[name] += runs
        for instruction in self.computations[name].values():
            for role, names in _CALLEE.findall(instruction.attributes):
                trips = 1
                if instruction.opcode == "while":
                    trips = self._trip_count(name, instruction)
                for callee in _NAME.findall(names):
                    if instruction.opcode != "call" and role in ("calls", "to_apply"):
                        self._fused.add(callee)
                    self._visit(callee, runs * trips)

    def _trip_count(self, computation: str, loop: Instruction) -> int:
        """Trips of a loop: as announced, or from `counter < constant` in its condition."""
        announced = _TRIPS.search(loop.attributes)
        if announced:
            return int(announced[1])
        callees = dict(_CALLEE.findall(loop.attributes))
        condition = self.computations[callees["condition"].lstrip("%")]
        body = self.computations[callees["body"].lstrip("%")]
        compare = list(condition.values())[-1]
        if compare.opcode == "compare" and "direction=LT" in compare.attributes:
            counter, limit = (condition[name] for name in compare.operands)
            stop = _constant(condition, limit)
            if counter.opcode == "get-tuple-element" and stop is not None:
                index = int(re.findall(r"index=(\d+)", counter.attributes)[0])
                start = self._initial_value(computation, loop, index)
                step = _increment(body, index)
                return math.ceil((stop - start) / step)
        self.unknown_loops.add(loop.name)
        return 1

    def _initial_value(self, computation: str, loop: Instruction, index: int) -> int:
        instructions = self.computations[computation]
        operands = instructions[loop.operands[0]].operands
        value = _constant(instructions, instructions[operands[index]]) if operands else None
        return 0 if value is None else value

    def _group(self, instruction: Instruction) -> list[int]:
        """Devices of the first group."""
        attributes = instruction.attributes
        iota = re.search(
            r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
        )
        if iota:
            shape = [int(side) for side in iota[2].split(",")]
            order = [int(axis) for axis in iota[3].split(",")] if iota[3] else None
            devices = np.arange(math.prod(shape)).reshape(shape).transpose(order)
            return devices.ravel()[: int(iota[1])].tolist()
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
        if listed:
            return [int(device) for device in listed[1].split(",")]
        mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
        if mesh:  # TPU's, whose hosts are no matter
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
            return list(range(math.prod(int(part or sizes[axis]) for axis, part in axes)))
        return list(range(self.num_devices))

    def _traffic(self, computation: str, instruction: Instruction) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0.0
        if opcode in FUSIONS:
            return self._fusion_traffic(self._fused_by(instruction))
        operands = self._operand_types(computation, instruction)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * type_bytes(instruction.type, off_chip=True)
        if opcode == "dynamic-update-slice":
            return 2 * type_bytes(operands[1], off_chip=True)
        if opcode.endswith("-start") and operands:  # of a copy or a slice; its type repeats them
            source = type_bytes(operands[0])
            is_read = type_bytes(operands[0], off_chip=True) > 0
            written = type_bytes(instruction.type, off_chip=True) - source * is_read
            return written + (type_bytes(instruction.type) - source) * is_read
        return sum(type_bytes(type_, off_chip=True) for type_ in [*operands, instruction.type])

    def _fused_by(self, fusion: Instruction) -> dict[str, Instruction]:
        callees = dict(_CALLEE.findall(fusion.attributes))
        return self.computations[callees["calls"].lstrip("%")]

    def _fusion_traffic(self, fused: dict[str, Instruction]) -> float:
        root = list(fused.values())[-1]
        results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        parameters = [each for each in fused.values() if each.opcode == "parameter"]
        moved = sum((_written(fused, result) for result in results), start=0.0)
        return moved + sum(
            self._read(fused, each) for each in parameters if type_bytes(each.type, off_chip=True)
        )

    def _read(self, fused: dict[str, Instruction], value: Instruction) -> float:
        """Bytes of a fusion's parameter that its users look at."""
        whole, total = type_bytes(value.type), 0.0
        for user in fused.values():
            for position, operand in enumerate(user.operands):
                if operand == value.name:
                    total += self._read_by(fused, user, position, whole)
        return min(total, whole)

    def _read_by(
        self, fused: dict[str, Instruction], user: Instruction, position: int, whole: float
    ) -> float:
        if user.opcode == "tuple" or _kind(user) in COLLECTIVES:
            return 0.0  # handed through
        if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
            return type_bytes(user.type)
        if user.opcode == "dynamic-update-slice" and position == 0:
            return 0.0
        if user.opcode == "bitcast":
            return self._read(fused, user)
        if user.opcode == "fusion":
            inner = self._fused_by(user)
            parameters = [each for each in inner.values() if each.opcode == "parameter"]
            (parameter,) = (each for each in parameters if each.arguments == str(position))
            return self._read(inner, parameter)
        return whole


def type_bytes(type_: str, *, off_chip: bool = False) -> float:
    """Bytes of an HLO type such as `(f32[2,3]{1,0}, bf16[8]{0:T(128)S(1)})`.

    Args:
        type_: the type.
        off_chip: leave out arrays in another memory space than the main memory.
    """
    total = 0.0
    for dtype, shape, layout in _ARRAY.findall(type_):
        if off_chip and re.search(r"S\([1-9]", layout):
            continue
        total += _itemsize(dtype) * math.prod(int(side) for side in shape.split(",") if side)
    return total


def type_shape(type_: str) -> list[int]:
    """Shape of the first array of an HLO type."""
    (_, shape, _), *_ = _ARRAY.findall(type_)
    return [int(side) for side in shape.split(",") if side]


def _itemsize(dtype: str) -> float:
    if dtype == "pred":
        return 1.0
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0.0


def _kind(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start")


def _parse(line: str, name: re.Match[str]) -> Instruction:
    start = name.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    close = _closing(line, opening)
    arguments = line[opening + 1 : close - 1]
    return Instruction(
        name=name[1],
        type=line[start:end],
        opcode=line[end:opening].strip(),
        operands=tuple(_NAME.findall(arguments)),
        attributes=line[close:],
        arguments=arguments,
    )


def _closing(line: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in HLO: {line[:80]}")


def _constant(instructions: dict[str, Instruction], instruction: Instruction) -> int | None:
    """The integer that an instruction copies, if it is one."""
    while instruction.opcode in ("copy", "bitcast"):
        instruction = instructions[instruction.operands[0]]
    if instruction.opcode == "constant" and instruction.arguments.isdecimal():
        return int(instruction.arguments)
    return None


def _increment(body: dict[str, Instruction], index: int) -> int:
    """What a loop's body adds to its counter, element `index` of its result; 1 if it is hidden."""
    root = list(body.values())[-1]
    if root.opcode == "tuple":
        add = body[root.operands[index]]
        if add.opcode == "add":
            steps = [_constant(body, body[name]) for name in add.operands]
            return next((step for step in steps if step), 1)
    return 1


def _written(fused: dict[str, Instruction], result: Instruction) -> float:
    """Bytes of a fusion's result that are new."""
    if not type_bytes(result.type, off_chip=True):
        return 0.0
    while result.opcode == "bitcast":
        result = fused[result.operands[0]]
    if result.opcode == "parameter" or _kind(result) in COLLECTIVES:
        return 0.0  # handed through
    if result.opcode == "dynamic-update-slice":
        return type_bytes(fused[result.operands[1]].type)
    return type_bytes(result.type)
