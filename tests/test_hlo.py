"""Collectives read from HLO text: every notation, and programs that XLA really compiled."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlwp.check._hlo import CompiledCollective, bytes_by_kind, compiled_collectives

# --- Text -----------------------------------------------------------------------------------


def _program(*lines: str, header: str = "num_partitions=8") -> str:
    """A program that consists of `lines`, with an operand %x of 16 float32 for them."""
    body = "\n".join(f"  {line}" for line in ("%x = f32[16]{0} parameter(0)", *lines))
    return f"HloModule m, {header}\n\nENTRY %main (x: f32[16]) -> f32[16] {{\n{body}\n}}\n"


def _only(text: str) -> CompiledCollective:
    (collective,) = compiled_collectives(text)
    return collective


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        (
            "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'a'}",
            [[0, 1, 4, 5], [2, 3, 6, 7]],
        ),
    ],
)
def test_notations_of_groups(notation: str, groups: list[list[int]]) -> None:
    line = f"%r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={notation}, "
    c = _only(_program(line + "use_global_device_ids=true, to_apply=%add"))
    assert [list(group) for group in c.groups] == groups
    assert c.group_size == len(groups[0])


def test_without_global_ids_a_group_holds_all_partitions_of_its_replicas() -> None:
    line = "%r = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups={{0}}, to_apply=%add"
    c = _only(_program(line, header="num_partitions=4"))
    assert c.groups == ((0, 1, 2, 3),)
    line = line.replace("{{0}}", "{{0},{1}}")
    c = _only(_program(line, header="replica_count=2, num_partitions=2"))
    assert c.groups == ((0, 1), (2, 3))


def test_groups_left_out_are_everybody() -> None:
    c = _only(_program("%g = f32[48]{0} all-gather(%x), dimensions={0}", header="replica_count=3"))
    assert c.groups == ((0, 1, 2),)


@pytest.mark.parametrize(
    "line",
    [
        "%r = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups={{0},{1},{2},{3}}, "
        "use_global_device_ids=true, to_apply=%add",
        "%r = f32[16]{0} all-gather(%x), replica_groups=[8,1]<=[8], dimensions={0}",
        "%r = f32[16]{0} all-gather(%x), replica_groups=mesh['a'=8,'b'=1] {'b'}, dimensions={0}",
        "%r = f32[16]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}",
        "%r = f32[16]{0} collective-permute(%x), source_target_pairs={}",
    ],
)
def test_what_talks_to_itself_is_left_out(line: str) -> None:
    assert compiled_collectives(_program(line)) == ()


@pytest.mark.parametrize(
    ("kind", "operand_bytes", "wire_bytes"),
    [
        ("all-reduce", 64, 2 * 64 * 3 // 4),
        ("all-gather", 64, 64 * 3),
        ("reduce-scatter", 64, 64 * 3 // 4),
        ("all-to-all", 64, 64 * 3 // 4),
        ("collective-broadcast", 64, 64),
    ],
)
def test_ring_bytes(kind: str, operand_bytes: int, wire_bytes: int) -> None:
    groups = "replica_groups=[2,4]<=[8], use_global_device_ids=true"
    c = _only(_program(f"%r = f32[16]{{0}} {kind}(%x), channel_id=1, {groups}"))
    assert (c.kind, c.operand_bytes, c.wire_bytes) == (kind, operand_bytes, wire_bytes)


def test_permute_has_its_pairs_as_groups() -> None:
    line = "%r = f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}"
    c = _only(_program(line))
    assert (c.groups, c.group_size) == (((0, 1), (1, 2)), 2)
    assert c.operand_bytes == c.wire_bytes == 64


def test_ragged_all_to_all_counts_its_data_only() -> None:
    c = _only(
        _program(
            "%i = s64[8]{0} parameter(1)",
            "%r = f32[16]{0} ragged-all-to-all(%x, %out, %i, %i, %i, %i), replica_groups={{0,1}}",
        )
    )
    assert c.operand_bytes == 64


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("f32[2,3]{1,0:T(8,128)S(1)}", 24),
        ("bf16[4]{0}", 8),
        ("u8[0]{0}", 0),
        ("s4[9]{0:E(4)}", 5),
        ("f8e4m3fn[3]", 3),
        ("c128[2]", 32),
        ("pred[5]", 5),
        ("f32[<=4,2]", 32),
        ("token[]", 0),
        ("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0}, (s32[], u8[1]))", 24 + 8 + 4 + 1),
    ],
)
def test_bytes_of_shapes(shape: str, size: int) -> None:
    c = _only(_program(f"%y = {shape} custom-call()", "%r = f32[] all-gather(%y)"))
    assert c.operand_bytes == size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%r = f32[16]{0} all-gather(%missing), replica_groups={}", "missing"),
        ("%r = f32[16]{0} all-gather(%x), replica_groups=<0,1>", "replica_groups"),
        ("%r = f32[16]{0} collective-permute(%x)", "source_target_pairs"),
        ("%y = weird[2] add(%x, %x)\n  %r = f32[16]{0} all-gather(%y)", "weird"),
    ],
)
def test_what_cannot_be_read_never_counts_as_nothing(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled_collectives(_program(line))


@pytest.mark.parametrize("text", ["", "module @jit_f {\n}\n", "HloModule m\n"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HLO module"):
        compiled_collectives(text)


ASYNC = """HloModule m, num_partitions=4, replica_count=1

%wrap (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), channel_id=1, replica_groups=[1,4]<=[4], \
use_global_device_ids=true, dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %as = ((f32[8]{0}), f32[2]{0}) START(%x), calls=%wrap
  %ad = f32[2]{0} DONE(%as), calls=%wrap
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%ad), replica_groups={}, dimensions={0}
  %agd = f32[8]{0} all-gather-done(%ag)
  ROOT %r = (s32[], f32[8]{0}) tuple(%i, /*index=1*/%agd)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%z), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  ROOT %o = f32[8]{0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize("wrapped", ["async", "reduce-scatter"])
def test_async_pairs_and_wrappers_count_once(wrapped: str) -> None:
    text = ASYNC.replace("START", f"{wrapped}-start").replace("DONE", f"{wrapped}-done")
    collectives = compiled_collectives(text)
    assert bytes_by_kind(collectives) == {"reduce-scatter": 7 * 8 * 4, "all-gather": 7 * 2 * 4}
    assert [(c.count, c.trip_known, c.wire_bytes) for c in collectives] == [(7, True, 24)] * 2


# --- Compiled programs ----------------------------------------------------------------------

ALL = P(("a", "b", "c"))
LOCAL = (4, 8, 16)  # what each of the eight devices holds
LOCAL_BYTES = math.prod(LOCAL) * 4


def _run_inside(f: Callable[..., object], mesh: Mesh, *dtypes: str) -> str:
    """The text of `f` inside shard_map, each argument LOCAL on each device."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=ALL, out_specs=ALL, check_vma=False)
    shape = (LOCAL[0] * mesh.size, *LOCAL[1:])
    args = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes or ("float32",)]
    return str(jax.jit(mapped).lower(*args).compile().as_text())


def _groups_over(mesh: Mesh, axes: tuple[str, ...]) -> set[frozenset[int]]:
    """The sets of devices that differ in their place on `axes` only."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    last = [mesh.axis_names.index(axis) for axis in axes]
    moved = np.moveaxis(ids, last, range(-len(last), 0))
    return {frozenset(g) for g in moved.reshape(-1, 2 ** len(axes)).tolist()}


@pytest.mark.parametrize("axes", [("a",), ("c",), ("a", "c"), ("b", "a"), ("a", "b", "c")])
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"])
def test_explicit_collectives(mesh222: Mesh, kind: str, axes: tuple[str, ...]) -> None:
    f = {
        "all-reduce": lambda x: lax.psum(x, axes),
        "all-gather": lambda x: lax.all_gather(x, axes, axis=2, tiled=True),
        "reduce-scatter": lambda x: lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True),
        "all-to-all": lambda x: lax.all_to_all(x, axes, 1, 2, tiled=True),
    }[kind]
    n = 2 ** len(axes)
    wire = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}.get(kind, (n - 1) / n)

    c = _only(_run_inside(f, mesh222))

    assert (c.kind, c.count, c.trip_known, c.group_size) == (kind, 1, True, n)
    assert c.operand_bytes == LOCAL_BYTES
    assert c.wire_bytes == wire * LOCAL_BYTES
    assert {frozenset(g) for g in c.groups} == _groups_over(mesh222, axes)
    assert "shard_map" in c.op_name


@pytest.mark.parametrize("axes", [("b",), ("a", "c")])
def test_permute(mesh222: Mesh, axes: tuple[str, ...]) -> None:
    n = 2 ** len(axes)
    ring = [(i, (i + 1) % n) for i in range(n)]
    c = _only(_run_inside(lambda x: lax.ppermute(x, axes, ring), mesh222))
    assert (c.kind, c.operand_bytes, c.wire_bytes) == ("collective-permute", *[LOCAL_BYTES] * 2)
    groups = _groups_over(mesh222, axes)
    assert len(c.groups) == mesh222.size
    assert all(any({*pair} <= group for group in groups) for pair in c.groups)


def test_permute_sends_the_slice_it_is_given(mesh222: Mesh) -> None:
    def halo(x: jax.Array) -> jax.Array:
        return x.at[:, :1].add(lax.ppermute(x[:, -1:], "a", [(0, 1)]))

    c = _only(_run_inside(halo, mesh222))
    assert c.operand_bytes == LOCAL_BYTES // LOCAL[1]
    assert c.groups == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_combined_all_reduce_has_the_bytes_of_all_its_operands(mesh222: Mesh) -> None:
    def f(x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, ...]:
        return lax.psum((x, y[:3], z), "b")

    text = _run_inside(f, mesh222, "float32", "float32", "int32")
    collectives = compiled_collectives(text)
    expected = LOCAL_BYTES + LOCAL_BYTES * 3 // 4 + LOCAL_BYTES
    assert bytes_by_kind(collectives) == {"all-reduce": expected}
    assert any(c.operand_bytes > LOCAL_BYTES for c in collectives)  # XLA did combine


def test_collectives_of_a_loop_count_once_a_trip(mesh222: Mesh) -> None:
    def step(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return lax.ppermute(carry, "b", [(0, 1), (1, 0)]) + 1, None

    def nested(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        inner = lax.scan(step, carry, None, length=5)[0]
        return lax.psum(jnp.sin(inner), "a"), None

    def f(x: jax.Array) -> jax.Array:
        return lax.scan(nested, x, None, length=3)[0]

    collectives = compiled_collectives(_run_inside(f, mesh222))
    assert {(c.kind, c.count, c.trip_known) for c in collectives} == {
        ("collective-permute", 15, True),
        ("all-reduce", 3, True),
    }
    assert bytes_by_kind(collectives) == {
        "collective-permute": 15 * LOCAL_BYTES,
        "all-reduce": 3 * LOCAL_BYTES,
    }


def test_an_unknown_trip_count_is_said(mesh222: Mesh) -> None:
    def f(x: jax.Array) -> jax.Array:
        step = functools.partial(lax.ppermute, axis_name="b", perm=[(0, 1), (1, 0)])
        return lax.while_loop(lambda c: c.sum() < 100, lambda c: step(c) + 1, x)

    (c,) = compiled_collectives(_run_inside(f, mesh222))
    assert (c.kind, c.count, c.trip_known) == ("collective-permute", 1, False)


def test_both_branches_of_a_conditional_count(mesh222: Mesh) -> None:
    def f(x: jax.Array) -> jax.Array:
        def permute(y: jax.Array) -> jax.Array:
            return lax.ppermute(y, "b", [(0, 1), (1, 0)])

        def gather(y: jax.Array) -> jax.Array:
            return lax.all_gather(y, "b").sum(0)

        return lax.cond(lax.psum(x.sum(), "b") > 0, permute, gather, x)

    found = bytes_by_kind(compiled_collectives(_run_inside(f, mesh222)))
    assert found == {
        "all-reduce": 4,
        "collective-permute": LOCAL_BYTES,
        "all-gather": LOCAL_BYTES,
    }


def test_collectives_that_the_partitioner_inserts(mesh222: Mesh) -> None:
    def f(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    split, whole = NamedSharding(mesh222, P(("a", "c"))), NamedSharding(mesh222, P())
    c = _only(jax.jit(f, in_shardings=split, out_shardings=whole).lower(x).compile().as_text())
    assert (c.kind, c.operand_bytes) == ("all-gather", 8 * 16 * 4 // 4)
    assert {frozenset(g) for g in c.groups} == _groups_over(mesh222, ("a", "c"))


def test_an_axis_of_size_one_communicates_nothing() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1), ("a", "b", "c"))

    def f(x: jax.Array) -> jax.Array:
        return lax.psum(x, "b") + lax.ppermute(x, "c", [(0, 0)])

    assert compiled_collectives(_run_inside(f, mesh)) == ()
