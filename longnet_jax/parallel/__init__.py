"""Meshes, sharding rules and sequence parallelism."""
