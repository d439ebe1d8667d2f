"""Tables of docs/parallel*.json: lists of (head, rows), all cells text."""

_MOVED = ("pass", "collective", "type", "group", "branches (w, r)")


def equality(record: dict) -> list[tuple]:
  """Returns the largest relative error of each case under each mesh.

  One table for attention and one for whole models, whose meshes differ.
  """
  found = []
  for whole in (False, True):
    cases = {
      name: row
      for name, row in record["errors"].items()
      if name.startswith("model, ") == whole
    }
    meshes = list(next(iter(cases.values())))
    rows = [
      (name, *(f"{row[mesh]:.0e}" for mesh in meshes))
      for name, row in cases.items()
    ]
    found.append((("data x seq x model", *meshes), rows))
  return found


def received(record: dict) -> list[tuple]:
  """Returns what collectives bring to a device, in bytes."""
  rows = [
    (
      f"{layer['length']:,}",
      f"{layer['devices']}",
      *_moved(row),
      *(f"{row[name]:,}" for name in ("formula", "measured")),
    )
    for layer, row in _rows(record)
  ]
  return [(("tokens", "devices", *_MOVED, "bytes, formula", "measured"), rows)]


def received_pod(record: dict) -> list[tuple]:
  """Returns what collectives bring to a chip of a compiled pod, in MiB."""
  rows = [
    (
      f"{layer['length']:,}",
      f"{layer['heads']} x {layer['width']}",
      *_moved(row),
      *(f"{row[name] / 2**20:.2f}" for name in ("formula", "measured")),
    )
    for layer, row in _rows(record)
  ]
  return [(("tokens", "heads", *_MOVED, "MiB, formula", "measured"), rows)]


def scaling(record: dict) -> list[tuple]:
  """Returns bytes and compilation at fixed tokens a device."""
  rows = []
  for layer in record["scaling"]:
    devices, received = layer["devices"], {}
    for row in layer["rows"]:
      group = row["group"]
      received[group] = received.get(group, 0) + row["measured"]
    rows.append(
      (
        f"{devices}",
        f"{layer['length']:,}",
        f"{received.get(2, 0):,}",
        f"{received.get(devices, 0) if devices > 2 else 0:,}",
        f"{layer['compile_cpu_seconds']:.0f}",
      )
    )
  head = ("devices", "tokens", "bytes, segment of two shards")
  head += ("bytes, segment of all shards", "CPU seconds to compile")
  return [(head, rows)]


def _rows(record):
  return [(layer, row) for layer in record["bytes"] for row in layer["rows"]]


def _moved(row):
  """Returns the cells that say what a row is about."""
  branches = ", ".join(f"({w:,}, {r:,})" for w, r in row["branches"])
  return row["pass"], row["kind"], row["dtype"], f"{row['group']}", branches
