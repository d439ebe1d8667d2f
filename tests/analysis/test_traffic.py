import jax
from jax import numpy as jnp
import pytest

from longnet_jax.analysis import traffic

LOOP = """
%taken (p: bf16[64,8], i: s32[]) -> bf16[4,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = bf16[4,8]{1,0} dynamic-slice(%p, %i, %zero)
}

%put (whole: f32[64,8], p.1: f32[2,8], i.1: s32[]) -> f32[64,8] {
  %whole = f32[64,8]{1,0} parameter(0)
  %p.1 = f32[2,8]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %u = f32[64,8]{1,0} dynamic-update-slice(%whole, %p.1, %i.1, %zero.1)
}

%less (t.2: (s32[], bf16[64,8], f32[64,8])) -> pred[] {
  %t.2 = (s32[], bf16[64,8]{1,0}, f32[64,8]{1,0}) parameter(0)
  ROOT %p.2 = pred[] compare(%t.2, %t.2), direction=LT
}

%body (t: (s32[], bf16[64,8], f32[64,8])) -> (s32[], bf16[64,8], f32[64,8]) {
  %t = (s32[], bf16[64,8]{1,0}, /*index=2*/f32[64,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %x = bf16[64,8]{1,0} get-tuple-element(%t), index=1
  %w = f32[64,8]{1,0} get-tuple-element(%t), index=2
  %part = bf16[4,8]{1,0} fusion(%x, %j), kind=kLoop, calls=%taken
  %attended = f32[2,8]{1,0} custom-call(%part), custom_call_target="attend", x=1
  %sum = f32[64,8]{1,0} fusion(%w, %attended, %j), kind=kLoop, calls=%put
  ROOT %r = (s32[], bf16[64,8]{1,0}, f32[64,8]{1,0}) tuple(%j, %x, %sum)
}

ENTRY %main (a: bf16[64,8], b: f32[64,8]) -> f32[64,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %n = s32[] constant(0)
  %t.1 = (s32[], bf16[64,8]{1,0}, f32[64,8]{1,0}) tuple(%n, %a, %b)
  %l = (s32[], bf16[64,8], f32[64,8]) while(%t.1), condition=%less, BODY
  %o = f32[64,8]{1,0} get-tuple-element(%l), index=2
  ROOT %c = f32[64,8]{0,1} copy(%o)
}
""".replace("BODY", "body=%body, TRIPS")
TRIPS = 'backend_config={"known_trip_count":{"n":"16"}}'


def test_loops_slices_and_updates_in_place():
  assert traffic.kernels(LOOP.replace("TRIPS", TRIPS)) == [
    ("fusion", 16, 2 * 4 * 8 * 2 + 4),
    ("attend", 16, 4 * 8 * 2 + 2 * 8 * 4),
    ("fusion", 16, 2 * 2 * 8 * 4 + 4),
    ("copy", 1, 2 * 64 * 8 * 4),
  ]


def test_a_loop_of_unknown_length_is_an_error():
  with pytest.raises(ValueError, match="how often 1 loops turn"):
    traffic.kernels(LOOP.replace("TRIPS", "x=1"))


def test_a_compiled_program():
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
  text = jax.jit(lambda x: jnp.sin(x).T + 1).lower(x).compile().as_text()
  assert sum(k.times * k.size for k in traffic.kernels(text)) >= 2 * 64 * 32 * 4
