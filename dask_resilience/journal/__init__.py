"""The journal's pure part: records, frames, segments, and checks over all of them.

The format is specified in ``docs/reference/journal-format.md``. Nothing here reads a file or a clock.
"""
