"""A cache in memory behind bare grpcio, with no more than Bazel needs to be given what is in it: the transport's floor.

    python -m tools.bench.bare_cache BLOBS

BLOBS is a directory in the layout of Bazel's disk cache; all of it is read before
anybody is answered. No check, no store, nothing counted; what isn't there is an
error. It says where it listens, and ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tools.bench.bare_grpc import calling, serve
from tools.reapi import methods
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.capabilities import Capabilities
from tools.server.requests import Instances


def _load(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("??/*")}


async def _serve(directory: Path) -> None:
    results = _load(directory / "ac")
    blobs = {
        name: bytestream.ReadResponse(data=data).SerializeToString() for name, data in _load(directory / "cas").items()
    }
    capabilities = Capabilities(Instances()).get(reapi.GetCapabilitiesRequest()).SerializeToString()

    def get_result(raw: bytes) -> bytes:
        return results[reapi.GetActionResultRequest.FromString(raw).action_digest.hash]

    def read(raw: bytes) -> bytes:
        # …/blobs/hash/size
        return blobs[bytestream.ReadRequest.FromString(raw).resource_name.split("/")[-2]]

    await serve(
        {
            methods.GET_CAPABILITIES: calling(lambda raw: capabilities),
            methods.GET_ACTION_RESULT: calling(get_result),
            methods.READ: calling(read),
        }
    )


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
