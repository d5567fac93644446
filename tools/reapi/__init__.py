"""The Remote Execution API as definitions: messages, methods, resource names. No I/O, no transport.

``proto/`` has the definitions, ``generated/`` what protoc made of them (`make proto`).
"""
