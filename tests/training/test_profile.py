import pathlib

import jax.numpy as jnp
import pytest

from longnet_jax.training import profile


@pytest.mark.parametrize(
  "text", ["9", "five:1", "0:1", "9:1", "1:0", "-1:2", "1:1:1", "1:2 ", ""]
)
def test_what_is_no_profile_is_named_with_a_legal_one(text):
  with pytest.raises(ValueError, match=f"profile is '{text}'; .* such as 8:1"):
    profile.parse(text, 8)


def test_the_steps_of_a_profile():
  assert profile.parse("3:2", 8) == range(3, 5)
  assert profile.parse("7:9", 8) == range(7, 9)
  assert not profile.parse(None, 8)


def test_a_trace_that_is_past_says_so(tmp_path):
  planned = profile.Profile(range(3, 5), tmp_path)
  assert planned.describe(4) == "profile: step 4 is past; choose one after 4"
  assert planned.describe(3).startswith("profile: steps 3 to 4 go to")
  planned.begin(5)
  planned.end(5, jnp.ones(1))
  assert not list(tmp_path.iterdir())


def test_a_file_in_its_place_is_named_before_a_step(tmp_path):
  (tmp_path / "profile").touch()
  profile.Profile(range(0), tmp_path)
  with pytest.raises(ValueError, match="profile is a file, .* move it away"):
    profile.Profile(range(1, 2), tmp_path)


def test_the_trace_of_a_run_in_a_bucket_is_copied_to_it(tmp_path, monkeypatch):
  written = {}
  monkeypatch.setattr(profile.storage, "is_remote", lambda _: True)
  monkeypatch.setattr(profile.storage, "write_whole", written.__setitem__)
  monkeypatch.setattr(
    profile.storage, "absolute", lambda name: pathlib.Path(name)
  )
  with profile.Profile(range(1, 4), tmp_path) as traced:
    traced.begin(1)
    traced.end(1, jnp.ones(1) + 1)
    assert not written
  (trace,) = (file for file in written if file.name.endswith(".xplane.pb"))
  assert trace.is_relative_to(tmp_path / "profile")
  assert written[trace]
  assert not list(tmp_path.iterdir())
