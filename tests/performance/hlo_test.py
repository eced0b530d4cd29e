"""Costs of programs small enough to count by hand: loops, collectives, memory."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dar_jax.parallel.chips import Chip
from dar_jax.performance.hlo import Collective, HloProgram, type_bytes
from dar_jax.performance.kernels import START, kernels_of

DEVICES = 8
VECTOR = 128
BYTES = 4 * VECTOR
"""Of the vector that each device holds."""


def compiled(per_device, *, out=None):
    """The program of `per_device` on a vector of 128 numbers on each of 8 devices."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("d")
    function = jax.shard_map(
        per_device, mesh=mesh, in_specs=split, out_specs=out or split, check_vma=False
    )
    x = jax.ShapeDtypeStruct((DEVICES * VECTOR,), jnp.float32, sharding=NamedSharding(mesh, split))
    return HloProgram(jax.jit(function).lower(x).compile().as_text(), DEVICES)


def repeated(trips, function):
    return lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, None, length=trips)[0]


ADD = functools.partial(jax.lax.psum, axis_name="d")
ROUND = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]
GATHER = lambda x: jax.lax.all_gather(x, "d", tiled=True)[:VECTOR] + 1  # noqa: E731
SCATTER = lambda x: jax.lax.psum_scatter(jnp.tile(x, DEVICES), "d", tiled=True)  # noqa: E731
HAND_COUNTS = {
    "once": (ADD, "all-reduce", 1, 2 * BYTES * 7 / 8),
    "5 trips": (repeated(5, ADD), "all-reduce", 5, 5 * 2 * BYTES * 7 / 8),
    "3 x 5 trips": (repeated(3, repeated(5, ADD)), "all-reduce", 15, 15 * 2 * BYTES * 7 / 8),
    "gather": (repeated(4, GATHER), "all-gather", 4, 4 * BYTES * 7),
    "scatter": (repeated(4, SCATTER), "reduce-scatter", 4, 4 * DEVICES * BYTES * 7 / 8),
    "permute": (
        repeated(6, lambda x: jax.lax.ppermute(x, "d", ROUND)),
        "collective-permute",
        6,
        6 * BYTES,
    ),
}


@pytest.mark.parametrize("name", HAND_COUNTS)
def test_collectives_count_with_the_trips_of_their_loops(name):
    function, kind, count, size = HAND_COUNTS[name]
    program = compiled(function)
    assert program.collectives() == [Collective(kind, DEVICES, count, float(size), DEVICES)]
    assert not program.unknown_loops


def test_no_collectives_without_communication():
    assert compiled(jnp.sin).collectives() == []


TPU_TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[8,16]{1,0:T(8,128)} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = f32[2,16]{1,0:T(8,128)} slice(%all-reduce.9), slice={[0:2], [0:16]}
}

%condition (c: (u32[], bf16[16,256])) -> pred[] {
  %limit = u32[]{:T(128)} constant(10)
  %c = (u32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (s: (u32[], bf16[16,256])) -> (u32[], bf16[16,256]) {
  %s = (u32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%s), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %x = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %start = (bf16[16,256], bf16[16,1024]) all-gather-start(%x), GROUPS
  %done = bf16[16,1024]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  ROOT %result = (u32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %x)
}

ENTRY %main (g: f32[8,16], x0: bf16[16,256]) -> f32[2,16] {
  %g = f32[8,16]{1,0:T(8,128)} parameter(0)
  %x0 = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %first = u32[]{:T(128)} constant(4)
  %copy = u32[]{:T(128)} copy(%first)
  %init = (u32[]{:T(128)}, bf16[16,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%copy, %x0)
  %while.1 = (u32[], bf16[16,256]{1,0:S(1)}) while(%init), condition=%condition, body=%body
  ROOT %scattered = f32[2,16]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
"""What TPU's compiler writes: no trip counts (this loop goes 4, 6, 8), groups as mesh axes,
reduce-scatters as fusions."""


MESH_GROUPS = "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}"


def test_programs_of_the_tpu_compiler_are_understood():
    text = TPU_TEXT.replace("GROUPS", MESH_GROUPS)
    found = HloProgram(text, DEVICES).collectives()
    assert found == [
        Collective("all-gather", 4, 3, 3.0 * 16 * 256 * 2 * 3, 4),
        Collective("reduce-scatter", 4, 1, 8 * 16 * 4 * 3 / 4, 4),
    ]


@pytest.mark.parametrize(
    ("groups", "size", "on_a_host"),
    [
        ("replica_groups=[2,4]<=[8]", 4, 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 1),
        ("replica_groups={{0,1,4,5},{2,3,6,7}}", 4, 2),
        ("replica_groups={}", 8, 4),
    ],
)
def test_groups_are_told_by_how_they_lie_on_hosts(groups, size, on_a_host):
    text = TPU_TEXT.replace("GROUPS", groups)
    (found, *_) = HloProgram(text, DEVICES, per_host=4).collectives()
    assert (found.group_size, found.on_a_host) == (size, on_a_host)


CHAIN_TEXT = """\
%row (w: f32[50,8], n: s32[]) -> f32[1,8] {
  %w = f32[50,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%w, %n), dynamic_slice_sizes={1,8}
}

%part (q: f32[2,8], r: f32[8,8], v: f32[50,8], m: s32[]) -> (f32[8,8], f32[1,8]) {
  %q = f32[2,8]{1,0} parameter(0)
  %r = f32[8,8]{1,0} parameter(1)
  %v = f32[50,8]{1,0} parameter(2)
  %m = s32[]{:S(2)} parameter(3)
  %gather.1 = f32[8,8]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, {chain_id="0"}
  %inner = f32[1,8]{1,0} fusion(%v, %m), kind=kLoop, calls=%row
  %twice = f32[1,8]{1,0} add(%inner, %inner)
  ROOT %out = (f32[8,8]{1,0}, f32[1,8]{1,0}) tuple(%gather.1, %twice)
}

%first (q: f32[2,8]) -> f32[8,8] {
  %p = f32[2,8] parameter(0)
  ROOT %gather.0 = f32[8,8] all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, {chain_id="0"}
}

%do (c: (f32[2,8], f32[8,8], f32[50,8], s32[])) -> f32[8,8] {
  %c = (f32[2,8], f32[8,8], f32[50,8], s32[]) parameter(0)
  %a = f32[2,8]{1,0} get-tuple-element(%c), index=0
  %b = f32[8,8]{1,0} get-tuple-element(%c), index=1
  %d = f32[50,8]{1,0} get-tuple-element(%c), index=2
  %e = s32[]{:S(2)} get-tuple-element(%c), index=3
  ROOT %middle = (f32[8,8]{1,0}, f32[1,8]{1,0}) fusion(%a, %b, %d, %e), kind=kCustom, calls=%part
}

%go (g: s32[]) -> pred[] {
  %g = s32[] parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %begin = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%first
  ROOT %loop = f32[8,8] while(%begin), condition=%go, body=%do, {"known_trip_count":{"n":"5"}}
}
"""
"""A gather that begins in one fusion and goes on, hidden, in those of a loop."""


def test_collective_spread_over_fusions_counts_once():
    assert HloProgram(CHAIN_TEXT, 4).collectives() == [
        Collective("all-gather", 4, 1, 2 * 8 * 4.0 * 3, 4)
    ]


def test_traffic_of_fusions_leaves_out_what_is_handed_through():
    a_row, gathered = 8 * 4, (2 + 8) * 8 * 4
    assert HloProgram(CHAIN_TEXT, 4).memory_traffic() == 5 * (a_row + a_row) + gathered


ASYNC_TEXT = """\
%update (stack: f32[24,8], row: f32[1,8], i: s32[]) -> f32[24,8] {
  %stack = f32[24,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %updated = f32[24,8]{1,0} dynamic-update-slice(%stack, %row, %i)
}

ENTRY %main (a: f32[24,8], b: f32[1,8], c: s32[]) -> f32[24,8] {
  %a = f32[24,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %c = s32[] parameter(2)
  %start = ((f32[24,8], f32[1,8], s32[]), f32[24,8], u32[]) fusion-start(%a, %b, %c), calls=%update
  ROOT %done = f32[24,8]{1,0} fusion-done(%start)
}
"""
"""A fusion under way while others run, as NVIDIA's compiler has it."""


def test_traffic_of_a_fusion_that_is_started_is_that_of_the_fusion():
    assert HloProgram(ASYNC_TEXT, 1).memory_traffic() == 2 * 8 * 4 + 4  # a row, and its place


PRODUCTS_TEXT = """\
%product (p: bf16[512,1024], q: bf16[1024,2048]) -> bf16[512,2048] {
  %p = bf16[512,1024]{1,0} parameter(0)
  %q = bf16[1024,2048]{1,0} parameter(1)
  ROOT %dot = bf16[512,2048]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[512,1024], b: bf16[1024,2048]) -> bf16[512,2048] {
  %a = bf16[512,1024]{1,0} parameter(0)
  %b = bf16[1024,2048]{1,0} parameter(1)
  %c = bf16[512,2048]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
  %d = bf16[512,2048]{1,0} negate(%c)
  ROOT %e = bf16[512,2048]{1,0} custom-call(%d), custom_call_target="library"
}
"""


SPARSE_CORE_TEXT = """HloModule offloaded

%called () -> s32[1] {
  ROOT %c = s32[1] constant({0})
}

ENTRY %main () -> s32[1] {
  %start = ((), (), s32[1]) call-start(), async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = s32[1] call-done(%start)
}
"""


def test_call_of_another_core_that_reads_nothing_moves_what_it_writes():
    assert HloProgram(SPARSE_CORE_TEXT, 1).memory_traffic() == 4


@pytest.mark.parametrize(
    ("chip", "seconds"),
    [
        (Chip(1e9, 1e9, 1e15, 1e9), 2 * 512 * 1024 * 2048 / 0.8e9 + 2 * START),
        (Chip(1e18, 1e9, 1e9, 1e9), 2 * (512 * 1024 + 1024 * 2048 + 5 * 512 * 2048) / 0.9e9),
        (Chip(1e18, 1e9, 1e15, 1e9), 3 * START),
    ],
)
def test_kernel_takes_the_longest_of_products_bytes_and_its_start(chip, seconds):
    found = kernels_of(HloProgram(PRODUCTS_TEXT, 1), chip)
    assert (found.count, found.libraries) == (3, {"library": 1})
    assert found.seconds == pytest.approx(seconds)


def test_loop_without_a_readable_bound_is_named():
    program = HloProgram(TPU_TEXT.replace("direction=LT", "direction=NE"), DEVICES)
    assert program.unknown_loops == {"while.1"}
    assert program.collectives()[0].count == 1


def test_bytes_of_types():
    assert type_bytes("(f32[2,3]{1,0}, bf16[8]{0:T(128)S(1)}, pred[4])") == 24 + 16 + 4
    assert type_bytes("(f32[2,3]{1,0}, bf16[8]{0:T(128)S(1)})", off_chip=True) == 24
    assert type_bytes("token[]") == 0


def launches(program):
    return sum(kernel.runs for kernel in program.kernels())


def test_a_kernel_reads_operands_and_writes_results_once_per_trip():
    whole = jax.jit(lambda x: jnp.sin(x) * 2).lower(jnp.zeros(1000)).compile()
    program = HloProgram(whole.as_text(), 1)
    assert (program.memory_traffic(), launches(program)) == (2 * 4000, 1)
    text = jax.jit(repeated(7, jnp.sin)).lower(jnp.zeros(1000)).compile().as_text()
    assert 7 * 2 * 4000 <= HloProgram(text, 1).memory_traffic() < 7 * 2 * 4000 + 20_000
    others = 3  # of the loop's counter and its bound, in every trip
    assert 7 <= launches(HloProgram(text, 1)) <= 7 * (1 + others) + others


def test_traffic_of_a_slice_is_not_that_of_what_it_is_cut_from():
    stacked = jnp.zeros((50, 1000))
    function = lambda x, stacked: jax.lax.scan(lambda x, row: (x + row, None), x, stacked)[0]  # noqa: E731
    text = jax.jit(function).lower(jnp.zeros(1000), stacked).compile().as_text()
    assert 50 * 3 * 4000 <= HloProgram(text, 1).memory_traffic() < 50 * 6 * 4000
