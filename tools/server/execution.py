"""The Execution service, and what google.longrunning has for looking at executions from outside.

What is wrong with a request is the call's error; what is wrong with an action,
a missing input for one, is in the response of its execution, as clients look
for it there.
"""

from __future__ import annotations

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError

from store.digest import Digest
from store.errors import MissingBlob
from tools.reapi.generated import operations_pb2 as operations
from tools.reapi.generated import remote_execution_pb2 as reapi
from tools.server.downloads import Downloads
from tools.server.errors import FailedPrecondition, InvalidArgument, NotThere
from tools.server.read_through import Actions
from tools.server.requests import Instances, get_function, read_digest
from tools.server.scheduler import Execution, Scheduler
from tools.server.status import as_status

_ACTION_MOST = 1 << 20
"""Bytes of an Action: a few digests and a platform."""
_PAGE = 100


class Executions:
    """Answers for one store."""

    def __init__(self, instances: Instances, scheduler: Scheduler, results: Actions, downloads: Downloads) -> None:
        self._instances = instances
        self._scheduler = scheduler
        self._results = results
        self._downloads = downloads

    def execute(self, request: reapi.ExecuteRequest, *, may_wait: bool = True) -> Execution:
        """An execution of the action, to be watched: one that is under way, a result that is known, or a new one.

        Raises InvalidArgument, BadDigest, Unavailable; WouldWait.
        """
        instance = self._instances.check(request.instance_name)
        if not request.HasField("action_digest"):
            raise InvalidArgument("there is no action_digest in the request")
        function = get_function(request.digest_function, [request.action_digest.hash])
        action = read_digest(request.action_digest, function)
        equal = self._scheduler.find_equal(instance, action)
        if equal is None and not request.skip_cache_lookup:
            known = self._find_result(request, may_wait)
            if known is not None:
                return self._scheduler.answer(instance, action, known)
        try:
            message = self._read_action(action, may_wait)
        except (FailedPrecondition, InvalidArgument) as error:
            refused = reapi.ExecuteResponse(status=as_status(error))
            return self._scheduler.answer(instance, action, refused)
        priority = request.execution_policy.priority
        return self._scheduler.submit(instance, action, priority, merge=not message.do_not_cache)

    def wait(self, request: reapi.WaitExecutionRequest, *, may_wait: bool = True) -> Execution:
        """The execution of that name. Raises NotThere."""
        return self._scheduler.get(request.name)

    def get(self, request: operations.GetOperationRequest, *, may_wait: bool = True) -> operations.Operation:
        """How the execution of that name is. Raises NotThere."""
        return self._scheduler.message_of(self._scheduler.get(request.name))

    def cancel(self, request: operations.CancelOperationRequest, *, may_wait: bool = True) -> Empty:
        """Have it end, for all who wait for it. Raises NotThere."""
        self._scheduler.cancel(self._scheduler.get(request.name))
        return Empty()

    def list(
        self, request: operations.ListOperationsRequest, *, may_wait: bool = True
    ) -> operations.ListOperationsResponse:
        """Those of an instance, or all where no name is given, a page at a time. Raises InvalidArgument."""
        if request.filter:
            raise InvalidArgument("operations can't be filtered here")
        if request.page_size < 0:
            raise InvalidArgument(f"a page of {request.page_size} operations can't be")
        instance = request.name.removesuffix("operations").rstrip("/")
        prefix = f"{instance}/operations/" if instance else ""
        known = [one for one in self._scheduler.list() if one.name.startswith(prefix)]
        begin = next((number for number, one in enumerate(known) if one.name == request.page_token), None)
        if request.page_token and begin is None:
            raise InvalidArgument("the page_token is none, or too old")
        begin, size = begin or 0, min(request.page_size or _PAGE, _PAGE)
        after = known[begin + size : begin + size + 1]
        return operations.ListOperationsResponse(
            operations=known[begin : begin + size], next_page_token=after[0].name if after else ""
        )

    def _find_result(self, request: reapi.ExecuteRequest, may_wait: bool) -> reapi.ExecuteResponse | None:
        asked = reapi.GetActionResultRequest(
            instance_name=request.instance_name,
            action_digest=request.action_digest,
            digest_function=request.digest_function,
            inline_stdout=request.inline_stdout,
            inline_stderr=request.inline_stderr,
            inline_output_files=request.inline_output_files,
        )
        try:
            message = self._results.get(asked, may_wait=may_wait)
        except NotThere:
            return None
        return reapi.ExecuteResponse(result=reapi.ActionResult.FromString(message), cached_result=True)

    def _read_action(self, digest: Digest, may_wait: bool) -> reapi.Action:
        if digest.size > _ACTION_MOST:
            raise InvalidArgument(f"{digest} is too large for an Action")
        try:
            data = self._downloads.read(digest) if may_wait else self._downloads.read_quick(digest)
            return reapi.Action.FromString(data)
        except MissingBlob as error:
            raise FailedPrecondition(f"the Action is missing: {error}", [digest]) from error
        except DecodeError:
            raise InvalidArgument(f"{digest} is no Action") from None
