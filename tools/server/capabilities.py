"""Capabilities: what this server can do, as clients ask before anything else."""

from __future__ import annotations

from dataclasses import dataclass

from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated.semver_pb2 import SemVer
from tools.server.requests import Instances

MAX_BATCH_BYTES = (4 << 20) - 1024
"""Of blobs in one message: a client takes messages of at most 4 MiB, and names take some room."""

_FUNCTIONS = [reapi.DigestFunction.SHA256, reapi.DigestFunction.BLAKE3]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Answers GetCapabilities. `max_blob_bytes` of 0: whatever the disk takes.

    `executes`: this server runs actions, too.
    """

    instances: Instances
    update_enabled: bool = True
    max_blob_bytes: int = 0
    executes: bool = False

    def get(self, request: reapi.GetCapabilitiesRequest) -> reapi.ServerCapabilities:
        """What this server can do for an instance."""
        self.instances.check(request.instance_name)
        compressors = [reapi.Compressor.IDENTITY, reapi.Compressor.ZSTD]
        priorities = reapi.PriorityCapabilities(
            # Bazel refuses a priority outside; all are taken, as they change nothing in a cache.
            priorities=[reapi.PriorityCapabilities.PriorityRange(min_priority=-(1 << 31), max_priority=(1 << 31) - 1)]
        )
        return reapi.ServerCapabilities(
            cache_capabilities=reapi.CacheCapabilities(
                digest_functions=_FUNCTIONS,
                action_cache_update_capabilities=reapi.ActionCacheUpdateCapabilities(
                    update_enabled=self.update_enabled
                ),
                cache_priority_capabilities=priorities,
                max_batch_total_size_bytes=MAX_BATCH_BYTES,
                symlink_absolute_path_strategy=reapi.SymlinkAbsolutePathStrategy.ALLOWED,
                supported_compressors=compressors,
                supported_batch_update_compressors=compressors,
                max_cas_blob_size_bytes=self.max_blob_bytes,
            ),
            execution_capabilities=reapi.ExecutionCapabilities(
                digest_function=reapi.DigestFunction.SHA256,
                digest_functions=_FUNCTIONS,
                exec_enabled=self.executes,
                execution_priority_capabilities=priorities,
            ),
            # Bazel 4 takes no server that begins later; nothing of 2.0 is left out.
            low_api_version=SemVer(major=2, minor=0),
            high_api_version=SemVer(major=2, minor=3),
        )
