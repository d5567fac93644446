"""Joining a cluster that exists: clients of its scheduler that are sources of work, and a worker around one.

Each is one module that knows one scheduler's interface: `buildgrid`, `buildbarn`.
"""
