"""Byte counts of compiled text: a text written by hand, and programs whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest

from launch import hlo

TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation (a: f32[8,128], b: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %add.1 = f32[8,128]{1,0:T(8,128)} add(%a, %b)
}

ENTRY %main.2 (p: f32[8,128], g: bf16[8,128]) -> (f32[8,128], f32[]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="p[\\'w(0)\\']"}
  %g = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %constant.1 = f32[]{:T(128)} constant(0.5)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,128]{1,0}), f32[4,128]{1,0:S(1)}, s32[]) slice-start(%p), slice={[0:4], [0:128]}
  %slice-done = f32[4,128]{1,0:S(1)} slice-done(%slice-start)
  %joined = f32[8,128]{1,0:S(1)} custom-call(%slice-done, %slice-done), custom_call_target="ConcatBitcast"
  %fusion.1 = (f32[8,128]{1,0:T(8,128)}, f32[128]{0}) fusion(%copy-done, %g, %constant.1), calls=%fused_computation
  %get-tuple-element.1 = f32[8,128]{1,0} get-tuple-element(%fusion.1), index=0
  %bitcast.1 = f32[1,8,128]{2,1,0} bitcast(%get-tuple-element.1)
  %copy.1 = f32[8,128]{0,1} copy(%joined)
  %sqrt.1 = f32[]{:T(128)S(6)} sqrt(%constant.1)
  ROOT %tuple.1 = (f32[8,128]{1,0}, f32[]{:T(128)}) tuple(%copy.1, %sqrt.1)
}
"""


def test_hand_written_text():
    leaf = 8 * 128 * 4
    # The fusion reads p, g (half as wide) and a scalar, and writes a leaf and a row; the copy reads and writes a leaf.
    expected = {"%fusion.1": leaf + leaf // 2 + 4 + leaf + 128 * 4, "%copy.1": 2 * leaf, "%sqrt.1": 8}
    assert {i.name: i.bytes for i in hlo.moving_instructions(TEXT)} == expected
    assert [i.opcode for i in hlo.moving_instructions(TEXT)] == ["fusion", "copy", "sqrt"]
    assert hlo.fusion_bytes(TEXT) == sum(expected.values())


# Two devices: started and finished apart from each other, hidden in fusions as a TPU does, in a loop, and synchronous.
COLLECTIVES = """HloModule jit_step, num_partitions=2

%begin (a: bf16[8]) -> (bf16[8], bf16[16]) {
  %a = bf16[8]{0} parameter(0)
  %all-gather.1 = bf16[16]{0} all-gather(%a), channel_id=1, dimensions={0}
  ROOT %custom-call.1 = (bf16[8]{0}, bf16[16]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%finish (b: bf16[8], c: bf16[16]) -> bf16[16] {
  %b = bf16[8]{0} parameter(0)
  %c = bf16[16]{0} parameter(1)
  %all-gather.2 = bf16[16]{0} all-gather(%b), channel_id=1, dimensions={0}
  ROOT %custom-call.2 = bf16[16]{0} custom-call(%c, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (d: (s32[], f32[4])) -> (s32[], f32[4]) {
  %d = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%d), index=0
  %e = f32[4]{0} get-tuple-element(%d), index=1
  %all-reduce.1 = f32[4]{0} all-reduce(%e), channel_id=2, to_apply=%add
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %all-reduce.1)
}

ENTRY %main (p: bf16[8], q: f32[4], r: u8[6]) -> f32[] {
  %p = bf16[8]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %r = u8[6]{0} parameter(2)
  %start = (bf16[8]{0}, bf16[16]{0}) fusion(%p), kind=kCustom, calls=%begin
  %done = bf16[16]{0} fusion(%start), kind=kCustom, calls=%finish
  %all-gather-start = (u8[6]{0}, u8[12]{0}) all-gather-start(%r), channel_id=3, dimensions={0}
  %all-gather-done = u8[12]{0} all-gather-done(%all-gather-start)
  %permute-start = (u8[6]{0}, u8[6]{0}, u32[], u32[]) collective-permute-start(%r), source_target_pairs={{0,1},{1,0}}
  %permute-done = u8[6]{0} collective-permute-done(%permute-start)
  %half.1 = u8[3]{0} slice(%r), slice={[0:3]}
  %half.2 = u8[3]{0} slice(%r), slice={[3:6]}
  %pair = (u8[3]{0}, u8[3]{0}) all-to-all(%half.1, %half.2), channel_id=4
  %reduce-scatter = f32[2]{0} reduce-scatter(%q), channel_id=5, to_apply=%add
  %loop = (s32[], f32[4]{0}) while(%tuple), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}

%less (f: (s32[], f32[4])) -> pred[] {
}

%add (g: f32[], h: f32[]) -> f32[] {
}
"""


def test_hand_written_collectives():
    expected = {"all-gather": 2 * 16 + 12, "all-reduce": 5 * 16, "all-to-all": 6}
    expected |= {"collective-permute": 6, "reduce-scatter": 16}
    assert hlo.collective_bytes(COLLECTIVES) == expected
    assert hlo.collective_bytes(TEXT) == {}


def test_collectives_of_unknown_number_are_refused():
    with pytest.raises(ValueError, match="%loop is a loop"):
        hlo.collective_bytes(COLLECTIVES.replace("known_trip_count", "trip_count"))
    branch = "conditional(%i), branch_computations={%body, %less}"
    with pytest.raises(ValueError, match="%loop is a conditional"):
        hlo.collective_bytes(COLLECTIVES.replace("while(%tuple), condition=%less, body=%body", branch))
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collective_bytes("HloModule empty")


def test_collectives_of_a_program():
    """On eight devices, each with 8 rows of 3 float32 numbers; the loop runs four times."""

    def fn(x):
        gathered = jax.lax.all_gather(x, "device", tiled=True).sum()
        swapped = jax.lax.all_to_all(x.astype(jnp.uint8), "device", 0, 0, tiled=True)
        scattered = jax.lax.psum_scatter(x, "device", tiled=True)
        passed = jax.lax.ppermute(x, "device", [(i, (i + 1) % 8) for i in range(8)])
        looped, _ = jax.lax.scan(lambda c, _: (jnp.sin(jax.lax.psum(c, "device")), None), x, length=4)
        return gathered, swapped, scattered, passed, looped

    mesh = jax.make_mesh((8,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    along = jax.sharding.PartitionSpec("device")
    out_specs = (jax.sharding.PartitionSpec(), along, along, along, along)
    sharded = jax.shard_map(fn, mesh=mesh, in_specs=along, out_specs=out_specs, check_vma=False)
    local = 8 * 3 * 4
    assert hlo.collective_bytes(jax.jit(sharded).lower(jnp.ones((64, 3))).compile().as_text()) == {
        "all-gather": 8 * local,
        "all-reduce": 4 * local,
        "all-to-all": local // 4,
        "collective-permute": local,
        "reduce-scatter": local,
    }


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("f32[]", 4), ("bf16[3,5]{1,0}", 30), ("s4[3]", 2), ("pred[7]{0:T(512)}", 7), ("(f32[2]{0}, (s32[], u8[3]))", 15)],
)
def test_shape_bytes(shape, expected):
    assert hlo.shape_bytes(shape) == expected


@pytest.mark.parametrize("operands", [1, 2, 3])
def test_one_elementwise_pass(operands):
    """n arrays in, one out: n + 1 times 4 bytes."""
    xs = [jnp.ones((64, 32))] * operands
    compiled = jax.jit(lambda *xs: sum(jnp.sin(x) for x in xs) * 2).lower(*xs).compile()
    assert hlo.fusion_bytes(compiled.as_text()) == (operands + 1) * 4 * 64 * 32


def test_what_cannot_be_counted_is_refused():
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, x.astype(jnp.int32), lambda i, y: jnp.sin(y) * 2, x))
    with pytest.raises(ValueError, match=r"is a (while|call)"):
        hlo.fusion_bytes(loop.lower(jnp.float32(3)).compile().as_text())
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.fusion_bytes("HloModule empty")
    with pytest.raises(ValueError, match="'q7'"):
        hlo.shape_bytes("q7[3]")
