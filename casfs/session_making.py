"""Which of the native sessions: the plain one, or the one that is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from casfs.contents import Contents
from casfs.session import Session
from casfs.tree import Tree

if TYPE_CHECKING:
    from casfs.tracing import Tracer


def make_session(
    device: int, tree: Tree, contents: Contents, passthrough: bool, tracer: Tracer | None, *, poll: bool = True
) -> Session:
    """A session that fetches what is missing; with a `tracer`, one that tells it of each upcall."""
    if tracer is None:
        return Session(device, tree, contents, passthrough=passthrough, poll=poll, fetch=contents.fetch)
    # What nobody traces doesn't load it.
    from casfs.session_traced import TracedSession

    return TracedSession(
        device, tree, contents, passthrough=passthrough, poll=poll, fetch=contents.fetch, tracer=tracer
    )
