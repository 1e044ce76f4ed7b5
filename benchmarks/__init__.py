"""Speed and memory beside the peers that users would pick instead, and beside what the machine can do.

``python -m benchmarks`` from the repository's root (``make bench`` sets everything up first). Sides of a row take turns
in one process, so that what else the machine does meets all of them. A file in ``benchmarks/rows`` with a function
``rows()`` adds rows; nothing else has to know of it.
"""
