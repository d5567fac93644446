"""Running actions of the Remote Execution API: an executor made of small decorators, and who gives it work.

`tools.worker.work` is the seam to schedulers, `tools.worker.executor` the order
of the decorators. Nothing here knows a transport.
"""
