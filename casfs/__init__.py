"""Projection: what a mount is, and the sessions and engines that show it.

Imports `store`, never `tools`. Start reading at `casfs.tree` (what the file
system is), then `casfs.session` (the kernel's protocol) and `casfs.mounting`.
"""
