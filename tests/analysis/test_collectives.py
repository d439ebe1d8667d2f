from longnet_jax.analysis import collectives

TEXT = """
  %a = f32[1,4,8,16]{3,1,0,2} all-gather(%x), replica_groups={{0,1},{2,3}}
  %b = bf16[4,8]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], x=1
  %c = f32[3,2]{1,0} collective-permute(%z), source_target_pairs={{0,2},{3,5}}
  %d = (f32[2]{0}, f32[8]{0}) all-gather-start(%w), replica_groups={{0,1,2,3}}
  %e = (s32[4]{0}, f32[]) all-reduce(%w, %v), replica_groups={{0,1}}
  %f = f32[8]{0} add(%d, %c)
  %g = f32[8]{0} all-gather(%d), replica_groups=mesh['a'=2,'b'=4] {'b'}, y=2
  %h = f32[8]{0} all-gather(%d), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}
  %i = ((f32[2], f32[4]), (f32[4], f32[8])) all-gather-start(%d, %e), \
replica_groups={{0,1}}
  %j = ((f32[4]), f32[2]) reduce-scatter-start(%d), replica_groups={{0,1}}
  %k = (f32[2]{0}, f32[4]{0}) all-reduce-start(%d, %e), replica_groups={{0,1}}
  %l = f32[8]{0} all-gather(%d), \
replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, y=2
"""
# The TPU compiler repeats a collective in every computation it runs beside.
CHAIN = """
%a = bf16[8] all-gather(%x), channel_id=1, replica_groups={{0,1}}, chain_id="7"
%b = bf16[8] all-gather(%y), channel_id=1, replica_groups={{0,1}}, chain_id="7"
  %c = bf16[4]{0} all-gather(%y), channel_id=1, replica_groups={{0,1}}
  %d = bf16[4]{0} all-gather(%y), channel_id=1, replica_groups={{0,1}}
"""


def test_a_chain_counts_once():
  found = collectives.collectives(CHAIN)
  assert [x.received for x in found] == [8, 4, 4]


def test_reads_what_each_collective_receives():
  assert collectives.collectives(TEXT) == [
    ("all-gather", "f32", 2, 4 * 8 * 16 * 4 // 2),
    ("reduce-scatter", "bf16", 4, 3 * 4 * 8 * 2),
    ("collective-permute", "f32", 2, 24),
    ("all-gather", "f32", 4, 24),
    ("all-reduce", "s32", 2, 16),
    ("all-reduce", "f32", 2, 4),
    ("all-gather", "f32", 4, 24),
    ("all-gather", "f32", 4, 24),
    ("all-gather", "f32", 2, 8),
    ("all-gather", "f32", 2, 16),
    ("reduce-scatter", "f32", 2, 8),
    ("all-reduce", "f32", 2, 8),
    ("all-reduce", "f32", 2, 16),
    ("all-gather", "f32", 2, 16),
  ]
