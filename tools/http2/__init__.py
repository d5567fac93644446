"""HTTP/2 as far as a gRPC server needs it: bytes in, bytes and calls of a handler out. No I/O, and no gRPC.

`hpack` has the compression of headers, `frames` the format, `connection` what a
server's end does with what comes, `outgoing` what it sends.
"""
