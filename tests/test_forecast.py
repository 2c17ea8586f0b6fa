"""Forecasts of compiled GPU programs: by hand, of real programs as text, and compiled here."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxlwp
from jaxlwp.check import Event, Forecast, compile_for, compiled_collectives, forecast, target_mesh
from jaxlwp.devices import Gpu, Level, System

DATA = Path(__file__).parent / "data"


def gpu(**changed: Any) -> Gpu:
    """A GPU of round numbers: 1 byte a picosecond, 100 operations, 10 without tensor cores."""
    given: dict[str, Any] = {
        "name": "round",
        "peak_flops_per_s": {
            "float32": 1e13,
            "tensorfloat32": 5e13,
            "float16": 1e14,
            "bfloat16": 1e14,
        },
        "peak_memory_bytes_per_s": 1e12,
        "memory_bytes": 1e11,
        "tensor_share": 1.0,
        "vector_share": 1.0,
        "memory_share": 1.0,
        "winograd": 1.6,
        "kernel_s": 2e-6,
    }
    return Gpu(**(given | changed))


def system(**changed: Any) -> System:
    """Eight such GPUs, links of 100 GB/s, 10 us for a small all-reduce."""
    inside = Level(devices=8, bytes_per_s=1e11, start_s=1e-5)
    return System(**({"name": "eight", "gpu": gpu(), "inside": inside} | changed))


DOUBLE = """%double (p: bf16[1000,1000]) -> bf16[1000,1000] {
  %p = bf16[1000,1000]{1,0} parameter(0)
  ROOT %d = bf16[1000,1000]{1,0} add(%p, %p)
}
"""
X = "%x = bf16[1000,1000]{1,0} parameter(0)"
ALL = "channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%add"


def module(*lines: str, computations: str = "", header: str = "num_partitions=8") -> str:
    """A scheduled program of the lines."""
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule m, is_scheduled=true, {header}\n\n{DOUBLE}\n{computations}\n"
        f"ENTRY %main (x: bf16[1000,1000]) -> bf16[1000,1000] {{\n{body}\n}}\n"
    )


def double(name: str, operand: str) -> str:
    """A kernel that reads and writes 2 MB: 2 + 4 = 6 us."""
    return f"%{name} = bf16[1000,1000]{{1,0}} fusion(%{operand}), kind=kLoop, calls=%double"


def product(name: str, lhs: str) -> str:
    """A kernel of 2e9 operations: 2 + 20 = 22 us."""
    return (
        f"%{name} = (bf16[1000,1000]{{1,0}}, s8[4194304]{{0}}) custom-call(%{lhs}, %x), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}'
    )


def start(name: str, operand: str, **config: bool) -> str:
    """An all-reduce of 2 MB over eight: 10 + 2 x 7/8 x 2 MB / (100 GB/s) = 45 us."""
    is_sync = str(config.get("is_sync", False)).lower()
    return (
        f"%{name} = bf16[1000,1000]{{1,0}} all-reduce-start(%{operand}), {ALL}, "
        f'backend_config={{"collective_backend_config":{{"is_sync":{is_sync}}}}}'
    )


def done(name: str, started: str) -> str:
    return f"%{name} = bf16[1000,1000]{{1,0}} all-reduce-done(%{started})"


def us(seconds: float) -> float:
    return round(seconds * 1e6, 6)


def spans(found: Forecast, stream: str) -> list[tuple[str, float, float]]:
    """(name, start, end) of a stream's events, in microseconds."""
    return [(e.name, us(e.start_s), us(e.end_s)) for e in found.events if e.stream == stream]


def totals_agree(found: Forecast) -> None:
    """What holds for every forecast."""
    assert found.total_s == pytest.approx(found.compute_s + found.exposed_s, rel=1e-9)
    ends = [event.end_s for event in found.events]
    assert found.total_s == pytest.approx(max(ends, default=0.0), rel=1e-9)
    for stream in ("compute", "communication", "exposed communication"):
        events = [e for e in found.events if e.stream == stream]
        for before, after in itertools.pairwise(events):
            assert before.end_s <= after.start_s + 1e-12
            assert before.start_s <= before.end_s


# --- the schedule, by hand --------------------------------------------------------------------

OVERLAPPED = (
    X,
    double("a", "x"),
    start("s", "a"),
    product("b", "x"),
    done("r", "s"),
    double("c", "r"),
    "ROOT %t = (bf16[1000,1000]{1,0}) tuple(%c)",
)


def test_three_kernels_and_one_overlapped_all_reduce() -> None:
    found = forecast(module(*OVERLAPPED), system())
    assert spans(found, "compute") == [("a", 0, 6), ("b", 6, 28), ("c", 51, 57)]
    assert spans(found, "communication") == [("s", 6, 51)]
    assert spans(found, "exposed communication") == [("s", 28, 51)]
    assert us(found.total_s) == 57
    assert us(found.compute_s) == 34
    assert us(found.communication_s) == 45
    assert us(found.exposed_s) == 23
    assert found.num_kernels == 3
    assert found.num_bytes == 3 * 4_000_000  # the product is of %x with itself
    assert found.flops == 2e9
    assert {kind: total.count for kind, total in found.kernels.items()} == {
        "product": 1,
        "fusion": 2,
    }
    assert found.collectives["all-reduce"].num_bytes == 2_000_000
    assert (found.num_devices, found.memory, found.notes) == (8, None, ())
    totals_agree(found)


def test_hidden() -> None:
    lines = (X, double("a", "x"), start("s", "a"), *(product(f"b{i}", "x") for i in range(3)))
    found = forecast(module(*lines, done("r", "s"), double("c", "r")), system())
    assert (us(found.total_s), us(found.compute_s)) == (6 + 66 + 6, 78)
    assert us(found.communication_s) == 45
    assert found.exposed_s == 0
    assert spans(found, "exposed communication") == []


def test_two_collectives_queue() -> None:
    lines = (X, double("a", "x"), start("s", "a"), start("t", "x"), product("b", "x"))
    found = forecast(module(*lines, done("r", "s"), done("q", "t"), double("c", "q")), system())
    assert spans(found, "communication") == [("s", 6, 51), ("t", 51, 96)]
    assert spans(found, "exposed communication") == [("s", 28, 51), ("t", 51, 96)]
    assert us(found.total_s) == 102
    totals_agree(found)


def test_a_kernel_in_front_of_the_done_does_not_wait() -> None:
    lines = (X, start("s", "x"), start("t", "x"), double("a", "x"), done("q", "t"))
    found = forecast(module(*lines, double("b", "x"), done("r", "s")), system())
    assert spans(found, "compute") == [("a", 0, 6), ("b", 90, 96)]
    assert spans(found, "exposed communication") == [("t", 6, 90)]


@pytest.mark.parametrize("plain", [True, False], ids=["no halves", "is_sync"])
def test_synchronous(plain: bool) -> None:
    """Nothing runs beside it, wherever its done is."""
    line = start("s", "a", is_sync=True)
    line = line.replace("all-reduce-start", "all-reduce") if plain else line
    lines = [X, double("a", "x"), line, product("b", "x")]
    found = forecast(module(*lines, *([] if plain else [done("r", "s")])), system())
    assert spans(found, "compute") == [("a", 0, 6), ("b", 51, 73)]
    assert us(found.exposed_s) == 45
    totals_agree(found)


def test_what_nobody_waits_for_is_waited_for_at_the_end() -> None:
    found = forecast(module(X, start("s", "x"), double("a", "x")), system())
    assert us(found.total_s) == 45
    assert us(found.exposed_s) == 39
    totals_agree(found)


def test_a_group_of_one_takes_no_time() -> None:
    line = start("s", "x").replace("[1,8]<=[8]", "[8,1]<=[8]")
    found = forecast(module(X, line, done("r", "s"), double("a", "r")), system())
    assert us(found.total_s) == 6
    assert not found.collectives


def test_the_slowest_group_counts() -> None:
    """Two hosts of two: {0,1} and {2,3} stay inside, {0,2} crosses."""
    across = Level(devices=2, bytes_per_s=1e10, start_s=1e-4)
    hosts = system(inside=Level(devices=2, bytes_per_s=1e11, start_s=1e-5), across=across)
    for groups, expected in (
        ("{{0,1},{2,3}}", hosts.collective_s("all-reduce", 2_000_000, (0, 1))),
        ("{{0,1,2},{3}}", hosts.collective_s("all-reduce", 2_000_000, (0, 1, 2))),
    ):
        line = start("s", "x").replace("[1,8]<=[8]", groups)
        found = forecast(module(X, line, header="num_partitions=4"), hosts)
        assert found.total_s == pytest.approx(expected, rel=1e-12)
    assert expected > 1e-4


def test_permutes_by_their_pairs() -> None:
    across = Level(devices=2, bytes_per_s=1e10, start_s=1e-4)
    hosts = system(inside=Level(devices=2, bytes_per_s=1e11, start_s=1e-5), across=across)
    for pairs, slowest in (("{{0,1},{2,3}}", (0, 1)), ("{{0,1},{1,2},{2,2}}", (1, 2))):
        line = (
            "%s = (bf16[1000,1000]{1,0}, bf16[1000,1000]{1,0}) collective-permute-start(%x), "
            f"channel_id=1, source_target_pairs={pairs}"
        )
        found = forecast(module(X, line, header="num_partitions=4"), hosts)
        expected = hosts.collective_s("collective-permute", 2_000_000, slowest)
        assert found.total_s == pytest.approx(expected, rel=1e-12)
        assert found.collectives["collective-permute"].num_bytes == 2_000_000


@pytest.mark.parametrize(
    ("kind", "operand", "priced"),
    [
        ("all-gather", 2_000_000, ("all-gather", 2_000_000)),
        ("reduce-scatter", 2_000_000, ("reduce-scatter", 2_000_000)),
        ("all-to-all", 2_000_000, ("all-to-all", 2_000_000)),
        ("collective-broadcast", 2_000_000, ("all-gather", 250_000)),
    ],
)
def test_other_collectives(kind: str, operand: int, priced: tuple[str, int]) -> None:
    line = f"%s = bf16[8,1000,1000]{{2,1,0}} {kind}(%x), {ALL}"
    found = forecast(module(X, line), system())
    assert found.collectives[kind].num_bytes == operand
    assert found.total_s == pytest.approx(system().collective_s(*priced, range(8)), rel=1e-12)


# --- loops, branches, calls -------------------------------------------------------------------


def loop(trips: str = "", body: str = "", condition: str = "") -> str:
    """Computations of a loop whose body is one kernel, unless another is given."""
    body = body or "  " + double("i", "q") + "\n"
    return (
        f"%body (q: bf16[1000,1000]) -> bf16[1000,1000] {{\n"
        f"  %q = bf16[1000,1000]{{1,0}} parameter(0)\n{body}}}\n\n"
        f"%cond (c: bf16[1000,1000]) -> pred[] {{\n"
        f"  %c = bf16[1000,1000]{{1,0}} parameter(0)\n"
        f'  ROOT %k = pred[] custom-call(%c), custom_call_target="test"\n}}\n'
    )


def while_(trips: int | None) -> str:
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    return f"%w = bf16[1000,1000]{{1,0}} while(%x), condition=%cond, body=%body{known}"


@pytest.mark.parametrize("trips", [1, 3, 4, 5, 1000])
def test_a_loop_of_known_trip_count(trips: int) -> None:
    """Its condition is not evaluated."""
    found = forecast(module(X, while_(trips), computations=loop()), system())
    assert us(found.total_s) == us(6e-6 * trips)
    assert found.num_kernels == trips
    assert found.num_bytes == trips * 4_000_000
    assert us(found.compute_s) == us(found.total_s)
    assert found.notes == ()
    assert len(found.events) <= 5
    totals_agree(found)


def test_a_loop_of_unknown_trip_count_counts_once_and_says_so() -> None:
    found = forecast(module(X, while_(None), computations=loop()), system())
    assert found.num_kernels == 2  # the condition's kernel, too: 2 + 2.000001 us
    assert us(found.total_s) == pytest.approx(6 + 4, abs=1e-5)
    assert "loop w: trip count unknown, one iteration" in found.notes


def test_a_collective_in_a_loop() -> None:
    """Each iteration waits for its own: 6 us before, 45 for it, 22 of them beside a product."""
    body = "\n".join(
        f"  {line}"
        for line in (double("i", "q"), start("s", "i"), product("j", "q"), done("r", "s"))
    )
    body = body.replace("%x)", "%q)") + "\n"  # the product's other operand
    text = module(X, while_(10), computations=loop(body=body))
    found = forecast(text, system())
    assert us(found.total_s) == 10 * 51
    assert us(found.exposed_s) == 10 * 23
    assert us(found.communication_s) == 10 * 45
    assert found.collectives["all-reduce"].count == 10
    assert found.exposed["all-reduce"].count == 10
    totals_agree(found)


def test_the_first_iteration_may_wait_for_a_collective_from_outside() -> None:
    body = f"  {start('s', 'q')}\n  {done('r', 's')}\n"
    lines = (X, start("o", "x"), while_(10), done("p", "o"))
    found = forecast(module(*lines, computations=loop(body=body)), system())
    assert us(found.total_s) == 45 + 10 * 45
    totals_agree(found)


def test_loops_in_loops() -> None:
    inner = loop().replace("%body", "%inner").replace("%cond", "%test")
    inner = inner.replace("%q", "%iq").replace("%i ", "%ii ").replace("%k ", "%ik ")
    line = while_(7).replace("%w", "%v").replace("%body", "%inner").replace("%cond", "%test")
    outer = loop(body="  " + line.replace("%x", "%q") + "\n")
    found = forecast(module(X, while_(50), computations=inner + outer), system())
    assert found.num_kernels == 350
    assert us(found.total_s) == 350 * 6
    assert len(found.events) < 30
    totals_agree(found)


def test_the_longest_branch_runs() -> None:
    branches = "".join(
        f"%branch{n} (q{n}: bf16[1000,1000]) -> bf16[1000,1000] {{\n"
        f"  %q{n} = bf16[1000,1000]{{1,0}} parameter(0)\n"
        + "".join(f"  {double(f'k{n}{i}', f'q{n}')}\n" for i in range(n))
        + "}\n\n"
        for n in (1, 3, 0)
    )
    line = (
        "%b = bf16[1000,1000]{1,0} conditional(%i, %x, %x, %x), "
        "branch_computations={%branch1, %branch3, %branch0}"
    )
    found = forecast(module(X, line, computations=branches), system())
    assert us(found.total_s) == 18
    assert found.num_kernels == 3
    assert found.notes == ("conditionals: the longest branch",)


def test_calls_are_put_in_their_place() -> None:
    """A command buffer, and a kernel on a stream of its own."""
    buffer = loop().split("\n\n")[0].replace("%body", "%command_buffer") + "\n"
    lines = (
        X,
        "%c = bf16[1000,1000]{1,0} call(%x), to_apply=%command_buffer",
        "%s = ((bf16[1000,1000]{1,0}), bf16[1000,1000]{1,0}) async-start(%c), "
        "calls=%command_buffer",
        "%r = bf16[1000,1000]{1,0} async-done(%s)",
    )
    found = forecast(module(*lines, computations=buffer), system())
    assert us(found.total_s) == 12
    assert found.num_kernels == 2


@pytest.mark.parametrize("opcode", ["async", "reduce-scatter"])
def test_wrapped_collectives(opcode: str) -> None:
    wrapped = (
        "%wrapped (p.1: bf16[1000,1000]) -> bf16[125,1000] {\n"
        "  %p.1 = bf16[1000,1000]{1,0} parameter(0)\n"
        f"  ROOT %rs = bf16[125,1000]{{1,0}} reduce-scatter(%p.1), {ALL}, dimensions={{0}}\n}}\n"
    )
    lines = (
        X,
        f"%s = ((bf16[1000,1000]{{1,0}}), bf16[125,1000]{{1,0}}) {opcode}-start(%x), "
        "calls=%wrapped",
        product("b", "x"),
        f"%r = bf16[125,1000]{{1,0}} {opcode}-done(%s)",
    )
    found = forecast(module(*lines, computations=wrapped), system())
    expected = system().collective_s("reduce-scatter", 2_000_000, range(8))
    assert found.communication_s == pytest.approx(expected, rel=1e-12)
    assert found.total_s == pytest.approx(max(expected, 22e-6), rel=1e-12)
    assert spans(found, "communication")[0][:2] == ("s", 0)


def test_a_collective_in_a_fusion() -> None:
    fused = (
        "%fused (p.1: bf16[1000,1000]) -> bf16[125,1000] {\n"
        "  %p.1 = bf16[1000,1000]{1,0} parameter(0)\n"
        f"  %rs = bf16[125,1000]{{1,0}} reduce-scatter(%p.1), {ALL}, dimensions={{0}}\n"
        "  ROOT %b = bf16[125000]{0} bitcast(%rs)\n}\n"
    )
    line = "%f = bf16[125000]{0} fusion(%x), kind=kCustom, calls=%fused"
    found = forecast(module(X, line, double("a", "x"), computations=fused), system())
    expected = system().collective_s("reduce-scatter", 2_000_000, range(8))
    assert found.total_s == pytest.approx(expected + 6e-6, rel=1e-12)
    assert (found.num_kernels, found.collectives["reduce-scatter"].count) == (1, 1)


def test_what_is_not_charged_is_said() -> None:
    lines = (
        X,
        "%t = token[] after-all()",
        "%s = (bf16[1000,1000]{1,0}, u32[], token[]) send(%x, %t), channel_id=1",
        "%d = token[] send-done(%s), channel_id=1",
        "%h = bf16[1000,1000]{1,0:S(5)} copy(%x)",
    )
    found = forecast(module(*lines), system())
    assert us(found.total_s) == 6
    assert found.notes == (
        "send and recv: not charged",
        "memory of the host: at the rate of the GPU's",
    )


# --- bytes ------------------------------------------------------------------------------------


def bytes_of(line: str, *, inside: str = "", parameters: str = "") -> int:
    """Bytes of the one kernel of a program."""
    computations = f"%inside () -> f32[] {{\n{inside}}}\n" if inside else ""
    lines = [f"{each.strip()}" for each in parameters.splitlines() if each.strip()]
    found = forecast(module(*lines, line, computations=computations), system())
    assert found.num_kernels == 1
    return found.num_bytes


BIG = "%big = f32[100,1000]{1,0} parameter(1)"
KB400 = 400_000


@pytest.mark.parametrize(
    ("inside", "shape", "expected"),
    [
        # all of it is read
        ("ROOT %r = f32[100,1000] negate(%p)", "f32[100,1000]", KB400 + KB400),
        # through slices: what they keep
        ("ROOT %r = f32[10,1000] slice(%p), slice={[0:10], [0:1000]}", "f32[10,1000]", 2 * 40_000),
        (
            "%i = s32[] constant(3)\n"
            "ROOT %r = f32[1,1000] dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,1000}",
            "f32[1,1000]",
            2 * 4000,
        ),
        (
            "%i = s32[7,1] constant({...})\n"
            "ROOT %r = f32[7,1000] gather(%p, %i), offset_dims={1}, slice_sizes={1,1000}",
            "f32[7,1000]",
            2 * 28_000,
        ),
        # the same behind a conversion and a bitcast
        (
            "%c = bf16[100,1000] convert(%p)\n%b = bf16[100000] bitcast(%c)\n"
            "ROOT %r = bf16[500] slice(%b), slice={[0:500]}",
            "bf16[500]",
            500 * 4 + 500 * 2,
        ),
        # two slices add up, up to the whole
        (
            "%a = f32[30,1000] slice(%p), slice={[0:30], [0:1000]}\n"
            "%b = f32[30,1000] slice(%p), slice={[60:90], [0:1000]}\n"
            "ROOT %r = f32[30,1000] add(%a, %b)",
            "f32[30,1000]",
            60 * 4000 + 30 * 4000,
        ),
        (
            "%a = f32[80,1000] slice(%p), slice={[0:80], [0:1000]}\n"
            "%b = f32[80,1000] slice(%p), slice={[20:100], [0:1000]}\n"
            "ROOT %r = f32[80,1000] add(%a, %b)",
            "f32[80,1000]",
            KB400 + 320_000,
        ),
        # a slice and the whole: the whole
        (
            "%a = f32[1,1000] slice(%p), slice={[0:1], [0:1000]}\n%n = f32[100,1000] negate(%p)\n"
            "ROOT %r = (f32[1,1000], f32[100,1000]) tuple(%a, %n)",
            "(f32[1,1000], f32[100,1000])",
            KB400 + 4000 + KB400,
        ),
        # a window over it reads all of it, whatever is kept afterwards
        (
            "%w = f32[100,1000] reduce-window(%p, %z), window={size=3x1 pad=1_1x0_0}\n"
            "ROOT %r = f32[1,1000] slice(%w), slice={[0:1], [0:1000]}",
            "f32[1,1000]",
            KB400 + 4000,
        ),
        # of what is joined with something else, or padded: its share of what is kept
        (
            "%b = f32[100,1000] broadcast(%z), dimensions={}\n"
            "%j = f32[100,2000] concatenate(%p, %b), dimensions={1}\n"
            "ROOT %r = f32[10,2000] slice(%j), slice={[0:10], [0:2000]}",
            "f32[10,2000]",
            40_000 + 80_000,
        ),
        (
            "%q = f32[102,1000] pad(%p, %z), padding=1_1x0_0\n"
            "ROOT %r = f32[51,1000] slice(%q), slice={[0:51], [0:1000]}",
            "f32[51,1000]",
            200_000 + 204_000,
        ),
    ],
)
def test_bytes_of_a_fusion(inside: str, shape: str, expected: int) -> None:
    inside = "%p = f32[100,1000] parameter(0)\n%z = f32[] constant(0)\n" + inside + "\n"
    line = f"%f = {shape} fusion(%big), kind=kLoop, calls=%inside"
    assert bytes_of(line, inside=inside, parameters=BIG) == expected


UPDATED = """%p = f32[100,1000] parameter(0)
%u = f32[2,1000] parameter(1)
%i = s32[] parameter(2)
"""
UPDATE_OPERANDS = """%big = f32[100,1000]{1,0} parameter(1)
%update = f32[2,1000]{1,0} parameter(2)
%place = s32[] parameter(3)
"""


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        # in place: the update is read and written, the index read
        ("ROOT %r = f32[100,1000] dynamic-update-slice(%p, %u, %i, %i)", 2 * 8000 + 4),
        (
            "%d = f32[100,1000] dynamic-update-slice(%p, %u, %i, %i)\n"
            "ROOT %r = f32[100,1000] bitcast(%d)",
            2 * 8000 + 4,
        ),
        # something is done with the result: all of it is made anew
        (
            "%d = f32[100,1000] dynamic-update-slice(%p, %u, %i, %i)\n"
            "ROOT %r = f32[100,1000] negate(%d)",
            KB400 + KB400 + 8000 + 4,
        ),
        # so it is if what is updated is made here
        (
            "%n = f32[100,1000] negate(%p)\n"
            "ROOT %r = f32[100,1000] dynamic-update-slice(%n, %u, %i, %i)",
            KB400 + KB400 + 8000 + 4,
        ),
    ],
)
def test_bytes_of_an_update(inside: str, expected: int) -> None:
    line = "%f = f32[100,1000]{1,0} fusion(%big, %update, %place), kind=kLoop, calls=%inside"
    inside = UPDATED + inside + "\n"
    assert bytes_of(line, inside=inside, parameters=UPDATE_OPERANDS) == expected


@pytest.mark.parametrize(
    ("update", "window", "touched"),
    [
        # rows of 4000 bytes are whole sectors
        ("f32[2,1000]", "update_window_dims={1}, inserted_window_dims={0}", 2 * 8000),
        # an element each: a sector each
        ("f32[300]", "update_window_dims={}, inserted_window_dims={0,1}", 2 * 300 * 32),
        ("f32[300,1,1]", "update_window_dims={1,2}, inserted_window_dims={}", 2 * 300 * 32),
        # no more than all of it
        ("f32[90000]", "update_window_dims={}, inserted_window_dims={0,1}", 2 * KB400),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_bytes_of_a_scatter(update: str, window: str, touched: int, fused: bool) -> None:
    size = 4 * math.prod(int(n) for n in update[4:-1].split(","))
    parameters = f"{BIG}\n%u = {update} parameter(2)\n%i = s32[300,2] parameter(3)"
    line = f"f32[100,1000]{{1,0}} scatter(%NAME, %i, %u), {window}, to_apply=%add"
    if fused:
        inside = (
            f"%p = f32[100,1000] parameter(0)\n%i = s32[300,2] parameter(1)\n"
            f"%u = {update} parameter(2)\nROOT %r = {line.replace('NAME', 'p')}\n"
        )
        line = "f32[100,1000]{1,0} fusion(%big, %i, %u), kind=kInput, calls=%inside"
    else:
        inside, line = "", line.replace("NAME", "big")
    expected = touched + size + 2400
    assert bytes_of(f"%f = {line}", inside=inside, parameters=parameters) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%f = f32[100,1000]{0,1} copy(%big)", 2 * KB400),
        ("%f = f32[1,1000] slice(%big), slice={[0:1], [0:1000]}", 2 * 4000),
        ("%f = f32[1,1000] dynamic-slice(%big, %k, %k)", 2 * 4000 + 8),
        ("%f = f32[100,1000] dynamic-update-slice(%big, %row, %k, %k)", 2 * 4000),
        ("%f = f32[100,1000] multiply(%big, %big)", 2 * KB400),
        ("%f = (f32[100,1000], f32[100,1000]) sort(%big, %big), to_apply=%lt", 3 * KB400),
        ("%f = c64[100,501] fft(%big), fft_type=RFFT, fft_length={1000}", KB400 + 400_800),
        # workspace is no traffic, whatever its size; another library's last result is
        (
            '%f = (f32[100,1000], u8[9999]{0}) custom-call(%big), custom_call_target="__cub$x"',
            2 * KB400,
        ),
        (
            '%f = (f32[100,1000], u8[9999]{0}) custom-call(%big), custom_call_target="mine"',
            2 * KB400 + 9999,
        ),
        (
            "%f = (f32[100,1000], f32[100,1000], u32[]) copy-start(%big)",
            2 * KB400,
        ),
    ],
)
def test_bytes_of_other_kernels(line: str, expected: int) -> None:
    parameters = f"{BIG}\n%row = f32[1,1000] parameter(2)\n%k = s32[] parameter(3)"
    assert bytes_of(line, parameters=parameters) == expected


def test_an_operand_given_twice_is_read_once() -> None:
    inside = (
        "%p = f32[100,1000] parameter(0)\n%q = f32[100,1000] parameter(1)\n"
        "ROOT %r = f32[100,1000] add(%p, %q)\n"
    )
    line = "%f = f32[100,1000]{1,0} fusion(%big, %big), kind=kLoop, calls=%inside"
    assert bytes_of(line, inside=inside, parameters=BIG) == 2 * KB400


def test_what_is_no_kernel() -> None:
    lines = (
        X,
        "%t = (bf16[1000,1000]{1,0}, bf16[1000,1000]{1,0}) tuple(%x, %x)",
        "%g = bf16[1000,1000]{1,0} get-tuple-element(%t), index=0",
        "%b = bf16[1000000]{0} bitcast(%g)",
        "%c = f32[] constant(1)",
        "%o = bf16[1000,1000]{1,0} opt-barrier(%x)",
        '%s = bf16[1000,1000]{1,0} custom-call(%x), custom_call_target="Sharding"',
        "%a = token[] after-all()",
    )
    found = forecast(module(*lines), system())
    assert (found.events, found.num_kernels, found.total_s) == ((), 0, 0)
    assert "0 ms a step" in str(found)


# --- operations -------------------------------------------------------------------------------


def operations(line: str, *operands: str, gpu_: Gpu | None = None) -> Event:
    """The one kernel of a program that is the line, its operands %a, %b, ..."""
    names = "abc"[: len(operands)]
    given = [
        f"%{name} = {shape} parameter({i})"
        for i, (name, shape) in enumerate(zip(names, operands, strict=True))
    ]
    (event,) = forecast(module(*given, line), system(gpu=gpu_ or gpu())).events
    return event


def cudnn(target: str, attributes: str, result: str) -> str:
    return (
        f"%f = ({result}, u8[64]{{0}}) custom-call(%a, %b), {attributes}, "
        f'custom_call_target="__cudnn${target}"'
    )


IMAGE, KERNEL = "bf16[2,8,8,16]", "bf16[32,3,3,16]"
OUTPUT = "bf16[2,8,8,32]"
NHWC = "dim_labels=b01f_o01i->b01f"
SAME = f"window={{size=3x3 pad=1_1x1_1}}, {NHWC}"
STRIDED = f"window={{size=3x3 stride=2x2 pad=0_1x0_1}}, {NHWC}"
FLOPS = 2 * (2 * 8 * 8) * 32 * (3 * 3 * 16)  # of the convolution and of both of its gradients


@pytest.mark.parametrize(
    ("kind", "line", "operands", "flops"),
    [
        ("forward", cudnn("convForward", SAME, OUTPUT), (IMAGE, KERNEL), FLOPS),
        (
            "forward",
            cudnn("convBiasActivationForward", SAME, OUTPUT),
            (IMAGE, KERNEL),
            FLOPS,
        ),
        ("backward-input", cudnn("convBackwardInput", SAME, IMAGE), (OUTPUT, KERNEL), FLOPS),
        ("backward-filter", cudnn("convBackwardFilter", SAME, KERNEL), (IMAGE, OUTPUT), FLOPS),
        # stride 2: a quarter of the positions, in all three
        (
            "forward",
            cudnn("convForward", STRIDED, "bf16[2,4,4,32]"),
            (IMAGE, KERNEL),
            FLOPS / 4,
        ),
        (
            "backward-input",
            cudnn("convBackwardInput", STRIDED, IMAGE),
            ("bf16[2,4,4,32]", KERNEL),
            FLOPS / 4,
        ),
        (
            "backward-filter",
            cudnn("convBackwardFilter", STRIDED, KERNEL),
            (IMAGE, "bf16[2,4,4,32]"),
            FLOPS / 4,
        ),
        # four groups: each output sums up a quarter of the inputs
        (
            "forward",
            cudnn("convForward", f"{SAME}, feature_group_count=4", OUTPUT),
            (IMAGE, "bf16[32,3,3,4]"),
            FLOPS / 4,
        ),
        (
            "backward-input",
            cudnn("convBackwardInput", f"{SAME}, feature_group_count=4", IMAGE),
            (OUTPUT, "bf16[32,3,3,4]"),
            FLOPS / 4,
        ),
        (
            "backward-filter",
            cudnn("convBackwardFilter", f"{SAME}, feature_group_count=4", "bf16[32,3,3,4]"),
            (IMAGE, OUTPUT),
            FLOPS / 4,
        ),
        # channels first, three dimensions
        (
            "forward",
            cudnn(
                "convForward",
                "window={size=3x3x3 pad=1_1x1_1x1_1}, dim_labels=bf012_oi012->bf012",
                "f32[1,32,4,4,4]",
            ),
            ("f32[1,16,4,4,4]", "f32[32,16,3,3,3]"),
            2 * 64 * 32 * 27 * 16,
        ),
    ],
)
def test_convolutions_by_cudnn(kind: str, line: str, operands: Any, flops: float) -> None:
    event = operations(line, *operands)
    assert (event.kind, event.flops) == (f"convolution {kind}", flops)


@pytest.mark.parametrize(
    ("kind", "result", "attributes", "operands", "flops"),
    [
        ("forward", OUTPUT, SAME, (IMAGE, KERNEL), FLOPS),
        ("forward", "bf16[2,4,4,32]", STRIDED, (IMAGE, KERNEL), FLOPS / 4),
        # dilated: as many positions of the filter
        (
            "forward",
            OUTPUT,
            f"window={{size=3x3 pad=2_2x2_2 rhs_dilate=2x2}}, {NHWC}",
            (IMAGE, KERNEL),
            FLOPS,
        ),
        ("forward", OUTPUT, f"{SAME}, feature_group_count=4", (IMAGE, "bf16[32,3,3,4]"), FLOPS / 4),
        # depthwise
        (
            "forward",
            IMAGE,
            f"{SAME}, feature_group_count=16",
            (IMAGE, "bf16[16,3,3,1]"),
            2 * (2 * 64) * 16 * 9,
        ),
        # transposed: each of 4x4 elements meets the whole filter, not each of the 8x8 results
        (
            "backward-input",
            OUTPUT,
            f"window={{size=3x3 pad=1_2x1_2 lhs_dilate=2x2}}, {NHWC}",
            ("bf16[2,4,4,16]", KERNEL),
            FLOPS / 4,
        ),
        (
            "backward-input",
            IMAGE,
            "window={size=3x3 pad=1_1x1_1 rhs_reversal=1x1}, dim_labels=b01f_i01o->b01f",
            (OUTPUT, KERNEL),
            FLOPS,
        ),
        # the gradient of the filter: the images' channels are the batch, the window is the output
        (
            "backward-filter",
            "bf16[16,3,3,32]",
            "window={size=8x8 pad=1_1x1_1}, dim_labels=f01b_i01o->b01f",
            (IMAGE, OUTPUT),
            FLOPS,
        ),
        # ... of a strided convolution
        (
            "backward-filter",
            "bf16[16,3,3,32]",
            "window={size=4x4 pad=0_1x0_1 rhs_dilate=2x2}, dim_labels=f01b_i01o->b01f",
            (IMAGE, "bf16[2,4,4,32]"),
            FLOPS / 4,
        ),
        # ... of a depthwise one: a group of the batch for each channel
        (
            "backward-filter",
            "bf16[1,3,3,16]",
            "window={size=8x8 pad=1_1x1_1}, dim_labels=f01b_i01o->b01f, batch_group_count=16",
            (IMAGE, IMAGE),
            2 * (2 * 64) * 16 * 9,
        ),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_convolutions_of_xla(
    kind: str, result: str, attributes: str, operands: Any, flops: float, fused: bool
) -> None:
    line = f"%f = {result} convolution(%a, %b), {attributes}"
    if fused:
        inside = (
            f"%inside () -> f32[] {{\n%a = {operands[0]} parameter(0)\n"
            f"%b = {operands[1]} parameter(1)\n{line}\nROOT %n = {result} negate(%f)\n}}\n"
        )
        lines = [f"%{n}.1 = {shape} parameter({n})" for n, shape in enumerate(operands)]
        call = f"%g = {result} fusion(%0.1, %1.1), kind=kCustom, calls=%inside"
        (event,) = forecast(module(*lines, call, computations=inside), system()).events
    else:
        event = operations(line, *operands)
    assert (event.kind, event.flops) == (f"convolution {kind}", flops)


@pytest.mark.parametrize(
    ("line", "operands", "flops"),
    [
        (
            "%f = f32[5,7] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            ("f32[5,11]", "f32[11,7]"),
            2 * 5 * 7 * 11,
        ),
        (
            "%f = f32[4,5,7] dot(%a, %b), lhs_batch_dims={2}, lhs_contracting_dims={0,3}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1,2}",
            ("f32[11,5,4,3]", "f32[4,11,3,7]"),
            2 * 4 * 5 * 7 * 11 * 3,
        ),
        (
            "%f = f32[5,7] dot(%a, %b), lhs_contracting_dims={}, rhs_contracting_dims={}",
            ("f32[5]", "f32[7]"),
            2 * 5 * 7,
        ),
        (
            '%f = (f32[5,7], s8[99]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$'
            'matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{'
            '"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}',
            ("f32[11,5]", "f32[11,7]"),
            2 * 5 * 7 * 11,
        ),
    ],
)
def test_products(line: str, operands: Any, flops: float) -> None:
    event = operations(line, *operands)
    assert (event.kind, event.flops) == ("product", flops)


def test_a_product_in_a_fusion_in_a_fusion() -> None:
    """Triton's nested fusions; the operands' type is the one that they have there."""
    nested = """%inner () -> f32[] {
  %q = f32[5,11] parameter(0)
  ROOT %c = bf16[5,11] convert(%q)
}
%outer () -> f32[] {
  %p = f32[5,11] parameter(0)
  %w = bf16[11,7] parameter(1)
  %n = bf16[5,11] fusion(%p), kind=kCustom, calls=%inner
  ROOT %d = f32[5,7] dot(%n, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    lines = (
        "%a = f32[5,11] parameter(0)",
        "%b = bf16[11,7] parameter(1)",
        "%f = f32[5,7] fusion(%a, %b), kind=kCustom, calls=%outer",
    )
    (event,) = forecast(module(*lines, computations=nested), system()).events
    assert (event.kind, event.flops, event.dtype) == ("product", 2 * 5 * 7 * 11, "bfloat16")
    assert event.num_bytes == 4 * 55 + 2 * 77 + 4 * 35


@pytest.mark.parametrize(
    "line",
    [
        "%f = f32[5,7] dot(%a, %b)",
        "%f = f32[5,7] convolution(%a, %b), window={size=3}",
        cudnn("convForward", "window={size=3}", "f32[5,7]"),
    ],
)
def test_operations_that_cannot_be_read_are_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="%f: cannot count operations"):
        operations(line, "f32[5,11]", "f32[11,7]")


# --- types and rates --------------------------------------------------------------------------

LONG = "f32[64,64,64,256]", "f32[256,3,3,256]"  # arithmetic takes longer than memory by far
LONG_FLOPS = 2 * 64**3 * 256 * 256 * 9


def long_convolution(dtype: str, attributes: str = SAME, gpu_: Gpu | None = None) -> Event:
    operands = [shape.replace("f32", dtype) for shape in LONG]
    return operations(cudnn("convForward", attributes, operands[0]), *operands, gpu_=gpu_)


def old_gpu() -> Gpu:
    """Without TensorFloat-32 and bfloat16."""
    return gpu(peak_flops_per_s={"float32": 1e13, "float16": 1e14})


@pytest.mark.parametrize(
    ("dtype", "used", "rate"),
    [("bf16", "bfloat16", 1e14), ("f16", "float16", 1e14), ("f32", "tensorfloat32", 5e13)],
)
def test_rates_of_types(dtype: str, used: str, rate: float) -> None:
    event = long_convolution(dtype)
    assert event.dtype == used
    assert event.seconds == pytest.approx(2e-6 + LONG_FLOPS / rate, rel=1e-12)


def test_the_highest_precision_is_float32() -> None:
    event = long_convolution("f32", f"{SAME}, operand_precision={{highest,highest}}")
    assert event.dtype == "float32"
    assert event.seconds == pytest.approx(2e-6 + LONG_FLOPS / 1.6e13, rel=1e-12)
    for config in (
        '"precision_config":{"operand_precision":["HIGHEST","HIGHEST"],"algorithm":"ALG_UNSET"}',
        '"precision_config":{"operand_precision":["DEFAULT","DEFAULT"],"algorithm":"ALG_UNSET"}',
    ):
        line = product("f", "a").replace("%x", "%b").replace("bf16", "f32")
        line = line.replace('"dot_dim', f'{config},"dot_dim')
        event = operations(line, "f32[1000,1000]", "f32[1000,1000]")
        assert event.dtype == ("float32" if "HIGHEST" in config else "tensorfloat32")


@pytest.mark.parametrize(
    ("attributes", "factor"),
    [
        (SAME, 1.6),
        (f"window={{size=3x3 stride=2x2 pad=1_1x1_1}}, {NHWC}", 1.0),
        (f"window={{size=3x3 pad=2_2x2_2 rhs_dilate=2x2}}, {NHWC}", 1.0),
        (f"{SAME}, feature_group_count=2", 1.0),
        (f"window={{size=5x5 pad=2_2x2_2}}, {NHWC}", 1.0),
    ],
)
def test_winograd(attributes: str, factor: float) -> None:
    """For plain 3x3 convolutions in float32 without tensor cores."""
    event = long_convolution("f32", attributes, old_gpu())
    assert event.dtype == "float32"
    assert event.seconds == pytest.approx(2e-6 + LONG_FLOPS / (1e13 * factor), rel=1e-12)
    assert long_convolution("f16", attributes, old_gpu()).seconds == pytest.approx(
        2e-6 + LONG_FLOPS / 1e14, rel=1e-12
    )


def test_types_that_a_gpu_does_not_have() -> None:
    lines = ("%a = bf16[64,64] parameter(0)", product("f", "a").replace("%x", "%a"))
    found = forecast(module(*lines), system(gpu=old_gpu()))
    assert found.events[0].dtype == "float32"
    assert found.notes == ("bfloat16 on round: at the rate of float32",)


def test_an_unknown_library_call_is_named() -> None:
    found = forecast(module(X, '%f = bf16[9] custom-call(%x), custom_call_target="mine"'), system())
    assert found.notes == ("mine: by its bytes alone, its operations are not known",)
    assert found.kernels["other"].count == 1


# --- kinds of kernels -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("copy", "ROOT %r = bf16[1000,1000] transpose(%p), dimensions={1,0}"),
        ("copy", "%s = bf16[9,9] slice(%p)\nROOT %r = bf16[9,18] concatenate(%s, %s)"),
        ("fusion", "ROOT %r = f32[1000,1000] convert(%p)"),
        ("reduction", "%n = bf16[1000,1000] negate(%p)\nROOT %r = bf16[1000] reduce(%n, %z)"),
    ],
)
def test_kinds_of_fusions(kind: str, inside: str) -> None:
    body = f"%inside () -> f32[] {{\n%p = bf16[1000,1000] parameter(0)\n{inside}\n}}\n"
    line = "%f = bf16[1000,1000] fusion(%x), kind=kLoop, calls=%inside"
    (event,) = forecast(module(X, line, computations=body.replace(", %z", "")), system()).events
    assert event.kind == kind


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("copy", "copy(%x)"),
        ("reduction", "reduce(%x, %x), to_apply=%add"),
        ("other", "sort(%x), to_apply=%lt"),
        ("other", "partition-id()"),
    ],
)
def test_kinds_of_others(kind: str, line: str) -> None:
    (event,) = forecast(module(X, f"%f = bf16[1000,1000]{{1,0}} {line}"), system()).events
    assert event.kind == kind


# --- errors -----------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="not scheduled"):
        forecast(module(X).replace("is_scheduled=true, ", ""), system())
    with pytest.raises(ValueError, match="for 16 devices, eight has 8"):
        forecast(module(X, header="num_partitions=16"), system())
    with pytest.raises(ValueError, match="not an HLO module"):
        forecast("module @jit_f {}", system())


# --- real programs ----------------------------------------------------------------------------


def sample(name: str) -> str:
    return (DATA / f"{name}.hlo").read_text()


def read(name: str) -> Forecast:
    found = forecast(sample(name), system())
    totals_agree(found)
    return found


def test_plain_jax() -> None:
    """Convolution (8 images a GPU, 32 to 64 channels) and dense layer, data parallel."""
    found = read("two_layers")
    convolution = 2 * (8 * 32 * 32) * 64 * (9 * 32)  # the input has no gradient
    dense = 2 * 8 * 64 * 128
    assert found.flops == 2 * convolution + 3 * dense
    assert {e.dtype for e in found.events if e.flops} == {"bfloat16"}
    assert found.kernels["convolution forward"].count == 1
    assert found.kernels["convolution backward-filter"].count == 1
    assert found.kernels["product"].count == 3
    # all gradients in one sum, and the loss
    gradients = 2 * (9 * 32 * 64 + 64 + 64 * 128)
    assert [e.num_bytes for e in found.events if e.stream == "communication"] == [gradients, 4]
    assert [e.op_name for e in found.events if e.stream == "communication"][1].startswith(
        "jit(step)"
    )
    assert found.num_kernels == 28
    assert all(e.layer is None for e in found.events)


def test_a_plan_of_ours() -> None:
    """Two convolutions split by height: halos forward and backward, one sum of gradients."""
    found = read("spatial")
    convolution = 2 * (4 * 8 * 64) * 32 * (9 * 32)
    assert found.flops == 5 * convolution  # forward, filter twice; input of the second alone
    assert found.collectives["collective-permute"].count == 6
    assert found.collectives["collective-permute"].num_bytes == 6 * 2 * 4 * 64 * 32
    by_kind: dict[str, int] = {}
    for c in compiled_collectives(sample("spatial")):
        by_kind[c.kind] = by_kind.get(c.kind, 0) + c.operand_bytes
    assert by_kind == {kind: total.num_bytes for kind, total in found.collectives.items()}
    layers = {e.layer for e in found.events if e.stream == "communication"}
    assert layers == {0, 1, None}  # the combined sum of gradients belongs to no layer
    # The haloed tensor is read whole by its convolution: 10 rows for 8.
    first = next(e for e in found.events if e.kind == "convolution forward")
    assert first.num_bytes == 2 * (4 * 10 * 64 * 32 + 4 * 8 * 64 * 32 + 9 * 32 * 32)


def test_loops_and_library_calls() -> None:
    found = read("flow")
    product = 2 * 256**3
    assert found.flops == (6 + 1 + 1) * product  # six iterations, one of unknown number, one more
    dtypes = [e.dtype for e in found.events if e.flops]
    assert dtypes == ["tensorfloat32"] * 5 + ["float32"]
    assert len(found.notes) == 2
    assert any("trip count unknown" in note for note in found.notes)
    # each iteration writes one of six rows of the results
    rows = [e for e in found.events if e.name == "loop_dynamic_update_slice_fusion"]
    assert {e.num_bytes for e in rows} == {2 * 4 * 256**2 + 4}


def test_convolutions_of_every_sort() -> None:
    """float32 on an A100, by count: batch 8, 32x32, 64 channels behind the first."""
    found = read("convolutions")
    strided = 2 * (8 * 16 * 16) * 64 * (9 * 32)
    dilated = 2 * (8 * 16 * 16) * 64 * (9 * 64)
    grouped = 2 * (8 * 16 * 16) * 64 * (9 * 16)
    depthwise = 2 * (8 * 32 * 32) * 64 * 9
    # XLA pads the transposed convolution's operand with zeros, so that cuDNN multiplies them; its
    # gradients are those of a convolution of stride 2.
    transposed = 2 * (8 * 32 * 32) * 64 * (4 * 64)
    expected = 3 * (strided + dilated + grouped + depthwise) + transposed * (1 + 1 / 4 + 1 / 4)
    assert found.flops == expected
    assert {e.dtype for e in found.events if e.flops} == {"tensorfloat32"}


# --- what is shown ----------------------------------------------------------------------------


def check_trace(trace: dict[str, Any], streams: Iterable[str]) -> None:
    """Against Google's "Trace Event Format": the object format, events X and M."""
    assert trace.keys() <= {"traceEvents", "displayTimeUnit", "otherData", "metadata"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    threads: dict[int, str] = {}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event.get("args", {}), dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            if event["name"] == "thread_name":
                threads[event["tid"]] = event["args"]["name"]
        else:
            assert event["ph"] == "X"
            assert isinstance(event["cat"], str)
            for key in ("ts", "dur"):
                assert isinstance(event[key], int | float)
                assert math.isfinite(event[key]) and event[key] >= 0
    assert list(threads.values()) == list(streams)
    used = {event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert used <= threads.keys()


STREAMS = ("compute", "communication", "exposed communication")


def test_trace(tmp_path: Path) -> None:
    found = forecast(module(*OVERLAPPED), system())
    found.save_trace(tmp_path / "trace.json")
    found.save_trace(tmp_path / "trace.json.gz")
    text = (tmp_path / "trace.json").read_text()
    assert gzip.decompress((tmp_path / "trace.json.gz").read_bytes()).decode() == text
    trace = json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert trace == found.trace()
    check_trace(trace, STREAMS)
    shown = {
        (e["tid"], e["name"]): (us(e["ts"] * 1e-6), us(e["dur"] * 1e-6))
        for e in trace["traceEvents"]
        if e["ph"] == "X"
    }
    assert shown == {
        (1, "fusion: a"): (0, 6),
        (1, "product: b"): (6, 22),
        (1, "fusion: c"): (51, 6),
        (2, "all-reduce: s"): (6, 45),
        (3, "all-reduce: s"): (28, 23),
    }
    (b,) = (e for e in trace["traceEvents"] if e["name"] == "product: b")
    assert b["args"] == {
        "instruction": "b",
        "bytes": 4_000_000,
        "flops": 2e9,
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("name", ["two_layers", "spatial", "flow", "convolutions"])
def test_traces_of_real_programs(name: str) -> None:
    check_trace(json.loads(json.dumps(read(name).trace())), STREAMS)


def test_table() -> None:
    text = str(forecast(module(*OVERLAPPED), system()))
    assert "forecast: 0.057 ms a step on eight, 8 devices" in text
    (row,) = (line for line in text.splitlines() if "all-reduce" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("all-reduce", "1", "2 MB", "", "0.045", "0.023")
    ]
    said = "kernels 0.034 ms, collectives 0.045 ms, of which kernels wait for 0.023 ms"
    assert said in " ".join(text.split())


# --- compiled here ----------------------------------------------------------------------------


def _is_installed() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


class TestCompiled:
    pytestmark = [
        pytest.mark.gpu_aot,
        pytest.mark.skipif(not _is_installed(), reason="the extra gpu-aot is not installed"),
    ]

    def test_samples_are_what_is_compiled(self) -> None:
        """The texts kept in tests/data say the same as the compiler of this environment."""
        from tests.data import make_hlo

        for make in (make_hlo.two_layers, make_hlo.spatial, make_hlo.flow, make_hlo.convolutions):
            whole = forecast(make(), system())
            kept = read(make.__name__)
            assert whole.flops == kept.flops
            assert whole.collectives.keys() == kept.collectives.keys()
            assert whole.num_kernels == pytest.approx(kept.num_kernels, rel=0.1)
            assert whole.num_bytes == pytest.approx(kept.num_bytes, rel=0.1)

    def test_a_compiled_step_of_ones_own(self) -> None:
        mesh = target_mesh("h200:8")
        whole = jax.NamedSharding(mesh, jax.P())
        split = jax.NamedSharding(mesh, jax.P(mesh.axis_names))

        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            x = lax.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
            return (x.astype(jnp.float32) ** 2).sum()

        step = jax.jit(jax.grad(loss), in_shardings=(whole, split), out_shardings=whole)
        w = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
        x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
        compiled = step.lower(w, x).compile()
        found = forecast(compiled, system())
        assert found.flops == 2 * (2 * 512 * 512 * 1024)
        assert found.collectives["all-reduce"].num_bytes == 2 * 512 * 1024
        assert found.memory is not None
        assert found.memory.argument_bytes == 4 * 512 * 1024 + 4 * 512 * 512
        totals_agree(found)

    @pytest.mark.parametrize("strategy", ["data", "owt"])
    def test_a_plan(self, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            x = lax.conv_general_dilated(
                x, params["c"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return ((jnp.maximum(x, 0).reshape(len(x), -1) @ params["d"]) ** 2).mean()

        params = {
            "c": jax.ShapeDtypeStruct((3, 3, 32, 32), jnp.float32),
            "d": jax.ShapeDtypeStruct((8 * 8 * 32, 512), jnp.float32),
        }
        rates = jaxlwp.Rates(flops_per_s=5e13, memory_bytes_per_s=4e12, link_bytes_per_s=(2e11,))
        x = jax.ShapeDtypeStruct((32, 8, 8, 32), jnp.float32)
        mesh = target_mesh("h200:8")
        plan = jaxlwp.parallelize(loss, params, x, mesh=mesh, strategy=strategy, rates=rates)
        step = compile_for(plan, "h200:8")
        found = forecast(step, system())
        by_kind = {kind: total.num_bytes for kind, total in found.collectives.items()}
        assert by_kind == step.compiled_bytes_by_kind
        assert found.memory == step.memory
        layers = {event.layer for event in found.events if event.flops}
        assert layers == {
            layer.index for layer in plan.graph.layers if layer.kind in ("conv", "dense")
        }
        totals_agree(found)

        # as docs/forecast.md has it
        page = (DATA.parent.parent / "docs" / "forecast.md").read_text()
        monkeypatch.chdir(tmp_path)
        namespace: dict[str, Any] = {"plan": plan}
        exec(page.split("```python\n")[1].split("```")[0], namespace)
        assert namespace["found"].flops == found.flops
        assert (tmp_path / "step.json.gz").stat().st_size > 0
