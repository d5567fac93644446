"""A remote cache above this store: a client of the Remote Execution API, and sources made of it.

Nothing here but `channel` imports grpc, and that is imported when the upstream
is first asked: a command that finds all it needs in the store never loads it.
"""
