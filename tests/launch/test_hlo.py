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
