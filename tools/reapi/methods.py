"""The methods of the services, as values: what a transport needs to route a call, and a client to make one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from tools.reapi.generated import bots_pb2 as bots
from tools.reapi.generated import bytestream_pb2 as bytestream
from tools.reapi.generated import operations_pb2 as operations
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.reapi.generated import remoteworker_pb2 as remoteworker


class Method(NamedTuple):
    """One method; `streams_in` and `streams_out`: many messages and not one."""

    service: str
    name: str
    request: type[Message]
    response: type[Message]
    streams_in: bool = False
    streams_out: bool = False

    @property
    def path(self) -> str:
        """As in an HTTP/2 request."""
        return f"/{self.service}/{self.name}"


_REAPI = "build.bazel.remote.execution.v2"
_BYTESTREAM = "google.bytestream.ByteStream"
_CAS = f"{_REAPI}.ContentAddressableStorage"
_BOTS = "google.devtools.remoteworkers.v1test2.Bots"

GET_CAPABILITIES = Method(
    f"{_REAPI}.Capabilities", "GetCapabilities", reapi.GetCapabilitiesRequest, reapi.ServerCapabilities
)
GET_ACTION_RESULT = Method(f"{_REAPI}.ActionCache", "GetActionResult", reapi.GetActionResultRequest, reapi.ActionResult)
UPDATE_ACTION_RESULT = Method(
    f"{_REAPI}.ActionCache", "UpdateActionResult", reapi.UpdateActionResultRequest, reapi.ActionResult
)
FIND_MISSING_BLOBS = Method(_CAS, "FindMissingBlobs", reapi.FindMissingBlobsRequest, reapi.FindMissingBlobsResponse)
BATCH_UPDATE_BLOBS = Method(_CAS, "BatchUpdateBlobs", reapi.BatchUpdateBlobsRequest, reapi.BatchUpdateBlobsResponse)
BATCH_READ_BLOBS = Method(_CAS, "BatchReadBlobs", reapi.BatchReadBlobsRequest, reapi.BatchReadBlobsResponse)
GET_TREE = Method(_CAS, "GetTree", reapi.GetTreeRequest, reapi.GetTreeResponse, streams_out=True)
SPLIT_BLOB = Method(_CAS, "SplitBlob", reapi.SplitBlobRequest, reapi.SplitBlobResponse)
SPLICE_BLOB = Method(_CAS, "SpliceBlob", reapi.SpliceBlobRequest, reapi.SpliceBlobResponse)
READ = Method(_BYTESTREAM, "Read", bytestream.ReadRequest, bytestream.ReadResponse, streams_out=True)
WRITE = Method(_BYTESTREAM, "Write", bytestream.WriteRequest, bytestream.WriteResponse, streams_in=True)
QUERY_WRITE_STATUS = Method(
    _BYTESTREAM, "QueryWriteStatus", bytestream.QueryWriteStatusRequest, bytestream.QueryWriteStatusResponse
)
EXECUTE = Method(f"{_REAPI}.Execution", "Execute", reapi.ExecuteRequest, operations.Operation, streams_out=True)
WAIT_EXECUTION = Method(
    f"{_REAPI}.Execution", "WaitExecution", reapi.WaitExecutionRequest, operations.Operation, streams_out=True
)
CREATE_BOT_SESSION = Method(_BOTS, "CreateBotSession", bots.CreateBotSessionRequest, bots.BotSession)
UPDATE_BOT_SESSION = Method(_BOTS, "UpdateBotSession", bots.UpdateBotSessionRequest, bots.BotSession)
SYNCHRONIZE = Method(
    "buildbarn.remoteworker.OperationQueue",
    "Synchronize",
    remoteworker.SynchronizeRequest,
    remoteworker.SynchronizeResponse,
)
_OPERATIONS = "google.longrunning.Operations"
LIST_OPERATIONS = Method(
    _OPERATIONS, "ListOperations", operations.ListOperationsRequest, operations.ListOperationsResponse
)
GET_OPERATION = Method(_OPERATIONS, "GetOperation", operations.GetOperationRequest, operations.Operation)
CANCEL_OPERATION = Method(_OPERATIONS, "CancelOperation", operations.CancelOperationRequest, Empty)


def services_of(methods: Iterable[Method]) -> list[str]:
    """The names of their services, each once."""
    return sorted({method.service for method in methods})
