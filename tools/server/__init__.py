"""The cache server: services over messages and streams of bytes, and the transports around them.

A service knows no transport: it takes a message, returns one or raises an
error of `tools.server.errors` or of the store, and `tools.server.status` says
which code that is. `tools.server.services` makes them for a store;
`tools.server.calls` says how each method is called, and `http2_server` moves
the messages.
"""
