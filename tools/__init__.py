"""What people start: the `casfs` command, and later the servers and the worker.

The layer at the top: nothing imports it. Start reading at `tools.main`.
"""
