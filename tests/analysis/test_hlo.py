from longnet_jax.analysis import collectives, hlo

# The form of `compiled.as_text()`, shortened.
SHORT = """HloModule step
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p, %p), CYCLES:"999"}
}
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} fusion(%t), calls=%fused, CYCLES:"10"}
  ROOT %y = f32[16]{0} all-gather(%x), replica_groups={{0,1}}
}
%condition (t: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%t, %limit), direction=LT
}
%open (t: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%t, %t), direction=LT
}
%cheap (t: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} fusion(%t), calls=%fused, CYCLES:"1"}
}
%dear (t: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} fusion(%t), calls=%fused, CYCLES:"100"}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %l = (s32[], f32[8]{0}) while(%a), condition=%condition, body=%body
  %m = (s32[], f32[8]) while(%l), condition=%open, body=%body, TRIPS:{"n":"3"}}
  %n = (s32[], f32[8]{0}) while(%m), condition=%open, body=%body
  ROOT %c = f32[8]{0} conditional(%n), branch_computations={%cheap, %dear}
}
"""
TEXT = SHORT.replace("CYCLES", 'backend_config={"estimated_cycles"').replace(
  "TRIPS", 'backend_config={"known_trip_count"'
)


def test_loops_are_multiplied_and_the_dearer_branch_counts():
  program = hlo.read(TEXT)
  assert hlo.cycles(program) == 10 * (4 + 3 + 1) + 100
  assert program.unknown_loops == 1


def test_collectives_are_counted_as_often_as_they_run():
  found = list(collectives.of_program(hlo.read(TEXT)))
  assert [times for _, times in found] == [4, 3, 1]
  assert {x.received for x, _ in found} == {32}


def test_a_collective_that_runs_inside_fusions_counts_once_a_turn():
  link = '%l = f32[8]{0} all-gather(%p), channel_id=1, chain_id="2", '
  link += "replica_groups={{0,1}}\n  "
  text = TEXT.replace("ROOT %twice", link + "ROOT %twice")
  found = list(collectives.of_program(hlo.read(text)))
  assert [(x.received, times) for x, times in found][:2] == [(16, 4), (32, 4)]
  assert len(found) == 4


def test_a_branch_that_is_rarely_taken_does_not_count():
  rare = 'calls=%fused, metadata={op_name="step/rarely/exp"}, CYCLES:"100"'
  text = SHORT.replace('calls=%fused, CYCLES:"100"', rare)
  text = text.replace("CYCLES", 'backend_config={"estimated_cycles"')
  text = text.replace("TRIPS", 'backend_config={"known_trip_count"')
  assert hlo.cycles(hlo.read(text)) == 10 * (4 + 3 + 1) + 1


def test_a_fused_reduce_scatter_is_counted_by_its_part():
  summed = "%s = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}\n  "
  text = TEXT.replace("%fused", "%all-reduce-scatter.1")
  text = text.replace("ROOT %twice", summed + "ROOT %twice")
  text = text.replace("%x = f32[8]{0}", "%x = f32[4]{0}")
  found = list(collectives.of_program(hlo.read(text)))
  kinds = [(x.kind, x.received, times) for x, times in found[:2]]
  assert kinds == [("reduce-scatter", 16, 4), ("all-gather", 32, 4)]
