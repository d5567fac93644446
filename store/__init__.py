"""What is kept: blobs, the index, trees and manifests.

The layer at the bottom: it imports neither ``casfs`` nor ``tools``, and knows
nothing of mounts. Start reading at ``store.repository``.
"""
