"""The rows, one module for each subject; ``rows()`` of every module here is called (see ``benchmarks.case``)."""
