"""A cluster's storage, as a worker uses it: inputs come from there, outputs go there before their action is done."""

from __future__ import annotations

from collections.abc import Sequence

from store.blobs import Blobs
from store.digest import Digest, DigestFunction
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.read_through import Certain
from tools.server.requests import get_function, read_digest
from tools.server.services import Services
from tools.upstream.errors import UpstreamError
from tools.upstream.sending import send_blobs
from tools.upstream.sources import Upstream
from tools.worker.local import Storage


class Outputs:
    """Uploads what actions made. Threads may share it."""

    def __init__(self, blobs: Blobs, upstream: Upstream) -> None:
        self._blobs = blobs
        self._upstream = upstream

    def send(self, digests: Sequence[Digest]) -> None:
        """Return when all are there. Raises UpstreamError."""
        client = self._upstream.client()
        for function in DigestFunction:
            wanted = [digest for digest in dict.fromkeys(digests) if digest.function is function]
            _, failed = send_blobs(client, self._blobs, wanted) if wanted else (0, set[Digest]())
            if failed:
                raise UpstreamError(
                    f"{client.label} didn't take {len(failed)} outputs, among them {next(iter(failed))}"
                )


class Results:
    """Stores results there, for schedulers that don't. Implements `tools.worker.storing.ResultTaker`."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def update(self, request: reapi.UpdateActionResultRequest) -> None:
        """Store one. Raises UpstreamError."""
        function = get_function(request.digest_function, [request.action_digest.hash])
        action = read_digest(request.action_digest, function)
        self._upstream.client().write_result(action, request.instance_name, request.action_result)


def make_storage(services: Services, upstream: Upstream, *, results: bool) -> Storage:
    """That of a worker; `results`: the worker has to store them."""
    outputs = Outputs(services.store.blobs, upstream)

    def added(digests: Sequence[Digest]) -> None:
        services.uploads.added(digests)
        outputs.send(digests)

    return Storage(Certain(services.store.presence, upstream), Results(upstream) if results else None, added)
